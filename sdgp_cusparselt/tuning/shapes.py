"""Which products to tune: from a file, or from a model that is traced without running it."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.config.patterns import METHODS
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.tuning.decision import MATMUL, Key, gemm_from_dict

#: Element types that the library multiplies 2:4 in every order of the dense operand.
DTYPES = (torch.bfloat16, torch.float16)
#: What an entry may leave out.
DEFAULTS: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "dense_order": "row",
    "method": SDGPConfig().prune,
    "transpose": False,
    "rival": MATMUL.name,
}
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False, "": False}


def read_shapes(path: Path, device: torch.device) -> list[Key]:
    """Return the products that a file lists, each once, in its order.

    Args:
        path: JSON (a list of objects, as ``ShapeLog.write`` makes it) or CSV with a header; m, n
            and k are needed, dtype, dense_order, method and transpose are optional.
        device: that the products are tuned on.

    Raises:
        OSError: the file cannot be read.
        ValueError: an entry is no product; the message says which and why.
    """
    text = path.read_text(encoding="utf-8")
    rows = _csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text, path)
    keys: dict[Key, None] = {}
    for number, row in enumerate(rows, start=1):
        try:
            keys[key_of({**DEFAULTS, **row}, device)] = None
        except (KeyError, TypeError, ValueError) as error:
            rule = "a list of products with m, n, k and optionally " + ", ".join(DEFAULTS)
            got = f"{row} as number {number} ({error})"
            raise value_error("tune", "shapes", rule, got, f"Mend {path}.") from error
    return list(keys)


def _json_rows(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise value_error("tune", "shapes", "JSON or CSV", error, f"Mend {path}.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise value_error("tune", "shapes", "a list of objects", type(rows), f"Mend {path}.")
    return rows


def _csv_rows(text: str) -> Iterable[dict[str, Any]]:
    for row in csv.DictReader(text.splitlines(), skipinitialspace=True):
        entry: dict[str, Any] = {name: value for name, value in row.items() if value}
        for name in ("m", "n", "k"):
            if str(entry.get(name)).isdigit():
                entry[name] = int(entry[name])
        transpose = str(entry.get("transpose", "")).lower()
        yield {**entry, "transpose": _BOOLEANS.get(transpose, transpose)}


def key_of(entry: Mapping[str, Any], device: torch.device) -> Key:
    """Return the product that an entry with every field names.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, or of no use.
    """
    if entry["method"] not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}")
    if not isinstance(entry["transpose"], bool):
        raise TypeError("transpose must be true or false")
    gemm = gemm_from_dict(entry, device)
    if gemm.dtype not in DTYPES:
        raise ValueError(f"dtype must be bfloat16 or float16, got {entry['dtype']}")
    return Key(gemm, entry["method"], entry["transpose"], str(entry["rival"]))
