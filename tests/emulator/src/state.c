/* Settings, counters, the registry of live objects, and the emu_ functions that tests control. */
#include "emu.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC UINT64_C(0x656d752d6c697665)
#define DEAD UINT64_C(0x656d752d64656164)

typedef struct { uint64_t magic; const void *self; object_t *object; } opaque_t;

state_t emu;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static layout_t default_layout, layout_of_alg[256], layout_of_width;
static bool has_layout_of_alg[256];
static int64_t width_with_layout;
static struct { int status, skip; } failures[FUNCTION_COUNT];
static atomic_long calls[FUNCTION_COUNT];
static atomic_int live[KIND_COUNT];
static atomic_uint next_thread = 1;
static _Thread_local unsigned this_thread;

static const char *const FUNCTION_NAMES[] = {
#define NAME(name) "cusparseLt" #name,
    FUNCTIONS(NAME)
#undef NAME
};

API void emu_reset(void) {
    pthread_mutex_lock(&lock);
    const int version[3] = {0, 8, 1};
    for (int i = 0; i < 3; i++) emu.version[i] = version[i];
    emu.arch = 80;
    emu.max_alg_id = -1;
    emu.noop = 0;
    emu.thread_check = 1;
    emu.per_plan = 0;
    emu.full_sizes = 0;
    emu.default_split_k = 1;
    emu.empty_pair = 0xE;
    width_with_layout = -1;
    emu.workspace = -1;
    emu.hangs = emu.order_violations = emu.unpruned_groups = 0;
    emu.last_alg = -1;
    emu.last_stream = emu.last_workspace = -1;
    emu.calls_of_bad = 0;
    default_layout = (layout_t){BLOCKED, 0};
    for (int i = 0; i < 256; i++) {
        emu.bad[i] = GOOD;
        emu.delay_us[i] = 0;
        has_layout_of_alg[i] = false;
    }
    for (int i = 0; i < FUNCTION_COUNT; i++) {
        failures[i].status = SUCCESS;
        calls[i] = 0;
    }
    pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void start(void) { emu_reset(); }

static unsigned thread_number(void) {
    if (this_thread == 0) this_thread = atomic_fetch_add(&next_thread, 1);
    return this_thread;
}

static int find_function(const char *name) {
    for (int i = 0; i < FUNCTION_COUNT; i++)
        if (strcmp(FUNCTION_NAMES[i], name) == 0) return i;
    return -1;
}

status_t emu_enter(enum function function) {
    atomic_fetch_add_explicit(&calls[function], 1, memory_order_relaxed);
    if (failures[function].status == SUCCESS) return SUCCESS;
    pthread_mutex_lock(&lock);
    status_t status = SUCCESS;
    if (failures[function].status != SUCCESS && failures[function].skip-- == 0) {
        status = failures[function].status;
        failures[function].status = SUCCESS;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

bool emu_version_at_least(int major, int minor) {
    int have = emu.version[0] * 1000 + emu.version[1];
    return have >= major * 1000 + minor;
}

static size_t opaque_size(void) {
    if (emu_version_at_least(0, 8)) return 512;
    return emu_version_at_least(0, 7) ? 1024 : 13072;
}

/* Whether the library has a function that ends such an object; others are never counted as live. */
static bool has_an_end(enum kind kind) {
#ifdef EMU_OLD_API
    if (kind == KIND_ALG) return false;
#endif
    return kind != KIND_MATMUL;
}

/* Fills the whole struct as the library may, so that too small an allocation is overrun. */
status_t new_object(void *opaque, enum kind kind, object_t *handle, object_t **out) {
    if (opaque == NULL || !aligned16(opaque)) return INVALID_VALUE;
    object_t *object = calloc(1, sizeof *object);
    if (object == NULL) return ALLOC_FAILED;
    object->kind = kind;
    object->alive = true;
    object->self = opaque;
    object->handle = handle;
    object->thread = thread_number();
    memset(opaque, 0xA5, opaque_size());
    *(opaque_t *)opaque = (opaque_t){MAGIC, opaque, object};
    if (has_an_end(kind)) {
        atomic_fetch_add(&live[kind], 1);
        if (handle != NULL) use(handle);
    }
    *out = object;
    return SUCCESS;
}

/* A struct that was moved or copied no longer lies at its own address: refused, and so is one that
 * was never initialised (0.8.1 and 0.10.0 answer INVALID_VALUE for a zeroed handle as well). */
object_t *lookup(const void *opaque, enum kind kind) {
    if (opaque == NULL || !aligned16(opaque)) return NULL;
    const opaque_t *at = opaque;
    if (at->magic != MAGIC || at->self != opaque) return NULL;
    object_t *object = at->object;
    return object->alive && object->kind == (int)kind ? object : NULL;
}

status_t check_handle(const void *handle, object_t **out) {
    if (handle == NULL || !aligned16(handle)) return INVALID_VALUE;
    object_t *object = lookup(handle, KIND_HANDLE);
    if (object == NULL) return INVALID_VALUE;
    if (emu.thread_check && object->thread != thread_number()) return INTERNAL_ERROR;
    *out = object;
    return SUCCESS;
}

void use(object_t *object) { atomic_fetch_add(&object->users, 1); }
void unuse(object_t *object) { atomic_fetch_sub(&object->users, 1); }

status_t end_object(const void *opaque, enum kind kind) {
    if (opaque == NULL) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    object_t *object = lookup(opaque, kind);
    if (object != NULL) {
        object->alive = false;
        ((opaque_t *)opaque)->magic = DEAD;
    }
    pthread_mutex_unlock(&lock);
    if (object == NULL) return INVALID_VALUE;
    if (object->users > 0) atomic_fetch_add(&emu.order_violations, 1);
    if (object->handle != NULL) unuse(object->handle);
    atomic_fetch_sub(&live[kind], 1);
    return SUCCESS;
}

layout_t emu_default_layout(void) {
    pthread_mutex_lock(&lock);
    layout_t layout = default_layout;
    pthread_mutex_unlock(&lock);
    return layout;
}

layout_t emu_plan_layout(int alg_id, int64_t width) {
    pthread_mutex_lock(&lock);
    layout_t layout = default_layout;
    if (emu.per_plan) layout = (layout_t){RANDOM_BITS, default_layout.seed + 1 + (uint64_t)alg_id};
    if (alg_id >= 0 && alg_id < 256 && has_layout_of_alg[alg_id]) layout = layout_of_alg[alg_id];
    if (width == width_with_layout) layout = layout_of_width;
    pthread_mutex_unlock(&lock);
    return layout;
}

int find_layout(const char *name) {
    static const struct { const char *text; int name; } known[] = {
        {"plain", PLAIN}, {"blocked", BLOCKED}, {"sm80", BLOCKED}, {"auto", BLOCKED},
        {"eight_bit", EIGHT_BIT}, {"sm90_atom", SM90_ATOM}, {"sm90_interleaved", SM90_INTERLEAVED},
        {"sm90_published", SM90_PUBLISHED}, {"random", RANDOM_BITS},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(known[i].text, name) == 0) return known[i].name;
    return -1;
}

API int emu_set_layout(const char *name, uint64_t seed) {
    int found = find_layout(name);
    if (found < 0) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    default_layout = (layout_t){found, seed};
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

API int emu_set_layout_of_algorithm(int alg_id, const char *name, uint64_t seed) {
    int found = find_layout(name);
    if (found < 0 || alg_id < 0 || alg_id > 255) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    layout_of_alg[alg_id] = (layout_t){found, seed};
    has_layout_of_alg[alg_id] = true;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

API int emu_set_layout_of_width(int64_t width, const char *name, uint64_t seed) {
    int found = find_layout(name);
    if (found < 0 || width < 1) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    layout_of_width = (layout_t){found, seed};
    width_with_layout = width;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

API int emu_set_empty_pair(int i0, int i1) {
    if (i0 < 0 || i0 > 3 || i1 < 0 || i1 > 3 || i0 == i1) return INVALID_VALUE;
    emu.empty_pair = i0 | i1 << 2;
    return SUCCESS;
}

API int emu_set_bad_algorithm(int alg_id, int kind) {
    if (alg_id < 0 || alg_id > 255 || kind < 0 || kind >= BAD_KIND_COUNT) return INVALID_VALUE;
    emu.bad[alg_id] = kind;
    return SUCCESS;
}

API int emu_set_algorithm_delay(int alg_id, int microseconds) {
    if (alg_id < 0 || alg_id > 255 || microseconds < 0) return INVALID_VALUE;
    emu.delay_us[alg_id] = microseconds;
    return SUCCESS;
}

API int emu_fail(const char *function, int status, int skip) {
    int found = find_function(function);
    if (found < 0 || skip < 0) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    failures[found].status = status;
    failures[found].skip = skip;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

API void emu_set_version(int major, int minor, int patch) {
    emu.version[0] = major;
    emu.version[1] = minor;
    emu.version[2] = patch;
}

API void emu_set_arch(int arch) { emu.arch = arch; }
API void emu_set_max_alg_id(int count) { emu.max_alg_id = count; }
API void emu_set_noop(int on) { emu.noop = on; }
API void emu_set_thread_check(int on) { emu.thread_check = on; }
API void emu_set_layout_per_plan(int on) { emu.per_plan = on; }
API void emu_set_workspace(long bytes) { emu.workspace = bytes; }
API void emu_set_full_sizes(int on) { emu.full_sizes = on; }
API void emu_set_default_split_k(int value) { emu.default_split_k = value; }

API int emu_live_objects(int kind) {
    if (kind < 0 || kind >= KIND_COUNT) return -1;
    return live[kind];
}

API long emu_calls(const char *function) {
    int found = find_function(function);
    return found < 0 ? -1 : calls[found];
}

API int emu_hangs(void) { return emu.hangs; }
API int emu_order_violations(void) { return emu.order_violations; }
API int emu_unpruned_groups(void) { return emu.unpruned_groups; }
API int emu_last_algorithm(void) { return emu.last_alg; }
API long emu_last_stream(void) { return emu.last_stream; }
API long emu_last_workspace(void) { return emu.last_workspace; }
