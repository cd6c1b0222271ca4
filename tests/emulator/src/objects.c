/* Library, handle and matrix descriptors. */
#include "emu.h"

#include <string.h>

bool aligned16(const void *pointer) { return ((uintptr_t)pointer & 15) == 0; }

status_t copy_attribute(void *field, size_t size, const void *data, size_t data_size) {
    if (data == NULL || data_size != size) return INVALID_VALUE;
    memcpy(field, data, size);
    return SUCCESS;
}

API status_t cusparseLtInit(void *handle) {
    ENTER(Init);
    object_t *object;
    return new_object(handle, KIND_HANDLE, NULL, &object);
}

API status_t cusparseLtDestroy(const void *handle) {
    ENTER(Destroy);
    return end_object(handle, KIND_HANDLE);
}

API status_t cusparseLtGetProperty(int property, int *value) {
    ENTER(GetProperty);
    if (value == NULL || property < 0 || property > 2) return INVALID_VALUE;
    *value = emu.version[property];
    return SUCCESS;
}

API status_t cusparseLtGetVersion(const void *handle, int *version) {
    ENTER(GetVersion);
    object_t *object;
    TRY(check_handle(handle, &object));
    if (version == NULL) return INVALID_VALUE;
    *version = emu.version[0] * 1000000 + emu.version[1] * 100 + emu.version[2];
    return SUCCESS;
}

#ifndef EMU_OLD_API
static const struct { const char *name, *text; } STATUS_TEXTS[] = {
    {"CUSPARSE_STATUS_SUCCESS", "success"},
    {"CUSPARSE_STATUS_NOT_INITIALIZED", "initialization error"},
    {"CUSPARSE_STATUS_ALLOC_FAILED", "out of memory"},
    {"CUSPARSE_STATUS_INVALID_VALUE", "invalid value"},
    {"CUSPARSE_STATUS_ARCH_MISMATCH", "architecture mismatch"},
    {"CUSPARSE_STATUS_MAPPING_ERROR", "texture memory mapping error"},
    {"CUSPARSE_STATUS_EXECUTION_FAILED", "kernel launch failure"},
    {"CUSPARSE_STATUS_INTERNAL_ERROR", "internal error"},
    {"CUSPARSE_STATUS_MATRIX_TYPE_NOT_SUPPORTED", "matrix type not supported"},
    {"CUSPARSE_STATUS_ZERO_PIVOT", "zero pivot"},
    {"CUSPARSE_STATUS_NOT_SUPPORTED", "operation not supported"},
    {"CUSPARSE_STATUS_INSUFFICIENT_RESOURCES", "insufficient resources"},
};

API const char *cusparseLtGetErrorName(int status) {
    emu_enter(FN_GetErrorName);
    return status < 0 || status > 11 ? "unrecognized error code" : STATUS_TEXTS[status].name;
}

API const char *cusparseLtGetErrorString(int status) {
    emu_enter(FN_GetErrorString);
    return status < 0 || status > 11 ? "unrecognized error code" : STATUS_TEXTS[status].text;
}
#endif

static bool known_type(int dtype) {
    switch (dtype) {
    case R_32F: case R_16F: case R_8I: case R_32I: case R_16BF: case R_E4M3: case R_E5M2:
    case R_E2M1: return true;
    default: return false;
    }
}

/* What rows, cols and ld must be multiples of; 0 where no such matrix may have the type. */
static int64_t multiple(int dtype, bool structured) {
    int dense;
    switch (dtype) {
    case R_E2M1: dense = 32; break;
    case R_16F: case R_16BF: dense = 8; break;
    case R_8I: case R_E4M3: case R_E5M2: dense = 16; break;
    case R_32F: dense = 4; break;
    case R_32I: return structured ? 0 : 4;
    default: return 0;
    }
    return structured ? 2 * dense : dense;
}

static status_t init_matrix(const void *handle, void *opaque, mat_t mat, uint32_t alignment) {
    object_t *owner, *object;
    TRY(check_handle(handle, &owner));
    if (opaque == NULL || mat.rows <= 0 || mat.cols <= 0) return INVALID_VALUE;
    if (mat.order != ORDER_ROW && mat.order != ORDER_COL) return INVALID_VALUE;
    if (!known_type(mat.dtype)) return INVALID_VALUE;
    if (mat.ld < (mat.order == ORDER_ROW ? mat.cols : mat.rows)) return INVALID_VALUE;
    if (alignment == 0 || alignment % 16 != 0) return NOT_SUPPORTED;
    int64_t step = multiple(mat.dtype, mat.structured);
    if (step == 0 || mat.rows % step || mat.cols % step || mat.ld % step) return NOT_SUPPORTED;
    int64_t lines = mat.order == ORDER_ROW ? mat.rows : mat.cols;
    int64_t most = dtype_size(mat.dtype) == 1 ? UINT32_MAX : INT32_MAX;
    if (mat.ld > most || lines > most / mat.ld) return NOT_SUPPORTED;
    TRY(new_object(opaque, KIND_MAT, owner, &object));
    mat.batches = 1;
    mat.batch_stride = lines * mat.ld;
    object->as.mat = mat;
    return SUCCESS;
}

API status_t cusparseLtDenseDescriptorInit(const void *handle, void *mat, int64_t rows,
                                           int64_t cols, int64_t ld, uint32_t alignment,
                                           int dtype, int order) {
    ENTER(DenseDescriptorInit);
    mat_t value = {.rows = rows, .cols = cols, .ld = ld, .dtype = dtype, .order = order};
    return init_matrix(handle, mat, value, alignment);
}

API status_t cusparseLtStructuredDescriptorInit(const void *handle, void *mat, int64_t rows,
                                                int64_t cols, int64_t ld, uint32_t alignment,
                                                int dtype, int order, int sparsity) {
    ENTER(StructuredDescriptorInit);
    if (sparsity != 0) return INVALID_VALUE;
    mat_t value = {.rows = rows, .cols = cols, .ld = ld, .dtype = dtype, .order = order};
    value.structured = true;
    return init_matrix(handle, mat, value, alignment);
}

API status_t cusparseLtMatDescriptorDestroy(const void *mat) {
    ENTER(MatDescriptorDestroy);
    return end_object(mat, KIND_MAT);
}

static status_t find_mat(const void *handle, const void *opaque, mat_t **mat) {
    object_t *owner;
    TRY(check_handle(handle, &owner));
    object_t *object = lookup(opaque, KIND_MAT);
    if (object == NULL) return INVALID_VALUE;
    *mat = &object->as.mat;
    return SUCCESS;
}

API status_t cusparseLtMatDescSetAttribute(const void *handle, void *opaque, int attribute,
                                           const void *data, size_t size) {
    ENTER(MatDescSetAttribute);
    mat_t *mat;
    TRY(find_mat(handle, opaque, &mat));
    if (attribute == 0) {
        int batches;
        TRY(copy_attribute(&batches, sizeof batches, data, size));
        if (batches < 1) return INVALID_VALUE;
        mat->batches = batches;
        return SUCCESS;
    }
    if (attribute != 1) return INVALID_VALUE;
    int64_t stride, lines = mat->order == ORDER_ROW ? mat->rows : mat->cols;
    TRY(copy_attribute(&stride, sizeof stride, data, size));
    if (stride != 0 && stride < lines * mat->ld) return INVALID_VALUE;
    mat->batch_stride = stride;
    return SUCCESS;
}

API status_t cusparseLtMatDescGetAttribute(const void *handle, const void *opaque, int attribute,
                                           void *data, size_t size) {
    ENTER(MatDescGetAttribute);
    mat_t *mat;
    TRY(find_mat(handle, opaque, &mat));
    if (data == NULL) return INVALID_VALUE;
    if (attribute == 0) return copy_attribute(data, size, &mat->batches, sizeof mat->batches);
    if (attribute != 1) return INVALID_VALUE;
    return copy_attribute(data, size, &mat->batch_stride, sizeof mat->batch_stride);
}
