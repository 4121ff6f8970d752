// Tiles of a matrix product: rows of weights, one after the other, times up to eight columns of activations at once,
// for the formats of ggml. Every sum is taken in the order of ggml's own dot product (arch/x86/quants.c and vec.cpp of
// ggml, MIT, whose ways of unpacking bits these are), with the same lanes, so that the bits are the same; cpu_kernels.c
// compares them.

#pragma once

#include "cpu_kernels.h"

// clang-format off
// ggml-common.h: 32 weights a block, 256 where the name ends with K
enum { BLOCK = 32, SUPER = 256 };
typedef struct { uint16_t d; uint8_t qs[BLOCK / 2]; } block_q4_0;
typedef struct { uint16_t d, m; uint8_t qs[BLOCK / 2]; } block_q4_1;
typedef struct { uint16_t d; uint8_t qh[4], qs[BLOCK / 2]; } block_q5_0;
typedef struct { uint16_t d, m; uint8_t qh[4], qs[BLOCK / 2]; } block_q5_1;
typedef struct { uint16_t d; int8_t qs[BLOCK]; } block_q8_0;
typedef struct { uint16_t d, s; int8_t qs[BLOCK]; } block_q8_1;
typedef struct { uint16_t d, dmin; uint8_t scales[12], qs[SUPER / 2]; } block_q4_K;
typedef struct { uint16_t d, dmin; uint8_t scales[12], qh[SUPER / 8], qs[SUPER / 2]; } block_q5_K;
typedef struct { uint8_t ql[SUPER / 2], qh[SUPER / 4]; int8_t scales[SUPER / 16]; uint16_t d; } block_q6_K;
typedef struct { float d; int8_t qs[SUPER]; int16_t sums[SUPER / 16]; } block_q8_K;
// clang-format on

// Columns of a tile: what the registers hold.
enum { COLUMNS = 8 };
// Bytes: a row is asked for before it is read. A short row ends before the processor's own prefetcher has found it.
enum { AHEAD = 512, AHEAD_ROWS = 4 };

INLINE float half(uint16_t h) { return _cvtsh_ss(h); }

INLINE void prefetch(const void *row) { _mm_prefetch((const char *)row + AHEAD, _MM_HINT_T0); }

INLINE float sum_8(__m256 x) {
    __m128 r = _mm_add_ps(_mm256_extractf128_ps(x, 1), _mm256_castps256_ps128(x));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define VNNI 1
INLINE __m256i add_dot_bytes(__m256i sum, __m256i u, __m256i s) { return _mm256_dpbusd_epi32(sum, u, s); }
#elif defined(__AVXVNNI__)
#define VNNI 1
INLINE __m256i add_dot_bytes(__m256i sum, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }
#else
#define VNNI 0
#endif

// Sums of four products each, of unsigned and signed bytes. The 16-bit way holds 2 * 255 * 127 only for weights up to
// 128.
INLINE __m256 dot_bytes(__m256i u, __m256i s) {
#if VNNI
    return _mm256_cvtepi32_ps(add_dot_bytes(_mm256_setzero_si256(), u, s));
#else
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}

// Number j of eight, eightfold.
INLINE __m256 spread(__m256 x, int j) { return _mm256_permutevar8x32_ps(x, _mm256_set1_epi32(j)); }

// The scale of a block times those of n columns, and that of column j, eightfold. Of one column alone by the short way.
INLINE __m256 scales_of(float d, const float *columns, const int n) {
    return n == 1 ? _mm256_set1_ps(d * columns[0]) : _mm256_mul_ps(_mm256_set1_ps(d), _mm256_load_ps(columns));
}
INLINE __m256 scale_of(__m256 scales, int j, const int n) { return n == 1 ? scales : spread(scales, j); }

INLINE __m256i nibbles(const uint8_t *qs) {
    const __m128i both = _mm_loadu_si128((const __m128i *)qs);
    return _mm256_and_si256(_mm256_set1_epi8(15), _mm256_set_m128i(_mm_srli_epi16(both, 4), both));
}

// 32 bits as bytes: all ones where a bit is set.
INLINE __m256i bits(const uint8_t *qh) {
    uint32_t word;
    memcpy(&word, qh, 4);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return _mm256_movm_epi8(word);
#else
    const __m256i each = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i others = _mm256_set1_epi64x(0x7fbfdfeff7fbfdfe);
    return _mm256_cmpeq_epi8(_mm256_or_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)word), each), others),
                             _mm256_set1_epi8(-1));
#endif
}

// ---- Q8_0, Q5_0, Q4_0: signed bytes times a scale, columns in Q8_0 ----

// The processor multiplies unsigned bytes with signed ones. Where it does so in one operation, one side is raised until
// it is unsigned, and so many times the sum of the other side's bytes is taken off: weights of four and five bits are
// raised, as they are stored, and columns know their sums; to weights of eight bits raised columns are quicker. Else
// the weights give their signs to the columns.
#if VNNI
enum { RAISED_q8_0 = 0, RAISED_q5_0 = 16, RAISED_q4_0 = 8, RAISED_COLUMNS = 128 };
INLINE __m256i bytes_q5_0(const block_q5_0 *x) {
    return _mm256_or_si256(nibbles(x->qs), _mm256_and_si256(bits(x->qh), _mm256_set1_epi8(16)));
}
INLINE __m256i bytes_q4_0(const block_q4_0 *x) { return nibbles(x->qs); }
#else
enum { RAISED_q8_0, RAISED_q5_0, RAISED_q4_0 };
INLINE __m256i bytes_q5_0(const block_q5_0 *x) {  // bit 5 says that it is not negative
    return _mm256_or_si256(nibbles(x->qs), _mm256_andnot_si256(bits(x->qh), _mm256_set1_epi8((char)0xF0)));
}
INLINE __m256i bytes_q4_0(const block_q4_0 *x) { return _mm256_sub_epi8(nibbles(x->qs), _mm256_set1_epi8(8)); }
#endif
INLINE __m256i bytes_q8_0(const block_q8_0 *x) { return _mm256_loadu_si256((const __m256i *)x->qs); }

// What these tiles read of n columns: block by block the scales (COLUMNS of them, zero where there is no column:
// leftovers could be denormal, and slow), then the n columns' bytes. Without gaps, so that a row of weights takes up
// few lines of cache beside them: with gaps reading the weights took twice as long.
typedef struct {
    int8_t bytes[BLOCK];
#if VNNI
    int32_t less[BLOCK / 4];  // four bytes' sum times what weights are raised by, negative
#endif
} column_q8_0;
enum { SCALES_BYTES = COLUMNS * sizeof(float) };
enum { PREPARED_Q8_0 = (SCALES_BYTES + COLUMNS * sizeof(column_q8_0)) / sizeof(float) };

INLINE const char *block_of_columns(const float *prepared, int64_t k, const int n) {
    return (const char *)prepared + k * (SCALES_BYTES + n * sizeof(column_q8_0));
}

#if VNNI
// Minus the sums of four bytes each, so many times.
INLINE __m256i less_of(__m256i x, int times) {
    const __m256i zero = _mm256_setzero_si256();
    return _mm256_sub_epi32(zero, add_dot_bytes(zero, _mm256_set1_epi8((char)times), x));
}
#endif

INLINE void prepare_signed(const job *w, int n, float *to, const int raised) {
    for (int64_t k = 0; k < w->k; k++) {
        float *scales = (float *)block_of_columns(to, k, n);
        column_q8_0 *columns = (column_q8_0 *)(scales + COLUMNS);
        for (int j = 0; j < COLUMNS; j++) scales[j] = 0.0f;
        for (int j = 0; j < n; j++) {
            const block_q8_0 *column = (const block_q8_0 *)(w->b + j * w->b_bytes) + k;
            __m256i y = _mm256_loadu_si256((const __m256i *)column->qs);
            scales[j] = half(column->d);
#if VNNI
            if (raised) {
                _mm256_store_si256((__m256i *)columns[j].less, less_of(y, raised));
            } else {
                y = _mm256_xor_si256(y, _mm256_set1_epi8((char)RAISED_COLUMNS));
            }
#endif
            _mm256_store_si256((__m256i *)columns[j].bytes, y);
        }
    }
}
static void prepare_for_q8_0(const job *w, int n, float *to) { prepare_signed(w, n, to, RAISED_q8_0); }
static void prepare_for_q5_0(const job *w, int n, float *to) { prepare_signed(w, n, to, RAISED_q5_0); }
static void prepare_for_q4_0(const job *w, int n, float *to) { prepare_signed(w, n, to, RAISED_q4_0); }

// Sums of four products each of a block's bytes with those of a column. rest: `rest_of` the block.
#if VNNI
INLINE __m256i rest_of(__m256i x, const int raised) { return raised ? x : less_of(x, RAISED_COLUMNS); }
INLINE __m256 dot_column(__m256i x, __m256i rest, const column_q8_0 *column, const int raised) {
    const __m256i y = _mm256_load_si256((const __m256i *)column->bytes);
    return _mm256_cvtepi32_ps(raised ? add_dot_bytes(_mm256_load_si256((const __m256i *)column->less), x, y)
                                     : add_dot_bytes(rest, y, x));
}
#else
INLINE __m256i rest_of(__m256i x, const int raised) { return (void)raised, _mm256_abs_epi8(x); }
INLINE __m256 dot_column(__m256i x, __m256i rest, const column_q8_0 *column, const int raised) {
    (void)raised;
    return dot_bytes(rest, _mm256_sign_epi8(_mm256_load_si256((const __m256i *)column->bytes), x));
}
#endif

#define SIGNED_TILE(TYPE)                                                                     \
    INLINE void tile_##TYPE(const job *w, const int n) {                                      \
        const int64_t length = w->k;                                                          \
        for (int64_t i = w->lo; i < w->hi; i++) {                                             \
            const block_##TYPE *row = (const block_##TYPE *)(w->a + i * w->a_bytes);          \
            __m256 sums[COLUMNS];                                                             \
            for (int j = 0; j < n; j++) sums[j] = _mm256_setzero_ps();                        \
            for (int64_t k = 0; k < length; k++) {                                            \
                prefetch(row + k);                                                            \
                const float *of_columns = (const float *)block_of_columns(w->prepared, k, n); \
                const column_q8_0 *columns = (const column_q8_0 *)(of_columns + COLUMNS);     \
                const __m256i x = bytes_##TYPE(row + k), rest = rest_of(x, RAISED_##TYPE);    \
                const __m256 scales = scales_of(half(row[k].d), of_columns, n);               \
                for (int j = 0; j < n; j++) {                                                 \
                    const __m256 dot = dot_column(x, rest, columns + j, RAISED_##TYPE);       \
                    sums[j] = _mm256_fmadd_ps(scale_of(scales, j, n), dot, sums[j]);          \
                }                                                                             \
            }                                                                                 \
            for (int j = 0; j < n; j++) w->c[j * w->ldc + i] = sum_8(sums[j]);                \
        }                                                                                     \
    }
SIGNED_TILE(q8_0)
SIGNED_TILE(q5_0)
SIGNED_TILE(q4_0)

// ---- Q5_1, Q4_1: unsigned bytes times a scale, and a minimum; columns in Q8_1, which knows their sums ----

INLINE __m256i bytes_q5_1(const block_q5_1 *x) {
    return _mm256_or_si256(nibbles(x->qs), _mm256_and_si256(bits(x->qh), _mm256_set1_epi8(16)));
}
INLINE __m256i bytes_q4_1(const block_q4_1 *x) { return nibbles(x->qs); }

// What these tiles read of up to COLUMNS columns, block by block.
typedef struct {
    float scales[COLUMNS], sums[COLUMNS];
    int8_t bytes[COLUMNS][BLOCK];
} columns_q8_1;
enum { PREPARED_Q8_1 = sizeof(columns_q8_1) / sizeof(float) };

static void prepare_q8_1(const job *w, int n, float *to) {
    for (int64_t k = 0; k < w->k; k++) {
        columns_q8_1 *prepared = (columns_q8_1 *)to + k;
        for (int j = 0; j < COLUMNS; j++) prepared->scales[j] = prepared->sums[j] = 0.0f;
        for (int j = 0; j < n; j++) {
            const block_q8_1 *column = (const block_q8_1 *)(w->b + j * w->b_bytes) + k;
            prepared->scales[j] = half(column->d);
            prepared->sums[j] = half(column->s);
            memcpy(prepared->bytes[j], column->qs, BLOCK);
        }
    }
}

#define MINIMUM_TILE(TYPE)                                                                                             \
    INLINE void tile_##TYPE(const job *w, const int n) {                                                               \
        const int64_t length = w->k;                                                                                   \
        for (int64_t i = w->lo; i < w->hi; i++) {                                                                      \
            const block_##TYPE *row = (const block_##TYPE *)(w->a + i * w->a_bytes);                                   \
            const columns_q8_1 *columns = (const columns_q8_1 *)w->prepared;                                           \
            __m256 sums[COLUMNS], minimums = _mm256_setzero_ps();                                                      \
            for (int j = 0; j < n; j++) sums[j] = _mm256_setzero_ps();                                                 \
            for (int64_t k = 0; k < length; k++) {                                                                     \
                prefetch(row + k);                                                                                     \
                const __m256i x = bytes_##TYPE(row + k);                                                               \
                const __m256 scales = scales_of(half(row[k].d), columns[k].scales, n);                                 \
                minimums = _mm256_fmadd_ps(_mm256_set1_ps(half(row[k].m)), _mm256_load_ps(columns[k].sums), minimums); \
                for (int j = 0; j < n; j++) {                                                                          \
                    const __m256i y = _mm256_load_si256((const __m256i *)columns[k].bytes[j]);                         \
                    sums[j] = _mm256_fmadd_ps(scale_of(scales, j, n), dot_bytes(x, y), sums[j]);                       \
                }                                                                                                      \
            }                                                                                                          \
            float of_minimums[COLUMNS];                                                                                \
            _mm256_storeu_ps(of_minimums, minimums);                                                                   \
            for (int j = 0; j < n; j++) w->c[j * w->ldc + i] = sum_8(sums[j]) + of_minimums[j];                        \
        }                                                                                                              \
    }
MINIMUM_TILE(q5_1)
MINIMUM_TILE(q4_1)

// ---- Q4_K, Q5_K, Q6_K: 256 weights a block in groups with scales of their own; columns in Q8_K ----

enum { PREPARED_K = 5 * COLUMNS };  // floats: a scale a column, and its eight sums of 32 (16 bits each)

static void prepare_q8_K(const job *w, int n, float *to) {
    for (int64_t k = 0; k < w->k; k++)
        for (int j = 0; j < COLUMNS; j++) {
            const block_q8_K *column = (const block_q8_K *)(w->b + j * w->b_bytes) + k;
            to[PREPARED_K * k + j] = j < n ? column->d : 0.0f;
            if (j >= n) continue;
            const __m128i low = _mm_loadu_si128((const __m128i *)column->sums),
                          high = _mm_loadu_si128((const __m128i *)column->sums + 1);
            _mm_store_si128((__m128i *)(to + PREPARED_K * k + COLUMNS + 4 * j), _mm_hadd_epi16(low, high));
        }
}

// 16-bit number i of eight, for a group of 32 products; signed byte 2i and 2i + 1 of 16, for two groups of 16.
INLINE __m256i scale_of_32(__m256i scales, int i) {
    return _mm256_shuffle_epi8(scales, _mm256_set1_epi16((short)(0x0100 + 0x0202 * i)));
}
INLINE __m256i scales_of_16(__m128i scales, int i) {
    const __m128i each = _mm_set_epi64x(0x0101010101010101 * (2 * i + 1), 0x0101010101010101 * (2 * i));
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, each));
}

// Sum over eight groups of 32: scale times unsigned byte times signed byte.
INLINE __m256i dot_super(const __m256i *x, const __m256i *scales, const int8_t *y) {
    __m256i sum = _mm256_setzero_si256();
    for (int c = 0; c < 8; c++) {
        const __m256i pairs = _mm256_maddubs_epi16(x[c], _mm256_loadu_si256((const __m256i *)(y + 32 * c)));
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        sum = _mm256_dpwssd_epi32(sum, scales[c], pairs);
#else
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(scales[c], pairs));
#endif
    }
    return sum;
}

// The 6-bit scales (first) and minimums (second) of eight groups, 16 bits each.
INLINE void unpack_scales(const uint8_t *packed, __m128i *scales, __m128i *minimums) {
    uint32_t u[4];
    memcpy(u, packed, 12);
    u[3] = (u[2] >> 4 & 0x0f0f0f0f) | (u[1] >> 6 & 0x03030303) << 4;
    const uint32_t second = u[1] & 0x3f3f3f3f;
    u[1] = (u[2] & 0x0f0f0f0f) | (u[0] >> 6 & 0x03030303) << 4;
    u[2] = second;
    u[0] &= 0x3f3f3f3f;
    *scales = _mm_cvtepu8_epi16(_mm_set_epi32(0, 0, (int)u[1], (int)u[0]));
    *minimums = _mm_cvtepu8_epi16(_mm_set_epi32(0, 0, (int)u[3], (int)u[2]));
}

// is_q5: Q5_K, with a fifth bit a weight; its minimums are summed as one number, those of Q4_K as four.
INLINE void tile_k(const job *w, const bool is_q5, const int n) {
    const int64_t length = w->k;
    for (int64_t i = w->lo; i < w->hi; i++) {
        const char *row = w->a + i * w->a_bytes;
        __m256 sums[COLUMNS];
        __m128 minimums[COLUMNS];
        float of_minimums[COLUMNS];
        for (int j = 0; j < n; j++) sums[j] = _mm256_setzero_ps(), minimums[j] = _mm_setzero_ps(), of_minimums[j] = 0;
        for (int64_t k = 0; k < length; k++) {
            const block_q5_K *q5 = (const block_q5_K *)row + k;
            // Both begin alike.
            const block_q4_K *q4 = is_q5 ? (const block_q4_K *)q5 : (const block_q4_K *)row + k;
            const uint8_t *qs = is_q5 ? q5->qs : q4->qs;
            const float *of_columns = w->prepared + PREPARED_K * k;
            __m128i packed, of_groups;
            unpack_scales(q4->scales, &packed, &of_groups);
            const __m256i both = _mm256_set_m128i(packed, packed);
            __m256i x[8], scales[8];
            for (int c = 0; c < 4; c++) {
                prefetch(qs + 32 * c);
                const __m256i two = _mm256_loadu_si256((const __m256i *)(qs + 32 * c));
                x[2 * c] = _mm256_and_si256(two, _mm256_set1_epi8(15));
                x[2 * c + 1] = _mm256_and_si256(_mm256_srli_epi16(two, 4), _mm256_set1_epi8(15));
            }
            if (is_q5) {
                const __m256i high = _mm256_loadu_si256((const __m256i *)q5->qh), fifth = _mm256_set1_epi8(16);
                for (int c = 0; c < 4; c++)
                    x[c] = _mm256_or_si256(x[c], _mm256_and_si256(_mm256_slli_epi16(high, 4 - c), fifth));
                for (int c = 4; c < 8; c++)
                    x[c] = _mm256_or_si256(x[c], _mm256_and_si256(_mm256_srli_epi16(high, c - 4), fifth));
            }
            for (int c = 0; c < 8; c++) scales[c] = scale_of_32(both, c);
            const __m256 of_scale = _mm256_load_ps(of_columns), minus = _mm256_set1_ps(-0.0f);
            const __m256 d = _mm256_mul_ps(_mm256_set1_ps(half(q4->d)), of_scale);
            const __m256 dmin = _mm256_mul_ps(_mm256_set1_ps(half(q4->dmin)), _mm256_xor_ps(of_scale, minus));
            for (int j = 0; j < n; j++) {
                const block_q8_K *column = (const block_q8_K *)(w->b + j * w->b_bytes) + k;
                sums[j] = _mm256_fmadd_ps(spread(d, j), _mm256_cvtepi32_ps(dot_super(x, scales, column->qs)), sums[j]);
                const __m128i products =
                    _mm_madd_epi16(of_groups, _mm_load_si128((const __m128i *)(of_columns + COLUMNS + 4 * j)));
                const __m128 by = _mm256_castps256_ps128(spread(dmin, j));
                if (is_q5) {
                    const __m128i two = _mm_hadd_epi32(products, products);
                    const float sum = (float)_mm_cvtsi128_si32(_mm_hadd_epi32(two, two));
                    of_minimums[j] = __builtin_fmaf(_mm_cvtss_f32(by), sum, of_minimums[j]);
                } else
                    minimums[j] = _mm_fmadd_ps(by, _mm_cvtepi32_ps(products), minimums[j]);
            }
        }
        for (int j = 0; j < n; j++) {
            const __m128 two = _mm_add_ps(minimums[j], _mm_movehl_ps(minimums[j], minimums[j]));
            const float sum = is_q5 ? of_minimums[j] : _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
            w->c[j * w->ldc + i] = sum_8(sums[j]) + sum;
        }
    }
}
INLINE void tile_q4_K(const job *w, const int n) { tile_k(w, false, n); }
INLINE void tile_q5_K(const job *w, const int n) { tile_k(w, true, n); }

INLINE void tile_q6_K(const job *w, const int n) {
    const int64_t length = w->k;
    for (int64_t i = w->lo; i < w->hi; i++) {
        const block_q6_K *row = (const block_q6_K *)(w->a + i * w->a_bytes);
        __m256 sums[COLUMNS];
        for (int j = 0; j < n; j++) sums[j] = _mm256_setzero_ps();
        for (int64_t k = 0; k < length; k++) {
            const __m128i packed = _mm_loadu_si128((const __m128i *)row[k].scales);
            const __m256i all = _mm256_cvtepi8_epi16(packed), low = _mm256_set1_epi8(15), high = _mm256_set1_epi8(48);
            __m256i x[8], scales[8];
            for (int c = 0; c < 2; c++) {
                prefetch(row[k].ql + 64 * c);
                prefetch(row[k].qh + 32 * c);
                const __m256i first = _mm256_loadu_si256((const __m256i *)(row[k].ql + 64 * c));
                const __m256i second = _mm256_loadu_si256((const __m256i *)(row[k].ql + 64 * c + 32));
                const __m256i upper = _mm256_loadu_si256((const __m256i *)(row[k].qh + 32 * c));
                x[4 * c] =
                    _mm256_or_si256(_mm256_and_si256(first, low), _mm256_and_si256(_mm256_slli_epi16(upper, 4), high));
                x[4 * c + 1] =
                    _mm256_or_si256(_mm256_and_si256(second, low), _mm256_and_si256(_mm256_slli_epi16(upper, 2), high));
                x[4 * c + 2] =
                    _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(first, 4), low), _mm256_and_si256(upper, high));
                x[4 * c + 3] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(second, 4), low),
                                               _mm256_and_si256(_mm256_srli_epi16(upper, 2), high));
            }
            for (int c = 0; c < 8; c++) scales[c] = scales_of_16(packed, c);
            const __m256 d =
                _mm256_mul_ps(_mm256_set1_ps(half(row[k].d)), _mm256_load_ps(w->prepared + PREPARED_K * k));
            for (int j = 0; j < n; j++) {
                const block_q8_K *column = (const block_q8_K *)(w->b + j * w->b_bytes) + k;
                // Weights are 32 less than their bits say.
                const __m256i of_sums = _mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)column->sums), all);
                const __m256i sum = _mm256_sub_epi32(dot_super(x, scales, column->qs), _mm256_slli_epi32(of_sums, 5));
                sums[j] = _mm256_fmadd_ps(spread(d, j), _mm256_cvtepi32_ps(sum), sums[j]);
            }
        }
        for (int j = 0; j < n; j++) w->c[j * w->ldc + i] = sum_8(sums[j]);
    }
}

// ---- F16 and F32: four vectors of sums, as ggml has them; of F16 the rest one by one. (What compilers make of ggml's
// rest of F32 differs: rows of F32 must be whole steps.) ----

#if defined(__AVX512F__)
typedef __m512 floats;
enum { WIDTH = 16, FLOAT_TILE = 6 };
#define ZERO _mm512_setzero_ps()
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, x) _mm512_storeu_ps(p, x)
#define LOAD_HALF(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define ADD(a, b) _mm512_add_ps(a, b)
INLINE float sum_floats(floats x) { return _mm512_reduce_add_ps(x); }
#else
typedef __m256 floats;
enum { WIDTH = 8, FLOAT_TILE = 3 };
#define ZERO _mm256_setzero_ps()
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, x) _mm256_storeu_ps(p, x)
#define LOAD_HALF(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define ADD(a, b) _mm256_add_ps(a, b)
INLINE float sum_floats(floats x) {
    const __m128 t = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)), u = _mm_hadd_ps(t, t);
    return _mm_cvtss_f32(_mm_hadd_ps(u, u));
}
#endif
enum { STEP = 4 * WIDTH };

// Columns as floats, one after the other.
static void prepare_f16(const job *w, int n, float *to) {
    for (int j = 0; j < n; j++) {
        const uint16_t *column = (const uint16_t *)(w->b + j * w->b_bytes);
        int64_t k = 0;
        for (; k + WIDTH <= w->k; k += WIDTH) STORE(to + j * w->k + k, LOAD_HALF(column + k));
        for (; k < w->k; k++) to[j * w->k + k] = half(column[k]);
    }
}

// The rest of a row of F16 that is no whole number of steps.
static __attribute__((noinline)) void add_rest(const uint16_t *row, const float *columns, int64_t apart, int64_t k,
                                               const job *w, int64_t i, int n) {
    for (int j = 0; j < n; j++) {
        double sum = w->c[j * w->ldc + i];
        for (int64_t rest = k; rest < w->k; rest++) sum += half(row[rest]) * columns[j * apart + rest];
        w->c[j * w->ldc + i] = (float)sum;
    }
}

INLINE void tile_floats(const job *w, const bool is_half, const int n) {
    const float *columns = is_half ? w->prepared : (const float *)w->b;
    const int64_t apart = is_half ? w->k : (int64_t)(w->b_bytes / sizeof(float));
    const int64_t length = w->k, row_bytes = length * (is_half ? 2 : 4);
    // Rows of a cache lie far apart.
    const bool apart_rows = (int64_t)w->a_bytes > row_bytes;
    for (int64_t i = w->lo; i < w->hi; i++) {
        const char *row = w->a + i * w->a_bytes;
        if (apart_rows && i + AHEAD_ROWS < w->hi)
            for (int64_t at = 0; at < row_bytes && at < AHEAD; at += 64)
                _mm_prefetch(row + AHEAD_ROWS * w->a_bytes + at, _MM_HINT_T0);
        floats sums[FLOAT_TILE][4];
        for (int j = 0; j < n; j++)
            for (int p = 0; p < 4; p++) sums[j][p] = ZERO;
        int64_t k = 0;
        for (; k + STEP <= length; k += STEP) {
            floats x[4];
            for (int p = 0; p < 4; p++) {
                const char *at = row + (k + p * WIDTH) * (is_half ? 2 : 4);
                prefetch(at);
                x[p] = is_half ? LOAD_HALF(at) : LOAD((const float *)at);
            }
            for (int j = 0; j < n; j++)
                for (int p = 0; p < 4; p++)
                    sums[j][p] = FMA(x[p], LOAD(columns + j * apart + k + p * WIDTH), sums[j][p]);
        }
        for (int j = 0; j < n; j++)
            w->c[j * w->ldc + i] = sum_floats(ADD(ADD(sums[j][0], sums[j][2]), ADD(sums[j][1], sums[j][3])));
        if (k < w->k) add_rest((const uint16_t *)row, columns, apart, k, w, i, n);
    }
}
INLINE void tile_f16(const job *w, const int n) { tile_floats(w, true, n); }
INLINE void tile_f32(const job *w, const int n) { tile_floats(w, false, n); }

// ---- by width ----

// One compiled tile for every width up to the widest.
#define WIDTHS(TILE, WIDEST)                             \
    static void all_##TILE(const job *w, int n) {        \
        switch (n) {                                     \
        case 1: TILE(w, 1); break;                       \
        case 2: TILE(w, 2); break;                       \
        case 3: TILE(w, 3); break;                       \
        case 4: TILE(w, WIDEST < 4 ? WIDEST : 4); break; \
        case 5: TILE(w, WIDEST < 5 ? WIDEST : 5); break; \
        case 6: TILE(w, WIDEST < 6 ? WIDEST : 6); break; \
        case 7: TILE(w, WIDEST < 7 ? WIDEST : 7); break; \
        default: TILE(w, WIDEST);                        \
        }                                                \
    }
WIDTHS(tile_q8_0, COLUMNS)
WIDTHS(tile_q5_0, COLUMNS)
WIDTHS(tile_q4_0, COLUMNS)
WIDTHS(tile_q5_1, COLUMNS)
WIDTHS(tile_q4_1, COLUMNS)
WIDTHS(tile_q4_K, COLUMNS)
WIDTHS(tile_q5_K, COLUMNS)
WIDTHS(tile_q6_K, COLUMNS)
WIDTHS(tile_f16, FLOAT_TILE)
WIDTHS(tile_f32, FLOAT_TILE)
