"""The 90 patterns of a 4 x 4 block that are 2:4 along both directions.

A pattern is two of four columns in each row, so that two rows are left to each column.
"""

import itertools

SIDE = 4
#: The two kept columns of a row.
PAIRS = tuple(itertools.combinations(range(SIDE), 2))
#: Indices into PAIRS, row by row, of every pattern.
PATTERNS = tuple(
    rows
    for rows in itertools.product(range(len(PAIRS)), repeat=SIDE)
    if all(sum(column in PAIRS[pair] for pair in rows) == 2 for column in range(SIDE))
)


def pattern_code(rows: tuple[int, ...]) -> int:
    """Return a pattern as 16 bits, row by row, bit 4 * row + column set where it keeps."""
    return sum(1 << (SIDE * row + column) for row, p in enumerate(rows) for column in PAIRS[p])
