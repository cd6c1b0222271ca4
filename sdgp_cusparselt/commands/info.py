"""``sdgp info``: an environment report to paste into an issue; it never fails."""

import argparse
import os
import platform
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from sdgp_cusparselt.commands.arguments import UsageError, integer, output_file
from sdgp_cusparselt.commands.console import Output, folded
from sdgp_cusparselt.versions import version_of, versions

if TYPE_CHECKING:
    from sdgp_cusparselt.packing.layout import MetadataLayout

#: Optional distributions whose presence changes what runs.
OPTIONAL = (
    "nvidia-cusparselt-cu13",
    "nvidia-cusparselt-cu12",
    "cupy-cuda13x",
    "cuda-pathfinder",
    "transformers",
    "pytest-benchmark",
    "scikit-learn",
    "mlxtend",
    "matplotlib",
)


#: Keys of the report that start so are what was learned: one paragraph each.
LAYOUT = "layout: "
#: More of them than this are counted, not printed.
LAYOUTS_SHOWN = 6
#: Edge of the largest operand whose layout is drawn.
LARGEST_DRAWING = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdgp info``."""
    parser.add_argument(
        "--layout",
        nargs="?",
        const="learned",
        metavar="NAME",
        help="draw a metadata layout: a name, or what was learned on this machine",
    )
    edge = integer(1, LARGEST_DRAWING)
    parser.add_argument("--rows", type=edge, default=128, help="rows of the drawn operand")
    parser.add_argument("--cols", type=edge, default=128, help="columns of the drawn operand")
    parser.add_argument(
        "--png", type=output_file, metavar="PATH", help="draw the layout into a picture"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report and return 0, whatever is missing or broken; 2 for an unknown layout."""
    output = Output(args)
    if args.layout is not None:
        _draw(args, output)
        return 0
    report = collect()
    output.write_json(report)
    output.print(describe(report, output.width))
    return 0


def describe(report: dict[str, str], width: int) -> str:
    """Return the report as lines of at most ``width`` columns: values beside their keys.

    Words longer than a line, such as paths, stay whole, so that they can be copied.
    """
    width = max(width, 40)
    plain = {key: value for key, value in report.items() if not key.startswith(LAYOUT)}
    edge = max(map(len, plain)) + 2
    lines = [folded(v or "none", width, k.ljust(edge), " " * edge) for k, v in plain.items()]
    layouts = [key for key in report if key not in plain]
    for key in layouts[:LAYOUTS_SHOWN]:
        lines.append(folded(key, width, "", "  "))
        lines.append(folded(report[key], width, "  ", "  "))
    if len(layouts) > LAYOUTS_SHOWN:
        lines.append(f"and {len(layouts) - LAYOUTS_SHOWN} more layouts: sdgp info --json -")
    return "\n".join(lines)


def collect() -> dict[str, str]:
    """Return the report; a probe that fails says so in its own line."""
    report: dict[str, str] = {}
    for probe in PROBES:
        try:
            report.update(probe())
        # A report on a broken environment is when it is needed most.
        except Exception as error:
            report[probe.__name__.strip("_")] = f"failed: {type(error).__name__}: {error}"
    return report


def _draw(args: argparse.Namespace, output: Output) -> None:
    """Print the layouts that are asked for; a picture of the first one with --png.

    Raises:
        UsageError: there is none of that name.
    """
    from sdgp_cusparselt.packing.drawing import draw_png, draw_text
    from sdgp_cusparselt.packing.layout import NAMED

    chosen: dict[str, MetadataLayout | None] = {args.layout: NAMED.get(args.layout)}
    if args.layout == "learned":
        nothing = {"plain (nothing was learned on this machine yet)": NAMED["plain"]}
        chosen = {**(_learned() or nothing)}
    document = {}
    for title, layout in chosen.items():
        if layout is None:
            names = ", ".join(NAMED)
            raise UsageError(f"argument --layout: must be one of {names}, got {title!r}")
        drawing = draw_text(layout, args.rows, args.cols)
        if args.png:
            draw_png(layout, args.rows, args.cols, args.png)
        output.print(f"{title}\n{drawing}")
        document[title] = layout.to_json()
    output.write_json(document)


def _learned() -> dict[str, "MetadataLayout"]:
    """Return every order that was proven on this machine, by the first plan that has it."""
    from sdgp_cusparselt.packing.layout import MetadataLayout
    from sdgp_cusparselt.packing.proofs import learned_layouts

    found: dict[str, MetadataLayout] = {}
    for proof in learned_layouts():
        orders = {e["layout"]: name for name, e in reversed(_proven(proof).items())}
        for text, plan in orders.items():
            found[f"{_title(proof)}, {plan}"] = MetadataLayout.from_json(text)
    return found


def _proven(proof: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {name: entry for name, entry in proof["plans"].items() if "layout" in entry}


def _title(proof: dict[str, Any]) -> str:
    identity = proof.get("identity", {})
    parts = [f"{name} {identity[name]}" for name in ("device", "cusparselt") if name in identity]
    return ", ".join([*parts, str(proof.get("dtype", ""))])


def _platform() -> dict[str, str]:
    return {"python": sys.version.split()[0], "platform": platform.platform()}


def _versions() -> dict[str, str]:
    optional = {name: version_of(name) for name in OPTIONAL}
    return versions() | {name: v for name, v in optional.items() if v != "none"}


def _devices() -> dict[str, str]:
    import torch

    report = {"torch cuda": torch.version.cuda or "none"}
    if not torch.cuda.is_available():
        return report | {"devices": "no CUDA device"}
    from sdgp_cusparselt.backends.machine import driver_version

    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = p.total_memory / 2**30
        report[f"device {index}"] = f"{p.name}, sm_{p.major}{p.minor}, {memory:.0f} GiB"
    return report | {"driver": driver_version()}


def _library() -> dict[str, str]:
    import pycusparselt

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", pycusparselt.LibraryVersionWarning)
        try:
            library = pycusparselt.load()
        except (pycusparselt.LibraryNotFoundError, pycusparselt.UnsupportedVersionError) as error:
            return {"cusparselt": f"not loaded: {error}"}
    report = {"cusparselt": f"{library.version_text} at {library.path}"}
    known = [str(w.message) for w in caught if w.category is pycusparselt.LibraryVersionWarning]
    return report | ({"cusparselt warning": known[0]} if known else {})


def _owners() -> dict[str, str]:
    """Name the file that several wheels installed over each other: pip removes it with any one."""
    import pycusparselt.loader

    wheels: dict[str, list[str]] = {}
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            if file.name == pycusparselt.loader.SONAME:
                path = os.path.realpath(str(file.locate()))
                wheels.setdefault(path, []).append(f"{distribution.name} {distribution.version}")
    shared = {path: sorted(set(names)) for path, names in wheels.items() if len(set(names)) > 1}
    if not shared:
        return {}
    ((path, names), *_) = shared.items()
    owners = " ".join(name.split()[0] for name in names)
    return {
        "cusparselt conflict": f"{' and '.join(names)} both own {path}, and removing either "
        f"removes it. pip uninstall {owners}, then pip install the one that torch "
        f"asks for: {_wanted_by_torch()}"
    }


def _wanted_by_torch() -> str:
    """Return torch's requirement of cuSPARSELt as its metadata has it."""
    required = metadata.requires("torch") or ()
    wanted = (line.partition(";")[0].strip() for line in required if "cusparselt" in line)
    return next(wanted, "none, so the one for torch's CUDA")


def _backends() -> dict[str, str]:
    import sdgp_cusparselt as sdgp

    return {
        f"backend {name}": "available" if available else f"unavailable: {reason}"
        for name, available, reason in sdgp.backend_status()
    }


def _kernels() -> dict[str, str]:
    found = version_of("triton") != "none"
    return {"pack kernels": "Triton" if found else "torch reference (Triton is not installed)"}


def _layouts() -> dict[str, str]:
    from sdgp_cusparselt.cache import cache_dir
    from sdgp_cusparselt.packing.layout import MetadataLayout
    from sdgp_cusparselt.packing.proofs import learned_layouts

    report = {"cache": str(cache_dir())}
    for proof in learned_layouts():
        title, proven = _title(proof), _proven(proof)
        names = {MetadataLayout.from_json(entry["layout"]).name for entry in proven.values()}
        shapes = sorted({plan.split()[0] for plan in proven})
        if proven:
            where = f"{' and '.join(sorted(names))}, proven for {len(proven)} plans"
            report[f"{LAYOUT}{title}"] = f"{where} of {', '.join(shapes)}"
        for plan, entry in proof["plans"].items():
            if "refused" in entry:
                report[f"{LAYOUT}{title}, {plan}"] = f"not proven: {entry['refused']}"
    return report


PROBES: tuple[Callable[[], dict[str, str]], ...] = (
    _platform,
    _versions,
    _devices,
    _library,
    _owners,
    _backends,
    _kernels,
    _layouts,
)
