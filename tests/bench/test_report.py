"""The report says what the file says; the file opens elsewhere and gives nothing away."""

import json
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.report_data import Results, Row, break_even, load, summary
from bench.report_plots import plot_all
from sdgp_cusparselt.planner.results import read_points, result_files
from tests.bench.conftest import run_python


@pytest.fixture(scope="module")
def entries(result_file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(part, contender) -> the file's own entry."""
    benchmarks = json.loads(result_file.read_text())["benchmarks"]
    infos = [b["extra_info"] | {"median": b["stats"]["median"]} for b in benchmarks]
    return {(info["part"], info["contender"]): info for info in infos}


def cells(markdown: str) -> list[dict[str, str]]:
    """Read a Markdown table back."""
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in markdown.split("\n")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_tables_numbers_are_the_files(
    result_file: Path, entries: dict[tuple[str, str], dict[str, Any]]
) -> None:
    (line,) = cells(report.grad_input_table(load([result_file])))
    net, pack = entries["grad_input", "sdgp"], entries["pack", "sdgp"]
    product = entries["sparse_gemm", "sdgp"]
    assert [line[size] for size in "MNK"] == [str(net[size]) for size in "MNK"]
    assert line["dense us"] == f"{net['reference_us']:.1f}"
    assert line["pack us"] == f"{pack['us']:.1f}"
    assert line["product us"] == f"{product['us']:.1f}"
    assert line["whole us"] == f"{net['us']:.1f}"
    assert line["speedup"] == f"{net['reference_us'] / net['us']:.2f}"
    assert line["auto"] == "-"


def test_tables_of_rivals_and_packs_hold_every_entry_as_it_is(
    result_file: Path, entries: dict[tuple[str, str], dict[str, Any]]
) -> None:
    results = load([result_file])
    rivals = {(line["part"], line["who"]): line for line in cells(report.rivals_table(results))}
    assert {"library prune + compress", "dense fallback", "sdgp"} <= {who for _, who in rivals}
    for key, line in rivals.items():
        info = entries[key]
        assert line["us"] == f"{info['us']:.1f}"
        assert line["its us"] == f"{info['reference_us']:.1f}"
        assert line["speedup"] == f"{info['reference_us'] / info['us']:.2f}"
    for line in cells(report.pack_table(results)):
        info = entries[line["part"], line["who"]]
        assert line["clones"] == f"{info['us'] / info['reference_us']:.2f}"
        assert line["GB/s"] == f"{info['bytes'] / info['us'] / 1e3:.1f}"
    assert "nothing about speed" in report.render(results)


def test_what_did_not_run_is_reported_with_its_reason(result_file: Path) -> None:
    lines = cells(report.not_run_table(load([result_file])))
    reasons = {line["who"]: line["reason"] for line in lines}
    assert reasons["torch._cslt_sparse_mm"] == "runs on CUDA devices only"
    assert "xFormers sp24" in reasons


def test_every_result_was_checked_first(entries: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert all(0 <= info["error_of_bound"] <= 1 for info in entries.values())
    assert entries["sparse_gemm", "sdgp"]["checked_against"] == "the pruned product"
    assert entries["grad_input", "sdgp"]["max_error"] > 0


def test_the_planner_reads_ours_and_leaves_rivals_out(
    result_file: Path, entries: dict[tuple[str, str], dict[str, Any]]
) -> None:
    ours = [
        round(info["median"] * 1e6, 3)
        for (part, _), info in entries.items()
        if part in ("dense_gemm", "sparse_gemm", "pack") and not info["rival"]
    ]
    assert sorted(round(p.us, 3) for p in read_points(result_file)) == sorted(ours)
    assert any(info["rival"] for (part, _), info in entries.items() if part == "sparse_gemm")


def test_the_file_opens_with_pytest_benchmark_and_names_no_host(result_file: Path) -> None:
    done = run_python("-m", "pytest_benchmark", "compare", str(result_file))
    assert done.returncode == 0, done.stderr
    assert "cpu-tiny-mlp.up-256-grad_input-sdgp" in done.stdout
    machine = json.loads(result_file.read_text())["machine_info"]
    assert "node" not in machine
    assert platform.node() not in (*machine.values(), *machine["sdgp"].values())
    assert {"torch", "triton", "cusparselt", "cusparselt_path", "tune"} <= set(machine["sdgp"])
    assert not machine["sdgp"]["cusparselt_path"].startswith("/")


def test_the_report_as_a_command(result_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.md"
    done = run_python(
        *("-m", "bench.report", str(result_file), "--output", str(target)),
        *("--plots", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    assert "## Summary" in target.read_text()
    names = {"speedups.png", "shares.png"}
    assert names <= {path.name for path in tmp_path.glob("*.png")}
    bad = run_python("-m", "bench.report", str(tmp_path / "none.json"))
    assert bad.returncode == 2
    assert "bench.report:" in bad.stderr


def row(n: int, us: float, reference_us: float) -> Row:
    shape = ("grad_input", "sdgp", f"c{n}", "model", "layer", 1024, n, 64)
    return Row(*shape, us, reference_us, "torch.mm", us, False, {})


def test_summary_counts_losses_and_takes_the_geometric_mean() -> None:
    rows = [row(1, 2.0, 1.0), row(2, 1.0, 8.0), row(3, 1.0, 2.0)]
    found = summary(rows)
    assert found["geometric_mean"] == pytest.approx(2.0)
    assert found["median"] == statistics.median([0.5, 8.0, 2.0])
    assert (found["losing"], found["shapes"], found["lowest"]) == (1, 3, 0.5)
    assert summary([]) == {"shapes": 0}


def test_break_even_is_the_width_from_which_nothing_loses() -> None:
    rows = [row(1024, 1.0, 2.0), row(2048, 2.0, 1.0), row(4096, 1.0, 1.5), row(8192, 1.0, 1.2)]
    assert break_even(rows) == 4096
    assert break_even([*rows, row(4096, 2.0, 1.0)]) == 8192
    assert break_even([row(8192, 2.0, 1.0)]) is None


def test_a_later_file_replaces_and_other_cards_are_refused(
    result_file: Path, tmp_path: Path
) -> None:
    data = json.loads(result_file.read_text())
    data["datetime"] = "2999-01-01T00:00:00"
    data["benchmarks"] = [b for b in data["benchmarks"] if b["extra_info"]["part"] == "pack"]
    data["benchmarks"][0]["extra_info"]["us"] = 123.0
    later = tmp_path / "later.json"
    later.write_text(json.dumps(data))
    before, both = load([result_file]), load([later, result_file])
    assert len(both.rows) == len(before.rows)
    assert both.of("pack", "sdgp")[0].us == 123.0
    data["machine_info"]["sdgp"]["gpu"] = "another"
    later.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="load: paths must be results of one card"):
        load([later, result_file])


def test_an_empty_file_is_no_file(result_file: Path, tmp_path: Path) -> None:
    """pytest-benchmark before 5.3 leaves one where it measured nothing."""
    empty = tmp_path / "stopped.json"
    empty.touch()
    assert load([empty, result_file]) == load([result_file])
    folder = tmp_path / "NVIDIA-H100"
    folder.mkdir()
    (folder / "stopped.json").touch()
    assert result_files(tmp_path) == []


def test_plots_skip_what_they_have_no_numbers_for(result_file: Path, tmp_path: Path) -> None:
    results = load([result_file])
    assert all(math.isfinite(r.speedup) for r in results.rows)
    empty = Results((), (), results.conditions)
    assert plot_all(empty, tmp_path) == []
