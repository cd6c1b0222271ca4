"""When a layer is torch's own: nothing of its backward is pruned, so autograd does all of it.

Then second derivatives, ``torch.func``, batched gradients and strides are torch's, too.
"""

import warnings

import torch
from torch import Tensor, nn

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import NotSupportedError, SDGPFallbackWarning
from sdgp_cusparselt.layers import shards
from sdgp_cusparselt.recording.records import LayerRecord

#: Classes of weights that are nothing but memory.
ORDINARY = (Tensor, nn.Parameter)


def prunes(input: Tensor, weight: Tensor, config: SDGPConfig, record: LayerRecord) -> bool:
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
    elif not _wanted(input, weight, config.prunes, sparse_grad_weight):
        return False
    else:
        reason = reason_against(input, weight, config)
    if reason is None:
        return True
    _announce(reason, config, record)
    return False


def _wanted(input: Tensor, weight: Tensor, prunes: bool, sparse_grad_weight: bool) -> bool:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True  # a tensor does not know what transforms around this one ask of it
    wanted = (prunes and input.requires_grad) or (sparse_grad_weight and weight.requires_grad)
    return wanted and weight.numel() > 0


def reason_against(input: Tensor, weight: Tensor, config: SDGPConfig) -> str | None:
    """Return why the products of these operands cannot be pruned, or None."""
    reason = reason_against_weight(weight, config)
    if reason is None and (input.layout is not torch.strided or input.is_nested):
        layout = "nested" if input.is_nested else str(input.layout).removeprefix("torch.")
        reason = f"its input is {layout}"
    return reason


def reason_against_weight(weight: Tensor, config: SDGPConfig) -> str | None:
    """Return why a product with this weight cannot be pruned, or None.

    Args:
        weight: [out_features, in_features], or of a convolution.
        config: how it would be pruned.
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


def _reason_against_subclass(weight: Tensor, config: SDGPConfig) -> str | None:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if isinstance(weight, FakeTensor | FunctionalTensor):
        return None
    if shards.is_sharded(weight):
        return shards.reason_against(weight, config)
    return f"its weight is a {type(weight).__name__}, which only its own class can multiply"


def _announce(reason: str, config: SDGPConfig, record: LayerRecord) -> None:
    """Count a call that is left unpruned, and warn of the first one of a layer."""
    if config.on_unsupported == "raise":
        raise NotSupportedError(f"{record.name} cannot be pruned: {reason}.")
    if torch.compiler.is_compiling():
        return
    key = ("grad_input", "pruning", reason)
    record.fallbacks[key] += 1
    if record.fallbacks[key] == 1:
        what = f"{record.name} runs as torch's own layer, unpruned: {reason}."
        warnings.warn(what, SDGPFallbackWarning, stacklevel=4)
