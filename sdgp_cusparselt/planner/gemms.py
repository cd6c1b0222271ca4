"""Every GEMM of one training step, traced on meta tensors: shapes without memory or a GPU.

Only the forward pass runs. Each weight or matmul that it uses has up to two GEMMs in the backward
pass, whose shapes follow from the forward ones; which of them run follows from requires_grad:

    output      [M, N] = input [M, K] @ weight.T [K, N]
    grad_input  [M, K] = grad_output [M, N] @ weight [N, K]          SDGP prunes grad_output along N
    grad_weight [N, K] = grad_output.T [N, M] @ input [M, K]
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sdgp_cusparselt.errors import NotSupportedError
from sdgp_cusparselt.layers.convert import is_head
from sdgp_cusparselt.layers.modules import SDGPConv1D, SDGPLinear, sdgp_class_of
from sdgp_cusparselt.layers.presets import Preset, role_of
from sdgp_cusparselt.layers.unsuitable import output_layers
from sdgp_cusparselt.planner.activations import Activations

aten = torch.ops.aten
#: Row and column multiples that cuSPARSELt asks of 16-bit operands (the pack pads the rows).
SPARSE_MULTIPLE, DENSE_MULTIPLE = 16, 8
#: Ops that move no data, although they are not declared as views.
_FREE = {"aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided"}


@dataclass(frozen=True)
class Gemm:
    """One GEMM [m, n] = [m, k] @ [k, n], ``batch`` times, of one layer's training step.

    Args:
        fqn: dotted name of the module that issued it.
        kind: linear, conv, attention or matmul.
        role: forward, grad_input or grad_weight.
        m, n, k: sizes of this GEMM; k is reduced. A convolution is its implicit GEMM.
        batch: independent GEMMs of this size in one call (attention heads, groups).
        elements: of the left operand, the right operand and the result, as stored in memory (a
            convolution reads its input once, however often the implicit GEMM does); zeros inside
            scaled_dot_product_attention, whose fused kernels keep the score matrix on chip.
        prunable: SDGP may run it on sparse tensor cores.
        reason: why it may not; empty when prunable.
        fold_elements: of the [m, n] result that a separate pass must spread into the gradient of
            an image; 0 where the result is already the gradient.
        call: number of the call that it belongs to; its two or three GEMMs share it.
    """

    fqn: str
    kind: str
    role: str
    m: int
    n: int
    k: int
    batch: int
    elements: tuple[int, int, int]
    prunable: bool = False
    reason: str = ""
    fold_elements: int = 0
    call: int = 0

    @property
    def flops(self) -> int:
        """Multiply-adds counted as two operations."""
        return 2 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True)
class Trace:
    """GEMMs of one step, and the traffic of everything else in the forward pass.

    Args:
        gemms: in the order of the forward pass.
        other_bytes: read and written by every other op of the forward pass, unfused.
        parameters: number of parameters that the step trains.
        activations: call of a linear layer -> the activation that follows it at once.
    """

    gemms: tuple[Gemm, ...]
    other_bytes: int
    parameters: int
    activations: Mapping[int, str] = field(default_factory=dict)


def trace_step(
    model: nn.Module,
    inputs: Mapping[str, Tensor] | Sequence[Tensor],
    *,
    exclude: Sequence[str] = (),
    include_heads: bool = False,
    preset: Preset = "all",
) -> Trace:
    """List the GEMMs of one training step of ``model``.

    Args:
        model: on the meta device (or any other; its forward pass runs once).
        inputs: keyword or positional arguments of its forward pass.
        exclude: fnmatch patterns of module names that stay dense.
        include_heads: let SDGP take the layers that ``convert_`` keeps dense for being heads.
        preset: which products SDGP takes, as ``convert_`` has it.

    Returns:
        The step's GEMMs with their roles, and the other ops' memory traffic.

    Raises:
        NotSupportedError: an op that multiplies matrices is not known to the planner.
    """
    recorder = _Recorder(exclude, include_heads, output_layers(model), preset)
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    with torch.enable_grad(), _names(model, recorder), recorder, _AttentionMarker(recorder):
        model(*args, **kwargs)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    activations = recorder.activations.found
    return Trace(tuple(recorder.gemms), recorder.other_bytes, trained, activations)


@contextmanager
def _names(model: nn.Module, recorder: "_Recorder") -> Iterator[None]:
    """Keep recorder.stack equal to the modules whose forward is running."""

    def enter(fqn: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            recorder.stack.append((fqn, module))
            recorder.activations.entered(module, inputs)

        return note

    def leave(*_: object) -> None:
        recorder.stack.pop()

    handles = []
    for fqn, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(fqn)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _AttentionMarker(TorchFunctionMode):
    """Tells the recorder which ops belong to scaled_dot_product_attention."""

    def __init__(self, recorder: "_Recorder") -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = func is nn.functional.scaled_dot_product_attention
        self.recorder.attention += inside
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.recorder.attention -= inside


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every aten op below autograd, where composite ops are already taken apart."""

    def __init__(
        self,
        exclude: Sequence[str],
        include_heads: bool,
        heads: Set[nn.Module],
        preset: Preset,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.exclude = exclude
        self.include_heads = include_heads
        self.heads = heads
        self.preset = preset
        self.activations = Activations()
        self.calls = 0
        self.stack: list[tuple[str, nn.Module]] = []
        self.attention = 0
        self.gemms: list[Gemm] = []
        self.other_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is aten.mm or packet is aten.bmm:
            self._matmul(args[0], args[1], out)
        elif packet is aten.addmm or packet is aten.baddbmm:
            self._matmul(args[1], args[2], out)
        elif packet is aten.convolution:
            self._convolution(args, out)
        elif packet in flop_registry:
            raise NotSupportedError(
                f"trace_step: {packet} in {self.fqn or 'the model'} multiplies matrices in a way "
                "the planner does not know. Trace the model on the meta device, where attention "
                "is taken apart into plain matmuls."
            )
        elif not self.attention and not func.is_view and func._schema.name not in _FREE:
            self.activations.saw(packet, args, out)
            tensors = [*args, *(out if isinstance(out, (tuple, list)) else (out,))]
            self.other_bytes += sum(_nbytes(t) for t in tensors if isinstance(t, Tensor))
        return out

    @property
    def fqn(self) -> str:
        """Name of the innermost module whose forward is running."""
        return self.stack[-1][0] if self.stack else ""

    def _matmul(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Record [M, K] @ [K, N], with an optional leading batch dimension."""
        self.calls += 1
        batch = left.shape[0] if left.dim() == 3 else 1
        m, k = left.shape[-2:]
        n = right.shape[-1]
        module = self.stack[-1][1] if self.stack else None
        is_layer = batch == 1 and _is_linear(module)
        if is_layer:
            self.activations.made(out, self.calls)
        kind = "linear" if is_layer else "attention" if self.attention else "matmul"
        sizes = (batch * m * k, batch * k * n, batch * m * n)
        if self.attention:  # a fused kernel keeps the score matrix, the bulk of it, on chip
            sizes = (0, 0, 0)
        self._add(kind, "forward", (m, n, k), batch, sizes)
        if left.requires_grad:
            reason = self._reason(n, k) if is_layer else f"{kind}: no weight to multiply"
            order = (sizes[2], sizes[1], sizes[0])
            self._add(kind, "grad_input", (m, k, n), batch, order, reason=reason)
        if right.requires_grad:
            own = self._reason_against_grad_weight(m, n, k) if is_layer else None
            order = (sizes[2], sizes[0], sizes[1])
            self._add(kind, "grad_weight", (n, k, m), batch, order, reason=own)

    def _convolution(self, args: Sequence[Any], out: Tensor) -> None:
        """Record a convolution as its implicit GEMM over output (transposed: input) pixels."""
        self.calls += 1
        image, weight, _, stride, padding, _, transposed, _, groups = args[:9]
        taps = math.prod(weight.shape[2:])
        pixels = image.shape[0] * math.prod((image if transposed else out).shape[2:])
        wide, narrow = weight.shape[0] // groups, weight.shape[1]
        sizes = (image.numel(), weight.numel(), out.numel())
        m, n, k = pixels, narrow * taps, wide
        forward, backward = ((m, n, k), (m, k, n)) if transposed else ((m, k, n), (m, n, k))
        self._add("conv", "forward", forward, groups, sizes)
        if image.requires_grad:
            fold = 0 if set(stride) == {1} else m * n
            reason = self._reason(wide, n, groups=groups)
            if not reason and (taps > 1 or any(padding)):
                reason = "only an unpadded 1x1 convolution runs sparse"
            order = (sizes[2], sizes[1], sizes[0])
            self._add("conv", "grad_input", backward, groups, order, reason=reason, fold=fold)
        if weight.requires_grad:
            order = (sizes[2], sizes[0], sizes[1])
            self._add("conv", "grad_weight", (k, n, m), groups, order)

    def _reason(self, reduced: int, width: int, groups: int = 1) -> str:
        """Say why the current module's grad_input stays dense; empty when SDGP may take it."""
        reason = self._reason_of_name()
        if reason:
            return reason
        if self.preset != "all" and role_of(self.fqn) != "reader":
            return f"it does not read the residual stream: preset {self.preset}"
        if groups > 1:
            return f"{groups} groups"
        if reduced % SPARSE_MULTIPLE or width % DENSE_MULTIPLE:
            return (
                f"out {reduced} must divide by {SPARSE_MULTIPLE} and in {width} by {DENSE_MULTIPLE}"
            )
        return ""

    def _reason_against_grad_weight(self, tokens: int, outputs: int, inputs: int) -> str | None:
        """Say why a layer's grad_weight stays dense; None where no preset asks for it."""
        if self.preset != "balanced" or self._reason_of_name() or role_of(self.fqn) is None:
            return None
        if outputs % SPARSE_MULTIPLE or inputs % DENSE_MULTIPLE or tokens < SPARSE_MULTIPLE:
            return None
        return ""

    def _reason_of_name(self) -> str:
        """Say why the current module stays dense for what it is; empty where it need not."""
        module = self.stack[-1][1] if self.stack else None
        if module is None or sdgp_class_of(module) is None:
            return f"{type(module).__name__} is not a layer that SDGP converts"
        if (is_head(self.fqn) or module in self.heads) and not self.include_heads:
            return "a head, dense by default"
        pattern = next((p for p in self.exclude if fnmatch(self.fqn, p)), None)
        return f"excluded by {pattern}" if pattern else ""

    def _add(
        self,
        kind: str,
        role: str,
        mnk: tuple[int, int, int],
        batch: int,
        elements: tuple[int, int, int],
        reason: str | None = None,
        fold: int = 0,
    ) -> None:
        """Append one GEMM; one that SDGP might take comes with a reason against it, or none."""
        prunable = reason == ""
        why = reason if reason is not None else f"{role} stays dense"
        fold_elements = fold if prunable else 0
        sizes = (*mnk, batch, elements, prunable, why, fold_elements, self.calls)
        self.gemms.append(Gemm(self.fqn, kind, role, *sizes))


def _is_linear(module: nn.Module | None) -> bool:
    """Say whether SDGP converts this module as a linear layer."""
    return module is not None and sdgp_class_of(module) in (SDGPLinear, SDGPConv1D)


def _nbytes(tensor: Tensor) -> int:
    """Bytes that reading the tensor moves; an expanded tensor's memory is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
