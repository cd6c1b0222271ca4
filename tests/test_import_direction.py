"""Imports follow the architecture: a module imports only modules above it in these lists."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Top is imported by everything, bottom imports everything; modules on one line are peers.
ORDER = {
    "pycusparselt": [
        "errors abi",
        "loader",
        "cusparselt",
        "lifetime",
        "descriptors",
        "objects",
        "__init__",
    ],
    "sdgp_cusparselt": [
        "versions errors",
        "equivalence cache arrays devices extras",
        "cards.efficiency cards.__init__",
        "cards.gpus",
        "cards.times",
        "config.patterns",
        "config.schedule",
        "config.combinations",
        "config.choices",
        "config.__init__",
        "recording.spans recording.__init__",
        "recording.records",
        "pruning.bits pruning.eager pruning.scratch pruning.sums",
        "pruning.plain pruning.fours pruning.producers",
        "pruning.cpu",
        "pruning.methods",
        "pruning.compiled",
        "pruning.__init__",
        "packing.layout packing.heavy",
        "packing.nibbles packing.drawing",
        "packing.packed",
        "packing.trials",
        "packing.reading",
        "packing.sampling packing.seeds",
        "packing.reference",
        "packing.halves packing.tables",
        "packing.selection packing.metadata packing.variants",
        "packing.quads",
        "packing.sums packing.directions packing.derivatives",
        "packing.produced packing.heavy_kernels",
        "packing.kernels",
        "packing.starting",
        "packing.launch",
        "packing.ratios packing.producing",
        "packing.pack packing.heavy_pack",
        "packing.prune",
        "packing.agreement packing.learn packing.proofs",
        "packing.certify",
        "packing.__init__",
        "backends.gemm",
        "backends.base",
        "backends.emulation",
        "backends.blocks backends.masking",
        "backends.dense",
        "backends.plans backends.machine",
        "backends.candidates backends.certificates backends.convolution backends.float16",
        "backends.reasons",
        "backends.cusparselt",
        "backends.selftest",
        "backends.__init__",
        "tuning.buckets tuning.memory",
        "tuning.decision",
        "tuning.filter tuning.session tuning.recorder tuning.shapes tuning.timing tuning.proof",
        "tuning.store tuning.contest",
        "tuning.search",
        "tuning.policy tuning.child",
        "tuning.watchdog",
        "tuning.__init__",
        "products.packed_weights",
        "products.linear_operands products.conv_operands products.weight_operands",
        "products.announce products.operands products.packers products.__init__",
        "products.heavy",
        "products.routes products.sparse products.weight_product products.makers",
        "products.produced_line products.maker_check",
        "products.checks products.prepared products.selfcheck products.by_hand",
        "products.dispatch",
        "products.backward products.weights products.stored_weights",
        "products.operators",
        "products.weight_operators products.stored_operators",
        "products.produced_layers",
        "products.produced_run",
        "products.produced",
        "products.cross_entropy",
        "products.head_operators",
        "layers.casting layers.shards layers.activations layers.weight_masks layers.refusals",
        "layers.plain",
        "layers.autograd",
        "layers.masked",
        "layers.cross_entropy",
        "layers.functional layers.fused layers.chains layers.presets layers.schedule_state",
        "layers.modules layers.mlp layers.report layers.unsuitable",
        "layers.fused_modules",
        "layers.convert",
        "layers.stepping layers.fuse",
        "layers.__init__",
        "weights.packed_linear",
        "weights.export",
        "weights.files",
        "functional nn",
        "weights.patterns weights.stages",
        "weights.transposable_kernel",
        "weights.transposable",
        "weights.masks weights.recipes.base weights.gradients",
        "weights.recipes",
        "weights.state weights.wanda",
        "weights.sparsify",
        "weights.__init__",
        "telemetry",
        "integrations.driver",
        "integrations",
        "diagnostics",
        "training",
        "planner",
        "__init__",
        "commands",
        "__main__",
    ],
}
FOLDERS = {"pycusparselt": "bindings/pycusparselt", "sdgp_cusparselt": "sdgp_cusparselt"}


def module_name(path: Path, package: str) -> str:
    return ".".join(path.relative_to(ROOT / FOLDERS[package]).with_suffix("").parts)


def rank(package: str, name: str) -> int:
    """Longest prefix of name that ORDER knows; a folder stands for all its modules."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for index, line in enumerate(ORDER[package]):
            if prefix in line.split():
                return index
    raise AssertionError(f"{package}.{name} has no place in ORDER: give it one")


def imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{path}:{node.lineno}: relative import; write it in full")
            for alias in node.names:
                found.append((node.lineno, f"{node.module}.{alias.name}"))
    return found


def violations(path: Path, package: str) -> list[str]:
    own = module_name(path, package)
    bad = []
    for line, target in imports(path):
        top, _, rest = target.partition(".")
        if package == "pycusparselt" and top in ("torch", "sdgp_cusparselt", "numpy"):
            bad.append(f"{path}:{line}: the binding never imports {top}")
        if top != package or not rest:
            continue
        if rank(package, resolve(package, rest)) > rank(package, own):
            bad.append(f"{path}:{line}: {own} imports {target}, which stands below it")
    return bad


def resolve(package: str, name: str) -> str:
    """Drop trailing attribute names until the rest is a module or a package."""
    parts = name.split(".")
    while parts:
        base = ROOT / FOLDERS[package] / Path(*parts)
        if base.with_suffix(".py").exists():
            return ".".join(parts)
        if base.is_dir():
            initial = ".".join([*parts, "__init__"])
            known = any(initial in line.split() for line in ORDER[package])
            return initial if known else ".".join(parts)
        parts.pop()
    return "__init__"


MODULES = [
    (package, path)
    for package, folder in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("package, path", MODULES, ids=[f"{p}:{f.stem}" for p, f in MODULES])
def test_imports_point_upwards(package: str, path: Path) -> None:
    assert not violations(path, package)


def test_the_check_sees_a_wrong_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sdgp_cusparselt"
    folder.mkdir()
    for room in ("pruning", "layers"):
        (folder / room).mkdir()
    (folder / "pruning/methods.py").write_text(
        "from sdgp_cusparselt.layers.modules import SDGPLinear\n"
    )
    (folder / "layers/modules.py").write_text("")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert violations(folder / "pruning" / "methods.py", "sdgp_cusparselt")
