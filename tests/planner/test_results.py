"""Result files replace published efficiencies, and show how wrong the predictions were."""

import json
import math
from pathlib import Path

import pytest

from sdgp_cusparselt.cards.gpus import GPUS
from sdgp_cusparselt.planner.results import (
    measured_efficiency,
    prediction_errors,
    read_points,
    result_files,
)
from sdgp_cusparselt.planner.roofline import gemm_time, square_layer

RESULTS = Path(__file__).parents[2] / "bench" / "results"
A100 = GPUS["A100"]


def write(folder: Path, times: dict[str, float], width: int = 4096) -> Path:
    """Write what the bench writes: one benchmark a part, median in seconds."""
    path = folder / "NVIDIA-A100-SXM4-80GB" / "run.json"
    path.parent.mkdir(parents=True)
    benchmarks = [
        {
            "name": part,
            "stats": {"median": us * 1e-6},
            "extra_info": {"part": part, "M": width, "N": width, "K": width},
        }
        for part, us in times.items()
    ]
    benchmarks.append({"name": "step", "stats": {"median": 1.0}, "extra_info": {"part": "step"}})
    path.write_text(json.dumps({"benchmarks": benchmarks}))
    return path


def test_measured_times_come_back_as_predictions(tmp_path: Path) -> None:
    times = {"dense_gemm": 600.0, "sparse_gemm": 400.0, "pack": 45.0}
    write(tmp_path, times)
    efficiency = measured_efficiency(A100, tmp_path)
    assert efficiency.measured
    time = gemm_time(square_layer(4096, 4096), A100, efficiency)
    assert (time.dense, time.sparse) == pytest.approx((600.0, 400.0), rel=1e-2)


def test_without_results_the_published_numbers_stand(tmp_path: Path) -> None:
    write(tmp_path, {"dense_gemm": 600.0})
    assert measured_efficiency(A100, tmp_path) is A100.published
    assert measured_efficiency(A100, tmp_path / "nowhere") is A100.published


def test_prediction_error_is_the_ratio_to_the_measurement(tmp_path: Path) -> None:
    predicted = gemm_time(square_layer(4096, 4096), A100, A100.published).dense
    path = write(tmp_path, {"dense_gemm": predicted / 2})
    (error,) = prediction_errors(A100, path)
    assert (error.part, error.count) == ("dense_gemm", 1)
    assert error.bias == error.spread == pytest.approx(2.0)


def test_device_time_is_preferred_to_wall_time(tmp_path: Path) -> None:
    path = write(tmp_path, {"dense_gemm": 600.0})
    data = json.loads(path.read_text())
    data["benchmarks"][0]["extra_info"]["device_us"] = 500.0
    path.write_text(json.dumps(data))
    assert [point.us for point in read_points(path)] == [500.0]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="read_points: path must be pytest-benchmark JSON"):
        read_points(path)


def test_prediction_error_of_every_committed_result(record_property: pytest.Function) -> None:
    """Report, do not judge: a wrong prediction is a fact about the model, not a bug."""
    files = result_files(RESULTS)
    lines = [
        f"{path.parent.name}/{path.name} {error.part}: predicted/measured {error.bias:.2f}, "
        f"off by {error.spread:.2f} over {error.count} points"
        for gpu, path in files
        for error in prediction_errors(gpu, path)
    ]
    for line in lines or ["prediction error: no result files"]:
        print(line)
        record_property("prediction_error", line)
    for gpu, path in files:
        assert all(math.isfinite(error.bias) for error in prediction_errors(gpu, path))
