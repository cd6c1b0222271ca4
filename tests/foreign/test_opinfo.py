"""PyTorch's own samples of linear and conv2d, through sdgp.functional."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sdgp_cusparselt as sdgp
from tests.foreign.comparing import (
    MAGNITUDE,
    NONE,
    assert_pruned_backward,
    close,
    grads,
    identical,
    random_like,
)
from tests.foreign.tally import Tally

pytest.importorskip("expecttest", reason="torch.testing._internal needs it: pip install expecttest")
from torch.testing._internal.common_methods_invocations import op_db

pytestmark = pytest.mark.foreign

OURS: dict[str, Callable[..., Tensor]] = {
    "linear": sdgp.functional.linear,
    "conv2d": sdgp.functional.conv2d,
}
PLAIN: dict[str, Callable[..., Tensor]] = {"linear": F.linear, "conv2d": F.conv2d}
INFO = {op.name.rpartition(".")[2]: op for op in op_db if op.name.startswith("nn.functional.")}
DTYPES = {name: sorted(INFO[name].supported_dtypes("cpu"), key=str) for name in OURS}
CASES = [(name, dtype) for name in OURS for dtype in DTYPES[name]]
IDS = [f"{name}-{str(dtype)[6:]}" for name, dtype in CASES]
FLOATS = [(n, d) for n, d in CASES if d.is_floating_point]
FLOAT_IDS = [f"{name}-{str(dtype)[6:]}" for name, dtype in FLOATS]


def samples(name: str, dtype: torch.dtype) -> list[tuple[str, list[Tensor], dict[str, Any]]]:
    """Return (label, tensors, keyword arguments) of every sample and of its strided twin."""
    wants_grad = dtype.is_floating_point or dtype.is_complex
    found = []
    for number, given in enumerate(INFO[name].sample_inputs("cpu", dtype, wants_grad)):
        for kind, sample in (("", given), (" strided", given.noncontiguous())):
            arguments = [sample.input, *sample.args]
            tensors = [a for a in arguments if isinstance(a, Tensor)]
            found.append((f"{number}{kind}", tensors, dict(sample.kwargs)))
    return found


def bound(name: str, options: dict[str, Any], config: sdgp.SDGPConfig | None) -> Any:
    """Return the function of the tensors alone: torch's where config is None, else ours."""
    if config is None:
        return functools.partial(PLAIN[name], **options)
    return functools.partial(OURS[name], **options, config=config)


@pytest.mark.parametrize("name, dtype", CASES, ids=IDS)
def test_prune_none_is_torch_itself(name: str, dtype: torch.dtype, tally: Tally) -> None:
    for label, tensors, options in samples(name, dtype):
        ours, plain = bound(name, options, NONE), bound(name, options, None)
        case = f"none {name} {str(dtype)[6:]} {label}"

        def forward(ours=ours, plain=plain, tensors=tensors) -> None:
            expected = plain(*tensors)
            identical(ours(*tensors), expected)
            assert ours(*tensors).stride() == expected.stride()

        def backward(ours=ours, plain=plain, tensors=tensors) -> None:
            grad_output = random_like(plain(*tensors))
            expected = grads(plain(*tensors), tensors, grad_output)
            got = grads(ours(*tensors), tensors, grad_output)
            identical(got, expected)
            assert [g.stride() for g in got] == [g.stride() for g in expected]

        tally.check(f"{case} forward", forward)
        tally.check(f"{case} inference", torch.inference_mode()(forward))
        if dtype.is_floating_point or dtype.is_complex:
            tally.check(f"{case} backward", backward)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["float64", "complex128"])
def test_prune_none_has_every_derivative(name: str, dtype: torch.dtype, tally: Tally) -> None:
    for label, tensors, options in samples(name, dtype):
        ours, plain = bound(name, options, NONE), bound(name, options, None)
        case = f"none {name} {str(dtype)[6:]} {label}"
        tangents = tuple(random_like(t) for t in tensors)
        grad_output = random_like(plain(*tensors))

        def second(f: Any, tensors=tensors, grad_output=grad_output) -> Any:
            leaf = grad_output.requires_grad_()
            first = [g for g in grads(f(*tensors), tensors, leaf, create_graph=True)]
            total = sum((g * random_like(g)).abs().square().sum() for g in first)
            return grads(total, [*tensors, leaf], torch.ones_like(total))

        def jvp(f: Any, tensors=tensors, tangents=tangents) -> Any:
            return torch.func.jvp(f, tuple(t.detach() for t in tensors), tangents)

        def vjp(f: Any, tensors=tensors, grad_output=grad_output) -> Any:
            output, pull = torch.func.vjp(f, *(t.detach() for t in tensors))
            return output, pull(grad_output.detach())

        def vmap(f: Any, tensors=tensors) -> Any:
            first, *rest = (t.detach() for t in tensors)
            batch = torch.stack([first, first * 2, first - 1])
            return torch.func.vmap(lambda x: f(x, *rest))(batch)

        def batched(f: Any, tensors=tensors, grad_output=grad_output) -> Any:
            several = torch.stack([grad_output.detach(), -2 * grad_output.detach()])
            return grads(f(*tensors), tensors, several, is_grads_batched=True)

        for derivative in (second, jvp, vjp, vmap, batched):
            tally.check(
                f"{case} {derivative.__name__}",
                lambda d=derivative, ours=ours, plain=plain: close(d(ours), d(plain)),
            )


@pytest.mark.parametrize("name, dtype", FLOATS, ids=FLOAT_IDS)
def test_pruning_is_prune_then_multiply(name: str, dtype: torch.dtype, tally: Tally) -> None:
    for label, tensors, options in samples(name, dtype):
        ours, plain = bound(name, options, MAGNITUDE), bound(name, options, None)
        dim, groups = (-1, 1) if name == "linear" else (-3, options.get("groups", 1))
        tally.check(
            f"pruned {name} {str(dtype)[6:]} {label}",
            lambda o=ours, p=plain, t=tensors, d=dim, g=groups: assert_pruned_backward(
                o, p, t, d, g
            ),
        )


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("config", [NONE, MAGNITUDE], ids=["none", "pruned"])
def test_fake_and_meta_tensors_have_torchs_shapes(
    name: str, config: sdgp.SDGPConfig, tally: Tally
) -> None:
    for label, tensors, options in samples(name, torch.float32):
        ours, plain = bound(name, options, config), bound(name, options, None)
        expected = plain(*tensors)

        def fake(ours=ours, tensors=tensors, expected=expected) -> None:
            with FakeTensorMode() as mode:
                inputs = [mode.from_tensor(t) for t in tensors]
                output = ours(*inputs)
                assert (output.shape, output.stride()) == (expected.shape, expected.stride())
                found = grads(output, inputs, torch.ones_like(output))
            assert [g.shape for g in found] == [t.shape for t in tensors]

        def meta(ours=ours, tensors=tensors, expected=expected) -> None:
            inputs = [t.detach().to("meta").requires_grad_() for t in tensors]
            output = ours(*inputs)
            assert output.shape == expected.shape
            found = grads(output, inputs, torch.ones_like(output))
            assert [g.shape for g in found] == [t.shape for t in tensors]

        tally.check(f"{config.prune} {name} {label} fake", fake)
        tally.check(f"{config.prune} {name} {label} meta", meta)
        # What a mode left behind would break this one.
        tally.check(f"{config.prune} {name} {label} after", lambda o=ours, t=tensors: o(*t))


@pytest.mark.parametrize("config", [NONE, MAGNITUDE], ids=["none", "pruned"])
def test_what_torch_refuses_is_refused(config: sdgp.SDGPConfig, tally: Tally) -> None:
    for number, given in enumerate(INFO["conv2d"].error_inputs("cpu")):
        sample = given.sample_input
        ours = bound("conv2d", sample.kwargs, config)

        def refused(ours=ours, sample=sample, given=given) -> None:
            with pytest.raises((given.error_type, ValueError, TypeError)):
                ours(sample.input, *sample.args)

        tally.check(f"{config.prune} conv2d error {number}", refused)


@pytest.mark.parametrize("name", OURS)
def test_complex_numbers_are_refused_under_pruning(name: str, tally: Tally) -> None:
    for label, tensors, options in samples(name, torch.complex64):

        def refused(tensors=tensors, options=options) -> None:
            with pytest.raises(TypeError, match=f"{name}: input must be real"):
                bound(name, options, MAGNITUDE)(*tensors)

        tally.check(f"pruned {name} refuses complex64 {label}", refused)
