// Tiles of a matrix product in F16, F32 and Q6_K: rows of weights, one after the other, times several columns at once.
// Every sum is taken in the order of ggml's own dot product (vec.cpp and arch/x86/quants.c of ggml, MIT, whose ways of
// unpacking bits these are), with the same lanes, so that the bits are the same; cpu_kernels.c compares them.

#pragma once

#include "cpu_kernels.h"

// Bytes: a row is asked for before it is read. A short row ends before the processor's own prefetcher has found it.
enum { AHEAD = 512, AHEAD_ROWS = 4 };

INLINE void prefetch(const void *row) { _mm_prefetch((const char *)row + AHEAD, _MM_HINT_T0); }

// ---- F16 and F32 ----

// Four vectors of sums, as ggml has them; of F16 the rest one by one. (What compilers make of ggml's rest of F32
// differs: rows of F32 must be whole steps.)

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

WIDTHS(tile_f16, FLOAT_TILE)
WIDTHS(tile_f32, FLOAT_TILE)

// ---- Q6_K. Its scales are for 16 weights each: a lane a row (cpu_lanes.h) gains nothing. ----

INLINE float sum_8(__m256 x) {
    __m128 r = _mm_add_ps(_mm256_extractf128_ps(x, 1), _mm256_castps256_ps128(x));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

// Number j of eight, eightfold.
INLINE __m256 spread(__m256 x, int j) { return _mm256_permutevar8x32_ps(x, _mm256_set1_epi32(j)); }

enum { PREPARED_Q6_K = COLUMNS };  // floats: a scale a column

static void prepare_scales_k(const job *w, int n, float *to) {
    for (int64_t k = 0; k < w->k; k++)
        for (int j = 0; j < COLUMNS; j++)
            to[PREPARED_Q6_K * k + j] = j < n ? ((const block_q8_K *)(w->b + j * w->b_bytes) + k)->d : 0.0f;
}

// Signed byte 2i and 2i + 1 of 16, for two groups of 16 weights.
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
                _mm256_mul_ps(_mm256_set1_ps(half(row[k].d)), _mm256_load_ps(w->prepared + PREPARED_Q6_K * k));
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
WIDTHS(tile_q6_K, COLUMNS)
