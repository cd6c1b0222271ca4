"""The pruned weight with its zeros, as each product sees it; groups run along what that reduces.

output and the gradients:         kept = where(mask, weight, 0), or the n largest of m along inputs
grad_input, a 2:4 weight in it:   kept pruned along the outputs as well
"""

import torch
from torch import Tensor

from sdgp_cusparselt.backends.emulation import decayed
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.devices import is_capturing
from sdgp_cusparselt.packing.pack import MAX_SIDE, kernel_obstacle
from sdgp_cusparselt.packing.prune import prune_dense
from sdgp_cusparselt.pruning.methods import prune

#: Dimensions of a weight [outputs, inputs, ...] along which groups run.
INPUTS, OUTPUTS = 1, 0


def masked(weight: Tensor, mask: Tensor | None, config: SDGPConfig) -> Tensor:
    """Return the weight that the products use in place of a weight.

    kept = where(mask, weight, 0), or the weight_n largest of weight_m along the inputs
    result = kept + weight_beta * (weight - kept)

    Args:
        weight: [outputs, inputs] or [outputs, inputs, kH, kW] float, any strides.
        mask: bool of its shape, True where it is kept; by magnitude if None.
        config: pattern and decay.

    Returns:
        Tensor of weight's shape, never weight itself.
    """
    if mask is None:
        kept = largest(weight, config.weight_n, config.weight_m, INPUTS)
    else:
        kept = torch.where(mask, weight, 0)
    return decayed(kept, weight, config.weight_beta)


def masked_twice(
    weight: Tensor, mask: Tensor | None, mask_t: Tensor | None, config: SDGPConfig
) -> Tensor:
    """Return ``masked(weight)`` pruned along the outputs too, the weight of grad_input.

    Args:
        weight: see ``masked``.
        mask: see ``masked``.
        mask_t: bool of weight's shape, what is kept along the outputs; by magnitude if None, which
            leaves a weight with a transposable mask as it is.
        config: see ``masked``.
    """
    once = masked(weight, mask, config)
    if mask_t is not None:
        kept = torch.where(mask_t, once, 0)
    else:
        kept = largest(once, config.weight_n, config.weight_m, OUTPUTS)
    return decayed(kept, once, config.weight_beta)


def largest(weight: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Return weight with the n largest of every m along a dimension; one pass of a kernel if 2-D.

    Args:
        weight: [outputs, inputs, ...] float, any strides.
        n: elements kept.
        m: of how many.
        dim: 0 or 1.
    """
    if _kernel_takes(weight, n, m):
        if weight.stride(1) == 1:
            return prune_dense(weight, n=n, dim=-1 if dim == INPUTS else 0)
        return prune_dense(weight.t(), n=n, dim=0 if dim == INPUTS else -1).t()
    with torch.no_grad():
        return prune(weight.detach(), method="magnitude", n=n, m=m, dim=dim)


def _kernel_takes(weight: Tensor, n: int, m: int) -> bool:
    return (
        weight.is_cuda
        and type(weight) in (Tensor, torch.nn.Parameter)
        and weight.ndim == 2
        and m == 4
        and n in (1, 2)
        and weight.numel() > 0
        and max(weight.shape) <= MAX_SIDE
        and weight.shape[0] % 4 == weight.shape[1] % 4 == 0
        and 1 in weight.stride()
        and kernel_obstacle(weight) is None
        and not is_capturing(weight.device)
    )
