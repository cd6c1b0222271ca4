/* Matmul on host memory through the plan's metadata order, and the search over algorithms. */
#include "emu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* The problem as sparse [rows, inner] @ dense [inner, cols]; where B is the structured operand
 * this is the transposed problem. */
typedef struct {
    const plan_t *plan;
    const matmul_t *matmul;
    sparse_view_t view;
    layout_map_t map;
    int64_t rows, inner, cols;
    bool sparse_is_a;
    int bad;
    unsigned long call;
} problem_t;

static problem_t describe(const plan_t *plan) {
    const matmul_t *m = &plan->matmul->as.matmul;
    problem_t p = {.plan = plan, .matmul = m, .view = plan_sparse_view(m)};
    p.sparse_is_a = m->a->as.mat.structured;
    p.rows = p.view.rows;
    p.inner = p.view.cols;
    p.cols = p.sparse_is_a ? m->d->as.mat.cols : m->d->as.mat.rows;
    layout_prepare(&p.map, plan->layout, p.rows, p.inner);
    p.bad = plan->params.id < 256 ? emu.bad[plan->params.id] : GOOD;
    p.call = p.bad == NON_DETERMINISTIC ? atomic_fetch_add(&emu.calls_of_bad, 1) : 0;
    return p;
}

/* The dense operand as [inner, cols], in the type that the sum is kept in. */
#define DEFINE_EXPAND(TYPE) \
    static void expand_##TYPE(const problem_t *p, const void *dense, TYPE *out) { \
        const matmul_t *m = p->matmul; \
        const mat_t *mat = p->sparse_is_a ? &m->b->as.mat : &m->a->as.mat; \
        int op = p->sparse_is_a ? m->op_b : m->op_a; \
        int64_t row = mat->order == ORDER_ROW ? mat->ld : 1; \
        int64_t col = mat->order == ORDER_ROW ? 1 : mat->ld; \
        bool turned = p->sparse_is_a ? op == OP_T : op == OP_N; \
        int64_t along_inner = turned ? col : row, along_cols = turned ? row : col; \
        for (int64_t k = 0; k < p->inner; k++) \
            for (int64_t n = 0; n < p->cols; n++) \
                out[k * p->cols + n] = \
                    (TYPE)load_number(dense, k * along_inner + n * along_cols, mat->dtype); \
    }

static int nibble_at(const problem_t *p, const uint8_t *metadata, int64_t row, int64_t group) {
    if (p->bad == WRONG_FROM_256_ROWS && p->rows >= 256) row ^= 8;
    int64_t nibble = layout_nibble(&p->map, row, group);
    return metadata[nibble >> 1] >> ((nibble & 1) * 4) & 0xF;
}

/* One row of the result: two products per group, in fp32 or in int32. */
#define DEFINE_ROW(TYPE) \
    static void row_##TYPE(const problem_t *p, const void *compressed, const uint8_t *metadata, \
                           const TYPE *restrict dense, int64_t row, TYPE *restrict sum) { \
        int64_t groups = p->inner / 4 - (p->bad == ALWAYS_WRONG); \
        memset(sum, 0, (size_t)p->cols * sizeof *sum); \
        for (int64_t g = 0; g < groups; g++) { \
            int nibble = nibble_at(p, metadata, row, g); \
            int64_t first = value_index(&p->view, row, 2 * g); \
            int64_t second = value_index(&p->view, row, 2 * g + 1); \
            TYPE v0 = (TYPE)load_number(compressed, first, p->view.dtype); \
            TYPE v1 = (TYPE)load_number(compressed, second, p->view.dtype); \
            const TYPE *restrict b0 = dense + (4 * g + (nibble & 3)) * p->cols; \
            const TYPE *restrict b1 = dense + (4 * g + (nibble >> 2)) * p->cols; \
            for (int64_t n = 0; n < p->cols; n++) sum[n] += v0 * b0[n] + v1 * b1[n]; \
        } \
    }

typedef int32_t integer;
DEFINE_EXPAND(float)
DEFINE_EXPAND(integer)
DEFINE_ROW(float)
DEFINE_ROW(integer)

static double activate(const matmul_t *m, double x) {
    if (m->relu) {
        if (x <= m->relu_threshold) x = 0;
        if (x > m->relu_upper) x = m->relu_upper;
    }
    if (m->gelu) {
        double inner = 0.7978845608028654 * (x + 0.044715 * x * x * x);
        x = m->gelu_scaling * 0.5 * x * (1 + tanh(inner));
    }
    return x;
}

static double disturb(const problem_t *p, int64_t row, int64_t col, double x) {
    if (p->bad == GIVES_NAN) return NAN;
    if (p->bad != NON_DETERMINISTIC || p->call % 2 == 0) return x;
    int64_t victim = (int64_t)(p->call * 2654435761u % (unsigned long)(p->rows * p->cols));
    return row * p->cols + col == victim ? 1.5 * x + 1 : x;
}

typedef struct {
    const float *alpha, *beta;
    const void *c;
    void *d;
    int batch;
} output_t;

static void finish(const problem_t *p, const output_t *o, int64_t row, int64_t col, double sum) {
    const matmul_t *m = p->matmul;
    const mat_t *c = &m->c->as.mat, *d = &m->d->as.mat;
    int64_t i = p->sparse_is_a ? row : col, j = p->sparse_is_a ? col : row;
    int64_t at = d->order == ORDER_ROW ? i * d->ld + j : j * d->ld + i;
    double alpha = m->alpha_vector ? o->alpha[i] : *o->alpha;
    double beta = m->beta_vector ? o->beta[i] : m->alpha_vector ? 0 : *o->beta;
    double x = alpha * disturb(p, row, col, sum);
    if (beta != 0) x += beta * load_number(o->c, at, c->dtype);
    if (m->bias != NULL) {
        int64_t bias = i + o->batch * m->bias_stride;
        x += load_number(m->bias, bias, p->view.dtype == R_8I ? R_32F : d->dtype);
    }
    store_number(o->d, at, d->dtype, activate(m, x));
}

static status_t run_batch(const problem_t *p, const void *compressed, const void *dense,
                          const output_t *o) {
    const uint8_t *metadata = (const uint8_t *)compressed + value_bytes(&p->view);
    float *expanded = malloc((size_t)(p->inner * p->cols) * sizeof *expanded);
    float *sum = malloc((size_t)p->cols * sizeof *sum);
    if (expanded == NULL || sum == NULL) {
        free(expanded);
        free(sum);
        return ALLOC_FAILED;
    }
    bool whole = p->view.dtype == R_8I;
    if (whole) expand_integer(p, dense, (integer *)expanded);
    else expand_float(p, dense, expanded);
    for (int64_t row = 0; row < p->rows; row++) {
        if (whole) row_integer(p, compressed, metadata, (integer *)expanded, row, (integer *)sum);
        else row_float(p, compressed, metadata, expanded, row, sum);
        for (int64_t col = 0; col < p->cols; col++)
            finish(p, o, row, col, whole ? (double)((integer *)sum)[col] : (double)sum[col]);
    }
    free(expanded);
    free(sum);
    return SUCCESS;
}

status_t run_matmul(const plan_t *plan, const float *alpha, const void *a, const void *b,
                    const float *beta, const void *c, void *d) {
    problem_t p = describe(plan);
    if (p.bad == NOT_SUPPORTED_AT_MATMUL) return NOT_SUPPORTED;
    if (p.bad == FAILS_AT_MATMUL) return EXECUTION_FAILED;
    const mat_t *dense_mat = p.sparse_is_a ? &p.matmul->b->as.mat : &p.matmul->a->as.mat;
    const mat_t *c_mat = &p.matmul->c->as.mat, *d_mat = &p.matmul->d->as.mat;
    int64_t size = value_bytes(&p.view) + plan_metadata_bytes(plan, &p.view);
    for (int i = 0; i < p.view.batches; i++) {
        const char *packed = p.sparse_is_a ? a : b, *dense = p.sparse_is_a ? b : a;
        if (p.view.batch_stride != 0) packed += i * size;
        dense += i * dense_mat->batch_stride * dtype_size(dense_mat->dtype);
        output_t o = {alpha, beta, NULL, NULL, i};
        o.c = (const char *)c + i * c_mat->batch_stride * dtype_size(c_mat->dtype);
        o.d = (char *)d + i * d_mat->batch_stride * dtype_size(d_mat->dtype);
        TRY(run_batch(&p, packed, dense, &o));
    }
    return SUCCESS;
}

static status_t check_pointers(const void *alpha, const void *a, const void *b, const void *beta,
                               const void *c, const void *d, const void *workspace) {
    if (!alpha || !a || !b || !beta || !c || !d) return INVALID_VALUE;
    bool aligned = aligned16(a) && aligned16(b) && aligned16(c) && aligned16(d);
    return aligned && aligned16(workspace) ? SUCCESS : INVALID_VALUE;
}

static status_t check_streams(void *const *streams, int32_t count) {
    if (count < 0 || (count > 0 && streams == NULL)) return INVALID_VALUE;
    emu.last_stream = count > 0 ? (long)(intptr_t)streams[0] : 0;
    return SUCCESS;
}

static void wait_us(int microseconds) {
    struct timespec left = {microseconds / 1000000, microseconds % 1000000 * 1000L};
    if (microseconds > 0) nanosleep(&left, NULL);
}

API status_t cusparseLtMatmul(const void *handle, const void *opaque, const void *alpha,
                              const void *a, const void *b, const void *beta, const void *c,
                              void *d, void *workspace, void **streams, int32_t stream_count) {
    ENTER(Matmul);
    if (emu.noop) return SUCCESS;
    plan_t *plan;
    TRY(find_plan(handle, opaque, &plan));
    TRY(check_pointers(alpha, a, b, beta, c, d, workspace));
    TRY(check_streams(streams, stream_count));
    for (int i = 0; i < 5; i++)
        if (plan->matmul->as.matmul.scale_mode[i] != 0) return NOT_SUPPORTED; /* not imitated */
    emu.last_workspace = (long)(intptr_t)workspace;
    emu.last_alg = plan->params.id;
    /* The whole workspace is written, so that too small an allocation is overrun. */
    if (workspace != NULL) memset(workspace, 0xC5, workspace_bytes(plan));
    wait_us(emu.delay_us[plan->params.id]);
    return run_matmul(plan, alpha, a, b, beta, c, d);
}

/* Like the library it believes every algorithm that reports success; the least delay wins. */
API status_t cusparseLtMatmulSearch(const void *handle, void *opaque, const void *alpha,
                                    const void *a, const void *b, const void *beta, const void *c,
                                    void *d, void *workspace, void **streams,
                                    int32_t stream_count) {
    ENTER(MatmulSearch);
    plan_t *plan;
    TRY(find_plan(handle, opaque, &plan));
    TRY(check_pointers(alpha, a, b, beta, c, d, workspace));
    TRY(check_streams(streams, stream_count));
    int best = -1;
    for (int id = 0; id < max_alg_id(); id++) {
        plan_t candidate = *plan;
        candidate.params.id = id;
        if (emu.bad[id] == NOT_SUPPORTED_AT_PLAN || emu.bad[id] == HANGS_AT_PLAN) continue;
        if (run_matmul(&candidate, alpha, a, b, beta, c, d) != SUCCESS) continue;
        if (best < 0 || emu.delay_us[id] < emu.delay_us[best]) best = id;
    }
    if (best < 0) return NOT_SUPPORTED;
    plan->params.id = best;
    plan->layout = layout_of_plan(plan->matmul, best);
    plan->alg->as.alg.params.id = best;
    return SUCCESS;
}
