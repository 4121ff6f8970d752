// Operations of ggml's CPU backend that a verify pass or a draft spends its time in, computed here in its place.
//
// Matrix products. ggml computes a pass of one token by a dot product a weight row, and a pass of several by other
// kernels, which cut the rows among threads in pieces of 16, so that a verify pass of two tokens costs two plain ones
// on a CPU that waits for memory, and round otherwise. Here every thread streams one contiguous range of rows, each row
// once for all tokens of a verify pass (K types with very long rows: for eight), and sums in one order for any number
// of them: that of ggml's own dot product (cpu_rows.h), or block after block (cpu_lanes.h). `start` compares with that
// dot product, and types that differ are left to ggml.
//
// Fills and concatenations, which ggml does number by number, of the draft logits of a reduced vocabulary: a quarter of
// the drafter's pass.
//
// This library is loaded before ggml, by cpu_kernels.py, so that ggml's calls between its own files arrive here first
// (ggml-cpu.c, llama.cpp as in llama-cpp-python 0.3.36). What is not computed here goes on to the function that called.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "cpu_lanes.h"
#include "cpu_rows.h"

// ggml-cpu-impl.h: the two fields in front
typedef struct {
    int thread, threads;
} compute_params;
// ggml.h: as far as the data
typedef struct tensor {
    int type;
    void *buffer;
    int64_t ne[4];
    size_t nb[4];
    int op, op_params[16], flags;
    struct tensor *src[10], *view_of;
    size_t view_at;
    void *data;
} tensor;

typedef bool (*tiled_fn)(const compute_params *, tensor *product);
typedef void (*forward_fn)(const compute_params *, tensor *result);
typedef bool (*product_fn)(const compute_params *, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda,
                           const void *b, int64_t ldb, void *c, int64_t ldc, int a_type, int b_type, int c_type);

enum { TYPES = 64 };
// Floats a thread: columns prepared for the tiles. At once as many as half of a usual second-level cache holds; one
// tile of very long rows (F16: 43,690 weights) may take twice that.
enum { SCRATCH = 256 * 1024, AT_ONCE = SCRATCH / 2 };
// Of rows that more columns than a tile pass over before the next rows: half of a first-level cache, or one group.
enum { ROW_BYTES = 16 * 1024 };
// Columns of passes that verify. Wider ones are prompts: there ggml is as quick for F16, F32 and the K types.
enum { VERIFIED = 32 };

// Of the largest product: what a sum in another order may differ by.
static const float OTHER_ORDER = 1e-5f;

static _Thread_local float scratch[SCRATCH] __attribute__((aligned(64)));

// clang-format off
#define QUANTIZED(TYPE, NAME, COLUMN, COLUMN_NAME, SIZE, AT, HALVES, FLOATS, PREPARE) \
    {TYPE, COLUMN, sizeof(block_##NAME), sizeof(block_##COLUMN_NAME), SIZE, AT, HALVES, false, COLUMNS, 0, 1, FLOATS, \
     PREPARE, all_tile_##NAME}
// clang-format on
static const kernel kernels[] = {
    QUANTIZED(Q8_0, q8_0, Q8_0, q8_0, BLOCK, 0, 1, PREPARED, prepare_for_q8_0),
    QUANTIZED(Q5_0, q5_0, Q8_0, q8_0, BLOCK, 0, 1, PREPARED, prepare_for_q5_0),
    QUANTIZED(Q4_0, q4_0, Q8_0, q8_0, BLOCK, 0, 1, PREPARED, prepare_for_q4_0),
    QUANTIZED(Q5_1, q5_1, Q8_1, q8_1, BLOCK, 0, 2, PREPARED, prepare_q8_1),
    QUANTIZED(Q4_1, q4_1, Q8_1, q8_1, BLOCK, 0, 2, PREPARED, prepare_q8_1),
    QUANTIZED(Q4_K, q4_K, Q8_K, q8_K, SUPER, 0, 2, PREPARED_K, prepare_for_minimum_k),
    QUANTIZED(Q5_K, q5_K, Q8_K, q8_K, SUPER, 0, 2, PREPARED_K, prepare_for_minimum_k),
    {Q6_K, Q8_K, sizeof(block_q6_K), sizeof(block_q8_K), SUPER, offsetof(block_q6_K, d), 1, true, COLUMNS, 0, 1,
     PREPARED_Q6_K, prepare_scales_k, all_tile_q6_K},
    {F16, F16, 2, 2, 1, 0, 1, true, FLOAT_TILE, VERIFIED, 1, FLOAT_TILE, prepare_f16, all_tile_f16},
    {F32, F32, 4, 4, 1, 0, 0, true, FLOAT_TILE, VERIFIED, STEP, 0, NULL, all_tile_f32},
};
enum { KERNELS = sizeof kernels / sizeof kernels[0] };

// The rows of one thread. Columns in groups whose scratch is at hand, rows in blocks that stay at hand while a group
// passes.
void multiply_rows(const kernel *use, int64_t lo, int64_t hi, int64_t n, int64_t k, const char *a, size_t a_bytes,
                   const char *b, size_t b_bytes, float *c, int64_t ldc) {
    const int64_t floats = use->floats * k, tiles_at_once = floats ? AT_ONCE / floats : n;
    const int64_t group = (tiles_at_once > 1 ? tiles_at_once : 1) * use->tile;
    for (int64_t first = 0; first < n; first += group) {
        const int64_t end = n < first + group ? n : first + group;
        const int64_t tiles = (end - first + use->tile - 1) / use->tile;
        int64_t rows = tiles > 1 ? (int64_t)(ROW_BYTES / a_bytes) / ROWS_TOGETHER * ROWS_TOGETHER : hi - lo;
        rows = rows < ROWS_TOGETHER ? ROWS_TOGETHER : rows;
        for (int64_t row = lo; row < hi; row += rows)
            // Tiles of about one width: three columns beside five cost less than one beside seven.
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t from = first + (end - first) * t / tiles, to = first + (end - first) * (t + 1) / tiles;
                const bool rest = hi - row < ROWS_TOGETHER && hi - lo >= ROWS_TOGETHER;  // goes with some before
                const job w = {.lo = rest ? hi - ROWS_TOGETHER : row,
                               .hi = row + rows < hi ? row + rows : hi,
                               .k = k,
                               .a = a,
                               .b = b + from * b_bytes,
                               .a_bytes = a_bytes,
                               .b_bytes = b_bytes,
                               .prepared = scratch + t * floats,
                               .c = c + from * ldc,
                               .ldc = ldc};
                if (use->prepare && row == lo) use->prepare(&w, (int)(to - from), scratch + t * floats);
                use->compute(&w, (int)(to - from));
            }
    }
}

// ggml's own function of that name, found in the library that called us; NULL where it has none.
static void *theirs(const char *name, const void *caller) {
    Dl_info info;
    if (!dladdr(caller, &info)) return NULL;
    void *library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return library ? dlsym(library, name) : NULL;
}
// Kept: threads that look at once find the same.
#define HAND_ON(TYPE, NAME)                                          \
    static _Atomic(TYPE) next;                                       \
    TYPE handed_on = atomic_load(&next);                             \
    if (!handed_on) {                                                \
        handed_on = (TYPE)theirs(NAME, __builtin_return_address(0)); \
        atomic_store(&next, handed_on);                              \
    }

static const kernel *own[TYPES];
static atomic_long asked;

const kernel *kernel_of(int type, int64_t blocks) {
    if (type < 0 || type >= TYPES || !own[type]) return NULL;
    const kernel *use = own[type];
    return blocks % use->step == 0 && use->floats * blocks <= SCRATCH ? use : NULL;
}

static const kernel *kernel_for(int64_t n, int64_t k, int a_type, int b_type, int c_type) {
    const kernel *use = c_type == F32 ? kernel_of(a_type, k) : NULL;
    return use && use->column_type == b_type && (!use->columns || n <= use->columns) ? use : NULL;
}

static from_float_fn quantizers[TYPES];

from_float_fn quantizer(int column_type) { return quantizers[column_type]; }

// ggml asks this of every thread, twice where columns have to be quantized first: false leaves the product to it.
// Everything that decides is the same for all threads.
bool llamafile_sgemm(const compute_params *params, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda,
                     const void *b, int64_t ldb, void *c, int64_t ldc, int a_type, int b_type, int c_type) {
    const kernel *use = kernel_for(n, k, a_type, b_type, c_type);
    if (params->thread == 0) atomic_fetch_add_explicit(&asked, 1, memory_order_relaxed);
    if (!use) {
        HAND_ON(product_fn, "llamafile_sgemm")
        return handed_on && handed_on(params, m, n, k, a, lda, b, ldb, c, ldc, a_type, b_type, c_type);
    }
    multiply_rows(use, first_row(m, params->thread, params->threads), first_row(m, params->thread + 1, params->threads),
                  n, k, a, lda * use->a_bytes, b, ldb * use->b_bytes, c, ldc);
    return true;
}

// ggml computes eight columns and more of K types in tiles, which round otherwise: passes that verify are left to the
// above.
bool ggml_compute_forward_mul_mat_tiled(const compute_params *params, tensor *product) {
    const int type = product->src[0]->type;
    const bool ours = type >= 0 && type < TYPES && own[type] && product->src[1]->ne[1] <= VERIFIED;
    if (ours) return false;
    HAND_ON(tiled_fn, "ggml_compute_forward_mul_mat_tiled")
    return handed_on && handed_on(params, product);
}

static bool contiguous(const tensor *t) {
    size_t bytes = sizeof(float);
    for (int i = 0; i < 4; bytes *= t->ne[i++])
        if (t->ne[i] != 1 && t->nb[i] != bytes) return false;
    return true;
}

static int64_t size(const tensor *t) { return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]; }

// One number everywhere. ggml goes row by row, and libllama makes rows of one number of a vocabulary.
void ggml_compute_forward_fill(const compute_params *params, tensor *result) {
    if (result->type != F32 || !contiguous(result)) {
        HAND_ON(forward_fn, "ggml_compute_forward_fill")
        if (!handed_on) abort();
        handed_on(params, result);
        return;
    }
    float number, *to = result->data;
    memcpy(&number, result->op_params, sizeof number);
    const int64_t n = size(result), end = n * (params->thread + 1) / params->threads;
    for (int64_t i = n * params->thread / params->threads; i < end; i++) to[i] = number;
}

// Two tensors one after the other. ggml goes number by number.
void ggml_compute_forward_concat(const compute_params *params, tensor *result) {
    const tensor *first = result->src[0], *second = result->src[1];
    bool outermost = true;
    for (int i = result->op_params[0] + 1; i < 4; i++) outermost &= result->ne[i] == 1;
    if (result->type != F32 || !outermost || !contiguous(result) || !contiguous(first) || !contiguous(second)) {
        HAND_ON(forward_fn, "ggml_compute_forward_concat")
        if (!handed_on) abort();
        handed_on(params, result);
        return;
    }
    const int64_t n = size(result), border = size(first);
    const int64_t from = n * params->thread / params->threads, end = n * (params->thread + 1) / params->threads;
    float *to = result->data;
    if (from < border)
        memcpy(to + from, (float *)first->data + from, sizeof(float) * ((end < border ? end : border) - from));
    const int64_t start = from > border ? from : border;
    if (start < end) memcpy(to + start, (float *)second->data + start - border, sizeof(float) * (end - start));
}

static uint64_t noise_state;
static uint32_t noise(void) {  // SplitMix64
    uint64_t z = noise_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (uint32_t)((z ^ z >> 31) >> 32);
}

// Bytes that are sound blocks: any quants, and scales between 2^-3 and 2 of either sign.
static void fill(char *to, int64_t blocks, size_t bytes) {
    for (size_t i = 0; i < blocks * bytes; i++) {
        const char byte = (char)noise();
        to[i] = byte == -128 ? 127 : byte;  // quantized activations end at 127, and of Q8_0 the size would not fit
    }
}
static void fill_halves(char *to, int64_t blocks, size_t bytes, size_t at, int halves) {
    for (int64_t i = 0; i < blocks; i++)
        for (int h = 0; h < halves; h++) {
            const uint16_t number = (uint16_t)((noise() & 0x83FF) | (12 + noise() % 4) << 10);
            memcpy(to + i * bytes + at + 2 * h, &number, 2);
        }
}
static void fill_floats(char *to, int64_t blocks, size_t bytes) {
    for (int64_t i = 0; i < blocks; i++) {
        const uint32_t number = (noise() & 0x807FFFFF) | (124 + noise() % 4) << 23;
        memcpy(to + i * bytes, &number, 4);
    }
}

static void fill_sums(block_q8_K *to, int64_t blocks) {
    for (int64_t i = 0; i < blocks; i++)
        for (int part = 0; part < SUPER / 16; part++) {
            to[i].sums[part] = 0;
            for (int at = 0; at < 16; at++) to[i].sums[part] += to[i].qs[16 * part + at];
        }
}

// Whether a kernel gives what ggml's dot product of that type gives: bit by bit where it sums in the same order, else
// to what another order may change, and then the same bits at every width and for any rows.
static bool agrees(const kernel *use, dot_fn dot) {
    enum { LONGEST = 199, BYTES = sizeof(block_q8_K) };
    enum { ROWS = 11, FEW = 5, INNER = 2 };                    // more than go together, and fewer
    enum { MOST = 2 * COLUMNS + 3 };                           // columns: tiles of every width
    static const int lengths[] = {1, 2, 9, 64, 128, LONGEST};  // of a row in blocks: steps of float weights, and rests
    static char a[ROWS * LONGEST * BYTES], b[MOST * LONGEST * BYTES] __attribute__((aligned(8)));
    static float c[ROWS * MOST], wanted[ROWS * MOST], few[FEW];
    noise_state = (uint64_t)use->type;
    for (size_t at = 0; at < sizeof lengths / sizeof lengths[0]; at++) {
        const int64_t k = lengths[at];
        if (k % use->step || use->floats * k > SCRATCH || (use->block == SUPER && k > 9)) continue;
        const size_t a_bytes = k * use->a_bytes, b_bytes = k * use->b_bytes;
        fill(a, ROWS * k, use->a_bytes);
        fill(b, MOST * k, use->b_bytes);
        if (use->type == F32) {
            fill_floats(a, ROWS * k, use->a_bytes);
        } else {
            fill_halves(a, ROWS * k, use->a_bytes, use->halves_at, use->halves);
        }
        if (use->column_type == F32 || use->column_type == Q8_K) {
            fill_floats(b, MOST * k, use->b_bytes);
        } else {
            fill_halves(b, MOST * k, use->b_bytes, 0, use->column_type == Q8_1 ? 2 : 1);
        }
        if (use->column_type == Q8_K) fill_sums((block_q8_K *)b, MOST * k);
        float most = 0;
        for (int64_t j = 0; j < MOST; j++) {
            float *ours = wanted + j * ROWS, theirs[ROWS];
            multiply_rows(use, 0, ROWS, 1, k, a, a_bytes, b + j * b_bytes, b_bytes, ours, ROWS);
            multiply_rows(use, 0, FEW, 1, k, a, a_bytes, b + j * b_bytes, b_bytes, few, FEW);
            if (memcmp(few, ours, sizeof few)) return false;
            for (int64_t i = 0; i < ROWS; i++) {
                dot((int)(k * use->block), &theirs[i], 0, a + i * a_bytes, 0, b + j * b_bytes, 0, 1);
                if (!isfinite(theirs[i])) return false;
                most = fabsf(theirs[i]) > most ? fabsf(theirs[i]) : most;
            }
            for (int64_t i = 0; i < ROWS; i++)
                if (use->same_order ? memcmp(&theirs[i], &ours[i], 4) != 0
                                    : !(fabsf(theirs[i] - ours[i]) <= OTHER_ORDER * most))
                    return false;
        }
        for (int64_t n = 1; n <= MOST; n++) {
            multiply_rows(use, 0, ROWS, n, k, a, a_bytes, b, b_bytes, c, ROWS);
            if (memcmp(c, wanted, n * ROWS * sizeof *c)) return false;
            memset(c, 0, sizeof c);  // other rows together, and few of them
            multiply_rows(use, 0, INNER, n, k, a, a_bytes, b, b_bytes, c, ROWS);
            multiply_rows(use, INNER, ROWS, n, k, a, a_bytes, b, b_bytes, c, ROWS);
            if (memcmp(c, wanted, n * ROWS * sizeof *c)) return false;
        }
    }
    return true;
}

// From now on products of the types that agree with ggml's dot products are computed here: a bit each, 1 << type.
uint64_t dspark_kernels_start(const type_traits *(*traits)(int type)) {
    uint64_t types = 0;
    for (int i = 0; i < KERNELS; i++) {
        const type_traits *known = traits(kernels[i].type);
        const bool same =
            known && known->dot && known->column_type == kernels[i].column_type && agrees(&kernels[i], known->dot);
        own[kernels[i].type] = same ? &kernels[i] : NULL;
        const int column_type = kernels[i].column_type;
        const type_traits *columns = column_type == F32 ? NULL : traits(column_type);
        if (same && columns) quantizers[column_type] = columns->from_float;
        types |= same ? 1ull << kernels[i].type : 0;
    }
    return types;
}

// Whether a product of n columns and k blocks a row is computed here.
bool dspark_kernels_covers(int64_t n, int64_t k, int a_type, int b_type, int c_type) {
    return kernel_for(n, k, a_type, b_type, c_type) != NULL;
}

// Times that ggml has asked for a product.
long dspark_kernels_asked(void) { return atomic_load(&asked); }
