"""Who owns a C struct and when it is destroyed: children first, once, never after a fork."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType
from typing import TypeVar

from pycusparselt.abi import OpaqueStorage
from pycusparselt.cusparselt import CFunction
from pycusparselt.errors import CusparseLtError, PlanStateError
from pycusparselt.loader import Library

# A garbage collection may run a finalizer in the middle of another release on the same thread.
_lock = threading.RLock()


def _renew_lock() -> None:
    """Give a forked child a free lock: the thread that held the old one does not exist there."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


class Resource:
    """An initialised C struct in a tree; it refers to other resources, never to Python objects.

    So the order of destruction holds even where the garbage collector ends a whole cycle of the
    Python objects at once.
    """

    def __init__(
        self,
        library: Library,
        storage: OpaqueStorage,
        destroy: CFunction | None,
        parents: tuple[Resource, ...],
    ) -> None:
        self.library = library
        self.storage = storage
        self.alive = True
        self._destroy = destroy
        self._parents = parents
        self._children: dict[int, Resource] = {}
        self._process = os.getpid()
        with _lock:
            for parent in parents:
                parent._children[id(self)] = self

    def release(self) -> CusparseLtError | None:
        """Destroy what was built on this, newest first, then this; return the first failure.

        Every object is dead afterwards, whatever the library answered.
        """
        with _lock:
            if not self.alive:
                return None
            self.alive = False
            failure = None
            for child in reversed(list(self._children.values())):
                failure = child.release() or failure
            for parent in self._parents:
                parent._children.pop(id(self), None)
            # A forked child shares neither the CUDA context nor the handle: destroying crashes.
            if self._destroy is None or self._process != os.getpid():
                return failure
            try:
                self._destroy(self.library, self.storage.address)
            except CusparseLtError as error:
                failure = failure or error
            return failure


Self = TypeVar("Self", bound="Owned")


class Owned:
    """A Python object that owns one C struct from its construction to :meth:`close`.

    It closes itself at the end of a with-block, when collected, and at interpreter exit. Closing
    closes everything that was built on it first.
    """

    _resource: Resource
    _finalizer: weakref.finalize[..., Owned]

    def _own(
        self,
        library: Library,
        storage: OpaqueStorage,
        destroy: CFunction | None,
        parents: tuple[Owned, ...] = (),
    ) -> None:
        """Take charge of a struct; call it right after the C function that initialised it."""
        self._resource = Resource(library, storage, destroy, tuple(p._resource for p in parents))
        self._finalizer = weakref.finalize(self, self._resource.release)

    @property
    def closed(self) -> bool:
        """Whether this object, or something it was built on, has been closed."""
        return not self._resource.alive

    @property
    def library(self) -> Library:
        """The library that this object belongs to."""
        return self._resource.library

    @property
    def address(self) -> int:
        """Address of the C struct, for the functions in :mod:`pycusparselt.cusparselt`.

        Raises:
            PlanStateError: the object has been closed.
        """
        self._require_open("use")
        return self._resource.storage.address

    def close(self) -> None:
        """Destroy the C object, and first everything built on it; a second call does nothing.

        Raises:
            CusparseLtError: the library refused; the object is closed all the same.
        """
        self._finalizer.detach()
        failure = self._resource.release()
        if failure is not None:
            raise failure

    def __enter__(self: Self) -> Self:
        self._require_open("__enter__")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _require_open(self, action: str) -> None:
        if not self._resource.alive:
            raise PlanStateError(
                f"{action}: {type(self).__name__} must be open, got one that was closed, or built "
                "on one that was. Create it again"
            )
