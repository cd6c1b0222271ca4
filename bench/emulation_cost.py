"""What emulating a pruned gradient launches and moves on a GPU, counted without one.

    PYTHONPATH=.:bindings python -m bench.emulation_cost [--compiled]

Counted, not measured: nothing here ran on a GPU. Three ways of the same work are counted:
plain torch: each operation on meta tensors that writes memory is a launch, and moves its operands
    and its result once.
kernel: launches and accesses of the Triton kernel in its interpreter, padding included, plus the
    torch operations around it.
compiled: kernels that torch.compile generates, and the bytes that its scheduler counts; for a CPU,
    because Inductor generates no CUDA code where there is none: it fuses reductions less than on a
    GPU, so that this is an upper bound. Seconds to minutes a pattern, hence an option.
A clone reads and writes the tensor once.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.packing.prune import prune_dense

METHODS = ("magnitude", "rescaled_magnitude", "random", "mvue")
PATTERNS = ((2, 4), (1, 4), (4, 8), (16, 32))
SHAPE, DTYPE = (256, 512), torch.bfloat16


@dataclass
class Cost:
    """Launches, and bytes that they read and write."""

    launches: int = 0
    nbytes: float = 0.0


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that write memory, and what they move."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = Cost()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        returns = function._schema.returns
        is_view = bool(returns) and all(
            r.alias_info is not None and not r.alias_info.is_write for r in returns
        )
        if not is_view and not function.overloadpacket.__name__.startswith(("empty", "detach")):
            operands = tree_leaves((args, kwargs or {}, result))
            tensors = {id(t): t for t in operands if isinstance(t, Tensor)}
            self.cost.launches += 1
            self.cost.nbytes += sum(map(_nbytes, tensors.values()))
        return result


def _nbytes(x: Tensor) -> int:
    """Return the bytes of what x really holds: an expanded dimension is read once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def plain(method: str, n: int, m: int) -> Cost:
    """Count ``sdgp.prune`` of a meta tensor."""
    x = torch.empty(SHAPE, dtype=DTYPE, device="meta")
    counter = Counter()
    with counter:
        sdgp.prune(x, method=method, n=n, m=m)
    return counter.cost


def kernel(method: str, n: int) -> Cost:
    """Count the Triton kernel in its interpreter, and the operations around it."""
    x = torch.randn(SHAPE).to(DTYPE)
    counter = Counter()
    with _accesses() as cost, counter:
        prune_dense(x, method=method, n=n, backend="triton")
    around = counter.cost
    return Cost(cost.launches + around.launches, cost.nbytes + around.nbytes)


@contextmanager
def _accesses() -> Iterator[Cost]:
    """Count what Triton's interpreter launches, loads and stores meanwhile."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    cost = Cost()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    launch = GridExecutor.__call__

    def moved(pointers: Any, mask: Any) -> None:
        cost.nbytes += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth / 8

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        moved(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        cost.launches += 1
        with _disable_current_modes():  # what the interpreter itself does is no part of it
            return launch(self, *args, **kwargs)

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    GridExecutor.__call__ = counted_launch
    try:
        yield cost
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
        GridExecutor.__call__ = launch


def compiled(method: str, n: int, m: int) -> Cost:
    """Count what Inductor generates for this pattern."""
    from torch._inductor import config, metrics

    # Bytes are counted only for whoever logs them.
    logger = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    torch._dynamo.reset()
    metrics.reset()
    x = torch.randn(SHAPE).to(DTYPE)
    function = torch.compile(lambda t: sdgp.prune(t, method=method, n=n, m=m), fullgraph=True)
    with config.patch(fx_graph_cache=False):
        function(x)
    return Cost(metrics.generated_kernel_count, metrics.num_bytes_accessed)


def table(with_compiled: bool) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| pattern | method | way | launches | bytes per element | clones |"
    yield "| --- | --- | --- | ---: | ---: | ---: |"
    elements = SHAPE[0] * SHAPE[1]
    for n, m in PATTERNS:
        for method in METHODS:
            ways = {"plain torch": plain(method, n, m)}
            if m == 4:
                ways["kernel"] = kernel(method, n)
            elif with_compiled:
                ways["compiled"] = compiled(method, n, m)
            for name, cost in ways.items():
                each = cost.nbytes / elements
                yield (
                    f"| {n}:{m} | {method} | {name} | {cost.launches} | {each:.1f} "
                    f"| {each / (2 * DTYPE.itemsize):.1f} |"
                )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compiled", action="store_true", help="count compiled patterns too")
    for line in table(parser.parse_args().compiled):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
