// What the products of cpu_kernels.c are to other files of this library.

#pragma once

#include <immintrin.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// ggml.h
// clang-format off
enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q8_1 = 9, Q4_K = 12, Q5_K = 13, Q6_K = 14, Q8_K = 15 };

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

// Columns at once of quantized weights, and rows that go together: threads share out whole groups of them.
enum { COLUMNS = 8, ROWS_TOGETHER = 8 };

#define INLINE static inline __attribute__((always_inline))

INLINE float half(uint16_t h) { return _cvtsh_ss(h); }

// Seen by the files of this library only.
#define WITHIN __attribute__((visibility("hidden")))

// ggml-cpu.h
typedef void (*dot_fn)(int n, float *out, size_t, const void *row, size_t, const void *column, size_t, int);
typedef void (*from_float_fn)(const float *from, void *to, int64_t n);
typedef struct {
    from_float_fn from_float;
    dot_fn dot;
    int column_type;
    int64_t rows;
} type_traits;

// Rows lo..hi of a times n columns of b into c: c[j * ldc + i] = a[i] . b[j], n at most COLUMNS; k blocks a row.
typedef struct {
    int64_t lo, hi, k;
    const char *a, *b;
    size_t a_bytes, b_bytes;  // of a row, of a column
    const float *prepared;    // of these columns, by `prepare_*`
    float *c;
    int64_t ldc;
} job;

typedef struct {
    int type, column_type;
    size_t a_bytes, b_bytes;  // of a block
    int64_t block;            // weights of a block
    size_t halves_at;         // where a block of weights has its scales, and how many: for `agrees`
    int halves;
    bool same_order;  // of sums as in ggml's dot product
    int tile;         // columns at once
    int64_t columns;  // at most, in ggml's place; 0 = any number
    int64_t step;     // blocks that a row must be a multiple of
    int64_t floats;   // of scratch a block and tile
    void (*prepare)(const job *, int n, float *to);
    void (*compute)(const job *, int n);
} kernel;

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

// The first row of a thread's share, which ends where the next one's begins.
INLINE int64_t first_row(int64_t rows, int64_t thread, int64_t threads) {
    const int64_t groups = (rows + ROWS_TOGETHER - 1) / ROWS_TOGETHER;
    const int64_t first = groups * thread / threads * ROWS_TOGETHER;
    return first < rows ? first : rows;
}

// The kernel of a type and row length; NULL where there is none, or where it does not agree with ggml.
WITHIN const kernel *kernel_of(int type, int64_t blocks);

// Turns floats into columns of that type, as ggml does; NULL for floats themselves.
WITHIN from_float_fn quantizer(int column_type);

// Rows lo..hi of `a` times n columns of `b`, k blocks each: c[j * ldc + i] = a[i] . b[j]. By one thread.
WITHIN void multiply_rows(const kernel *use, int64_t lo, int64_t hi, int64_t n, int64_t k, const char *a,
                          size_t a_bytes, const char *b, size_t b_bytes, float *c, int64_t ldc);
