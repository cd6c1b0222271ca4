"""The page about heads says what is counted and what was measured."""

import importlib.util
import json
from pathlib import Path

from bench import head_cost

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "head.md"


def test_the_table_of_costs_is_what_is_counted() -> None:
    assert head_cost.report() in PAGE.read_text(encoding="utf-8"), "run: python -m bench.head_cost"


def test_liger_and_torch_hold_the_gradients_and_a_chunk_of_logits() -> None:
    """Llama-3-8B's head: 8192 / ceil(128256 / 4096) tokens a chunk, and half of them."""
    needed = head_cost.gradients(4096)
    assert head_cost.liger(4096).peak - needed == 256 * 128256 * 2
    assert head_cost.torch_chunked(4096).peak - needed == 128 * (128256 + 4096) * 4


def test_the_table_of_losses_is_what_was_measured() -> None:
    path = ROOT / "docs" / "head_pruning.py"
    spec = importlib.util.spec_from_file_location("head_pruning", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    document = json.loads(module.RESULT.read_text(encoding="utf-8"))
    assert module.summary(document["runs"]) == document["summary"]
    assert module.table(document) in PAGE.read_text(encoding="utf-8")
