"""Which operand of which product is 2:4: the one table of what makes sense together.

product                                 may be 2:4 in                              field
output      = input @ weight.T          weight, along in_features                  forward
grad_input  = grad_output @ weight      grad_output or weight, along out_features  prune, grad_input
grad_weight = grad_output.T @ input     grad_output, along tokens                  grad_weight
"""

from dataclasses import dataclass
from typing import Literal, Protocol

#: The operand of a product that is 2:4; "dense" for none.
Operand = Literal["dense", "weight", "grad_output"]


class Choices(Protocol):
    """The fields of ``SDGPConfig`` that the table asks for."""

    @property
    def prune(self) -> str:
        """Method of the gradient for grad_input."""
        ...

    @property
    def forward(self) -> str:
        """dense or sparse_weight."""
        ...

    @property
    def grad_input(self) -> str:
        """grad_output or weight."""
        ...

    @property
    def grad_weight(self) -> str:
        """dense or sparse."""
        ...


@dataclass(frozen=True)
class Combination:
    """One row of the table.

    Attributes:
        name: what reports and the planner call it.
        output: operand of the forward product that is 2:4.
        grad_input: of the data gradient's.
        grad_weight: of the weight gradient's.
        source: who proposed it.
    """

    name: str
    output: Operand
    grad_input: Operand
    grad_weight: Operand
    source: str

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        """Of output, grad_input and grad_weight."""
        return self.output, self.grad_input, self.grad_weight


COMBINATIONS: tuple[Combination, ...] = (
    Combination("dense", "dense", "dense", "dense", "torch"),
    Combination("mvue", "dense", "dense", "grad_output", "Chmiel et al. 2203.10991"),
    Combination("sdgp", "dense", "grad_output", "dense", "McDanel et al. 2202.00774"),
    Combination("sdgp+mvue", "dense", "grad_output", "grad_output", "both of these"),
    Combination(
        "weights",
        "weight",
        "dense",
        "dense",
        "Mishra 2104.08378, SR-STE 2102.04010, Kao 2209.07617",
    ),
    Combination("weights+mvue", "weight", "dense", "grad_output", "with Chmiel et al."),
    Combination("weights+sdgp", "weight", "grad_output", "dense", "with McDanel et al."),
    Combination("weights+sdgp+mvue", "weight", "grad_output", "grad_output", "all three products"),
    Combination("double", "weight", "weight", "dense", "SLoPe 2405.16325"),
    Combination("double+mvue", "weight", "weight", "grad_output", "FST 2404.01847"),
)
_BY_OPERANDS = {row.operands: row for row in COMBINATIONS}


def operands_of(config: Choices) -> tuple[Operand, Operand, Operand]:
    """Return which operand of output, grad_input and grad_weight a configuration makes sparse."""
    grad_input: Operand = "grad_output" if config.prune != "none" else "dense"
    return (
        "weight" if config.forward == "sparse_weight" else "dense",
        "weight" if config.grad_input == "weight" else grad_input,
        "grad_output" if config.grad_weight == "sparse" else "dense",
    )


def combination_of(config: Choices) -> Combination:
    """Return the row of the table that a configuration is.

    Args:
        config: a validated one, which has a row.
    """
    return _BY_OPERANDS[operands_of(config)]


def why_not(config: Choices) -> tuple[str, str, str, str] | None:
    """Return (argument, rule, value, what to do) where a configuration has no row, or None.

    The two operands of one product are never both sparse: no sparse tensor core multiplies them.
    """
    if config.grad_input == "weight" and config.prune != "none":
        fix = "Use grad_input='grad_output', or prune='none': one operand of a product is 2:4."
        return "prune", '"none" where grad_input has a 2:4 weight', repr(config.prune), fix
    if operands_of(config) in _BY_OPERANDS:
        return None
    rule = '"sparse_weight" where grad_input has a 2:4 weight'
    fix = "Use forward='sparse_weight': both directions are of one pruned weight."
    return "forward", rule, repr(config.forward), fix
