/* A test double of libcusparseLt with the real ABI, on host memory. Written from the documented
 * behaviour; where the documentation is silent, a comment says what was chosen. */
#ifndef EMU_H
#define EMU_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

typedef enum {
    SUCCESS = 0,
    NOT_INITIALIZED = 1,
    ALLOC_FAILED = 2,
    INVALID_VALUE = 3,
    ARCH_MISMATCH = 4,
    EXECUTION_FAILED = 6,
    INTERNAL_ERROR = 7,
    NOT_SUPPORTED = 10,
} status_t;

enum {
    R_32F = 0, R_16F = 2, R_8I = 3, R_32I = 10, R_16BF = 14, R_E4M3 = 28, R_E5M2 = 29, R_E2M1 = 33
};
enum { OP_N = 0, OP_T = 1 };
enum { ORDER_COL = 1, ORDER_ROW = 2 };
enum { COMPUTE_32I = 0, COMPUTE_16F = 1, COMPUTE_32F = 2 };
enum { PRUNE_TILE = 0, PRUNE_STRIP = 1 };

#define FUNCTIONS(X) \
    X(Init) X(Destroy) X(GetVersion) X(GetProperty) X(GetErrorName) X(GetErrorString) \
    X(DenseDescriptorInit) X(StructuredDescriptorInit) X(MatDescriptorDestroy) \
    X(MatDescSetAttribute) X(MatDescGetAttribute) X(MatmulDescriptorInit) \
    X(MatmulDescSetAttribute) X(MatmulDescGetAttribute) X(MatmulAlgSelectionInit) \
    X(MatmulAlgSelectionDestroy) X(MatmulAlgSetAttribute) X(MatmulAlgGetAttribute) \
    X(MatmulGetWorkspace) X(MatmulPlanInit) X(MatmulPlanDestroy) X(Matmul) X(MatmulSearch) \
    X(SpMMAPrune) X(SpMMAPruneCheck) X(SpMMAPrune2) X(SpMMAPruneCheck2) X(SpMMACompressedSize) \
    X(SpMMACompress) X(SpMMACompressedSize2) X(SpMMACompress2)

enum function {
#define NAME(name) FN_##name,
    FUNCTIONS(NAME)
#undef NAME
    FUNCTION_COUNT
};

enum kind { KIND_HANDLE, KIND_MAT, KIND_MATMUL, KIND_ALG, KIND_PLAN, KIND_COUNT };

enum layout_name {
    PLAIN, BLOCKED, EIGHT_BIT, SM90_ATOM, SM90_INTERLEAVED, SM90_PUBLISHED, RANDOM_BITS,
    LAYOUT_COUNT
};
typedef struct { int name; uint64_t seed; } layout_t;

enum bad_kind {
    GOOD, WRONG_FROM_256_ROWS, NON_DETERMINISTIC, NOT_SUPPORTED_AT_PLAN, NOT_SUPPORTED_AT_MATMUL,
    GIVES_NAN, HANGS_AT_PLAN, FAILS_AT_MATMUL, ALWAYS_WRONG, BAD_KIND_COUNT
};

typedef struct object object_t;

typedef struct {
    int64_t rows, cols, ld;
    int dtype, order;
    bool structured;
    int batches;
    int64_t batch_stride;
} mat_t;

typedef struct {
    object_t *a, *b, *c, *d;
    int op_a, op_b, compute;
    int relu, gelu, alpha_vector, beta_vector;
    float relu_upper, relu_threshold, gelu_scaling;
    int64_t bias_stride;
    const void *bias, *sparse_pointer;
    int scale_mode[5];
    const void *scale_pointer[5];
} matmul_t;

typedef struct { int id, iterations, split_k, split_k_mode, split_k_buffers; } alg_params_t;
typedef struct { object_t *matmul; alg_params_t params; } alg_t;
typedef struct { object_t *matmul, *alg; alg_params_t params; layout_t layout; } plan_t;

/* Never freed: a stale pointer then finds a dead object instead of somebody else's memory. */
struct object {
    int kind;
    bool alive;
    const void *self;
    unsigned thread;
    object_t *handle;
    atomic_int users;
    union { mat_t mat; matmul_t matmul; alg_t alg; plan_t plan; } as;
};

/* state.c */
typedef struct {
    atomic_int version[3];
    atomic_int arch, max_alg_id, noop, thread_check, per_plan;
    atomic_int full_sizes, default_split_k, empty_pair;
    atomic_long workspace;
    atomic_int bad[256];
    atomic_int delay_us[256];
    atomic_int hangs, order_violations, unpruned_groups, last_alg;
    atomic_long last_stream, last_workspace;
    atomic_ulong calls_of_bad;
} state_t;
extern state_t emu;

status_t emu_enter(enum function function);
layout_t emu_default_layout(void);
layout_t emu_plan_layout(int alg_id, int64_t width);
int find_layout(const char *name);
bool emu_version_at_least(int major, int minor);
status_t new_object(void *opaque, enum kind kind, object_t *handle, object_t **out);
object_t *lookup(const void *opaque, enum kind kind);
status_t check_handle(const void *handle, object_t **out);
void use(object_t *object);
void unuse(object_t *object);
status_t end_object(const void *opaque, enum kind kind);

#define ENTER(name) \
    do { \
        status_t entered_ = emu_enter(FN_##name); \
        if (entered_ != SUCCESS) return entered_; \
    } while (0)
#define TRY(expression) \
    do { \
        status_t tried_ = (expression); \
        if (tried_ != SUCCESS) return tried_; \
    } while (0)

/* objects.c */
bool aligned16(const void *pointer);
status_t copy_attribute(void *field, size_t size, const void *data, size_t data_size);

/* matmul.c */
int max_alg_id(void);
layout_t layout_of_type(layout_t layout, int dtype);
status_t find_plan(const void *handle, const void *opaque, plan_t **plan);
size_t workspace_bytes(const plan_t *plan);
layout_t layout_of_plan(const object_t *matmul, int alg_id);

/* layout.c */
typedef struct {
    layout_t layout;
    int64_t rows, cols, padded_rows, padded_cols;
    int row_bits, group_bits;
    int row_place[8], group_place[8];
    bool rows_first;
} layout_map_t;
void layout_prepare(layout_map_t *map, layout_t layout, int64_t rows, int64_t cols);
int64_t layout_bytes(layout_t layout, int64_t rows, int64_t cols);
int64_t layout_nibble(const layout_map_t *map, int64_t row, int64_t group);

/* number.c */
int dtype_size(int dtype);
double load_number(const void *base, int64_t index, int dtype);
void store_number(void *base, int64_t index, int dtype, double value);
bool is_zero(const void *base, int64_t index, int dtype);

/* sparse.c: the structured operand as [rows, cols] with the reduction along cols. */
typedef struct {
    int64_t rows, cols, row_stride, col_stride;
    int dtype, batches;
    int64_t batch_stride;
    bool cols_contiguous;
} sparse_view_t;
sparse_view_t sparse_view(const mat_t *mat, bool is_a, int op);
sparse_view_t plan_sparse_view(const matmul_t *matmul);
int64_t value_bytes(const sparse_view_t *view);
int64_t plan_metadata_bytes(const plan_t *plan, const sparse_view_t *view);
int64_t buffer_bytes(const sparse_view_t *view, int64_t metadata);
int64_t value_index(const sparse_view_t *view, int64_t row, int64_t kept);

/* gemm.c */
status_t run_matmul(const plan_t *plan, const float *alpha, const void *a, const void *b,
                    const float *beta, const void *c, void *d);
#endif
