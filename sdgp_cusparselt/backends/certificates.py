"""Which packer a plan may be fed by: certificates by plan, made once on the device."""

from collections.abc import Callable, Hashable
from dataclasses import asdict

import torch
from torch import Tensor

from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.backends.plans import PlanCache, PlannedGemm, planned_as
from sdgp_cusparselt.devices import is_capturing, on_device
from sdgp_cusparselt.equivalence import compare, exact_bound
from sdgp_cusparselt.packing.certify import Check, certify, plan_compress
from sdgp_cusparselt.packing.proofs import Certificate, Proofs
from sdgp_cusparselt.packing.trials import few_integers, share_of_nonzeros, some_rows, wide_product

NOT_YET = "not proven before the graph was captured"


class Certificates:
    """The certificates of every plan that this process has used.

    Args:
        machine: what they are worth nothing without.
        plans: where plans come from; called on the first use of a plan only.
    """

    def __init__(self, machine: Machine, plans: Callable[[], PlanCache]) -> None:
        self.machine, self._plans = machine, plans
        self._found: dict[Hashable, Certificate] = {}
        self._proofs: dict[Hashable, Proofs] = {}

    def __call__(self, gemm: Gemm, candidate: Candidate) -> Certificate:
        """Return whether our packing is proven for a plan, and in what order; then a look-up.

        The first call for a plan compares packers and products on the device. Under graph
        capture, where that cannot be done, the answer is no, and is not kept.

        Raises:
            CusparseLtError: the library refused the plan or its product.
        """
        key = (planned_as(gemm), candidate)
        found = self._found.get(key)
        if found is None:
            if is_capturing(gemm.device):
                return Certificate(None, NOT_YET)
            planned = self._plans().get(gemm, candidate)
            with torch.no_grad(), on_device(gemm.device):
                found = self._found[key] = self._certify(planned, gemm, candidate)
        return found

    def known(self) -> dict[Hashable, Certificate]:
        """Return what was found so far, by (product, candidate)."""
        return dict(self._found)

    def _certify(self, planned: PlannedGemm, gemm: Gemm, candidate: Candidate) -> Certificate:
        return certify(
            plan_compress(planned.plan),
            planned.rows,
            gemm.k,
            gemm.dtype,
            gemm.device,
            self._proofs_of(gemm),
            plan_name(gemm, candidate),
            check=product_check(planned, gemm),
        )

    def _proofs_of(self, gemm: Gemm) -> Proofs:
        key = (gemm.device, gemm.dtype)
        if key not in self._proofs:
            self._proofs[key] = Proofs(self.machine.key(gemm.device), gemm.dtype)
        return self._proofs[key]


def plan_name(gemm: Gemm, candidate: Candidate) -> str:
    """Return what tells plans of one packed operand apart, as text.

    A library chooses its kernel, and with it the metadata order, by all of it.
    """
    parts = {"n": gemm.n, "dense": gemm.dense_order, **asdict(candidate)}
    return " ".join(f"{name}={value}" for name, value in parts.items())


def product_check(planned: PlannedGemm, gemm: Gemm) -> Check:
    """Return a check of a packed operand of small integers: its product must be the exact one."""

    def check(packed: Tensor, left: Tensor) -> str | None:
        generator = torch.Generator(gemm.device).manual_seed(gemm.n)
        stored = (gemm.k, gemm.n) if gemm.dense_order == "row" else (gemm.n, gemm.k)
        share = share_of_nonzeros(gemm.k, gemm.dtype)
        dense = few_integers(*stored, gemm.dtype, gemm.device, generator, share=share)
        dense = dense if gemm.dense_order == "row" else dense.t()
        result = planned.product(packed, dense)
        rows = some_rows(planned.rows, max(gemm.n, gemm.k), gemm.device, generator)
        if rows is not None:
            left, result = left[rows], result[rows]
        expected = wide_product(left, dense, gemm.dtype)
        if torch.equal(result, expected):
            return None
        # Twice: the expected integers were rounded to the result's dtype as well.
        found = compare(result, expected.float(), 2 * exact_bound(expected.float(), result.dtype))
        return None if found is None else found.describe()

    return check
