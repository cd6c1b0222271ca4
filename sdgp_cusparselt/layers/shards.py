"""Tensor-parallel linear layers: every rank prunes and multiplies the shards that it holds.

For each dimension of the device mesh the weight says how the others have to lie:

    weight      grad_output   input       grad_input   grad_weight   grad_bias
    Shard(0)    Shard(-1)     Replicate   Partial      Shard(0)      Shard(0)     column-wise
    Shard(1)    Replicate     Shard(-1)   Shard(-1)    Shard(1)      Replicate    row-wise
    Replicate   Shard(0)      Shard(0)    Shard(0)     Partial       Partial      by samples
    Replicate   Replicate     Replicate   Replicate    Replicate     Replicate
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.config.patterns import STOCHASTIC

if TYPE_CHECKING:  # torch.distributed takes a second to import, and whoever shards has it
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
#: (grad_output, input, weight) of one rank -> grad_input, grad_weight, grad_bias of that rank.
Local = Callable[[Tensor, Tensor | None, Tensor | None], Gradients]

#: Mesh -> generator that is in the same state on all of its ranks.
_common: "dict[DeviceMesh, torch.Generator]" = {}


def is_sharded(x: Tensor | None) -> "TypeGuard[DTensor]":
    """Whether x is a DTensor; imports nothing."""
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(x, found.DTensor)


def reason_against(weight: "DTensor", config: SDGPConfig) -> str | None:
    """Return why the products of a sharded weight cannot be pruned shard by shard, or None.

    Args:
        weight: [out_features, in_features].
        config: how it would be pruned.
    """
    from torch.distributed.tensor import Replicate, Shard

    if weight.ndim != 2:
        return f"its weight is a DTensor of {weight.ndim} dimensions"
    parts = 1
    for size, placement in zip(weight.device_mesh.shape, weight.placements, strict=True):
        if placement not in (Shard(0), Shard(1), Replicate()):
            return f"its weight lies as {placement} on the device mesh"
        parts *= size if placement == Shard(0) else 1
    outputs = weight.shape[0]
    if config.prunes and outputs % (parts * config.m):
        return f"groups of {config.m} outputs would cross the {parts} shards of its {outputs}"
    return None


@dataclass(frozen=True)
class Sharding:
    """How a layer's operands lie on a device mesh.

    Attributes:
        mesh: of ranks.
        weight: one placement for each of its dimensions.
        input_shape: of the whole input.
        weight_shape: of the whole weight.
    """

    mesh: "DeviceMesh"
    weight: "tuple[Placement, ...]"
    input_shape: torch.Size
    weight_shape: torch.Size


def sharding_of(input: Tensor, weight: Tensor) -> Sharding | None:
    """Return how these operands lie, or None where the weight is no DTensor."""
    if not is_sharded(weight):
        return None
    return Sharding(weight.device_mesh, weight.placements, input.shape, weight.shape)


def linear_gradients(
    sharding: Sharding,
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    config: SDGPConfig,
    local: Local,
) -> Gradients:
    """Return the gradients of a sharded linear layer from those of each rank's shards.

    Args:
        sharding: of the layer.
        grad_output: DTensor [..., out_features], placed anyhow.
        input: DTensor [..., in_features], placed anyhow, or None.
        weight: DTensor [out_features, in_features], or None.
        config: how to prune.
        local: computes them for one rank.

    Note:
        Draws agree between ranks that hold the same part of grad_output, and differ between those
        that hold different parts, whatever the seeds of the ranks are.
    """
    assert is_sharded(grad_output)  # the gradient of a DTensor
    layouts = _layouts(sharding, grad_output)
    held = grad_output.redistribute(sharding.mesh, layouts.grad_output)
    with _draws(held, config):
        found = local(
            held.to_local(),
            input.redistribute(sharding.mesh, layouts.input).to_local()
            if is_sharded(input)
            else None,
            weight.to_local() if is_sharded(weight) else None,
        )
    shapes = (sharding.input_shape, sharding.weight_shape, sharding.weight_shape[:1])
    first, second, third = (
        None if part is None else _whole(part, sharding.mesh, placements, shape)
        for part, placements, shape in zip(found, layouts[2:], shapes, strict=True)
    )
    return first, second, third


class _Layouts(NamedTuple):
    """Placements, one for each dimension of the mesh; the table above."""

    grad_output: "tuple[Placement, ...]"
    input: "tuple[Placement, ...]"
    grad_input: "tuple[Placement, ...]"
    grad_weight: "tuple[Placement, ...]"
    grad_bias: "tuple[Placement, ...]"


def _layouts(sharding: Sharding, grad_output: "DTensor") -> _Layouts:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = grad_output.ndim - 1
    whole, features = Replicate(), Shard(last)
    lines: list[tuple[Placement, ...]] = []
    for weight, given in zip(sharding.weight, grad_output.placements, strict=True):
        if weight == Shard(0):
            lines.append((features, whole, Partial(), Shard(0), Shard(0)))
        elif weight == Shard(1):
            lines.append((whole, features, features, Shard(1), whole))
        elif given == Shard(0) and last > 0:
            lines.append((given, given, given, Partial(), Partial()))
        else:
            lines.append((whole,) * 5)
    return _Layouts(*zip(*lines, strict=True))


def _whole(
    part: Tensor, mesh: "DeviceMesh", placements: "tuple[Placement, ...]", shape: torch.Size
) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
    )


@contextmanager
def _draws(grad_output: "DTensor", config: SDGPConfig) -> Iterator[None]:
    """Let pruning draw what belongs to this rank's part of grad_output."""
    sparse = config.grad_weight == "sparse"
    if config.prune not in STOCHASTIC and not (sparse and config.grad_weight_prune in STOCHASTIC):
        yield
        return
    mesh, part = grad_output.device_mesh, 0
    for dim, placement in enumerate(grad_output.placements):
        if placement.is_shard():
            part = part * mesh.size(dim) + mesh.get_local_rank(dim)
    seed = int(torch.randint(2**62, (), generator=_common_generator(mesh))) + part
    device = grad_output.device
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    else:
        module = torch.get_device_module(device)
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            module.manual_seed(seed)
            yield


def _common_generator(mesh: "DeviceMesh") -> torch.Generator:
    """Return the generator of a mesh, at first seeded by its first rank's."""
    found = _common.get(mesh)
    if found is None:
        seed = torch.randint(2**62, (1,)).to(mesh.device_type)
        for dim in range(mesh.ndim):
            torch.distributed.broadcast(seed, group=mesh.get_group(dim), group_src=0)
        found = _common[mesh] = torch.Generator().manual_seed(int(seed))
    return found
