"""Say in one sentence a task what ``make demo`` saw: python docs/demo_closing.py RESULTS.json ...

RESULTS.json is what ``sdgp train`` writes; each needs a dense run and a pruned one.
"""

import json
import sys
from pathlib import Path
from typing import Any

from sdgp_cusparselt.training.tasks import TASKS


def sentence(document: dict[str, Any]) -> str:
    """Return where dense ended, and how much better or worse each pruned method did.

    Args:
        document: content of ``results.json``.

    Raises:
        ValueError: there is no dense run, no pruned one, or one that ended in no finite number.
    """
    metric = TASKS[document["task"]].metric
    dense, *pruned = sorted(document["summary"], key=lambda entry: entry["method"] != "dense")
    ended = all(entry["mean"] is not None for entry in (dense, *pruned))
    if dense["method"] != "dense" or not pruned or not ended:
        got = ", ".join(entry["method"] for entry in document["summary"])
        rule = "a finite dense run and a pruned one"
        raise ValueError(f"sentence: document must hold {rule}, got {got}. Run: make demo")
    places = min(2, metric.digits)
    behind = []
    for entry in pruned:
        gap = entry["mean"] - dense["mean"]
        word = "better" if (gap > 0) == metric.higher_is_better else "worse"
        size = f"{abs(gap):.{places}f}"
        said = f"{size} {word}" if float(size) else f"the same to {0.1**places:.{places}f}"
        behind.append(f"{entry['label']} {said}")
    seeds = len(dense["seeds"])
    runs = "one seed" if seeds == 1 else f"means of {seeds} seeds"
    end = f"dense ends at {dense['mean']:.{places}f} {metric.words}"
    return f"{document['task']}: {end}; {', '.join(behind)} ({runs})."


def main(paths: list[str]) -> int:
    """Print what was seen, a line per result file."""
    if not paths:
        print("demo_closing: give result files of sdgp train, got none", file=sys.stderr)
        return 2
    print("Seen:")
    for path in paths:
        print(f"  {sentence(json.loads(Path(path).read_text(encoding='utf-8')))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
