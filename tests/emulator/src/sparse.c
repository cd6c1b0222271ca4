/* Prune, check and compress the structured operand. */
#include "emu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

sparse_view_t sparse_view(const mat_t *mat, bool is_a, int op) {
    int64_t row = mat->order == ORDER_ROW ? mat->ld : 1, col = mat->order == ORDER_ROW ? 1 : mat->ld;
    sparse_view_t view = {mat->rows, mat->cols, row, col, mat->dtype, mat->batches,
                          mat->batch_stride, false};
    if (is_a ? op == OP_T : op == OP_N)
        view = (sparse_view_t){mat->cols, mat->rows, col, row, mat->dtype, mat->batches,
                               mat->batch_stride, false};
    view.cols_contiguous = view.col_stride == 1;
    return view;
}

sparse_view_t plan_sparse_view(const matmul_t *m) {
    bool is_a = m->a->as.mat.structured;
    return sparse_view(is_a ? &m->a->as.mat : &m->b->as.mat, is_a, is_a ? m->op_a : m->op_b);
}

int64_t value_bytes(const sparse_view_t *view) {
    return view->rows * view->cols / 2 * dtype_size(view->dtype);
}

/* 8-bit operands have a region twice as large as their nibbles. */
static int64_t eight_bit_metadata(const sparse_view_t *view) {
    return round_up(view->rows, 64) * round_up(view->cols, 128) / 4;
}

/* A bare descriptor does not know its operation: the larger of both orientations. */
static int64_t bare_metadata_bytes(const sparse_view_t *view) {
    if (dtype_size(view->dtype) == 1) return eight_bit_metadata(view);
    return larger(round_up(view->rows, 32) * round_up(view->cols, 64),
                  round_up(view->rows, 64) * round_up(view->cols, 32)) / 8;
}

/* A plan's region as measured on sm86, and where an imagined order's tiles need more, that. */
int64_t plan_metadata_bytes(const plan_t *plan, const sparse_view_t *view) {
    if (emu.full_sizes || dtype_size(view->dtype) == 1) return bare_metadata_bytes(view);
    return larger(round_up(view->rows, 32) * round_up(view->cols, 64) / 8,
                  layout_bytes(plan->layout, view->rows, view->cols));
}

int64_t buffer_bytes(const sparse_view_t *view, int64_t metadata) {
    return dtype_size(view->dtype) == 1 ? metadata / 2 : metadata;
}

/* The values keep the memory orientation of the dense operand. */
int64_t value_index(const sparse_view_t *view, int64_t row, int64_t kept) {
    return view->cols_contiguous ? row * (view->cols / 2) + kept : kept * view->rows + row;
}

/* The two columns that a group keeps. A lone non-zero is paired with column 3, one in column 3
 * with column 2, and an empty group keeps 2 and 3 unless a test chose another pair. */
static void kept_columns(const void *dense, int64_t at, int64_t step, int dtype, int *i0, int *i1) {
    int found[4], count = 0;
    for (int i = 0; i < 4; i++)
        if (!is_zero(dense, at + i * step, dtype)) found[count++] = i;
    if (count > 2) atomic_fetch_add(&emu.unpruned_groups, 1);
    if (count >= 2) {
        *i0 = found[0];
        *i1 = found[1];
    } else if (count == 1) {
        *i0 = found[0] < 2 ? found[0] : 2;
        *i1 = 3;
    } else {
        *i0 = emu.empty_pair & 3;
        *i1 = emu.empty_pair >> 2;
    }
}

static void copy_element(void *to, int64_t to_index, const void *from, int64_t index, int dtype) {
    size_t size = (size_t)dtype_size(dtype);
    memcpy((char *)to + (size_t)to_index * size, (const char *)from + (size_t)index * size, size);
}

static void compress_one(const sparse_view_t *view, layout_t layout, int64_t size, const void *dense,
                         void *out) {
    uint8_t *metadata = (uint8_t *)out + value_bytes(view);
    memset(metadata, 0xEE, (size_t)size);
    layout_map_t map;
    layout_prepare(&map, layout, view->rows, view->cols);
    for (int64_t r = 0; r < view->rows; r++)
        for (int64_t g = 0; g < view->cols / 4; g++) {
            int i0, i1;
            int64_t at = r * view->row_stride + g * 4 * view->col_stride;
            kept_columns(dense, at, view->col_stride, view->dtype, &i0, &i1);
            copy_element(out, value_index(view, r, 2 * g), dense, at + i0 * view->col_stride, view->dtype);
            copy_element(out, value_index(view, r, 2 * g + 1), dense, at + i1 * view->col_stride, view->dtype);
            int64_t nibble = layout_nibble(&map, r, g);
            int shift = (int)(nibble & 1) * 4;
            uint8_t *byte = &metadata[nibble >> 1];
            *byte = (uint8_t)((*byte & ~(0xF << shift)) | (i0 | i1 << 2) << shift);
        }
}

/* The buffer may be NULL, as on sm86. */
static status_t compress(const sparse_view_t *view, layout_t layout, int64_t metadata,
                         const void *dense, void *compressed, void *buffer) {
    if (dense == NULL || compressed == NULL) return INVALID_VALUE;
    if (!aligned16(dense) || !aligned16(compressed) || !aligned16(buffer)) return INVALID_VALUE;
    int64_t size = value_bytes(view) + metadata;
    int copies = view->batch_stride == 0 ? 1 : view->batches;
    if (buffer != NULL) memset(buffer, 0xB0, (size_t)buffer_bytes(view, metadata));
    for (int i = 0; i < copies; i++) {
        int64_t skip = i * view->batch_stride * dtype_size(view->dtype);
        const char *from = (const char *)dense + skip;
        compress_one(view, layout, metadata, from, (char *)compressed + i * size);
    }
    return SUCCESS;
}

static status_t sizes(const sparse_view_t *view, int64_t metadata, size_t *compressed,
                      size_t *buffer) {
    if (compressed == NULL || buffer == NULL) return INVALID_VALUE;
    int copies = view->batch_stride == 0 ? 1 : view->batches;
    *compressed = (size_t)((value_bytes(view) + metadata) * copies);
    *buffer = (size_t)buffer_bytes(view, metadata);
    return SUCCESS;
}

/* The descriptor form knows neither plan nor operation until it is told. */
static status_t descriptor_view(const void *handle, const void *opaque, int is_a, int op,
                                sparse_view_t *view) {
    object_t *owner;
    TRY(check_handle(handle, &owner));
    object_t *object = lookup(opaque, KIND_MAT);
    if (object == NULL || !object->as.mat.structured) return INVALID_VALUE;
    if ((is_a != 0 && is_a != 1) || (op != OP_N && op != OP_T)) return INVALID_VALUE;
    *view = sparse_view(&object->as.mat, is_a, op);
    return SUCCESS;
}

static status_t matmul_view(const void *handle, const void *opaque, sparse_view_t *view) {
    object_t *owner;
    TRY(check_handle(handle, &owner));
    object_t *object = lookup(opaque, KIND_MATMUL);
    if (object == NULL) return INVALID_VALUE;
    const matmul_t *m = &object->as.matmul;
    if (!m->a->alive || !m->b->alive || !m->c->alive || !m->d->alive) return INVALID_VALUE;
    *view = plan_sparse_view(m);
    return SUCCESS;
}

API status_t cusparseLtSpMMACompressedSize(const void *handle, const void *opaque,
                                           size_t *compressed, size_t *buffer) {
    ENTER(SpMMACompressedSize);
    plan_t *plan;
    TRY(find_plan(handle, opaque, &plan));
    sparse_view_t view = plan_sparse_view(&plan->matmul->as.matmul);
    return sizes(&view, plan_metadata_bytes(plan, &view), compressed, buffer);
}

API status_t cusparseLtSpMMACompress(const void *handle, const void *opaque, const void *dense,
                                     void *compressed, void *buffer, void *stream) {
    ENTER(SpMMACompress);
    plan_t *plan;
    TRY(find_plan(handle, opaque, &plan));
    emu.last_stream = (long)(intptr_t)stream;
    sparse_view_t view = plan_sparse_view(&plan->matmul->as.matmul);
    int64_t metadata = plan_metadata_bytes(plan, &view);
    return compress(&view, plan->layout, metadata, dense, compressed, buffer);
}

API status_t cusparseLtSpMMACompressedSize2(const void *handle, const void *mat,
                                            size_t *compressed, size_t *buffer) {
    ENTER(SpMMACompressedSize2);
    sparse_view_t view;
    TRY(descriptor_view(handle, mat, 1, OP_N, &view));
    view.batches = 1; /* it counts one batch */
    return sizes(&view, bare_metadata_bytes(&view), compressed, buffer);
}

API status_t cusparseLtSpMMACompress2(const void *handle, const void *mat, int is_a, int op,
                                      const void *dense, void *compressed, void *buffer,
                                      void *stream) {
    ENTER(SpMMACompress2);
    sparse_view_t view;
    TRY(descriptor_view(handle, mat, is_a, op, &view));
    emu.last_stream = (long)(intptr_t)stream;
    layout_t layout = layout_of_type(emu_default_layout(), view.dtype);
    return compress(&view, layout, bare_metadata_bytes(&view), dense, compressed, buffer);
}

static bool group_is_24(const sparse_view_t *view, const void *dense, int64_t at) {
    int count = 0;
    for (int i = 0; i < 4; i++) count += !is_zero(dense, at + i * view->col_stride, view->dtype);
    return count <= 2;
}

static status_t prune_check(const sparse_view_t *view, const void *dense, int *valid) {
    bool fits = ((uintptr_t)valid & 3) == 0;
    if (dense == NULL || valid == NULL || !fits || !aligned16(dense)) return INVALID_VALUE;
    *valid = 0;
    int copies = view->batch_stride == 0 ? 1 : view->batches;
    for (int i = 0; i < copies; i++)
        for (int64_t r = 0; r < view->rows; r++)
            for (int64_t c = 0; c < view->cols; c += 4) {
                int64_t at = i * view->batch_stride + r * view->row_stride + c * view->col_stride;
                if (!group_is_24(view, dense, at)) *valid = 1;
            }
    return SUCCESS;
}

static double magnitude(const sparse_view_t *view, const void *in, int64_t at, int row, int col) {
    return fabs(load_number(in, at + row * view->row_stride + col * view->col_stride, view->dtype));
}

/* The two largest of four; the lower column wins a tie. */
static int strip_mask(const sparse_view_t *view, const void *in, int64_t at) {
    int mask = 0;
    for (int i = 0; i < 4; i++) {
        int better = 0;
        for (int j = 0; j < 4; j++) {
            double mine = magnitude(view, in, at, 0, i), other = magnitude(view, in, at, 0, j);
            better += j < i ? other >= mine : other > mine;
        }
        mask |= (better < 2) << i;
    }
    return mask;
}

/* Of the 90 patterns with two per row and per column of a 4 x 4 tile, the one with the largest
 * sum; it is held as four masks of four bits. */
static int tile_mask(const sparse_view_t *view, const void *in, int64_t at) {
    static const int pairs[6] = {3, 5, 9, 6, 10, 12};
    double best = -1;
    int best_mask = 0;
    for (int code = 0; code < 6 * 6 * 6 * 6; code++) {
        int rows[4] = {pairs[code / 216], pairs[code / 36 % 6], pairs[code / 6 % 6], pairs[code % 6]};
        int per_column[4] = {0};
        double sum = 0;
        for (int r = 0; r < 4; r++)
            for (int c = 0; c < 4; c++)
                if (rows[r] >> c & 1) {
                    per_column[c]++;
                    sum += magnitude(view, in, at, r, c);
                }
        bool fits = per_column[0] == 2 && per_column[1] == 2 && per_column[2] == 2;
        if (fits && per_column[3] == 2 && sum > best) {
            best = sum;
            best_mask = rows[0] | rows[1] << 4 | rows[2] << 8 | rows[3] << 12;
        }
    }
    return best_mask;
}

static void apply_mask(const sparse_view_t *view, const void *in, void *out, int64_t at, int rows,
                       int mask) {
    size_t size = (size_t)dtype_size(view->dtype);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++) {
            int64_t index = at + r * view->row_stride + c * view->col_stride;
            if (mask >> (4 * r + c) & 1)
                memmove((char *)out + (size_t)index * size, (const char *)in + (size_t)index * size, size);
            else
                memset((char *)out + (size_t)index * size, 0, size);
        }
}

static status_t prune(const sparse_view_t *view, const void *in, void *out, int algorithm) {
    if (in == NULL || out == NULL || !aligned16(in) || !aligned16(out)) return INVALID_VALUE;
    if (algorithm != PRUNE_TILE && algorithm != PRUNE_STRIP) return INVALID_VALUE;
    int copies = view->batch_stride == 0 ? 1 : view->batches;
    int step = algorithm == PRUNE_TILE ? 4 : 1;
    for (int i = 0; i < copies; i++)
        for (int64_t r = 0; r < view->rows; r += step)
            for (int64_t c = 0; c < view->cols; c += 4) {
                int64_t at = i * view->batch_stride + r * view->row_stride + c * view->col_stride;
                int mask = step == 4 ? tile_mask(view, in, at) : strip_mask(view, in, at);
                apply_mask(view, in, out, at, step, mask);
            }
    return SUCCESS;
}

API status_t cusparseLtSpMMAPrune(const void *handle, const void *matmul, const void *in,
                                  void *out, int algorithm, void *stream) {
    ENTER(SpMMAPrune);
    sparse_view_t view;
    TRY(matmul_view(handle, matmul, &view));
    emu.last_stream = (long)(intptr_t)stream;
    return prune(&view, in, out, algorithm);
}

API status_t cusparseLtSpMMAPruneCheck(const void *handle, const void *matmul, const void *in,
                                       int *valid, void *stream) {
    ENTER(SpMMAPruneCheck);
    sparse_view_t view;
    TRY(matmul_view(handle, matmul, &view));
    emu.last_stream = (long)(intptr_t)stream;
    return prune_check(&view, in, valid);
}

API status_t cusparseLtSpMMAPrune2(const void *handle, const void *mat, int is_a, int op,
                                   const void *in, void *out, int algorithm, void *stream) {
    ENTER(SpMMAPrune2);
    sparse_view_t view;
    TRY(descriptor_view(handle, mat, is_a, op, &view));
    emu.last_stream = (long)(intptr_t)stream;
    return prune(&view, in, out, algorithm);
}

API status_t cusparseLtSpMMAPruneCheck2(const void *handle, const void *mat, int is_a, int op,
                                        const void *in, int *valid, void *stream) {
    ENTER(SpMMAPruneCheck2);
    sparse_view_t view;
    TRY(descriptor_view(handle, mat, is_a, op, &view));
    emu.last_stream = (long)(intptr_t)stream;
    return prune_check(&view, in, valid);
}
