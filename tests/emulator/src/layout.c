/* Where the nibble of (row, group of four columns) lies in the metadata, counted in nibbles. */
#include "emu.h"

static int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

static int trailing_zeros(int64_t value, int most) {
    int bits = 0;
    while (bits < most && ((value >> bits) & 1) == 0) bits++;
    return bits;
}

static uint64_t next_random(uint64_t *state) {
    uint64_t z = (*state += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

/* One permutation of the bits inside a tile of at most 128 rows by 16 groups; whole tiles follow
 * each other down the rows first, or along the columns first, as the seed says. */
static void draw_permutation(layout_map_t *map) {
    uint64_t state = map->layout.seed;
    int places[16];
    map->row_bits = trailing_zeros(map->rows, 7);
    map->group_bits = trailing_zeros(map->cols / 4, 4);
    int total = map->row_bits + map->group_bits;
    for (int i = 0; i < total; i++) places[i] = i;
    for (int i = total - 1; i > 0; i--) {
        int other = (int)(next_random(&state) % (uint64_t)(i + 1));
        int swap = places[i];
        places[i] = places[other];
        places[other] = swap;
    }
    for (int i = 0; i < map->row_bits; i++) map->row_place[i] = places[i];
    for (int i = 0; i < map->group_bits; i++) map->group_place[i] = places[map->row_bits + i];
    map->rows_first = next_random(&state) & 1;
}

void layout_prepare(layout_map_t *map, layout_t layout, int64_t rows, int64_t cols) {
    *map = (layout_map_t){.layout = layout, .rows = rows, .cols = cols};
    map->padded_rows = rows;
    map->padded_cols = cols;
    /* Row counts from 256 on that are not multiples of 128: nobody documents them; plain here. */
    if (layout.name == BLOCKED && (rows % 128 != 0 || cols % 64 != 0)) map->layout.name = PLAIN;
    int row_step = 32, col_step = 32;
    switch (map->layout.name) {
    case BLOCKED: return;
    case RANDOM_BITS: draw_permutation(map); return;
    case EIGHT_BIT: row_step = 16, col_step = 64; break;
    case SM90_ATOM: case SM90_PUBLISHED: row_step = 64; break;
    case SM90_INTERLEAVED: row_step = 16; break;
    default: break;
    }
    map->padded_rows = round_up(rows, row_step);
    map->padded_cols = round_up(cols, col_step);
}

/* Bytes that an order reaches, whole tiles; the region may be larger, never smaller. */
int64_t layout_bytes(layout_t layout, int64_t rows, int64_t cols) {
    layout_map_t map;
    layout_prepare(&map, layout, rows, cols);
    return map.padded_rows * map.padded_cols / 8;
}

/* The 64 words of a 32 x 32 block, which plain and blocked share. */
static int64_t word_in_block(int64_t r, int64_t c) {
    return (r % 8) * 8 + (r / 16 % 2) * 4 + (c / 16 % 2) * 2 + r / 8 % 2;
}

static int64_t plain(const layout_map_t *map, int64_t r, int64_t c) {
    return (c / 32) * (2 * map->padded_rows) + (r / 32) * 64 + word_in_block(r, c);
}

static int64_t blocked(const layout_map_t *map, int64_t r, int64_t c) {
    return (r / 128) * 512 + (c / 64) * 512 * (map->rows / 128) + (r % 128 / 32) * 64 +
           (c % 64 / 32) * 256 + word_in_block(r, c);
}

/* CUTLASS Sm90GemmSparseConfig for 16-bit: 64 x 32 atoms, down the rows, then along the columns. */
static int64_t sm90_atom(const layout_map_t *map, int64_t r, int64_t c) {
    return (r / 64) * 128 + (c / 32) * (map->padded_rows / 64) * 128 + r / 8 % 2 + (r % 8) * 2 +
           (c / 16 % 2) * 16 + (r / 16 % 4) * 32;
}

/* Per 16 x 32 block a word holds (r, g), (r + 8, g), (r, g + 4), (r + 8, g + 4). The order of the
 * blocks is not documented: down the rows first here, as in the other candidates. */
static int64_t sm90_interleaved(const layout_map_t *map, int64_t r, int64_t group) {
    int64_t block = (group / 8) * (map->padded_rows / 16) + r / 16;
    int64_t word = (r % 8) * 4 + group % 4;
    return (block * 32 + word) * 4 + r / 8 % 2 + (group / 4 % 2) * 2;
}

/* CUTLASS 2.x for 8-bit operands: 32-bit words of eight groups, ColumnMajorInterleaved<2>, and in
 * each 16 x 64 block the rows r and r + 8 side by side. */
static int64_t eight_bit(const layout_map_t *map, int64_t r, int64_t group) {
    int64_t word = (r % 8) * 4 + (group / 8 % 2) * 2 + r / 8 % 2;
    int64_t block = (group / 16) * (map->padded_rows / 16) + r / 16;
    return (block * 32 + word) * 8 + group % 8;
}

/* Published for 16-bit operands on sm90: tiles of 64 x 32 that follow each other along the columns;
 * in a tile 16 rows at a time, as four pairs of groups g, g + 4 of rows r and r + 8. */
static int64_t sm90_published(const layout_map_t *map, int64_t r, int64_t group) {
    int64_t tile = (r / 64) * (map->padded_cols / 32) + group / 8;
    int64_t inside = (r / 16 % 4) * 128 + (r % 8) * 16 + r / 8 % 2;
    return tile * 512 + inside + (group % 4) * 4 + (group / 4 % 2) * 2;
}

static int64_t random_bits(const layout_map_t *map, int64_t row, int64_t group) {
    int64_t inside = 0;
    for (int i = 0; i < map->row_bits; i++) inside |= ((row >> i) & 1) << map->row_place[i];
    for (int i = 0; i < map->group_bits; i++) inside |= ((group >> i) & 1) << map->group_place[i];
    int64_t tile_row = row >> map->row_bits, tile_col = group >> map->group_bits;
    int64_t tile_rows = map->rows >> map->row_bits;
    int64_t tile_cols = (map->cols / 4) >> map->group_bits;
    int64_t tile = map->rows_first ? tile_col * tile_rows + tile_row : tile_row * tile_cols + tile_col;
    return (tile << (map->row_bits + map->group_bits)) + inside;
}

int64_t layout_nibble(const layout_map_t *map, int64_t row, int64_t group) {
    switch (map->layout.name) {
    case BLOCKED: return blocked(map, row, group * 4) * 4 + group % 4;
    case SM90_ATOM: return sm90_atom(map, row, group * 4) * 4 + group % 4;
    case EIGHT_BIT: return eight_bit(map, row, group);
    case SM90_INTERLEAVED: return sm90_interleaved(map, row, group);
    case SM90_PUBLISHED: return sm90_published(map, row, group);
    case RANDOM_BITS: return random_bits(map, row, group);
    default: return plain(map, row, group * 4) * 4 + group % 4;
    }
}

/* The same map for tests: nibble address of every (row, group), row-major. */
API int emu_layout_addresses(const char *name, uint64_t seed, int64_t rows, int64_t cols,
                             int64_t *addresses) {
    int found = find_layout(name);
    if (found < 0) return INVALID_VALUE;
    layout_map_t map;
    layout_prepare(&map, (layout_t){found, seed}, rows, cols);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < cols / 4; g++)
            addresses[r * (cols / 4) + g] = layout_nibble(&map, r, g);
    return SUCCESS;
}
