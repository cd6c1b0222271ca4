"""The Slurm scripts, with stand-ins for the cluster's commands and real processes behind them."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
#: Starts the rest of its line once a node, at once; a failure of one is the failure of all. As
#: Slurm's own, it waits for every task, or, told to --kill-on-bad-exit, ends the others when one
#: fails: TERM, then KILL after KillWait seconds (30 by Slurm's default).
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$LOG"
kill_others=
while [[ "$1" == --* ]]; do
  [[ "$1" == --kill-on-bad-exit=1 ]] && kill_others=yes
  shift
done
for ((node = 0; node < ${SLURM_JOB_NUM_NODES:-1}; node++)); do
  SLURM_NODEID=$node "$@" &
done
status=0
for ((node = 0; node < ${SLURM_JOB_NUM_NODES:-1}; node++)); do
  wait -n && continue
  status=1
  [[ "$kill_others" ]] || continue
  kill $(jobs -rp) 2>/dev/null
  sleep 1
  kill -KILL $(jobs -rp) 2>/dev/null
done
exit "$status"
"""
#: Runs what stands behind the image, in the folder that --pwd names.
APPTAINER = """#!/usr/bin/env bash
shift
while [[ "$1" == --* ]]; do
  [[ "$1" == --pwd && -d "$2" ]] && cd "$2"
  [[ "$1" == --nv ]] && shift || shift 2
done
shift
exec "$@"
"""
SCONTROL = "#!/usr/bin/env bash\necho localhost\necho another\n"
SDGP = '#!/usr/bin/env bash\necho "sdgp $*" >>"$LOG"\n'


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a job on two nodes of one process each."""
    commands = tmp_path / "bin"
    commands.mkdir()
    torchrun = f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n'
    stand_ins = {"srun": SRUN, "apptainer": APPTAINER, "scontrol": SCONTROL, "sdgp": SDGP}
    for name, text in {**stand_ins, "torchrun": torchrun}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        # The job takes port 20000 + id % 20000; this id is unlikely to meet another job here.
        job = free.getsockname()[1]
    return os.environ | {
        "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), "/usr/bin:/bin"]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bindings")]),
        "LOG": str(tmp_path / "log"),
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "localhost,another",
        "OMP_NUM_THREADS": "1",
    }


def sbatch(
    script: str, *arguments: str, environment: dict[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(DOCKER / script), *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_training_job_meets_from_two_nodes(cluster: dict[str, str], tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "ddp.py")
    done = sbatch(
        "train.sbatch", "x.sif", script, "--steps", "3", environment=cluster, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Rank 0 alone prints, and the world has two.
    losses = re.findall(r"^final loss ([\d.]+)$", done.stdout, re.MULTILINE)
    assert len(losses) == 1 and 1.0 < float(losses[0]) < 5.5
    assert (tmp_path / ".cache" / "sdgp-cluster").is_dir()


@pytest.mark.slow
def test_every_node_knows_its_rank_and_the_size_of_the_world(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "who.py"
    script.write_text(
        "import os, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "found = [None] * dist.get_world_size()\n"
        "dist.all_gather_object(found, (dist.get_rank(), os.environ['SLURM_NODEID']))\n"
        "if dist.get_rank() == 0: print(sorted(found))\n"
        "dist.destroy_process_group()\n"
    )
    done = sbatch("train.sbatch", "x.sif", str(script), environment=cluster, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    nodes = re.findall(r"\((\d), '(\d)'\)", done.stdout)
    assert [rank for rank, _ in nodes] == ["0", "1"] and {node for _, node in nodes} == {"0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_rank_that_fails_fails_the_job(
    failing: str, cluster: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "fails.py"
    # The other's torchrun meets its exit barrier first, and would wait there for 300 s.
    script.write_text(
        "import os, sys, time\n"
        f"fails = os.environ['RANK'] == '{failing}'\n"
        "time.sleep(2 * fails)\n"
        "sys.exit(fails)\n"
    )
    done = sbatch("train.sbatch", "x.sif", str(script), environment=cluster, cwd=tmp_path)
    assert done.returncode != 0


@pytest.mark.parametrize("arguments", [(), ("x.sif",)])
def test_a_job_without_its_arguments_says_how(
    arguments: tuple[str, ...], cluster: dict[str, str], tmp_path: Path
) -> None:
    done = sbatch("train.sbatch", *arguments, environment=cluster, cwd=tmp_path)
    assert done.returncode == 1 and "usage: sbatch docker/train.sbatch" in done.stderr


def test_the_card_is_checked_before_it_is_measured(cluster: dict[str, str], tmp_path: Path) -> None:
    done = sbatch(
        "slurm.sbatch",
        "x.sif",
        environment=cluster | {"SLURM_JOB_NUM_NODES": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    ran = [line for line in Path(cluster["LOG"]).read_text().splitlines() if line[:4] == "sdgp"]
    assert ran == ["sdgp check", "sdgp bench --output /results"]


@pytest.mark.parametrize("name", ["slurm.sbatch", "train.sbatch"])
def test_the_clusters_page_names_every_job(name: str) -> None:
    assert f"sbatch docker/{name}" in (ROOT / "docs" / "clusters.md").read_text()
