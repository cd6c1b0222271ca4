"""PyTorch's own samples of nn.Linear and nn.Conv2d, as modules that convert_ changed."""

import contextlib
import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.errors import SDGPError
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
from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.foreign

INFO = {info.name: info for info in module_db if info.name in ("nn.Linear", "nn.Conv2d")}
CASES = [
    (name, dtype)
    for name in INFO
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
]
IDS = [f"{name}-{str(dtype)[6:]}" for name, dtype in CASES]


def samples(name: str, dtype: torch.dtype, training: bool = True) -> list[tuple[Any, Tensor]]:
    """Return (module, input) of every sample that builds; torch's list also has lazy ones."""
    info = INFO[name]
    found = []
    for given in info.module_inputs_func(info, "cpu", dtype, True, training):
        made = given.constructor_input
        torch.manual_seed(0)
        module = info.module_cls(*made.args, **made.kwargs | {"dtype": dtype})
        (x,) = (*given.forward_input.args, *given.forward_input.kwargs.values())
        found.append((module.train(training), x))
    return found


def converted(module: nn.Module, config: sdgp.SDGPConfig) -> nn.Module:
    """Return a converted copy."""
    twin = copy.deepcopy(module)
    sdgp.convert_(twin, config, lambda *_: True)
    return twin


def leaves(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [x, *module.parameters()]


@pytest.mark.parametrize("name, dtype", CASES, ids=IDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_pruning(name: str, dtype: torch.dtype, training: bool, tally: Tally) -> None:
    for number, (plain, x) in enumerate(samples(name, dtype, training)):
        for layout, given in (("", x), (" strided", strided(x))):
            with tally.case(f"none module {name} {str(dtype)[6:]} {number}{layout}"):
                ours = converted(plain, NONE)
                grad_output = random_like(plain(given))
                identical(ours(given), plain(given))
                got = grads(ours(given), leaves(ours, given), grad_output)
                identical(got, grads(plain(given), leaves(plain, given), grad_output))


@pytest.mark.parametrize("name, dtype", CASES, ids=IDS)
def test_pruned(name: str, dtype: torch.dtype, tally: Tally) -> None:
    dim = -1 if name == "nn.Linear" else -3
    for number, (plain, x) in enumerate(samples(name, dtype)):
        for layout, given in (("", x), (" strided", strided(x))):
            with tally.case(f"pruned module {name} {str(dtype)[6:]} {number}{layout}"):
                ours = converted(plain, MAGNITUDE)
                names = [key for key, _ in plain.named_parameters()]

                def call(module: nn.Module, x: Tensor, *parameters: Tensor, names=names) -> Tensor:
                    given = dict(zip(names, parameters, strict=True))
                    return torch.func.functional_call(module, given, (x,))

                assert_pruned_backward(
                    lambda *t, call=call, ours=ours: call(ours, *t),
                    lambda *t, call=call, plain=plain: call(plain, *t),
                    leaves(plain, given),
                    dim,
                )


@contextlib.contextmanager
def refused_in_our_words() -> Iterator[None]:
    """Take a refusal for an answer where it is this package's own sentence."""
    try:
        yield
    except (SDGPError, TypeError, ValueError) as error:
        if "SDGP" not in str(error):
            raise


def strided(x: Tensor) -> Tensor:
    """Return x's numbers in memory that is neither contiguous nor dense."""
    wide = torch.empty((*x.shape, 2), dtype=x.dtype)
    return wide.select(-1, 1).copy_(x.detach()).detach().requires_grad_(x.requires_grad)


@pytest.mark.parametrize("name", INFO)
@pytest.mark.parametrize("config", [NONE, MAGNITUDE], ids=["none", "pruned"])
def test_what_torch_asks_of_every_module(name: str, config: sdgp.SDGPConfig, tally: Tally) -> None:
    for number, (plain, x) in enumerate(samples(name, torch.float32)):
        ours, case = converted(plain, config), f"{config.prune} module {name} {number}"
        expected = ours(x)

        def reloaded(ours=ours, x=x, expected=expected) -> None:
            identical(pickle.loads(pickle.dumps(ours))(x), expected)

        def saved(ours=ours, x=x, expected=expected) -> None:
            buffer = io.BytesIO()
            torch.save(ours, buffer)
            buffer.seek(0)
            identical(torch.load(buffer, weights_only=False)(x), expected)

        def state(ours=ours, plain=plain) -> None:
            assert list(ours.state_dict()) == list(plain.state_dict())
            fresh = copy.deepcopy(plain)
            fresh.load_state_dict(ours.state_dict())
            ours.load_state_dict(plain.state_dict())

        def cast(ours=ours, plain=plain, x=x) -> None:
            twin = copy.deepcopy(ours).double()
            identical(twin(x.double()), copy.deepcopy(plain).double()(x.double()))

        def kinds(ours=ours, plain=plain) -> None:
            assert isinstance(ours, type(plain)) and ours.extra_repr().startswith(
                plain.extra_repr()
            )

        def factory(ours=ours, plain=plain) -> None:
            assert [p.dtype for p in ours.parameters()] == [p.dtype for p in plain.parameters()]

        def gradient(ours=ours, x=x) -> None:
            wide = copy.deepcopy(ours).double()
            wide.requires_grad_()
            # The gradient of the parameters is exact under every method.
            fixed = x.detach().double()
            assert torch.autograd.gradcheck(
                lambda *p: torch.func.functional_call(
                    wide, dict(zip(dict(wide.named_parameters()), p, strict=True)), (fixed,)
                ),
                tuple(wide.parameters()),
            )

        def meta(ours=ours, x=x, expected=expected) -> None:
            assert copy.deepcopy(ours).to("meta")(x.to("meta")).shape == expected.shape

        def traced(ours=ours, x=x, expected=expected) -> None:
            with refused_in_our_words():
                identical(torch.fx.symbolic_trace(ours)(x), expected)

        def channels_last(ours=ours, plain=plain, x=x) -> None:
            if x.ndim != 4:
                return
            last = x.detach().to(memory_format=torch.channels_last)
            wide = copy.deepcopy(ours).to(memory_format=torch.channels_last)
            narrow = copy.deepcopy(plain).to(memory_format=torch.channels_last)
            identical(wide(last), narrow(last))
            assert wide(last).stride() == narrow(last).stride()

        def vmapped(ours=ours, x=x) -> None:
            batch = torch.stack([x.detach(), 2 * x.detach()])
            with refused_in_our_words() if config.prunes else contextlib.nullcontext():
                close(torch.func.vmap(ours)(batch), torch.stack([ours(b) for b in batch]))

        def reverted(ours=ours, plain=plain, x=x) -> None:
            twin = copy.deepcopy(ours)
            sdgp.revert_(twin)
            assert type(twin) is type(plain)
            identical(twin(x), plain(x))

        checks = (reloaded, saved, state, cast, kinds, factory, gradient, meta, traced)
        for check in (*checks, channels_last, vmapped, reverted):
            tally.check(f"{case} {check.__name__}", check)


@pytest.mark.parametrize("name", INFO)
def test_complex_layers_are_left_plain(name: str, tally: Tally) -> None:
    for number, (plain, x) in enumerate(samples(name, torch.complex64)):
        with tally.case(f"pruned module {name} complex64 {number}"):
            model = nn.Sequential(copy.deepcopy(plain), nn.Identity())
            with pytest.raises(ValueError, match="complex"):
                sdgp.convert_(model, MAGNITUDE, lambda *_: True)
            identical(model(x), plain(x))
