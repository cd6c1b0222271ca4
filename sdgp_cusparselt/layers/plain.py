"""When a layer is torch's own: nothing of its backward is pruned, so autograd does all of it.

Then second derivatives, ``torch.func``, batched gradients and strides are torch's, too.
"""

import torch
from torch import Tensor, nn

from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import NotSupportedError, SDGPError
from sdgp_cusparselt.layers import casting, shards
from sdgp_cusparselt.products import dispatch
from sdgp_cusparselt.products.announce import announce
from sdgp_cusparselt.recording.records import LayerRecord

#: Classes of weights that are nothing but memory.
ORDINARY = (Tensor, nn.Parameter)
#: The compiler differentiates the forward instead of calling the backward, and says nothing.
_NOT_COMPILED = "SDGP: a pruned layer inside a transform of torch.func is not compiled"


def linear_prunes(input: Tensor, weight: Tensor, config: SDGPConfig, record: LayerRecord) -> bool:
    """Whether anything of a linear layer's backward is pruned.

    Args:
        input: [..., in_features], before autocast.
        weight: [out_features, in_features], before autocast.
        config: of the layer.
        record: of the layer; told of the reason where something is to be pruned, but cannot be.

    Raises:
        NotSupportedError: it cannot be, and ``config.on_unsupported`` is "raise".
    """
    if not may_prune(input, weight, config, record):
        return False
    if not _is_asked(input, weight):
        return True
    dtype = casting.autocast_dtype(input) or input.dtype
    return not dispatch.linear_is_plain(input, weight, dtype, config, record)


def conv2d_prunes(
    input: Tensor, weight: Tensor, conv: ConvGeometry, config: SDGPConfig, record: LayerRecord
) -> bool:
    """Whether anything of a convolution's backward is pruned, if ``may_prune`` says that it may.

    Args:
        input: [N, in_channels, H, W], before autocast.
        weight: [out_channels, in_channels / groups, kH, kW], before autocast.
        conv: stride, padding, dilation, groups.
        config: of the layer.
        record: of the layer.
    """
    if not _is_asked(input, weight):
        return True
    dtype = casting.autocast_dtype(input) or input.dtype
    return not dispatch.conv2d_is_plain(input, weight, conv, dtype, config, record)


def may_prune(input: Tensor, weight: Tensor, config: SDGPConfig, record: LayerRecord) -> bool:
    """Whether something of this call's backward is to be pruned, and can be.

    Args:
        input: of the layer.
        weight: of the layer.
        config: of the layer.
        record: of the layer; told of the reason where something is to be pruned, but cannot be.

    Raises:
        NotSupportedError: it cannot be, and ``config.on_unsupported`` is "raise".
    """
    sparse_grad_weight = config.grad_weight == "sparse"
    if not (config.prunes or sparse_grad_weight) or not torch.is_grad_enabled():
        return False
    if torch._C._get_tracing_state() is not None:  # torch.jit.is_tracing()
        reason: str | None = "torch.jit.trace records no pruning"
    elif not _is_wanted(input, weight, config.prunes, sparse_grad_weight):
        return False
    else:
        reason = reason_against(input, weight, config)
    if reason is None:
        return True
    _stay_plain(reason, config, record)
    return False


def _is_wanted(input: Tensor, weight: Tensor, prunes: bool, sparse_grad_weight: bool) -> bool:
    """Whether the gradients that would be pruned are asked for."""
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            raise SDGPError(_NOT_COMPILED)
        return True  # a tensor does not know what the transforms around it ask
    wanted = (prunes and input.requires_grad) or (sparse_grad_weight and weight.requires_grad)
    return wanted and weight.numel() > 0


def _is_asked(input: Tensor, weight: Tensor) -> bool:
    """Whether the dispatcher may know these operands: eager, and nothing but memory."""
    return (
        type(input) is Tensor
        and type(weight) in ORDINARY
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def reason_against(input: Tensor, weight: Tensor, config: SDGPConfig) -> str | None:
    """Return why the products of these operands cannot be pruned, or None."""
    reason = reason_against_weight(weight, config)
    if reason is None and (input.layout is not torch.strided or input.is_nested):
        layout = "nested" if input.is_nested else str(input.layout).removeprefix("torch.")
        reason = f"its input is {layout}"
    return reason


def reason_against_weight(weight: Tensor, config: SDGPConfig | None) -> str | None:
    """Return why a product with this weight cannot be pruned, or None.

    Args:
        weight: [out_features, in_features], or of a convolution.
        config: how it would be pruned; None for a weight at rest, whose shards say nothing: FSDP
            gathers them for the forward.
    """
    if not weight.is_floating_point():
        if weight.is_complex():
            return "its weight is complex, and pruning is defined for real gradients"
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if (
        type(weight) not in ORDINARY
        and type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__
    ):
        return _reason_against_subclass(weight, config)
    if weight.layout is not torch.strided or weight.ndim < 2:
        layout = f"{weight.ndim}-D" if weight.ndim < 2 else str(weight.layout)
        return f"its weight is {layout.removeprefix('torch.')}"
    return None


def _reason_against_subclass(weight: Tensor, config: SDGPConfig | None) -> str | None:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if isinstance(weight, (FakeTensor, FunctionalTensor)):
        return None
    if shards.is_sharded(weight):
        return None if config is None else shards.reason_against(weight, config)
    return f"its weight is a {type(weight).__name__}, which only its own class can multiply"


def _stay_plain(reason: str, config: SDGPConfig, record: LayerRecord) -> None:
    """Count a call that stays plain for a reason of its operands, and announce the reason."""
    if config.on_unsupported == "raise":
        raise NotSupportedError(f"{record.name} cannot be pruned: {reason}.")
    if not torch.compiler.is_compiling():
        record.calls["grad_input", "plain"] += 1
        record.fallbacks["grad_input", reason] += 1
        announce(record.name, "grad_input", "plain", reason)
