"""The roofline on numbers worked out by hand, and the paper's arithmetic."""

from dataclasses import replace

import pytest

from sdgp_cusparselt.cards.efficiency import Curve, Efficiency
from sdgp_cusparselt.cards.gpus import GPU, GPUS, gpu_of
from sdgp_cusparselt.planner.gemms import Gemm, Trace
from sdgp_cusparselt.planner.roofline import (
    break_even,
    forecast,
    gemm_time,
    ladder,
    paper_saving,
    square_layer,
)

FLAT = Curve(((1.0, 0.5),))
IDEAL = Efficiency(FLAT, FLAT, "by hand", bandwidth=1.0, launch_us=0.0)
CARD = GPU("X", tflops=100, bandwidth=1000, source="by hand", published=IDEAL)


def test_a_large_gemm_costs_its_arithmetic() -> None:
    time = gemm_time(square_layer(8192, 8192), CARD, IDEAL)
    flops = 2 * 8192**3
    assert time.dense == pytest.approx(flops / 50e12 * 1e6)
    assert time.sparse == pytest.approx(flops / 100e12 * 1e6)
    assert time.pack == pytest.approx(3.125 * 8192**2 / 1e12 * 1e6)
    assert time.gains
    assert time.best == time.pack + time.sparse


def test_a_thin_gemm_costs_its_bytes() -> None:
    time = gemm_time(square_layer(2**20, 16), CARD, IDEAL)
    assert time.dense == pytest.approx(2 * (2 * 2**20 * 16 + 256) / 1e12 * 1e6)
    assert not time.gains
    assert time.best == time.dense


def test_folding_writes_columns_and_reads_them_again() -> None:
    elements = (128 * 32, 32 * 144, 2 * 16 * 64)
    columns = 128 * 144
    gemm = Gemm("", "conv", "grad_input", 128, 144, 32, 1, elements, True, "", columns)
    time = gemm_time(gemm, CARD, IDEAL)
    assert time.fold == pytest.approx(2 * (columns + elements[2]) / 1e12 * 1e6)


def test_break_even_is_where_the_closed_form_says() -> None:
    # pack = saved: 3.125 T n / B = 2 T n^2 / P (1 - 1/g), so n = 3.125 P / (2 B (1 - 1/g)).
    efficiency = replace(IDEAL, sparse=Curve(((1.0, 0.3),)))
    gain = 2 * 0.3 / 0.5
    exact = 3.125 * 50e12 / (2 * 1e12 * (1 - 1 / gain))
    assert break_even(CARD, efficiency, 2**20, range(16, 4096, 16)) == -(-exact // 16) * 16


def test_no_break_even_where_sparse_is_slower_than_dense() -> None:
    slow = replace(IDEAL, sparse=Curve(((1.0, 0.2),)))
    assert break_even(CARD, slow) is None


@pytest.mark.parametrize("share, saved", [(0.30, 0.15), (1 / 3, 1 / 6), (0.50, 0.25)])
def test_the_papers_saving_as_arithmetic(share: float, saved: float) -> None:
    assert paper_saving(share) == pytest.approx(saved)


def test_the_ladder_ends_at_the_forecast() -> None:
    layers = [square_layer(8192, n) for n in (512, 4096)]
    trio = [
        replace(g, role=r, prunable=r == "grad_input")
        for g in layers
        for r in ("forward", "grad_input", "grad_weight")
    ]
    result = forecast(Trace(tuple(trio), 10**9, 0), CARD, IDEAL)
    rungs = [rung.saved for rung in ladder(result)]
    assert rungs[1] == pytest.approx(1 / 6)
    assert rungs[5] == pytest.approx(1 - result.sdgp_us / result.dense_us)
    assert rungs[6] == pytest.approx(1 - 1 / result.speedup)
    assert rungs[5] >= rungs[4] - 1e-12


def test_a_curve_passes_through_its_points_and_keeps_launch_time_below_them() -> None:
    curve = Curve.from_times([(512, 512, 512, 10.0), (4096, 4096, 4096, 1000.0)], peak=312)
    assert curve.at(512) == pytest.approx(2 * 512**3 / 10e-6 / 312e12)
    assert curve.at(4096) == pytest.approx(2 * 4096**3 / 1000e-6 / 312e12)
    assert 2 * 128**3 / (curve.at(128) * 312e12) == pytest.approx(10e-6)
    assert curve.at(512) < curve.at(1448) < curve.at(4096) == curve.at(9999)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_published_fractions_are_possible_and_have_sources(gpu: GPU) -> None:
    fractions = [
        e for curve in (gpu.published.dense, gpu.published.sparse) for _, e in curve.points
    ]
    # Boost clocks lift a consumer card a little above its data sheet.
    assert all(0 < fraction < 1.05 for fraction in fractions)
    assert gpu.source and gpu.published.source
    assert not gpu.published.measured


def test_a_result_folder_finds_its_card() -> None:
    names = {
        "NVIDIA-A100-SXM4-80GB": "A100",
        "nvidia_h200": "H200",
        "NVIDIA GeForce RTX 4090": "RTX4090",
        "NVIDIA L40S": "L40S",
    }
    assert {folder: gpu_of(folder).name for folder in names} == names
    assert gpu_of("cpu") is None
