"""Whole training steps as the benchmark takes them: one set of weights, contenders in turns."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import sdgp_cusparselt as sdgp
from bench import bench_models, models, report, report_data
from bench.bench_models import CONFIGS, LEARNING_RATE, Rig, check
from bench.operands import executor
from bench.shapes import CPU_TRAINED, TRAINED, Selection, trained_cases
from bench.verify import WrongResultError
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.recording.records import COMPILED
from tests.bench.conftest import run_python

CASES = pytest.mark.parametrize("case", CPU_TRAINED, ids=lambda case: case.model)
DENSE = {name: config.replace(backend="dense") for name, config in CONFIGS.items()}


@pytest.mark.parametrize(
    "name, millions", [("gpt-350m", 354.9), ("gpt-1.3b", 1315.8), ("vit-l-16", 304.3)]
)
def test_models_have_the_size_of_their_name(name: str, millions: float) -> None:
    """12 width^2 weights, 13 width biases and norms a block; embeddings, head and last norm."""
    (case,) = (case for case in TRAINED if case.model == name)
    width = case.width
    blocks = case.layers * (12 * width**2 + 13 * width)
    around = (case.outputs + case.sequence + 2) * width
    if case.patch:
        around += (3 * case.patch**2 + 2) * width
    with torch.device("meta"):
        model = models.GPT(case) if case.patch == 0 else models.ViT(case)
    count = sum(p.numel() for p in model.parameters())
    assert count == blocks + around
    assert round(count / 1e6, 1) == millions


def test_tokens_choose_the_number_of_samples() -> None:
    chosen = Selection(full=True, models=("gpt-1.3b",), tokens=(8192, 16384))
    found = [case for case in trained_cases(chosen) if case.device_type == "cuda"]
    assert [(case.batch, case.sequence) for case in found] == [(4, 2048), (8, 2048)]
    quick = [case for case in trained_cases(Selection()) if case.device_type == "cuda"]
    assert [case.model for case in quick] == ["gpt-350m"]
    # A sparse grad_weight packs tokens in sixteens; a rest would be a second product.
    assert all(case.batch * case.sequence % 16 == 0 for case in TRAINED)


@CASES
def test_contenders_share_weights_and_differ_in_their_gradients_alone(case) -> None:
    torch.manual_seed(0)
    rig = Rig(case, None)
    weights = [p.detach().clone() for p in rig.parameters]
    steps = {name: rig.pruned(config) for name, config in DENSE.items()}
    steps["none"] = rig.pruned(sdgp.SDGPConfig(prune="none"))
    dense_loss, dense_norm = rig.dense(), rig.gradient_norm()
    dense = [p.grad.clone() for p in rig.parameters]
    norms, taken = set(), 2
    for name, step in steps.items():
        assert {id(p) for p in step.module.parameters()} == {id(p) for p in rig.parameters}
        loss = step()
        assert torch.equal(loss, dense_loss), name
        norms.add(rig.gradient_norm())
        same = all(torch.equal(p.grad, g) for p, g in zip(rig.parameters, dense, strict=True))
        assert same == (name == "none")
        assert 0 <= check(loss, rig).of_bound <= 1
        taken += 2  # with the dense step of the check
    assert dense_norm in norms and len(norms) == 3
    # No step of Adam is longer than (1 - beta1) / sqrt(1 - beta2) learning rates.
    longest = 0.1 / 0.001**0.5 * LEARNING_RATE
    for parameter, weight in zip(rig.parameters, weights, strict=True):
        assert (parameter - weight).abs().max() <= 1.01 * taken * longest


def test_a_wrong_loss_or_gradient_is_refused() -> None:
    rig = Rig(CPU_TRAINED[0], None)
    loss = rig.dense()
    with pytest.raises(WrongResultError, match="the loss is"):
        check(loss * 1.02, rig)
    with pytest.raises(WrongResultError, match="the loss is nan"):
        check(loss * torch.nan, rig)
    rig.parameters[0].grad[0, 0] = torch.inf
    with pytest.raises(WrongResultError, match="gradients' norm is inf"):
        check(loss, rig)


@CASES
def test_compiled_contenders_take_turns_without_being_compiled_anew(case) -> None:
    """A block and the head for each, whatever the number of blocks and the order of the steps."""
    torch._dynamo.reset()
    rig = Rig(case, "aot_eager")
    pruned = [rig.pruned(config) for config in DENSE.values()]
    for step in pruned:
        assert torch.equal(step(), rig.dense())
    counters.clear()
    before = Counter(COMPILED.calls)
    for step in (*pruned, rig.dense, *reversed(pruned), rig.dense):
        step()
    assert counters["stats"]["unique_graphs"] == 0 and not counters["recompiles"]
    layers = 4 * case.layers
    assert COMPILED.calls - before == Counter(
        {("grad_input", "emulated"): 4 * layers, ("grad_weight", "emulated"): 2 * layers}
    )
    assert pruned[1].calls_of_a_step() == Counter(
        {("grad_input", "emulated"): layers, ("grad_weight", "emulated"): layers}
    )


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run sparse on the emulator, and leave no plan in the one that later tests count in."""
    monkeypatch.setattr(routes, "LIBRARY", executor("cpu"))
    yield
    executor("cpu").plans.clear()


@CASES
@pytest.mark.usefixtures("emulated")
def test_on_the_emulated_library_every_product_of_the_blocks_is_sparse(case) -> None:
    rig = Rig(case, None)
    step = rig.pruned(CONFIGS["grad_input + grad_weight"].replace(tune="never"))
    loss = step()
    assert 0 <= check(loss, rig).of_bound <= 1
    found = bench_models.afterwards(rig, step)
    layers = 4 * case.layers
    assert found["backends"] == {"grad_input sparse": layers, "grad_weight sparse": layers}
    share = f"grad_input {layers} of {layers}, grad_weight {layers} of {layers}"
    assert report.sparse_share(found["backends"]) == share
    assert found["gradient_norm"] != found["reference_gradient_norm"]


def test_a_rig_that_is_dropped_holds_no_memory() -> None:
    first = bench_models.rig_of(CPU_TRAINED[0])
    assert bench_models.rig_of(CPU_TRAINED[0]) is first
    bench_models.rig_of(CPU_TRAINED[1])
    assert sum(p.numel() for p in first.parameters) == 0 and not first.optimizer.state
    bench_models.drop_rig()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it trains the large models")
def test_the_part_runs_and_its_table_says_what_the_file_says(tmp_path: Path) -> None:
    command = ("-m", "sdgp_cusparselt", "bench", "--full", "--parts", "models")
    done = run_python(*command, "--models", "gpt-350m", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (tmp_path / "cpu").glob("*.json")
    infos = [b["extra_info"] for b in json.loads(written.read_text())["benchmarks"]]
    table = report.model_table(report_data.load([written]))
    lines = [[c.strip() for c in line.strip("| ").split("|")] for line in table.split("\n")]
    assert len(infos) == 4 and len(lines) == 6
    for info, cells in zip(infos, lines[2:], strict=True):
        line = dict(zip(lines[0], cells, strict=True))
        assert (line["model"], line["pruned"]) == (info["case"], info["contender"])
        assert line["time / dense"] == f"{info['us'] / info['reference_us']:.3f}"
        assert line["peak / dense"] == "-"
        assert line["products run sparse"].startswith("grad_input 0 of 8")
        assert line["ms"] == f"{info['us'] / 1e3:.1f}"
        assert line["pruned"] in done.stdout


def test_memory_is_shown_in_units_of_dense() -> None:
    info = {"parameters": 354_900_000, "peak_mib": 51200.0, "reference_peak_mib": 50000.0}
    info["backends"] = {"grad_input sparse": 90, "grad_input plain": 6}
    shape = ("model_step", "grad_input", "gpt-350m-16x1024", "gpt-350m", "24 blocks", 1, 1, 1)
    row = report_data.Row(*shape, 180e3, 200e3, "the dense step", 1.0, False, info)
    table = report.model_table(report_data.Results((row,), (), ()))
    cells = [c.strip() for c in table.split("\n")[2].strip("| ").split("|")]
    assert cells[1:] == [
        "354.9", "grad_input", "180.0", "200.0", "0.900", "10.0%", "50.0", "1.024",
        "grad_input 90 of 96",
    ]  # fmt: skip
