"""torch.library.opcheck for every operator that this package registers."""

import pytest
import torch

from tests.foreign.tally import Tally
from tests.products.operator_samples import samples

pytestmark = pytest.mark.foreign


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str, tally: Tally) -> None:
    operator = getattr(torch.ops.sdgp, name.split()[0])
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for utility in (*utilities, "test_aot_dispatch_dynamic"):
        tally.check(
            f"opcheck {name} {utility}",
            lambda u=utility: torch.library.opcheck(operator, samples()[name], test_utils=u),
        )
