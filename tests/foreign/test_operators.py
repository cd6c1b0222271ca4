"""torch.library.opcheck for every operator that this package registers."""

import pytest
import torch

from tests.foreign.tally import Tally
from tests.products.test_operators import samples

pytestmark = pytest.mark.foreign


def registered() -> set[str]:
    """Return the names of the operators in torch.ops.sdgp."""
    schemas = torch._C._jit_get_all_schemas()
    return {s.name.removeprefix("sdgp::") for s in schemas if s.name.startswith("sdgp::")}


def test_every_operator_has_samples() -> None:
    assert registered() == {name.split()[0] for name in samples()}


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str, tally: Tally) -> None:
    operator = getattr(torch.ops.sdgp, name.split()[0])
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for utility in (*utilities, "test_aot_dispatch_dynamic"):
        tally.check(
            f"opcheck {name} {utility}",
            lambda u=utility: torch.library.opcheck(operator, samples()[name], test_utils=u),
        )
