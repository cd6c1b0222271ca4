"""DDP, FSDP2 and tensor parallelism: judges what two_ranks.py found in two processes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.foreign.tally import Tally

pytestmark = pytest.mark.foreign
ROOT = Path(__file__).parents[2]


def test_two_ranks(tmp_path: Path, tally: Tally) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.foreign.two_ranks", str(tmp_path / "found")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bindings")]),
        "SDGP_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for rank, data in enumerate(json.loads((tmp_path / "found").read_text())):
        unknown = {f"{name} (rank {rank})": text for name, text in data["unknown"].items()}
        tally.take(Tally(data["passed"], Counter(data["known"]), unknown))
