// A DSpark or DFlash drafter on a CPU: the pass of a block and the taking in of features, by the products of
// cpu_kernels.c.
//
// libllama runs the same files. Its graph waits for all threads after each of some hundred operations, is built anew
// when features and blocks alternate, and makes logits of the whole vocabulary, several times over, of a head that
// knows a part of it: of a small drafter's pass that is the larger part. Here threads wait a handful of times a layer
// and logits are those of the head.
//
// Shapes: n columns (rows of blocks, or tokens of context), d hidden size, D size of a head. Matrices are as in the
// file, [rows][width].

#include "cpu_kernels.h"

#if defined(_OPENMP) && !defined(__clang__)  // threads of ggml's own runtime: two would compete for the cores
#include <math.h>
#include <omp.h>
#include <stdlib.h>

enum { ROWS = 32 };   // of a block at most
enum { LANES = 32 };  // keys at once
enum { HEAD = 256 };  // most of D

// ggml.h
typedef void (*to_float_fn)(const void *from, float *to, int64_t n);
typedef struct {
    const char *name;
    int64_t block, interleaved;
    size_t bytes;
    bool quantized;
    to_float_fn to_float;
} type_layout;

// cpu_drafter.py knows these three.
typedef struct {
    int64_t type, rows, width;
    const char *data;
} matrix;

typedef struct {
    matrix query, key, value, output, gate, up, down;
    const float *input_norm, *query_norm, *key_norm, *ffn_norm;
} layer;

typedef struct {
    int64_t layers, d, heads, kv_heads, head, ffn, rank;  // rank 0: no Markov head
    int64_t sequences, cells, columns, threads, causal;
    float epsilon, rope_base, confidence_bias;
    matrix embedding, fusion, vocabulary, markov_embedding, markov_output;
    const float *fused_norm, *output_norm, *confidence;  // confidence [d + rank]; NULL: no such head
    const int64_t *to_target;                            // ids of a reduced vocabulary; NULL: they are the target's
    const layer *layer;
    const type_layout *(*layout)(int type);
} description;

typedef struct {
    description is;
    int64_t stride;                // cells of a cached head, a whole number of lanes
    uint16_t *keys;                // [layer][sequence][kv head][D][stride]: keys side by side, so that lanes are keys
    uint16_t *values;              // [layer][sequence][kv head][stride][D]
    float *hidden, *branch;        // [column][d]
    float *queries, *mixed;        // [column][heads * D]
    float *new_keys, *new_values;  // [layer][column][kv heads * D]; a block's are of one layer
    float *gates, *ups;            // [column][ffn]
    float *cosines, *sines;        // [column][D / 2]
    double *frequencies;           // [D / 2]: of RoPE, radians a position
    float *biases;                 // [block][rows of the vocabulary]
    struct own {                   // of each thread
        char *packed;              // columns as the products want them
        float *normed;             // [column][d]
        float *scores;             // [row of a block][stride + ROWS]
        float *embedded;           // [block][rank]
        int64_t *previous;         // [block]: the token before
        struct best {
            float logit;
            int64_t row;
        } *best[2];  // [block]: of this thread's rows. In turn: the others still read the last ones
    } *own;
} drafter;

// One of the threads of a parallel region: OpenMP may give fewer than it was asked for.
typedef struct {
    int thread, threads;
} worker;

typedef struct {
    int64_t from, to;
} span;

INLINE worker myself(void) { return (worker){omp_get_thread_num(), omp_get_num_threads()}; }

INLINE span share(int64_t n, worker me) { return (span){n * me.thread / me.threads, n * (me.thread + 1) / me.threads}; }

// ---- small parts ----

// exp(x), to 1e-7 of it. Plain arithmetic, so that loops over it become vectors.
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float sum = 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = (sum * r + 1.0f) * r + 1.0f;
    int32_t bits;
    float power;
    memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4B400000 + 127) << 23;
    memcpy(&power, &bits, 4);
    return sum * power;
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    float parts[16] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++) parts[l] += a[i + l] * b[i + l];
    for (; i < n; i++) sum += a[i] * b[i];
    for (int l = 0; l < 16; l++) sum += parts[l];
    return sum;
}

static void normalize(const float *x, const float *weight, float epsilon, int64_t n, float *to) {
    const float scale = 1.0f / sqrtf(dot(x, x, n) / (float)n + epsilon);
    for (int64_t i = 0; i < n; i++) to[i] = x[i] * scale * weight[i];
}

// Halves of a head are turned against each other (NeoX).
static void rotate(float *x, const float *cosines, const float *sines, int64_t head) {
    for (int64_t i = 0; i < head / 2; i++) {
        const float a = x[i], b = x[i + head / 2];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + head / 2] = b * cosines[i] + a * sines[i];
    }
}

static void angles(const drafter *p, int64_t column, int64_t position) {
    const int64_t half = p->is.head / 2;
    for (int64_t i = 0; i < half; i++) {
        const double angle = (double)position * p->frequencies[i];
        p->cosines[column * half + i] = (float)cos(angle);
        p->sines[column * half + i] = (float)sin(angle);
    }
}

INLINE void widen(const uint16_t *from, float *to, int64_t n) {
    for (int64_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
}

static void row_of(const drafter *p, const matrix *from, int64_t row, float *to) {
    const type_layout *layout = p->is.layout((int)from->type);
    const char *at = from->data + row * (from->width / layout->block) * (int64_t)layout->bytes;
    if (from->type == F32) {
        memcpy(to, at, from->width * sizeof(float));
    } else {
        layout->to_float(at, to, from->width);
    }
}

// ---- products ----

INLINE const kernel *kernel_for(const drafter *p, const matrix *w) {
    return kernel_of((int)w->type, w->width / p->is.layout((int)w->type)->block);
}

static size_t column_bytes(const drafter *p, const matrix *w) {
    const kernel *use = kernel_for(p, w);
    return w->width / use->block * use->b_bytes;
}

// n columns x [n][width] as the products with `w` want them, in this thread's own place.
static void pack(const drafter *p, worker me, const matrix *w, const float *x, int64_t n) {
    const kernel *use = kernel_for(p, w);
    const from_float_fn convert = quantizer(use->column_type);
    const size_t bytes = column_bytes(p, w);
    for (int64_t j = 0; j < n; j++) {
        char *to = p->own[me.thread].packed + j * bytes;
        if (convert) {
            convert(x + j * w->width, to, w->width);
        } else {
            memcpy(to, x + j * w->width, bytes);
        }
    }
}

INLINE span rows_of(const matrix *w, worker me) {
    return (span){first_row(w->rows, me.thread, me.threads), first_row(w->rows, me.thread + 1, me.threads)};
}

// This thread's rows of `w` times the columns it packed, into [n][rows]; returns which rows.
static span multiply(const drafter *p, worker me, const matrix *w, int64_t n, float *to) {
    const kernel *use = kernel_for(p, w);
    const int64_t blocks = w->width / use->block;
    const span mine = rows_of(w, me);
    multiply_rows(use, mine.from, mine.to, n, blocks, w->data, blocks * use->a_bytes, p->own[me.thread].packed,
                  column_bytes(p, w), to, w->rows);
    return mine;
}

// `w` times n columns added to the hidden states.
static void add_product(const drafter *p, worker me, const matrix *w, const float *x, int64_t n) {
    pack(p, me, w, x, n);
    const span mine = multiply(p, me, w, n, p->branch);
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = mine.from; i < mine.to; i++) p->hidden[j * p->is.d + i] += p->branch[j * p->is.d + i];
}

static const float *normed(const drafter *p, worker me, const float *weight, int64_t n) {
    float *to = p->own[me.thread].normed;
    for (int64_t j = 0; j < n; j++)
        normalize(p->hidden + j * p->is.d, weight, p->is.epsilon, p->is.d, to + j * p->is.d);
    return to;
}

// ---- attention ----

INLINE int64_t cached_head(const drafter *p, int64_t at, int64_t sequence, int64_t kv_head) {
    return ((at * p->is.sequences + sequence) * p->is.kv_heads + kv_head) * p->stride * p->is.head;
}

// One head of one block: its rows see `length` cached tokens and one another (before themselves only where causal).
static void attend(const drafter *p, worker me, int64_t at, int64_t sequence, int64_t length, int64_t first,
                   int64_t rows, int64_t head) {
    const int64_t D = p->is.head, kv_head = head * p->is.kv_heads / p->is.heads, width = p->stride + ROWS;
    const uint16_t *keys = p->keys + cached_head(p, at, sequence, kv_head);
    const uint16_t *values = p->values + cached_head(p, at, sequence, kv_head);
    float *scores = p->own[me.thread].scores;
    const float *queries[ROWS];
    for (int64_t r = 0; r < rows; r++) queries[r] = p->queries + ((first + r) * p->is.heads + head) * D;
    for (int64_t t = 0; t < length; t += LANES) {
        float sums[ROWS][LANES], key[LANES];
        memset(sums, 0, rows * sizeof sums[0]);
        for (int64_t i = 0; i < D; i++) {
            widen(keys + i * p->stride + t, key, LANES);
            for (int64_t r = 0; r < rows; r++)
                for (int l = 0; l < LANES; l++) sums[r][l] += queries[r][i] * key[l];
        }
        for (int64_t r = 0; r < rows; r++) memcpy(scores + r * width + t, sums[r], sizeof sums[r]);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *row = scores + r * width, most = -INFINITY, sum = 0;
        const int64_t seen = length + (p->is.causal ? r + 1 : rows);
        for (int64_t t = length; t < seen; t++)
            row[t] = dot(queries[r], p->new_keys + ((first + t - length) * p->is.kv_heads + kv_head) * D, D);
        const float scale = 1.0f / sqrtf((float)D);
        for (int64_t t = 0; t < seen; t++) most = row[t] > most ? row[t] : most;
        for (int64_t t = 0; t < seen; t++) row[t] = exponential((row[t] - most) * scale);
        for (int64_t t = 0; t < seen; t++) sum += row[t];
        for (int64_t t = 0; t < seen; t++) row[t] /= sum;
        for (int64_t t = seen; t < length + rows; t++) row[t] = 0;
    }
    float sums[ROWS][HEAD], value[HEAD];
    memset(sums, 0, rows * sizeof sums[0]);
    for (int64_t t = 0; t < length + rows; t++) {
        const float *from = value;
        if (t < length) {
            widen(values + t * D, value, D);
        } else {
            from = p->new_values + ((first + t - length) * p->is.kv_heads + kv_head) * D;
        }
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < D; i++) sums[r][i] += scores[r * width + t] * from[i];
    }
    for (int64_t r = 0; r < rows; r++)
        memcpy(p->mixed + ((first + r) * p->is.heads + head) * D, sums[r], D * sizeof(float));
}

// Keys and values of one token and head go into the cache.
static void store(const drafter *p, int64_t at, int64_t sequence, int64_t position, int64_t kv_head, const float *key,
                  const float *value) {
    uint16_t *keys = p->keys + cached_head(p, at, sequence, kv_head) + position;
    uint16_t *values = p->values + cached_head(p, at, sequence, kv_head) + position * p->is.head;
    for (int64_t i = 0; i < p->is.head; i++) {
        keys[i * p->stride] = _cvtss_sh(key[i], _MM_FROUND_TO_NEAREST_INT);
        values[i] = _cvtss_sh(value[i], _MM_FROUND_TO_NEAREST_INT);
    }
}

// ---- layers and heads ----

// All rows of `blocks` blocks through one layer; block b begins after lengths[b] cached tokens.
static void through(const drafter *p, worker me, int64_t at, int64_t blocks, int64_t rows, const int32_t *sequences,
                    const int32_t *lengths) {
    const description *is = &p->is;
    const layer *now = &is->layer[at];
    const int64_t n = blocks * rows, heads = is->heads + is->kv_heads;
    const float *x = normed(p, me, now->input_norm, n);
    pack(p, me, &now->query, x, n);
    multiply(p, me, &now->query, n, p->queries);
    pack(p, me, &now->key, x, n);
    multiply(p, me, &now->key, n, p->new_keys);
    pack(p, me, &now->value, x, n);
    multiply(p, me, &now->value, n, p->new_values);
#pragma omp barrier
    const span turned = share(n * heads, me);
    for (int64_t task = turned.from; task < turned.to; task++) {
        const int64_t j = task / heads, head = task % heads, half = is->head / 2;
        const bool query = head < is->heads;
        float *of_head = query ? p->queries + (j * is->heads + head) * is->head
                               : p->new_keys + (j * is->kv_heads + head - is->heads) * is->head;
        normalize(of_head, query ? now->query_norm : now->key_norm, is->epsilon, is->head, of_head);
        rotate(of_head, p->cosines + j * half, p->sines + j * half, is->head);
    }
#pragma omp barrier
    const span mixed = share(blocks * is->heads, me);
    for (int64_t task = mixed.from; task < mixed.to; task++) {
        const int64_t b = task / is->heads;
        attend(p, me, at, sequences[b], lengths[b], b * rows, rows, task % is->heads);
    }
#pragma omp barrier
    add_product(p, me, &now->output, p->mixed, n);
#pragma omp barrier
    x = normed(p, me, now->ffn_norm, n);
    pack(p, me, &now->gate, x, n);
    const span mine = multiply(p, me, &now->gate, n, p->gates);
    pack(p, me, &now->up, x, n);
    multiply(p, me, &now->up, n, p->ups);
    for (int64_t j = 0; j < n; j++) {
        float *gates = p->gates + j * is->ffn, *ups = p->ups + j * is->ffn;
        for (int64_t i = mine.from; i < mine.to; i++) gates[i] *= ups[i] / (1.0f + exponential(-gates[i]));
    }
#pragma omp barrier
    add_product(p, me, &now->down, p->gates, n);
#pragma omp barrier
}

// Position k of all blocks: the bias of the token before is added to this thread's rows of the logits, and their best
// is found.
static void correct(const drafter *p, worker me, int64_t k, int64_t blocks, int64_t rows, float *logits,
                    float *confidence) {
    const description *is = &p->is;
    const struct own *own = &p->own[me.thread];
    const span mine = rows_of(&is->vocabulary, me);
    if (is->rank) {
        for (int64_t b = 0; b < blocks; b++)
            row_of(p, &is->markov_embedding, own->previous[b], own->embedded + b * is->rank);
        pack(p, me, &is->markov_output, own->embedded, blocks);
        multiply(p, me, &is->markov_output, blocks, p->biases);
    }
    for (int64_t b = 0; b < blocks; b++) {
        float *row = logits + (b * rows + k) * is->vocabulary.rows;
        const float *bias = p->biases + b * is->vocabulary.rows;
        if (is->rank)
            for (int64_t i = mine.from; i < mine.to; i++) row[i] += bias[i];
        struct best best = {-INFINITY, mine.from};
        for (int64_t i = mine.from; i < mine.to; i++)
            if (row[i] > best.logit) best = (struct best){row[i], i};
        own->best[k % 2][b] = best;
        if (me.thread == 0 && is->confidence) {
            const float *state = own->normed + (b * rows + k) * is->d;
            const float logit =
                dot(state, is->confidence, is->d) + dot(own->embedded + b * is->rank, is->confidence + is->d, is->rank);
            confidence[b * rows + k] = 1.0f / (1.0f + expf(-logit - is->confidence_bias));
        }
    }
}

// The best of all threads' rows; the first of equals.
static int64_t chosen(const drafter *p, worker me, int64_t k, int64_t b) {
    struct best best = p->own[0].best[k % 2][b];
    for (int t = 1; t < me.threads; t++) {
        const struct best other = p->own[t].best[k % 2][b];
        if (other.logit > best.logit) best = other;
    }
    return best.row;
}

// ---- for cpu_drafter.py ----

// Whether this build can run a drafter, and the products of such a matrix are computed here.
bool dspark_drafter_fits(int type, int64_t blocks) { return kernel_of(type, blocks) != NULL; }

void dspark_drafter_free(drafter *p) {
    if (!p) return;
    for (int64_t t = 0; p->own && t < p->is.threads; t++) {
        struct own *own = &p->own[t];
        void *parts[] = {own->packed,   own->normed,  own->scores, own->embedded,
                         own->previous, own->best[0], own->best[1]};
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) free(parts[i]);
    }
    void *parts[] = {p->own,        p->keys,  p->values, p->hidden,  p->branch, p->queries, p->mixed,      p->new_keys,
                     p->new_values, p->gates, p->ups,    p->cosines, p->sines,  p->biases,  p->frequencies};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) free(parts[i]);
    free(p);
}

// Everything it needs besides the weights, which stay the caller's; NULL without memory.
drafter *dspark_drafter_new(const description *is) {
    drafter *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->is = *is;
    p->stride = (is->cells + LANES - 1) / LANES * LANES;
    bool whole = true;
#define TAKE(TO, COUNT) whole &= (TO = calloc((size_t)(COUNT), sizeof *TO)) != NULL
    const int64_t columns = is->columns, cached = is->layers * is->sequences * is->kv_heads * p->stride * is->head;
    TAKE(p->keys, cached);
    TAKE(p->values, cached);
    TAKE(p->hidden, columns * is->d);
    TAKE(p->branch, columns * is->d);
    TAKE(p->queries, columns * is->heads * is->head);
    TAKE(p->mixed, columns * is->heads * is->head);
    TAKE(p->new_keys, is->layers * columns * is->kv_heads * is->head);
    TAKE(p->new_values, is->layers * columns * is->kv_heads * is->head);
    TAKE(p->gates, columns * is->ffn);
    TAKE(p->ups, columns * is->ffn);
    TAKE(p->cosines, columns * is->head / 2);
    TAKE(p->sines, columns * is->head / 2);
    TAKE(p->biases, columns * is->vocabulary.rows);
    TAKE(p->frequencies, is->head / 2);
    TAKE(p->own, is->threads);
    size_t widest = 0;
    const matrix *all[] = {&is->fusion, &is->vocabulary, &is->markov_output};
    for (int64_t i = 0; i < (is->rank ? 3 : 2); i++) {
        const size_t bytes = column_bytes(p, all[i]);
        widest = bytes > widest ? bytes : widest;
    }
    for (int64_t at = 0; at < is->layers; at++) {
        const layer *now = &is->layer[at];
        const matrix *of_layer[] = {&now->query, &now->key, &now->value, &now->output,
                                    &now->gate,  &now->up,  &now->down};
        for (int i = 0; i < 7; i++) {
            const size_t bytes = column_bytes(p, of_layer[i]);
            widest = bytes > widest ? bytes : widest;
        }
    }
    for (int64_t t = 0; whole && t < is->threads; t++) {
        struct own *own = &p->own[t];
        TAKE(own->packed, columns * widest);
        TAKE(own->normed, columns * is->d);
        TAKE(own->scores, ROWS * (p->stride + ROWS));
        TAKE(own->embedded, columns * (is->rank + 1));
        TAKE(own->previous, columns);
        TAKE(own->best[0], columns);
        TAKE(own->best[1], columns);
    }
#undef TAKE
    if (whole) {
        const int64_t half = is->head / 2;
        for (int64_t i = 0; i < half; i++) p->frequencies[i] = pow(is->rope_base, -(double)i / (double)half);
        return p;
    }
    dspark_drafter_free(p);
    return NULL;
}

// Features [n][width of the fusion] of n tokens at `positions` become cached keys and values; n at most `columns`.
void dspark_drafter_take_in(drafter *p, int64_t n, const int32_t *sequences, const int32_t *positions,
                            const float *features) {
    const description *is = &p->is;
    const int64_t of_layer = is->columns * is->kv_heads * is->head, half = is->head / 2;
#pragma omp parallel num_threads((int)is->threads)
    {
        const worker me = myself();
        const span mine = share(n, me);
        for (int64_t j = mine.from; j < mine.to; j++) angles(p, j, positions[j]);
        pack(p, me, &is->fusion, features, n);
        multiply(p, me, &is->fusion, n, p->hidden);
#pragma omp barrier
        const float *x = normed(p, me, is->fused_norm, n);
        for (int64_t at = 0; at < is->layers; at++) {
            pack(p, me, &is->layer[at].key, x, n);
            multiply(p, me, &is->layer[at].key, n, p->new_keys + at * of_layer);
            pack(p, me, &is->layer[at].value, x, n);
            multiply(p, me, &is->layer[at].value, n, p->new_values + at * of_layer);
        }
#pragma omp barrier
        const span stored = share(is->layers * n * is->kv_heads, me);
        for (int64_t task = stored.from; task < stored.to; task++) {
            const int64_t at = task / (n * is->kv_heads), j = task / is->kv_heads % n, head = task % is->kv_heads;
            float *key = p->new_keys + at * of_layer + (j * is->kv_heads + head) * is->head;
            const float *value = p->new_values + at * of_layer + (j * is->kv_heads + head) * is->head;
            normalize(key, is->layer[at].key_norm, is->epsilon, is->head, key);
            rotate(key, p->cosines + j * half, p->sines + j * half, is->head);
            store(p, at, sequences[j], positions[j], head, key, value);
        }
    }
}

// Blocks of `rows` rows, [anchor, mask, ...] each, after lengths[b] cached tokens of sequences[b]; blocks * rows at
// most `columns`. Into logits [blocks * rows][rows of the vocabulary], corrected along the best tokens; those, as rows
// of the vocabulary, into `best`; into `confidence` their probabilities of being accepted, where a head says so.
void dspark_drafter_draft(drafter *p, int64_t blocks, int64_t rows, const int32_t *sequences, const int32_t *lengths,
                          const int32_t *anchors, int32_t mask, float *logits, int64_t *best, float *confidence) {
    const description *is = &p->is;
#pragma omp parallel num_threads((int)is->threads)
    {
        const worker me = myself();
        const struct own *own = &p->own[me.thread];
        const span mine = share(blocks * rows, me);
        for (int64_t j = mine.from; j < mine.to; j++) {
            row_of(p, &is->embedding, j % rows ? mask : anchors[j / rows], p->hidden + j * is->d);
            angles(p, j, lengths[j / rows] + j % rows);
        }
#pragma omp barrier
        for (int64_t at = 0; at < is->layers; at++) through(p, me, at, blocks, rows, sequences, lengths);
        pack(p, me, &is->vocabulary, normed(p, me, is->output_norm, blocks * rows), blocks * rows);
        multiply(p, me, &is->vocabulary, blocks * rows, logits);
        for (int64_t b = 0; b < blocks; b++) own->previous[b] = anchors[b];
        for (int64_t k = 0; k < rows; k++) {
            correct(p, me, k, blocks, rows, logits, confidence);
#pragma omp barrier
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t row = chosen(p, me, k, b);
                own->previous[b] = is->to_target ? is->to_target[row] : row;
                if (me.thread == 0) best[b * rows + k] = row;
            }
        }
    }
}

// The first `length` cached tokens of a sequence for another one too.
void dspark_drafter_fork(drafter *p, int64_t from, int64_t to, int64_t length) {
    const description *is = &p->is;
    for (int64_t at = 0; at < is->layers; at++)
        for (int64_t head = 0; head < is->kv_heads; head++) {
            const int64_t a = cached_head(p, at, from, head), b = cached_head(p, at, to, head);
            for (int64_t i = 0; i < is->head; i++)
                memcpy(p->keys + b + i * p->stride, p->keys + a + i * p->stride, length * sizeof *p->keys);
            memcpy(p->values + b, p->values + a, length * is->head * sizeof *p->values);
        }
}
#endif
