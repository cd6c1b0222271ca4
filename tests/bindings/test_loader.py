"""One library, found or given, opened once; versions outside the tested range are refused."""

import ctypes
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pycusparselt as cslt
import pytest
from pycusparselt import loader
from pycusparselt.errors import (
    CusparseLtError,
    LibraryNotFoundError,
    LibraryVersionWarning,
    UnsupportedVersionError,
)

from tests.bindings.wheels import installed_file
from tests.emulator.control import Emulator

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was loaded, for this test only."""
    monkeypatch.setattr(loader, "_libraries", {})
    monkeypatch.delenv(loader.ENVIRONMENT_VARIABLE, raising=False)


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != loader.ENVIRONMENT_VARIABLE}
    paths = {"PYTHONPATH": str(ROOT / "bindings")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**inherited, **paths, **environment},
        timeout=120,
    )


def test_by_path_once(fresh: None, emulator: Emulator) -> None:
    lib = cslt.load(emulator.path)
    assert lib is cslt.load(Path(emulator.path))
    assert lib.path == emulator.path
    assert lib.version == (0, 8, 1)
    assert emulator.calls("cusparseLtGetProperty") == 3


def test_by_environment(fresh: None, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSPARSELT_LIBRARY", emulator.path)
    assert cslt.load() is cslt.load(emulator.path)


def test_injected(fresh: None, emulator: Emulator) -> None:
    cdll = ctypes.CDLL(emulator.path)
    lib = cslt.load(cdll=cdll)
    assert lib is cslt.load(cdll=cdll)
    assert lib.cdll is cdll
    with cslt.Handle(lib) as handle:
        assert handle.version() == 801
    assert cdll.cusparseLtInit.argtypes is None
    with pytest.raises(TypeError, match="alone"):
        cslt.load(emulator.path, cdll=cdll)


def test_threads_open_it_once(fresh: None, emulator: Emulator) -> None:
    barrier, found = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        found.append(cslt.load(emulator.path))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(lib) for lib in found}) == 1
    assert emulator.calls("cusparseLtGetProperty") == 3


@pytest.mark.parametrize("version", [(0, 6, 2), (0, 7, 1), (0, 8, 1), (0, 10, 0), (0, 10, 7)])
def test_tested_versions_load_without_a_word(
    fresh: None, emulator: Emulator, version: tuple[int, int, int]
) -> None:
    emulator.version(*version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cslt.load(emulator.path).version == version


@pytest.mark.parametrize("version", [(0, 4, 0), (0, 6, 1), (0, 11, 0), (1, 0, 0)])
def test_other_versions_are_refused(
    fresh: None, emulator: Emulator, version: tuple[int, int, int]
) -> None:
    emulator.version(*version)
    text = r"\.".join(str(part) for part in version)
    with pytest.raises(UnsupportedVersionError, match=f"0.6.2 and 0.10.*got {text}"):
        cslt.load(emulator.path)
    with pytest.warns(LibraryVersionWarning, match=f"got {text}"):
        assert cslt.load(emulator.path, allow_untested=True).version == version


def test_the_known_regression_is_named(fresh: None, emulator: Emulator) -> None:
    emulator.version(0, 8, 0)
    with pytest.warns(LibraryVersionWarning, match="regressions on H100"):
        cslt.load(emulator.path)


def test_a_missing_file(fresh: None, tmp_path: Path) -> None:
    with pytest.raises(LibraryNotFoundError, match="pip install nvidia-cusparselt-cu13") as caught:
        cslt.load(tmp_path / "nothing.so")
    assert caught.value.searched == (str(tmp_path / "nothing.so"),)


def test_another_library_is_refused(fresh: None) -> None:
    with pytest.raises(LibraryNotFoundError, match="cusparseLtGetProperty"):
        cslt.load(cdll=ctypes.CDLL(None))


def test_a_library_that_gives_no_version(fresh: None, emulator: Emulator) -> None:
    emulator.fail("cusparseLtGetProperty", cslt.Status.INTERNAL_ERROR)
    with pytest.raises(LibraryNotFoundError, match="must answer cusparseLtGetProperty"):
        cslt.load(emulator.path)


def test_a_failed_search_lists_what_it_tried(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SONAME", "libcusparseLt-that-is-not.so")
    failing = "raise LookupError('DynamicLibNotFoundError: looked in /a and /b')"
    monkeypatch.setattr(loader, "_FIND", failing)
    with pytest.raises(LibraryNotFoundError, match="pip install nvidia-cusparselt-cu13") as caught:
        cslt.load()
    listing = "\n".join(caught.value.searched)
    assert "CUSPARSELT_LIBRARY (not set)" in listing
    assert "looked in /a and /b" in listing
    assert listing.replace("\n", "\n  ") in str(caught.value)


@pytest.mark.parametrize("answer", [None, ModuleNotFoundError("cuda")])
def test_without_pathfinder(
    fresh: None, monkeypatch: pytest.MonkeyPatch, answer: Exception | None
) -> None:
    def find_spec(name: str) -> None:
        if answer is not None:
            raise answer

    monkeypatch.setattr(loader, "SONAME", "libcusparseLt-that-is-not.so")
    monkeypatch.setattr(loader.importlib.util, "find_spec", find_spec)
    with pytest.raises(LibraryNotFoundError, match="pip install cuda-pathfinder"):
        cslt.load()


def test_a_search_that_hangs_is_given_up(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SONAME", "libcusparseLt-that-is-not.so")
    monkeypatch.setattr(loader, "_FIND", "import time; time.sleep(60)")
    monkeypatch.setattr(loader, "_FIND_TIMEOUT_S", 0.2)
    with pytest.raises(LibraryNotFoundError, match=r"no answer in 0\.2 s"):
        cslt.load()


def test_import_opens_nothing_and_search_keeps_symbols_local() -> None:
    code = (
        "import ctypes, sys\n"
        "import pycusparselt as cslt\n"
        "opened = lambda: 'libcusparseLt' in open('/proc/self/maps').read()\n"
        "assert not opened() and 'torch' not in sys.modules\n"
        "lib = cslt.load()\n"
        "assert opened() and cslt.load() is lib\n"
        "assert not hasattr(ctypes.CDLL(None), 'cusparseLtInit')\n"
        "print(lib.path)\n"
    )
    finished = in_a_process(code)
    assert finished.returncode == 0, finished.stderr
    path = finished.stdout.strip()
    assert Path(path).is_absolute()
    assert Path(path).name == "libcusparseLt.so.0"


def test_a_copy_that_is_already_loaded_is_used() -> None:
    code = (
        "import ctypes, os\n"
        "import pycusparselt as cslt\n"
        "from pycusparselt import loader\n"
        f"path = {str(installed_file('libcusparseLt.so.0'))!r}\n"
        "held = ctypes.CDLL(path)\n"
        "loader._FIND = 'raise SystemExit(9)'\n"
        "assert os.path.samefile(cslt.load().path, path)\n"
    )
    finished = in_a_process(code)
    assert finished.returncode == 0, finished.stderr


def test_errors_survive_pickling() -> None:
    original = CusparseLtError(10, "CUSPARSE_STATUS_NOT_SUPPORTED", "cusparseLtMatmul", "no", "M=1")
    copy = pickle.loads(pickle.dumps(original))
    assert str(copy) == str(original)
    assert (copy.status, copy.function, copy.text) == (10, "cusparseLtMatmul", "no")
    missing = pickle.loads(pickle.dumps(LibraryNotFoundError("gone", ("here",))))
    assert (str(missing), missing.searched) == ("gone", ("here",))
