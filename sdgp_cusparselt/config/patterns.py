"""The prune methods and N:M patterns that there are, and how an argument is checked for them."""

from typing import Literal, get_args

from sdgp_cusparselt.errors import type_error, value_error

PruneMethod = Literal["none", "random", "magnitude", "rescaled_magnitude", "mvue"]
METHODS: tuple[str, ...] = get_args(PruneMethod)
#: Methods that draw from torch's generator.
STOCHASTIC = ("random", "mvue")
MAX_M = 32
#: N:M patterns that fit the 2:4 format; 1:4 is a 2:4 whose second value is zero.
HARDWARE_PATTERNS = ((2, 4), (1, 4))


def check_pattern(
    function: str, method: object, n: object, m: object, *, argument: str = "method"
) -> None:
    """Raise unless method is known and 1 <= n <= m <= 32."""
    if method not in METHODS:
        rule = f"one of {', '.join(METHODS)}"
        raise value_error(function, argument, rule, repr(method), "Pick one of these.")
    check_sizes(function, n, m)


def check_sizes(
    function: str, n: object, m: object, names: tuple[str, str] = ("n", "m")
) -> tuple[int, int]:
    """Return n and m if 1 <= n <= m <= 32, else raise.

    Args:
        function: that is named in errors.
        n: elements kept.
        m: of how many.
        names: of the two arguments.
    """
    n, m = checked_int(function, names[0], n), checked_int(function, names[1], m)
    if not 1 <= m <= MAX_M:
        raise value_error(function, names[1], f"in 1..{MAX_M}", m, "Hardware runs m = 4.")
    if not 1 <= n <= m:
        rule = f"in 1..{names[1]} with {names[1]} = {m}"
        raise value_error(function, names[0], rule, n, "Hardware runs n = 2.")
    return n, m


def checked_int(function: str, argument: str, value: object) -> int:
    """Return value if it is an int and no bool, else raise TypeError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise type_error(function, argument, "an int", repr(value), "Pass a whole number.")
    return value
