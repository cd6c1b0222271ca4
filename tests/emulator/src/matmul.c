/* Matmul descriptor, algorithm selection and plan. */
#include "emu.h"

#include <float.h>

static bool is_fp8(int dtype) { return dtype == R_E4M3 || dtype == R_E5M2; }
static bool is_16bit(int dtype) { return dtype == R_16F || dtype == R_16BF; }

static status_t check_types(const matmul_t *m) {
    int in = m->a->as.mat.dtype, c = m->c->as.mat.dtype, d = m->d->as.mat.dtype;
    if (m->b->as.mat.dtype != in) return NOT_SUPPORTED;
    if (is_16bit(in)) {
        if (c != in || d != in) return NOT_SUPPORTED;
        if (m->compute == COMPUTE_16F) return in == R_16F ? SUCCESS : NOT_SUPPORTED;
        return m->compute == COMPUTE_32F ? SUCCESS : NOT_SUPPORTED;
    }
    if (in == R_8I) {
        bool known = d == R_8I || d == R_32I || is_16bit(d);
        return known && c == d && m->compute == COMPUTE_32I ? SUCCESS : NOT_SUPPORTED;
    }
    if (is_fp8(in)) {
        if (m->compute != COMPUTE_32F) return NOT_SUPPORTED;
        if (is_fp8(d)) return is_16bit(c) ? SUCCESS : NOT_SUPPORTED;
        return (is_16bit(d) || d == R_32F) && c == d ? SUCCESS : NOT_SUPPORTED;
    }
    /* fp32 inputs (TF32, 1:2 sparsity) and fp4 are not imitated. */
    return NOT_SUPPORTED;
}

/* What the library takes in a descriptor and refuses once an algorithm is to be chosen. */
static status_t check_arch(const matmul_t *m) {
    if (m->compute == COMPUTE_16F && emu.arch != 90) return NOT_SUPPORTED;
    if (is_fp8(m->a->as.mat.dtype) && emu.arch < 89) return NOT_SUPPORTED;
    for (int i = 0; i < 5; i++)
        if (m->scale_mode[i] > 1) return NOT_SUPPORTED;
    bool vector = m->alpha_vector || m->beta_vector;
    return vector && m->compute != COMPUTE_32I ? NOT_SUPPORTED : SUCCESS;
}

static bool batches_agree(const matmul_t *m) {
    int batches = m->a->as.mat.batches;
    return m->b->as.mat.batches == batches && m->c->as.mat.batches == batches &&
           m->d->as.mat.batches == batches;
}

static bool reduction_contiguous(const mat_t *mat, bool is_a, int op) {
    bool transposed = is_a ? op == OP_T : op == OP_N;
    return (mat->order == ORDER_ROW) != transposed;
}

static status_t check_problem(const matmul_t *m) {
    const mat_t *a = &m->a->as.mat, *b = &m->b->as.mat, *c = &m->c->as.mat, *d = &m->d->as.mat;
    if (a->structured == b->structured || c->structured || d->structured) return INVALID_VALUE;
    int64_t rows = m->op_a == OP_N ? a->rows : a->cols, inner_a = m->op_a == OP_N ? a->cols : a->rows;
    int64_t cols = m->op_b == OP_N ? b->cols : b->rows, inner_b = m->op_b == OP_N ? b->rows : b->cols;
    if (inner_a != inner_b || c->rows != rows || c->cols != cols) return INVALID_VALUE;
    if (d->rows != rows || d->cols != cols || !batches_agree(m)) return INVALID_VALUE;
    if (c->ld != d->ld || c->order != d->order) return NOT_SUPPORTED;
    TRY(check_types(m));
    bool tn = reduction_contiguous(a, true, m->op_a) && reduction_contiguous(b, false, m->op_b);
    return dtype_size(a->dtype) == 1 && !tn ? NOT_SUPPORTED : SUCCESS;
}

API status_t cusparseLtMatmulDescriptorInit(const void *handle, void *matmul, int op_a, int op_b,
                                            const void *mat_a, const void *mat_b,
                                            const void *mat_c, const void *mat_d, int compute) {
    ENTER(MatmulDescriptorInit);
    object_t *owner, *object;
    TRY(check_handle(handle, &owner));
    matmul_t m = {.op_a = op_a, .op_b = op_b, .compute = compute};
    m.a = lookup(mat_a, KIND_MAT);
    m.b = lookup(mat_b, KIND_MAT);
    m.c = lookup(mat_c, KIND_MAT);
    m.d = lookup(mat_d, KIND_MAT);
    if (!m.a || !m.b || !m.c || !m.d || matmul == NULL) return INVALID_VALUE;
    if ((op_a != OP_N && op_a != OP_T) || (op_b != OP_N && op_b != OP_T)) return INVALID_VALUE;
    if (compute < COMPUTE_32I || compute > COMPUTE_32F) return INVALID_VALUE;
    TRY(check_problem(&m));
    m.relu_upper = FLT_MAX;
    m.gelu_scaling = 1.0f;
    TRY(new_object(matmul, KIND_MATMUL, owner, &object));
    object->as.matmul = m;
    return SUCCESS;
}

/* The field behind an attribute and its size; NULL where this version does not have it. */
static void *field_of(matmul_t *m, int attribute, size_t *size) {
    *size = sizeof(int);
    switch (attribute) {
    case 0: return &m->relu;
    case 1: *size = sizeof(float); return &m->relu_upper;
    case 2: *size = sizeof(float); return &m->relu_threshold;
    case 3: return &m->gelu;
    case 4: *size = sizeof(float); return &m->gelu_scaling;
    case 5: return &m->alpha_vector;
    case 6: return &m->beta_vector;
    case 7: *size = sizeof(int64_t); return &m->bias_stride;
    case 8: *size = sizeof(void *); return &m->bias;
    case 9: *size = sizeof(void *); return &m->sparse_pointer;
    default: break;
    }
    if (attribute < 10 || attribute > 19 || !emu_version_at_least(0, 7)) return NULL;
    if (attribute < 15) return &m->scale_mode[attribute - 10];
    *size = sizeof(void *);
    return &m->scale_pointer[attribute - 15];
}

static bool all_alive(const matmul_t *m) {
    return m->a->alive && m->b->alive && m->c->alive && m->d->alive;
}

static status_t find_matmul(const void *handle, const void *opaque, object_t **found) {
    object_t *owner;
    TRY(check_handle(handle, &owner));
    *found = lookup(opaque, KIND_MATMUL);
    return *found != NULL && all_alive(&(*found)->as.matmul) ? SUCCESS : INVALID_VALUE;
}

API status_t cusparseLtMatmulDescSetAttribute(const void *handle, void *opaque, int attribute,
                                              const void *data, size_t data_size) {
    ENTER(MatmulDescSetAttribute);
    object_t *object;
    size_t size;
    TRY(find_matmul(handle, opaque, &object));
    matmul_t *m = &object->as.matmul;
    void *field = field_of(m, attribute, &size);
    if (field == NULL) return INVALID_VALUE;
    bool gelu = attribute == 3 || attribute == 4;
    if (gelu && m->compute != COMPUTE_32I) return INVALID_VALUE;
    if (attribute == 7 && data != NULL && data_size == size) {
        int64_t stride = *(const int64_t *)data;
        if (stride != 0 && stride < m->d->as.mat.rows) return INVALID_VALUE;
    }
    TRY(copy_attribute(field, size, data, data_size));
    m->relu = m->relu != 0;
    return SUCCESS;
}

API status_t cusparseLtMatmulDescGetAttribute(const void *handle, const void *opaque,
                                              int attribute, void *data, size_t data_size) {
    ENTER(MatmulDescGetAttribute);
    object_t *object;
    size_t size;
    TRY(find_matmul(handle, opaque, &object));
    void *field = field_of(&object->as.matmul, attribute, &size);
    if (field == NULL || data == NULL) return INVALID_VALUE;
    if (attribute == 9) return INTERNAL_ERROR; /* it can be set and not read, as measured on sm86 */
    return copy_attribute(data, data_size, field, size);
}

int max_alg_id(void) {
    if (emu.max_alg_id >= 0) return emu.max_alg_id;
    return emu.arch >= 90 ? 21 : 4;
}

API status_t cusparseLtMatmulAlgSelectionInit(const void *handle, void *selection,
                                              const void *matmul, int alg) {
    ENTER(MatmulAlgSelectionInit);
    object_t *descriptor, *object;
    TRY(find_matmul(handle, matmul, &descriptor));
    if (alg != 0 || selection == NULL) return INVALID_VALUE;
    TRY(check_arch(&descriptor->as.matmul));
    TRY(new_object(selection, KIND_ALG, descriptor->handle, &object));
    object->as.alg = (alg_t){.matmul = descriptor, .params = {.iterations = 5}};
    object->as.alg.params.split_k = emu.default_split_k;
    object->as.alg.params.split_k_mode = emu.arch >= 90 ? 0 : 1;
    return SUCCESS;
}

#ifndef EMU_OLD_API
API status_t cusparseLtMatmulAlgSelectionDestroy(const void *selection) {
    ENTER(MatmulAlgSelectionDestroy);
    return end_object(selection, KIND_ALG);
}
#endif

static status_t find_alg(const void *handle, const void *opaque, alg_t **alg) {
    object_t *owner;
    TRY(check_handle(handle, &owner));
    object_t *object = lookup(opaque, KIND_ALG);
    if (object == NULL || !all_alive(&object->as.alg.matmul->as.matmul)) return INVALID_VALUE;
    *alg = &object->as.alg;
    return SUCCESS;
}

/* sm8x knows one and two kernels; what sm90 takes was not measured. */
static bool known_split_k_mode(int value) {
    if (emu.arch < 90) return value == 1 || value == 2;
    return value >= 0 && value <= (emu_version_at_least(0, 7) ? 6 : 2);
}

static status_t check_alg_value(const alg_t *alg, int attribute, int value) {
    const matmul_t *m = &alg->matmul->as.matmul;
    int64_t inner = m->op_a == OP_N ? m->a->as.mat.cols : m->a->as.mat.rows;
    bool ok;
    switch (attribute) {
    case 0: ok = value >= 0 && value < max_alg_id(); break;
    case 2: ok = value >= 0; break;
    case 3: ok = emu.arch >= 90 ? value == 1 || value == -1 : value >= 1 && value <= inner; break;
    case 4: ok = known_split_k_mode(value); break;
    case 5: ok = value >= 0 && (emu.arch >= 90 ? value == 0 : value < alg->params.split_k); break;
    default: ok = false;
    }
    return ok ? SUCCESS : INVALID_VALUE;
}

static int *alg_field(alg_params_t *params, int attribute) {
    switch (attribute) {
    case 0: return &params->id;
    case 2: return &params->iterations;
    case 3: return &params->split_k;
    case 4: return &params->split_k_mode;
    default: return &params->split_k_buffers;
    }
}

API status_t cusparseLtMatmulAlgSetAttribute(const void *handle, void *selection, int attribute,
                                             const void *data, size_t size) {
    ENTER(MatmulAlgSetAttribute);
    alg_t *alg;
    int value;
    TRY(find_alg(handle, selection, &alg));
    TRY(copy_attribute(&value, sizeof value, data, size));
    TRY(check_alg_value(alg, attribute, value));
    *alg_field(&alg->params, attribute) = value;
    return SUCCESS;
}

API status_t cusparseLtMatmulAlgGetAttribute(const void *handle, const void *selection,
                                             int attribute, void *data, size_t size) {
    ENTER(MatmulAlgGetAttribute);
    alg_t *alg;
    TRY(find_alg(handle, selection, &alg));
    if (attribute < 0 || attribute > 5 || data == NULL) return INVALID_VALUE;
    int value = attribute == 1 ? max_alg_id() : *alg_field(&alg->params, attribute);
    return copy_attribute(data, size, &value, sizeof value);
}

/* 8-bit operands have an order of their own where a test asked for no other. */
layout_t layout_of_type(layout_t layout, int dtype) {
    return dtype_size(dtype) == 1 && layout.name == BLOCKED ? (layout_t){EIGHT_BIT, 0} : layout;
}

layout_t layout_of_plan(const object_t *matmul, int alg_id) {
    const matmul_t *m = &matmul->as.matmul;
    bool sparse_a = m->a->as.mat.structured;
    int64_t width = sparse_a ? m->d->as.mat.cols : m->d->as.mat.rows;
    return layout_of_type(emu_plan_layout(alg_id, width), m->a->as.mat.dtype);
}

/* Split-k -1 on SM90 blocks for few rows, and so does a bad algorithm: flagged, not imitated. */
static bool would_hang(const matmul_t *m, const alg_params_t *params) {
    sparse_view_t view = plan_sparse_view(m);
    return (params->split_k == -1 && view.rows < 400) || emu.bad[params->id] == HANGS_AT_PLAN;
}

API status_t cusparseLtMatmulPlanInit(const void *handle, void *plan, const void *matmul,
                                      const void *selection) {
    ENTER(MatmulPlanInit);
    object_t *descriptor, *object;
    alg_t *alg;
    TRY(find_matmul(handle, matmul, &descriptor));
    TRY(find_alg(handle, selection, &alg));
    const matmul_t *m = &descriptor->as.matmul;
    if (plan == NULL || alg->matmul != descriptor || !batches_agree(m)) return INVALID_VALUE;
    TRY(check_arch(m));
    if (emu.bad[alg->params.id] == NOT_SUPPORTED_AT_PLAN) return NOT_SUPPORTED;
    if (would_hang(m, &alg->params)) {
        atomic_fetch_add(&emu.hangs, 1);
        return INTERNAL_ERROR;
    }
    TRY(new_object(plan, KIND_PLAN, descriptor->handle, &object));
    plan_t value = {.matmul = descriptor, .alg = lookup(selection, KIND_ALG)};
    value.params = alg->params;
    value.layout = layout_of_plan(descriptor, alg->params.id);
    object->as.plan = value;
    object_t *used[] = {m->a, m->b, m->c, m->d, value.alg};
    for (size_t i = 0; i < sizeof used / sizeof *used; i++) use(used[i]);
    return SUCCESS;
}

API status_t cusparseLtMatmulPlanDestroy(const void *plan) {
    ENTER(MatmulPlanDestroy);
    object_t *object = lookup(plan, KIND_PLAN);
    TRY(end_object(plan, KIND_PLAN));
    const matmul_t *m = &object->as.plan.matmul->as.matmul;
    object_t *used[] = {m->a, m->b, m->c, m->d, object->as.plan.alg};
    for (size_t i = 0; i < sizeof used / sizeof *used; i++) unuse(used[i]);
    return SUCCESS;
}

status_t find_plan(const void *handle, const void *opaque, plan_t **plan) {
    object_t *owner;
    TRY(check_handle(handle, &owner));
    object_t *object = lookup(opaque, KIND_PLAN);
    if (object == NULL || !all_alive(&object->as.plan.matmul->as.matmul)) return INVALID_VALUE;
    if (!object->as.plan.alg->alive) return INVALID_VALUE;
    *plan = &object->as.plan;
    return SUCCESS;
}

size_t workspace_bytes(const plan_t *plan) {
    if (emu.workspace >= 0) return (size_t)emu.workspace;
    sparse_view_t view = plan_sparse_view(&plan->matmul->as.matmul);
    return (size_t)buffer_bytes(&view, plan_metadata_bytes(plan, &view));
}

API status_t cusparseLtMatmulGetWorkspace(const void *handle, const void *opaque, size_t *size) {
    ENTER(MatmulGetWorkspace);
    plan_t *plan;
    TRY(find_plan(handle, opaque, &plan));
    if (size == NULL) return INVALID_VALUE;
    *size = workspace_bytes(plan);
    return SUCCESS;
}
