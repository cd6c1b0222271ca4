"""What torch's product of a CSR matrix costs beside the dense one: python docs/csr_products.py

dense time / CSR time of one layer's grad_input on this machine, at 50 to 95 % zeros anywhere: the
product alone, and with the conversion of a dense matrix to CSR. The benchmark measures both in one
run and is run several times, so that what varies from run to run is seen.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs/results/unstructured-csr.json"
BENCH = ("bench/bench_unstructured.py", "-k", "cpu")
RUNS = 5


def measured() -> list[dict[str, Any]]:
    """Run the benchmark once and return what it says of each product."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "-q", *BENCH, f"--benchmark-json={path}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    return [one["extra_info"] for one in found]


def document(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return dense time / CSR time of every run, by product and share of zeros."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for one in (info for run in runs for info in run):
        share = f"{one['sparsity']:.0%}"
        ratio = one["reference_us"] / one["us"]
        ratios.setdefault(one["part"], {}).setdefault(share, []).append(round(ratio, 3))
    first = runs[0][0]
    return {
        "command": "python docs/csr_products.py",
        "shape": {side: first[side] for side in ("M", "N", "K")},
        "dtype": first["dtype"],
        "environment": {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "dense_over_csr": ratios,
    }


def main() -> None:
    """Write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    content = document([measured() for _ in range(args.runs)])
    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content["dense_over_csr"], indent=1))


if __name__ == "__main__":
    main()
