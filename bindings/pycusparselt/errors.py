"""What this binding raises; it stands alone, so nothing here derives from another package."""

from __future__ import annotations


class CusparseLtError(RuntimeError):
    """A C function returned a status other than success.

    Attributes:
        status: the number that the C function returned.
        name: its name, for example ``CUSPARSE_STATUS_NOT_SUPPORTED``.
        function: the C function, for example ``cusparseLtMatmul``.
        text: the library's own sentence for this status, "" where it exports none.
        context: shapes and dtypes at hand, library version, and what to do if that is known.
    """

    def __init__(
        self, status: int, name: str, function: str, text: str = "", context: str = ""
    ) -> None:
        super().__init__(status, name, function, text, context)
        self.status = status
        self.name = name
        self.function = function
        self.text = text
        self.context = context

    def __str__(self) -> str:
        message = f"{self.function} failed: {self.name} ({self.status})"
        if self.text:
            message += f", {self.text}"
        return f"{message}; {self.context}" if self.context else message


class LibraryNotFoundError(OSError):
    """No libcusparseLt could be found or opened.

    Attributes:
        searched: the places that were tried, in order.
    """

    def __init__(self, message: str, searched: tuple[str, ...] = ()) -> None:
        super().__init__(message, searched)
        self.message = message
        self.searched = searched

    def __str__(self) -> str:
        return self.message


class UnsupportedVersionError(RuntimeError):
    """The library's version lies outside the range that this binding was compared with."""


class LibraryVersionWarning(UserWarning):
    """The library loads, but this version is untested or has a known regression."""


class FunctionNotAvailableError(NotImplementedError):
    """The loaded library does not export this C function; raised only when it is called.

    Attributes:
        function: the C function that is missing.
    """

    def __init__(self, message: str, function: str) -> None:
        super().__init__(message, function)
        self.message = message
        self.function = function

    def __str__(self) -> str:
        return self.message


class PlanStateError(RuntimeError):
    """An object was used after it, or something it was built on, had been closed."""
