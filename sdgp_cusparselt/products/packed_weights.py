"""Pruned weights, kept from one product to the next: pruned and packed once per version.

A version is a storage, the place in it, and torch's counter of changes in place, of the weight and
of its masks. Optimizers, ``load_state_dict`` and everything under ``torch.no_grad`` that changes a
weight in place counts; whoever writes through ``.data`` calls ``forget`` afterwards. Nothing is
kept of a weight whose version says nothing: one that FSDP gathers anew, one that was packed into a
CUDA graph, an inference tensor.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sdgp_cusparselt.backends.masking import INPUTS, OUTPUTS, largest, masked, masked_twice
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.devices import is_capturing

#: Weights of which something is kept; the one used longest ago goes first.
LIMIT = 4096
#: Packed forms kept of one version: token counts may lead to plans that read different orders.
FORMS = 4


@dataclass(slots=True)
class _Kept:
    """A tensor, and the stream and event after which it can be read."""

    tensor: Tensor
    stream: Any = None
    event: Any = None

    @classmethod
    def of(cls, tensor: Tensor) -> "_Kept":
        if not tensor.is_cuda:
            return cls(tensor)
        stream = torch.cuda.current_stream(tensor.device)
        return cls(tensor, stream, stream.record_event())

    def read(self) -> Tensor:
        """Return the tensor for the current stream."""
        if self.stream is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            if stream != self.stream:
                stream.wait_event(self.event)
                self.tensor.record_stream(stream)
        return self.tensor


@dataclass(slots=True)
class _Version:
    """What is kept of one version of one weight."""

    version: Hashable
    #: While they are held no other storage gets their addresses, by which versions are told apart.
    storages: tuple[StorageWeakRef, ...]
    forms: OrderedDict[Hashable, _Kept] = field(default_factory=OrderedDict)

    @property
    def is_over(self) -> bool:
        return any(_is_gone(storage) for storage in self.storages)


_versions: OrderedDict[Hashable, _Version] = OrderedDict()
#: Storages that were packed into a CUDA graph: a replay changes or reads them without a word.
_captured: dict[int, StorageWeakRef] = {}
_lock = threading.Lock()


@dataclass(slots=True, eq=False)
class PrunedWeight:
    """A weight with its masks, and all that products need of it.

    Attributes:
        weight: [outputs, inputs] or [outputs, inputs, kH, kW], any strides and float dtype.
        mask: bool of its shape or None; see ``backends.masking``.
        mask_t: likewise.
        dtype: of the products.
        config: pattern and decay.
        keeps: whether its version says when it changes.
    """

    weight: Tensor
    mask: Tensor | None
    mask_t: Tensor | None
    dtype: torch.dtype
    config: SDGPConfig
    keeps: bool = True
    #: Whether nothing but the packed weight exists: then a machine without sparse tensor cores is
    #: no surprise that is told of.
    is_stored: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        """[outputs, inputs] or [outputs, inputs, kH, kW]."""
        return tuple(self.weight.shape)

    def dense(self) -> Tensor:
        """Return the pruned weight with its zeros, in the products' dtype."""
        return self._form(("dense", self.dtype, *self._pattern), self._dense)

    def dense_twice(self) -> Tensor:
        """Return it pruned along the outputs as well."""
        return self._form(("twice", self.dtype, *self._pattern), self._dense_twice)

    def packed(self, along: int, order: Hashable, pack: Callable[..., Tensor]) -> Tensor:
        """Return the packed operand of a product.

        Args:
            along: ``INPUTS`` for output, ``OUTPUTS`` for grad_input.
            order: what tells the operands apart that plans read: a layout, or a plan.
            pack: (x, method=, transpose=) -> uint8 buffer; see ``CusparseLtBackend.pack``.
        """
        key = ("packed", along, order, self.dtype, *self._pattern)
        return self._form(key, lambda: self._packed(along, pack))

    @property
    def _pattern(self) -> tuple[int, int, float]:
        return self.config.weight_n, self.config.weight_m, self.config.weight_beta

    def _dense(self) -> Tensor:
        return masked(self.weight.detach().to(self.dtype), self.mask, self.config)

    def _dense_twice(self) -> Tensor:
        weight = self.weight.detach().to(self.dtype)
        return masked_twice(weight, self.mask, self.mask_t, self.config)

    def _packed(self, along: int, pack: Callable[..., Tensor]) -> Tensor:
        weight = self.weight.detach().to(self.dtype)
        n, m, _ = self._pattern
        method = "magnitude" if n == 2 else "none"
        if along == INPUTS:
            # The packer prunes by itself what has no mask.
            fuses = self.mask is None and n == 2
            x = weight if fuses else masked(weight, self.mask, self.config)
        elif self.mask_t is not None:
            x = masked_twice(weight, self.mask, self.mask_t, self.config)
        else:
            x = masked(weight, self.mask, self.config)
            x = x if n == 2 else largest(x, n, m, OUTPUTS)
        matrix = x.reshape(x.shape[0], x.shape[1])  # of a 1x1 kernel
        operand = matrix if along == INPUTS else matrix.t()
        if operand.stride(1) == 1:
            return pack(operand, method=method, transpose=False)
        turned = operand.t()
        turned = turned if turned.stride(1) == 1 else turned.contiguous()
        return pack(turned, method=method, transpose=True)

    def _form(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            version = self._version()
            if version is None:
                return make()
            with _lock:
                kept = version.forms.get(key)
                if kept is not None:
                    version.forms.move_to_end(key)
            if kept is None:
                kept = _Kept.of(make())
                with _lock:
                    version.forms[key] = kept
                    while len(version.forms) > FORMS:
                        version.forms.popitem(last=False)
        return kept.read()

    def _tensors(self) -> list[Tensor]:
        return [t for t in (self.weight, self.mask, self.mask_t) if t is not None]

    def _version(self) -> _Version | None:
        """Return what is kept of the version at hand, or None where nothing may be."""
        tensors = self._tensors()
        if not self.keeps or any(t.is_inference() for t in tensors):
            return None
        places = [_place(t) for t in tensors]
        if is_capturing(tensors[0].device):
            with _lock:
                for t in tensors:
                    storage = t.untyped_storage()
                    _captured[storage._cdata] = _weakly(t)
            return None
        if _captured and any(place[0] in _captured for place in places):
            return None
        key, state = places[0], (*places[1:], *(t._version for t in tensors))
        with _lock:
            found = _versions.get(key)
            if found is None or found.version != state or found.is_over:
                storages = tuple(_weakly(t) for t in tensors)
                _drop_dead()
                found = _versions[key] = _Version(state, storages)
            _versions.move_to_end(key)
            while len(_versions) > LIMIT:
                _versions.popitem(last=False)
        return found


def forget() -> None:
    """Drop everything that is kept of weights: after one was changed through ``.data``."""
    with _lock:
        _versions.clear()
        _captured.clear()


def kept_nbytes() -> int:
    """Return the bytes that pruned and packed weights take beside the weights."""
    with _lock:
        forms = [kept.tensor for found in _versions.values() for kept in found.forms.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in forms)


def _place(x: Tensor) -> tuple[Any, ...]:
    return (x.untyped_storage()._cdata, x.data_ptr(), x.shape, x.stride(), x.dtype)


def _drop_dead() -> None:
    """Drop what is kept of weights that are gone; the lock is held."""
    for key in [key for key, found in _versions.items() if found.is_over]:
        del _versions[key]
    for address in [address for address, storage in _captured.items() if _is_gone(storage)]:
        del _captured[address]


def _weakly(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]
