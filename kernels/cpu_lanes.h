// Tiles of a matrix product in ggml's quantized formats: eight rows of weights at once, a lane each, times up to eight
// columns of activations.
//
// A dot product of one row, as ggml has it, spends on a block of 32 weights and a column one operation to multiply and
// three to make floats of eight partial sums. Here weights are turned while they are unpacked, so that a vector holds
// four weights each of eight rows: eight operations multiply a block of eight rows, and what makes floats of the sums
// does so for all eight. Sums of a block are of integers, exact in any order; blocks are added up one after the other,
// for any number of columns the same way.
//
// Blocks are unpacked as in ggml-common.h and ggml-quants.c of ggml (MIT).

#pragma once

#include "cpu_kernels.h"

// Rows at once, and words of four weights in a block.
enum { LANES = ROWS_TOGETHER, WORDS = BLOCK / 4 };
// Weights are asked for so many groups of eight rows ahead, or fewer, where that is more than a second-level cache has
// room for.
enum { GROUPS_AHEAD = 4, BYTES_AHEAD = 96 * 1024 };

// ---- columns ----

// A block of a column. Without gaps, so that the rows of weights find room in the cache.
typedef struct __attribute__((may_alias)) {
    int32_t words[WORDS];  // four bytes each
    int32_t less;          // their sum times what weights are raised by, negative
    float scale, sum;      // sum: of the numbers, for formats with a minimum
} column;
enum { PREPARED = sizeof(column) / sizeof(float) * COLUMNS, PREPARED_K = SUPER / BLOCK * PREPARED };

// The processor multiplies unsigned bytes with signed ones: weights are raised until they are unsigned, and so many
// times the column's sum is taken off. Bytes raised by 128 need the operation that sums four products at once; where it
// is missing they give their signs to the column.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
enum { VNNI = 1 };
#define DOT_BYTES _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
enum { VNNI = 1 };
#define DOT_BYTES _mm256_dpbusd_avx_epi32
#else
enum { VNNI = 0 };
#endif
enum { RAISED_Q4_0 = 8, RAISED_Q5_0 = 16, RAISED_Q8_0 = VNNI ? 128 : 0 };

INLINE void prepare_block(column *to, const int8_t *bytes, int raised, float scale, float sum) {
    const __m256i y = _mm256_loadu_si256((const __m256i *)bytes);
    __m256i sums = _mm256_sad_epu8(_mm256_xor_si256(y, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
    sums = _mm256_add_epi32(sums, _mm256_unpackhi_epi64(sums, sums));
    const int raised_sum = _mm256_extract_epi32(sums, 0) + _mm256_extract_epi32(sums, 4);
    _mm256_storeu_si256((__m256i *)to->words, y);
    to->less = -raised * (raised_sum - 128 * BLOCK);
    to->scale = scale;
    to->sum = sum;
}

INLINE void prepare_q8_0(const job *w, int n, float *to, int raised) {
    column *next = (column *)to;
    for (int64_t k = 0; k < w->k; k++)
        for (int j = 0; j < n; j++) {
            const block_q8_0 *from = (const block_q8_0 *)(w->b + j * w->b_bytes) + k;
            prepare_block(next++, from->qs, raised, half(from->d), 0.0f);
        }
}
static void prepare_for_q4_0(const job *w, int n, float *to) { prepare_q8_0(w, n, to, RAISED_Q4_0); }
static void prepare_for_q5_0(const job *w, int n, float *to) { prepare_q8_0(w, n, to, RAISED_Q5_0); }
static void prepare_for_q8_0(const job *w, int n, float *to) { prepare_q8_0(w, n, to, RAISED_Q8_0); }

static void prepare_q8_1(const job *w, int n, float *to) {
    column *next = (column *)to;
    for (int64_t k = 0; k < w->k; k++)
        for (int j = 0; j < n; j++) {
            const block_q8_1 *from = (const block_q8_1 *)(w->b + j * w->b_bytes) + k;
            prepare_block(next++, from->qs, 0, half(from->d), half(from->s));
        }
}

static void prepare_for_minimum_k(const job *w, int n, float *to) {
    column *next = (column *)to;
    for (int64_t k = 0; k < w->k; k++)
        for (int c = 0; c < SUPER / BLOCK; c++)
            for (int j = 0; j < n; j++) {
                const block_q8_K *from = (const block_q8_K *)(w->b + j * w->b_bytes) + k;
                const float sum = from->d * (float)(from->sums[2 * c] + from->sums[2 * c + 1]);
                prepare_block(next++, from->qs + BLOCK * c, 0, from->d, sum);
            }
}

// ---- weights of eight rows, `apart` bytes from one to the next ----

INLINE __m256i rows_apart_by_four(const char *row, size_t apart) {
    const __m128i low = _mm_loadu_si128((const __m128i *)row),
                  high = _mm_loadu_si128((const __m128i *)(row + 4 * apart));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// 16 bytes a row as four vectors: word i of every row.
INLINE void turn(const char *row, size_t apart, __m256i *words) {
    __m256i x[4];
    for (int r = 0; r < 4; r++) x[r] = rows_apart_by_four(row + r * apart, apart);
    const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
    const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
    words[0] = _mm256_unpacklo_epi64(a, c);
    words[1] = _mm256_unpackhi_epi64(a, c);
    words[2] = _mm256_unpacklo_epi64(b, d);
    words[3] = _mm256_unpackhi_epi64(b, d);
}

INLINE void turn_32(const char *row, size_t apart, __m256i *words) {
    turn(row, apart, words);
    turn(row + 16, apart, words + 4);
}

INLINE __m256i word_of_rows(const char *row, size_t apart) {
    int32_t x[LANES];
    for (int r = 0; r < LANES; r++) memcpy(x + r, row + r * apart, 4);
    return _mm256_set_epi32(x[7], x[6], x[5], x[4], x[3], x[2], x[1], x[0]);
}

INLINE __m256 half_of_rows(const char *row, size_t apart) {
    int16_t x[LANES];
    for (int r = 0; r < LANES; r++) memcpy(x + r, row + r * apart, 2);
    return _mm256_cvtph_ps(_mm_set_epi16(x[7], x[6], x[5], x[4], x[3], x[2], x[1], x[0]));
}

// The lower halves of eight words, as floats; the upper ones.
INLINE __m256 lower_halves(__m256i words) {
    const __m256i upper_gone = _mm256_and_si256(words, _mm256_set1_epi32(0xFFFF));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper_gone, upper_gone), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
INLINE __m256 upper_halves(__m256i words) { return lower_halves(_mm256_srli_epi32(words, 16)); }

// Byte i of eight words, as floats.
INLINE __m256 bytes_as_floats(__m256i words, int i) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(words, 8 * i), _mm256_set1_epi32(255)));
}

INLINE __m256i lower_nibbles(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE __m256i upper_nibbles(__m256i x) { return lower_nibbles(_mm256_srli_epi16(x, 4)); }

INLINE void nibbles(const char *row, size_t apart, __m256i *words) {
    __m256i both[4];
    turn(row, apart, both);
    for (int i = 0; i < 4; i++) words[i] = lower_nibbles(both[i]), words[4 + i] = upper_nibbles(both[i]);
}

// A fifth bit for weights of four: 32 bits a row, bit i for weight i.
INLINE void add_fifth(__m256i bits, __m256i *words) {
    const __m256i even = _mm256_set1_epi32((int)0x80402010), fifth = _mm256_set1_epi8(16);
    for (int i = 0; i < WORDS; i += 2) {
        // The byte with the bits of two words, four times.
        const __m256i each = _mm256_set1_epi32(0x01010101 * (i / 2));
        const __m256i base =
            _mm256_set_epi64x(0x0C0C0C0C08080808, 0x0404040400000000, 0x0C0C0C0C08080808, 0x0404040400000000);
        const __m256i byte = _mm256_shuffle_epi8(bits, _mm256_add_epi8(base, each));
        const __m256i first = _mm256_and_si256(_mm256_slli_epi16(byte, 4), even), second = _mm256_and_si256(byte, even);
        words[i] = _mm256_or_si256(words[i], _mm256_min_epu8(first, fifth));
        words[i + 1] = _mm256_or_si256(words[i + 1], _mm256_min_epu8(second, fifth));
    }
}

// ---- sums ----

// x and the sums of four products each, of unsigned and signed bytes. (The 16-bit way holds 2 * 127 * 128.)
INLINE __m256i add_dot(__m256i x, __m256i u, __m256i s) {
#ifdef DOT_BYTES
    return DOT_BYTES(x, u, s);
#else
    return _mm256_add_epi32(x, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}

// A block with a scale a row, times n columns. is_signed: weights are, and multiplied the longer way.
INLINE void add_block(__m256 *sums, const __m256i *words, __m256 scales, const column *columns, const bool is_signed,
                      const int n) {
    for (int j = 0; j < n; j++) {
        __m256i x = _mm256_set1_epi32(columns[j].less);
        for (int i = 0; i < WORDS; i++) {
            const __m256i y = _mm256_set1_epi32(columns[j].words[i]);
            x = is_signed ? add_dot(x, _mm256_abs_epi8(words[i]), _mm256_sign_epi8(y, words[i]))
                          : add_dot(x, words[i], y);
        }
        const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(columns[j].scale), scales);
        sums[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(x), scale, sums[j]);
    }
}

INLINE void add_minimums(__m256 *sums, __m256 minimums, const column *columns, const int n) {
    for (int j = 0; j < n; j++) sums[j] = _mm256_fmadd_ps(_mm256_set1_ps(columns[j].sum), minimums, sums[j]);
}

// ---- formats: block number k of eight rows ----

// Four bits a weight at `qs`; a fifth at `qh`, unless that is 0; behind the scale a minimum or not.
INLINE void block_of_nibbles(const char *at, size_t apart, __m256 *sums, const column *columns, const size_t qs,
                             const size_t qh, const bool minimum, const int n) {
    __m256i words[WORDS];
    nibbles(at + qs, apart, words);
    if (qh) add_fifth(word_of_rows(at + qh, apart), words);
    if (minimum) {
        const __m256i both = word_of_rows(at, apart);
        add_block(sums, words, lower_halves(both), columns, false, n);
        add_minimums(sums, upper_halves(both), columns, n);
    } else {
        add_block(sums, words, half_of_rows(at, apart), columns, false, n);
    }
}
#define NIBBLES(TYPE, QH, MINIMUM)                                                                                \
    INLINE void block_of_##TYPE(const char *at, size_t apart, __m256 *sums, const column *columns, const int n) { \
        block_of_nibbles(at, apart, sums, columns, offsetof(block_##TYPE, qs), QH, MINIMUM, n);                   \
    }
NIBBLES(q4_0, 0, false)
NIBBLES(q5_0, offsetof(block_q5_0, qh), false)
NIBBLES(q4_1, 0, true)
NIBBLES(q5_1, offsetof(block_q5_1, qh), true)

INLINE void block_of_q8_0(const char *at, size_t apart, __m256 *sums, const column *columns, const int n) {
    __m256i words[WORDS];
    turn_32(at + offsetof(block_q8_0, qs), apart, words);
    if (RAISED_Q8_0)
        for (int i = 0; i < WORDS; i++) words[i] = _mm256_xor_si256(words[i], _mm256_set1_epi8(-128));
    add_block(sums, words, half_of_rows(at, apart), columns, !RAISED_Q8_0, n);
}

// Q4_K and Q5_K begin alike: two halves, and eight scales and minimums of six bits. is_q5: a fifth bit a weight.
INLINE void block_of_k(const char *at, size_t apart, __m256 *sums, const column *columns, const bool is_q5,
                       const int n) {
    __m256i first[4], fifth[WORDS];
    turn(at, apart, first);
    const __m256i low = _mm256_set1_epi8(15), six = _mm256_set1_epi8(63), high = _mm256_set1_epi8(48);
    // What is left of the first two words are the upper bits of groups 4 to 7, above their lower ones in the third.
    const __m256i scales[2] = {
        _mm256_and_si256(first[1], six),
        _mm256_or_si256(_mm256_and_si256(first[3], low), _mm256_and_si256(_mm256_srli_epi16(first[1], 2), high))};
    const __m256i minimums[2] = {_mm256_and_si256(first[2], six),
                                 _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(first[3], 4), low),
                                                 _mm256_and_si256(_mm256_srli_epi16(first[2], 2), high))};
    const __m256 d = lower_halves(first[0]), minus = _mm256_sub_ps(_mm256_setzero_ps(), upper_halves(first[0]));
    if (is_q5) turn_32(at + offsetof(block_q5_K, qh), apart, fifth);
    const char *qs = at + (is_q5 ? offsetof(block_q5_K, qs) : offsetof(block_q4_K, qs));
#pragma GCC unroll 4
    for (int c = 0; c < 8; c += 2) {
        __m256i both[WORDS], words[WORDS];
        turn_32(qs + 16 * c, apart, both);
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {
            const int group = c + part;
            for (int i = 0; i < WORDS; i++) {
                words[i] = part ? upper_nibbles(both[i]) : lower_nibbles(both[i]);
                if (is_q5) {
                    const __m256i there =
                        group < 4 ? _mm256_slli_epi16(fifth[i], 4 - group) : _mm256_srli_epi16(fifth[i], group - 4);
                    words[i] = _mm256_or_si256(words[i], _mm256_and_si256(there, _mm256_set1_epi8(16)));
                }
            }
            const __m256i of_scale = scales[group / 4], of_minimum = minimums[group / 4];
            add_block(sums, words, _mm256_mul_ps(d, bytes_as_floats(of_scale, group % 4)), columns + group * n, false,
                      n);
            const __m256 minimum = _mm256_mul_ps(minus, bytes_as_floats(of_minimum, group % 4));
            add_minimums(sums, minimum, columns + group * n, n);
        }
    }
}
INLINE void block_of_q4_K(const char *at, size_t apart, __m256 *sums, const column *columns, const int n) {
    block_of_k(at, apart, sums, columns, false, n);
}
INLINE void block_of_q5_K(const char *at, size_t apart, __m256 *sums, const column *columns, const int n) {
    block_of_k(at, apart, sums, columns, true, n);
}

// ---- tiles ----

typedef void (*block_fn)(const char *at, size_t apart, __m256 *sums, const column *columns, const int n);

INLINE int64_t bytes_ahead(size_t group) {
    const int64_t groups = BYTES_AHEAD / (int64_t)group;
    return (int64_t)group * (groups < 1 ? 1 : groups > GROUPS_AHEAD ? GROUPS_AHEAD : groups);
}

// Bytes of rows to come, in their order: eight rows side by side are too many streams for a processor to foresee. Into
// the second-level cache: the first one's queue of misses is short.
INLINE void ask(const char *at, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(at + i, _MM_HINT_T1);
}

// parts: columns of the prepared ones a block. Fewer rows than lanes go one by one, in all lanes; the last ones of more
// go with some of those before.
INLINE void tile_quantized(const job *w, const size_t bytes, const int parts, const block_fn add, const int n) {
    const bool few = w->hi - w->lo < LANES;
    const int64_t ahead = bytes_ahead(LANES * w->a_bytes);
    const size_t apart = few ? 0 : w->a_bytes;
    for (int64_t i = w->lo; i < w->hi; i += few ? 1 : LANES) {
        const int64_t first = few || i + LANES <= w->hi ? i : w->hi - LANES;
        const char *row = w->a + first * w->a_bytes, *next = row + ahead;
        const column *now = (const column *)w->prepared;
        __m256 sums[COLUMNS];
        for (int j = 0; j < n; j++) sums[j] = _mm256_setzero_ps();
        for (int64_t k = 0; k < w->k; k++, now += parts * n) {
            if (!few) ask(next + k * LANES * bytes, LANES * bytes);
            add(row + k * bytes, apart, sums, now, n);
        }
        for (int j = 0; j < n; j++) {
            float *c = w->c + j * w->ldc + first;
            if (few) {
                *c = _mm256_cvtss_f32(sums[j]);
            } else {
                _mm256_storeu_ps(c, sums[j]);
            }
        }
    }
}

#define TILE(TYPE, PARTS)                                                   \
    INLINE void tile_##TYPE(const job *w, const int n) {                    \
        tile_quantized(w, sizeof(block_##TYPE), PARTS, block_of_##TYPE, n); \
    }                                                                       \
    WIDTHS(tile_##TYPE, COLUMNS)
TILE(q4_0, 1)
TILE(q5_0, 1)
TILE(q8_0, 1)
TILE(q4_1, 1)
TILE(q5_1, 1)
TILE(q4_K, SUPER / BLOCK)
TILE(q5_K, SUPER / BLOCK)
