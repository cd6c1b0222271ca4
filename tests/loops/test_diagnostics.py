"""Gradient diagnostics against formulas in float64, exact moments and what was written."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.extras import MissingPackageError
from sdgp_cusparselt.recording.spans import moment_sums
from sdgp_cusparselt.telemetry.diagnostics import MEASURES, GradientDiagnostics, GradientRow
from tests.helpers import oracle_magnitude


def network(**kwargs: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    config = {"prune": "magnitude", "telemetry_every": 1, "backend": "dense"} | kwargs
    sdgp.convert_(model, sdgp.SDGPConfig(**config))
    return model


def step(model: nn.Module, grad: Tensor) -> None:
    model(torch.randn(len(grad), 16, requires_grad=True)).backward(grad)


def last_of(model: nn.Module, grads: list[Tensor], draws: int = 8) -> GradientRow:
    """Return the row of the last layer, whose grad_output is what was given."""
    diagnostics = GradientDiagnostics(model, draws=draws)
    for grad in grads:
        step(model, grad)
    (row,) = [r for r in diagnostics.collect(7) if r.layer == "2" and r.product == "grad_input"]
    assert row.step == 7 and row.samples == len(grads)
    return row


def test_a_method_that_does_not_draw_is_all_bias() -> None:
    grad = torch.randn(64, 16)
    row = last_of(network(), [grad])
    g, p = grad.double(), oracle_magnitude(grad, 2, 4, 1).double()
    error = ((p - g).norm() / g.norm()).item()
    assert (row.relative_l2, row.bias) == (pytest.approx(error, rel=1e-5),) * 2
    assert row.variance == 0 and row.pruning == "magnitude 2:4 backend=dense"
    assert row.cosine == pytest.approx((g * p).sum().item() / (g.norm() * p.norm()).item(), 1e-5)
    assert row.kept_l1 == pytest.approx((p.abs().sum() / g.abs().sum()).item(), rel=1e-5)


def test_random_has_the_moments_of_a_fair_choice_of_two_in_four() -> None:
    """Each element is kept with probability 1/2: E p = g/2 and Var p = g^2/4, so 1/2 and 1/4."""
    row = last_of(network(prune="random"), [torch.randn(512, 16)], draws=32)
    # 8192 elements and 32 draws: both scatter by less than one percent.
    assert row.bias == pytest.approx(0.5, rel=0.03)
    assert row.variance == pytest.approx(0.25, rel=0.03)
    assert row.relative_l2 == pytest.approx(0.5**0.5, rel=0.03)


def exact_mvue_variance(grad: Tensor) -> float:
    """Return sum x^2 (1/p - 1) / sum x^2 from Chmiel's inclusion probabilities, in plain Python."""
    total = 0.0
    for group in grad.double().view(-1, 4).tolist():
        sizes = [abs(x) for x in group]
        largest, rest = max(sizes), sum(sizes) - max(sizes)
        spread = largest < rest
        for size in sizes:
            capped = 1.0 if size == largest else size / rest
            p = 2 * size / sum(sizes) if spread else capped
            total += size**2 * (1 / p - 1)
    return total / grad.double().square().sum().item()


def test_mvue_has_no_bias_and_the_variance_of_its_probabilities() -> None:
    grad = torch.randn(512, 16)
    row = last_of(network(prune="mvue"), [grad], draws=32)
    assert row.variance == pytest.approx(exact_mvue_variance(grad), rel=0.03)
    # With nothing to find, bias^2 scatters around 0 by about variance / sqrt(8192) / 32.
    assert row.bias < 0.03
    assert row.relative_l2**2 == pytest.approx(row.variance, rel=0.1)


def test_bias_is_corrected_for_the_number_of_draws() -> None:
    """Averaged over many estimates of two draws each, the squared bias of fair coins is 1/4."""
    grad = torch.randn(64, 16)
    draw = lambda: grad * (torch.rand_like(grad) < 0.5)
    estimates = torch.stack([moment_sums(grad, draw(), draw, 2) for _ in range(200)])
    assert estimates[:, 0].mean().item() == pytest.approx(0.25, rel=0.02)
    assert estimates[:, 1].mean().item() == pytest.approx(0.25, rel=0.02)


def test_collecting_takes_only_what_is_new_and_leaves_telemetry_alone() -> None:
    model = network(grad_weight="sparse")
    step(model, torch.randn(8, 16))
    diagnostics = GradientDiagnostics(model)
    assert diagnostics.collect(0) == []
    for number in (1, 2):
        for _ in range(number):
            step(model, torch.randn(8, 16))
        found = diagnostics.collect(number)
        assert [(r.layer, r.product, r.samples) for r in found] == [
            (layer, product, number) for layer in "02" for product in ("grad_input", "grad_weight")
        ]
    assert len(diagnostics.rows) == 8
    assert sdgp.telemetry(model).layers[0]["gradient_error"]["samples"] == 4


def test_overflows_are_counted_and_left_out() -> None:
    model = network(prune="mvue")
    diagnostics = GradientDiagnostics(model)
    grad = torch.randn(8, 16)
    step(model, grad)
    grad[3, 3] = torch.inf
    step(model, grad)
    row = diagnostics.collect(1)[-1]
    assert (row.samples, row.not_finite) == (1, 1)
    assert all(torch.tensor(getattr(row, name)).isfinite() for name in MEASURES)
    step(model, grad)
    assert diagnostics.collect(2) == [], "nothing finite"


def test_drawing_for_the_diagnostics_does_not_change_the_run() -> None:
    def run(observed: bool) -> tuple[Tensor, Tensor]:
        model = network(prune="mvue", telemetry_every=2)
        if observed:
            GradientDiagnostics(model, draws=16)
        torch.manual_seed(5)
        for _ in range(3):
            step(model, torch.randn(8, 16))
        return model[0].weight.grad.clone(), torch.rand(1)

    for one, other in zip(run(True), run(False), strict=True):
        assert torch.equal(one, other)


def test_dense_phases_of_a_schedule_have_no_rows() -> None:
    model = network(schedule=sdgp.Schedule(warmup=1))
    diagnostics = GradientDiagnostics(model)
    rows = []
    for number in range(2):
        step(model, torch.randn(8, 16))
        sdgp.step(model)
        rows.append(len(diagnostics.collect(number)))
    assert rows == [0, 2]


@pytest.fixture
def collected() -> GradientDiagnostics:
    model = network(prune="mvue", grad_weight="sparse")
    diagnostics = GradientDiagnostics(model)
    for number in range(3):
        step(model, torch.randn(8, 16))
        diagnostics.collect(number)
    return diagnostics


def test_the_csv_holds_every_row(collected: GradientDiagnostics, tmp_path: Path) -> None:
    collected.write_csv(tmp_path / "deep" / "gradients.csv")
    with open(tmp_path / "deep" / "gradients.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(collected.rows) == 12
    for line, row in zip(lines, collected.rows, strict=True):
        assert (line["layer"], line["pruning"]) == (row.layer, row.pruning)
        assert all(float(line[name]) == getattr(row, name) for name in MEASURES)


def test_scalars_go_to_a_writer(collected: GradientDiagnostics) -> None:
    class Writer:
        seen: list[tuple[str, float, int]] = []  # noqa: RUF012

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.seen.append((tag, value, step))

    collected.add_scalars(Writer())
    row = collected.rows[0]
    assert len(Writer.seen) == 5 * 12
    assert (f"sdgp/bias/{row.layer}/grad_input", row.bias, row.step) in Writer.seen


def test_without_tensorboard_the_error_names_it(
    collected: GradientDiagnostics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingPackageError, match="pip install tensorboard"):
        collected.write_tensorboard(tmp_path)
    assert not list(tmp_path.glob("events*"))


def test_the_plot_is_a_png_and_its_arguments_are_checked(
    collected: GradientDiagnostics, tmp_path: Path
) -> None:
    from PIL import Image

    collected.plot(tmp_path / "all.png")
    collected.plot(tmp_path / "one.png", measures=["cosine"])
    sizes = [Image.open(tmp_path / name).size for name in ("all.png", "one.png")]
    assert sizes[0][0] == 2 * sizes[1][0] and sizes[0][1] > sizes[1][1]
    with pytest.raises(ValueError, match="measures must be among relative_l2, .*, got 'snr'"):
        collected.plot(tmp_path / "x.png", measures=["snr"])
    with pytest.raises(ValueError, match="rows must be collected"):
        GradientDiagnostics(network()).plot(tmp_path / "x.png")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="model must be sampled, .*telemetry_every"):
        GradientDiagnostics(network(telemetry_every=0))
    with pytest.raises(ValueError, match="draws must be >= 2, got 1"):
        GradientDiagnostics(network(), draws=1)
    with pytest.raises(ValueError, match="model must be converted"):
        GradientDiagnostics(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="step must be an int, got 0.5"):
        GradientDiagnostics(network()).collect(0.5)


def test_importing_it_imports_no_plotting() -> None:
    code = "import sys, sdgp_cusparselt.diagnostics; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
