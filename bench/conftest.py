"""What every benchmark shares: options, parametrisation, conditions in the result file."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import machine
from bench.contender import NOT_RUN, STARTED
from bench.operands import operands
from bench.shapes import CONVOLUTIONS, LINEARS, TRAINED, Selection
from bench.timing import synchronised

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sdgp", "what the benchmarks measure")
    group.addoption("--bench-scope", choices=("quick", "full"), default="quick")
    group.addoption("--bench-dtype", choices=tuple(DTYPES), default="bf16")
    group.addoption("--bench-models", default="", help="names of bench/shapes.py, by commas")
    group.addoption("--bench-tokens", default="", help="such as 4096,16384; all if empty")
    group.addoption("--bench-time-limit", type=float, default=0.0, help="seconds; 0 is none")
    group.addoption("--bench-command", default="", help="what to write down as the command")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_RUN] = []
    config.stash[STARTED] = time.monotonic()
    _selection(config)  # names a wrong model or token count before anything is collected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a benchmark the (case, contender) pairs that its module makes for these options."""
    if "contender" not in metafunc.fixturenames:
        return
    pairs = metafunc.module.pairs(_selection(metafunc.config))
    metafunc.parametrize("case, contender", [_parameter(*pair) for pair in pairs])


@pytest.fixture(scope="session", autouse=True)
def _cpu_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the emulator proves on a CPU out of the user's cache, where GPUs would read it."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("SDGP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def _selection(config: pytest.Config) -> Selection:
    option = config.getoption
    models = tuple(name for name in option("--bench-models").split(",") if name)
    known = {names[0] for names in (*LINEARS, *CONVOLUTIONS)} | {"gpt-1.3b", "mlp"}
    known |= {case.model for case in TRAINED}
    if not known.issuperset(models):
        raise pytest.UsageError(f"--bench-models must be some of {sorted(known)}, got {models}")
    counts = [count for count in option("--bench-tokens").split(",") if count]
    if not all(count.isdecimal() and int(count) for count in counts):
        raise pytest.UsageError(f"--bench-tokens must be such as 4096,16384, got {counts}")
    tokens = tuple(int(count) for count in counts)
    full = option("--bench-scope") == "full"
    return Selection(full, DTYPES[option("--bench-dtype")], models, tokens)


def _parameter(case: Any, contender: Any) -> Any:
    place = "cpu" if case.device_type == "cpu" else "gpu"
    marks = [pytest.mark.gpu, pytest.mark.benchmark(timer=synchronised)] if place == "gpu" else []
    return pytest.param(case, contender, id=f"{place}-{case.label}-{contender.label}", marks=marks)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed; skip what needs a GPU where there is none."""
    torch.manual_seed(0)
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    yield


@pytest.fixture(scope="session", autouse=True)
def _release() -> Iterator[None]:
    yield
    operands.cache_clear()


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine.public(machine_info)
    machine_info["sdgp"] = machine.conditions()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    """Add what did not run, and why; cases by name, not as Python objects."""
    output_json["not_run"] = config.stash[NOT_RUN]
    output_json["command"] = config.getoption("--bench-command")
    output_json["scope"] = config.getoption("--bench-scope")
    for entry in output_json["benchmarks"]:
        params = entry["params"] or {}
        entry["params"] = {
            name: getattr(value, "label", value) for name, value in params.items()
        } or None
