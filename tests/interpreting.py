"""Whether Triton's interpreter can run a kernel here: what tests of kernels on a CPU ask for."""

import pytest

from sdgp_cusparselt.packing.launch import interpreted
from sdgp_cusparselt.versions import version_of


def interpreter_fault() -> str:
    """Return why no kernel with a loop can be interpreted, or nothing."""
    if not interpreted():
        return "needs Triton's interpreter: TRITON_INTERPRET=1 and no GPU"
    # A loop's bound is an array of one element there, which NumPy no longer takes for a number.
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return (
            f"Triton {version_of('triton')} cannot interpret a loop beside NumPy "
            f"{version_of('numpy')}: pip install 'numpy<2.4'"
        )
    return ""


def _release(distribution: str) -> tuple[int, int]:
    major, minor = version_of(distribution).split(".")[:2]
    return int(major), int(minor)


needs_loops = pytest.mark.skipif(bool(interpreter_fault()), reason=interpreter_fault())
