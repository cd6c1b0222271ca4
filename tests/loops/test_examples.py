"""Every example runs, and every library's loop is the same training as the plain one."""

import runpy
import sys

import pytest
import torch
from torch import nn

from tests.helpers import in_float64
from tests.loops.examples import EXAMPLES, LOSS_TOLERANCE, load, pruned_by

STEPS = 4
SCRIPTS = [
    ("plain_pytorch", "--precision=bf16"),
    ("plain_pytorch", "--precision=fp16"),
    ("compiled", "--backend=aot_eager"),
    ("hf_trainer",),
    ("accelerate_loop", "--accumulate=2"),
    ("lightning_loop",),
    ("image_training", "--arch=resnet", "--workers=2"),
    ("image_training", "--arch=regnet", "--workers=0"),
    ("checkpointing", "--checkpointing=on"),
    ("fused_mlp", "--fuse=on"),
    ("schedule", "--ramp=geometric"),
]
#: By torchrun, in test_distributed.py.
LAUNCHED = {"ddp", "fsdp2"}
NOT_LOOPS = {"tiny_gpt", "raw_matmul"}


@pytest.mark.parametrize("script", SCRIPTS, ids=" ".join)
def test_scripts_print_their_final_loss(
    script: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, *options = script
    monkeypatch.setattr(sys, "argv", [name, "--steps", "4", *options])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    label, value = last.rsplit(" ", 1)
    assert label == "final loss" and 1.0 < float(value) < 5.5


def curve(name: str, method: str = "magnitude", **options: object) -> tuple[nn.Module, list[float]]:
    torch._dynamo.reset()
    with pruned_by(method):
        model, losses = load(name).train(STEPS, **options)
    return model, losses


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, list[float]]:
    return curve("plain_pytorch")


@pytest.mark.parametrize("name", ["hf_trainer", "accelerate_loop", "lightning_loop"])
def test_a_library_trains_bit_for_bit_as_the_plain_loop(
    name: str, plain: tuple[nn.Module, list[float]]
) -> None:
    model, losses = curve(name)
    assert losses == plain[1] and len(losses) == STEPS
    other = model.state_dict()
    for key, tensor in plain[0].state_dict().items():
        assert torch.equal(tensor, other[key]), key


def test_the_curve_depends_on_the_pruning(
    plain: tuple[nn.Module, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdgp_cusparselt.convert_", lambda model, config: None)
    dense = curve("plain_pytorch")[1]
    assert dense[0] == plain[1][0], "the first forward is dense"
    assert dense[2:] != plain[1][2:]


def test_compiled_code_and_accumulation_train_as_the_plain_loop() -> None:
    with in_float64():
        expected = curve("plain_pytorch")[1]
        compiled = curve("compiled", backend="aot_eager")[1]
        accumulated = curve("plain_pytorch", accumulate=2)[1]
    assert compiled == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert accumulated == pytest.approx(expected, rel=LOSS_TOLERANCE)


def test_fused_layers_train_as_the_separate_ones() -> None:
    with in_float64():
        expected = curve("plain_pytorch", "mvue")[1]
        assert curve("fused_mlp", "mvue")[1] == pytest.approx(expected, rel=LOSS_TOLERANCE)


def test_bf16_stays_close(plain: tuple[nn.Module, list[float]]) -> None:
    losses = curve("plain_pytorch", precision="bf16")[1]
    # Eight bits of mantissa in each product: relative 2**-8, and some more after a few steps.
    assert losses == pytest.approx(plain[1], rel=4 * 2.0**-8)


def test_checkpointing_changes_no_bit_even_of_a_method_that_draws() -> None:
    again = curve("checkpointing", "mvue", checkpointing=False)[1]
    assert curve("checkpointing", "mvue")[1] == again


def test_a_schedule_goes_on_after_a_checkpoint_bit_for_bit() -> None:
    train = load("schedule").train
    unbroken = train(12)
    assert train(12, stop=5) == unbroken
    assert train(12, ramp="none")[:2] == unbroken[:2], "the warm-up and the step after it"
    assert train(12, ramp="none") != unbroken


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=" ".join)
def test_scripts_reach_their_loss(
    script: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From ln 128 = 4.9 nats a byte to below 2.8, the digits from ln 10 = 2.3 to below 1.

    Label smoothing by 0.1 alone leaves 0.5 nats of the digits' loss.
    """
    torch._dynamo.reset()
    name, *options = script
    steps, bound = ("200", 1.0) if name == "image_training" else ("100", 2.8)
    monkeypatch.setattr(sys, "argv", [name, "--steps", steps, *options])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert float(last.rsplit(" ", 1)[1]) < bound


def test_every_example_is_run_and_short() -> None:
    files = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert set(files) == {name for name, *_ in SCRIPTS} | LAUNCHED | NOT_LOOPS
    for path in files.values():
        assert len(path.read_text().splitlines()) < 80, path
