"""Write README's accuracy tables from the result files: python docs/accuracy.py

A table stands between ``<!-- accuracy: FILE -->`` and ``<!-- end of accuracy -->``.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- accuracy: (\S+) -->\n(?:.*?<!-- end of accuracy -->\n)?", re.DOTALL)
HEAD = "| {task}, {metric} | mean ± std | min to max | minus dense |\n|---|---:|---:|---:|"


def with_accuracy(text: str) -> str:
    """Return a page with every accuracy table made anew from the file that it names."""

    def made(match: re.Match[str]) -> str:
        document = json.loads((ROOT / match[1]).read_text(encoding="utf-8"))
        return f"<!-- accuracy: {match[1]} -->\n{table(document)}\n<!-- end of accuracy -->\n"

    return BLOCK.sub(made, text)


def table(document: dict[str, Any]) -> str:
    """Return one result file as Markdown: a row per method, losses kept."""
    metric = document["metric"]
    unit = f"{metric['name']} ({metric['unit']})"
    lines = [HEAD.format(task=document["task"], metric=unit)]
    for row in document["summary"]:
        spread = f"{row['mean']:.2f} ± {row['std']:.2f}"
        difference = f"{row['difference_mean']:+.2f} ± {row['difference_std']:.2f}"
        cells = [row["label"], spread, f"{row['min']:.2f} to {row['max']:.2f}"]
        cells.append("" if row["method"] == "dense" else difference)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Write README's tables."""
    readme = ROOT / "README.md"
    readme.write_text(with_accuracy(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
