"""The cache file under corruption, kills, foreign machines, and processes that tune at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdgp_cusparselt.cache import CacheFile, cache_dir, locked
from sdgp_cusparselt.errors import SDGPCacheWarning
from sdgp_cusparselt.tuning import TuningCache, tune
from tests.tuning.fakes import CPU, GEMM, FakeExecutor, fixed

ROOT = Path(__file__).parents[2]
HEADER = {"kind": "test", "machine": {"device": "a GPU"}}

TUNE = """
import sys
from pathlib import Path
from sdgp_cusparselt.tuning import TuningCache, tune
from tests.tuning.fakes import GEMM, FakeExecutor, fixed
executor = FakeExecutor("nan", "good")
print("ready", flush=True)
sys.stdin.readline()
decision = tune(GEMM, executor, cache=TuningCache(Path(sys.argv[1])), timer=fixed(a1=30.0))
print(decision.use, executor.calls["candidates"], flush=True)
"""

WRITE_FOR_EVER = """
import sys
from pathlib import Path
from sdgp_cusparselt.cache import CacheFile
file = CacheFile(Path(sys.argv[1]), {"kind": "test", "machine": {"device": "a GPU"}})
print("ready", flush=True)
for number in range(10**9):
    file.merge({str(number % 50): "x" * 20_000})
"""

DIE_WHILE_WRITING = """
import json, os, signal, sys
from pathlib import Path
from sdgp_cusparselt.cache import CacheFile
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
dump = json.dumps
def half(document, file, **kwargs):
    text = dump(document)
    file.write(text[: len(text) // 2])
    file.flush()
    die()
if sys.argv[2] == "in the middle":
    json.dump = half
else:
    os.replace = lambda *paths: die()
file = CacheFile(Path(sys.argv[1]), {"kind": "test", "machine": {"device": "a GPU"}})
file.merge({"new": 1})
"""

HOLD = """
import sys, time
from pathlib import Path
from sdgp_cusparselt.tuning import TuningCache
from tests.tuning.fakes import CPU, FakeExecutor
with TuningCache(Path(sys.argv[1])).turn(FakeExecutor("good"), CPU) as held:
    print("held" if held else "not held", flush=True)
    time.sleep(60)
"""


def start(script: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f".{os.pathsep}bindings"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def cache(tmp_path: Path) -> TuningCache:
    return TuningCache(tmp_path)


def tuned(cache: TuningCache, executor: FakeExecutor | None = None) -> FakeExecutor:
    executor = executor or FakeExecutor("nan", "good")
    assert tune(GEMM, executor, cache=cache, timer=fixed(a1=30.0)).use == "sparse"
    return executor


def test_two_processes_that_tune_at_once_search_once(tmp_path: Path) -> None:
    processes = [start(TUNE, tmp_path) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    answers = []
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        answers.append(process.communicate(timeout=60)[0])
    assert sorted(answers) == ["sparse 0\n", "sparse 1\n"]


def test_two_threads_that_tune_at_once_search_once(cache: TuningCache) -> None:
    executor = FakeExecutor("nan", "good")
    threads = [threading.Thread(target=tuned, args=(cache, executor)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert executor.calls["candidates"] == 1


def test_a_stuck_tuner_does_not_hang_the_others(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    try:
        assert holder.stdout.readline() == "held\n"
        cache = TuningCache(tmp_path, timeout_s=0.3)
        executor = FakeExecutor("good")
        decision = tune(GEMM, executor, cache=cache, timer=fixed(a0=1.0))
        assert decision.use == "dense" and "kept the tuner" in decision.reason
        assert decision.transient and not executor.calls
        cache.timeout_s = 60.0
        begun = time.monotonic()
        tune(GEMM, executor, cache=cache, timer=fixed(a0=1.0))
        assert time.monotonic() - begun < 30, "one wait in vain is enough"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert tune(GEMM, executor, cache=cache, timer=fixed(a0=1.0)).use == "sparse"


@pytest.mark.parametrize("when", ["in the middle", "before the rename"])
def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, when: str) -> None:
    file = CacheFile(tmp_path / "file.json", HEADER)
    file.merge({"old": 1})
    writer = start(DIE_WHILE_WRITING, file.path, when)
    writer.communicate(timeout=60)
    assert writer.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".*.partial")), "it died with a partial file"
    assert file.read() == {"old": 1}
    file.merge({"after": 1})
    assert file.read() == {"old": 1, "after": 1}
    assert not list(tmp_path.glob(".*.partial")), "leftovers of killed writers are removed"


def test_a_kill_at_any_time_corrupts_nothing(tmp_path: Path) -> None:
    file = CacheFile(tmp_path / "file.json", HEADER)
    writer = start(WRITE_FOR_EVER, file.path)
    assert writer.stdout.readline() == "ready\n"
    while not file.path.exists():
        time.sleep(0.001)
    for _ in range(50):
        entries = file.read()
        assert entries and all(value == "x" * 20_000 for value in entries.values())
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert file.read()


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_set_aside_and_rebuilt(cache: TuningCache, fraction: float) -> None:
    executor = tuned(cache)
    path = cache.file(executor, CPU).path
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.warns(SDGPCacheWarning, match="is not used: it is corrupt.*renamed"):
        tuned(TuningCache(cache.folder))
    assert path.with_name(path.name + ".aside").exists()
    assert tuned(TuningCache(cache.folder), FakeExecutor("refuses")).calls["candidates"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"use": "fast"},
        {"m": "32"},
        {"m": 64},
        {"dtype": "bfloat17"},
        {"candidate": None},
        {"candidate": {"alg": 3}},
        {"sparse_us": "1"},
        {"rejected": [{"alg_id": 1}]},
    ],
    ids=str,
)
def test_a_spoilt_entry_is_set_aside_and_rebuilt(
    cache: TuningCache, change: dict[str, object]
) -> None:
    executor = tuned(cache)
    path = cache.file(executor, CPU).path
    document = json.loads(path.read_text())
    (entry,) = document["entries"].values()
    entry.update(change)
    path.write_text(json.dumps(document))
    with pytest.warns(SDGPCacheWarning, match="is corrupt"):
        tuned(TuningCache(cache.folder))


def test_a_foreign_file_is_set_aside(cache: TuningCache) -> None:
    executor = tuned(cache)
    file = cache.file(executor, CPU)
    document = json.loads(file.path.read_text())
    document["machine"]["library"] = "0.7.1"
    file.path.write_text(json.dumps(document))
    with pytest.warns(SDGPCacheWarning, match="foreign .machine is .*0.7.1"):
        assert TuningCache(cache.folder).decisions(executor, CPU) == []


def test_machines_do_not_share_decisions(cache: TuningCache) -> None:
    first, second = FakeExecutor("good", machine="A"), FakeExecutor("good", machine="B")
    for executor in (first, second):
        tune(GEMM, executor, cache=cache, timer=fixed(a0=1.0))
        assert executor.calls["candidates"] == 1
    assert cache.file(first, CPU).path != cache.file(second, CPU).path


def test_merge_keeps_what_others_wrote(tmp_path: Path) -> None:
    one, two = (CacheFile(tmp_path / "file.json", HEADER) for _ in range(2))
    one.merge({"a": 1})
    two.merge({"b": 2})
    one.merge({"a": 3})
    assert two.read() == {"a": 3, "b": 2}


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = TuningCache(tmp_path / "file" / "cache")
    with pytest.warns(SDGPCacheWarning, match="set SDGP_CACHE_DIR") as caught:
        tuned(cache)
    assert len(caught) == 1, "said once"


def test_a_file_system_without_locks(cache: TuningCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(self: object, timeout: float) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("sdgp_cusparselt.cache.FileLock.acquire", acquire)
    with pytest.warns(SDGPCacheWarning, match="does not appear to support flock"):
        tuned(cache)


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "lock", 1.0):
        raise KeyError
    with locked(tmp_path / "lock", 0.0) as held:
        assert held
        with locked(tmp_path / "lock", 0.0) as again:
            assert not again


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDGP_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("SDGP_CACHE_DIR")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "sdgp_cusparselt"
