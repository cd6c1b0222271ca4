"""Exceptions and warnings of the upper layer; ``pycusparselt.errors`` has the binding's own."""

from pycusparselt.errors import CusparseLtError, LibraryNotFoundError, PlanStateError

__all__ = [
    "CusparseLtError",
    "EquivalenceError",
    "LibraryNotFoundError",
    "NotSupportedError",
    "PlanStateError",
    "SDGPCacheWarning",
    "SDGPError",
    "SDGPFallbackWarning",
    "SDGPScheduleWarning",
    "message",
    "type_error",
    "value_error",
]


class SDGPError(Exception):
    """Base class of everything this package raises on its own account."""


class NotSupportedError(SDGPError, NotImplementedError):
    """A product cannot run as asked; the message lists every reason."""


class EquivalenceError(SDGPError, ArithmeticError):
    """A backend's result lies outside the bound derived from its dtype and reduction length."""


class SDGPFallbackWarning(UserWarning):
    """A product does not run sparse; issued once a reason, for the first layer that met it."""


class SDGPCacheWarning(UserWarning):
    """A cache file was set aside or cannot be written; what it held is made anew when needed."""


class SDGPScheduleWarning(UserWarning):
    """A schedule does not move, or goes on from a checkpoint that was written under another one."""


def value_error(function: str, argument: str, rule: str, got: object, fix: str) -> ValueError:
    """Build the one form that every ValueError of this package has."""
    return ValueError(message(function, argument, rule, got, fix))


def type_error(function: str, argument: str, rule: str, got: object, fix: str) -> TypeError:
    """Build the one form that every TypeError of this package has."""
    return TypeError(message(function, argument, rule, got, fix))


def message(function: str, argument: str, rule: str, got: object, fix: str) -> str:
    """Return ``<function>: <argument> must be <rule>, got <value>. <what to do>``."""
    return f"{function}: {argument} must be {rule}, got {got}. {fix}"
