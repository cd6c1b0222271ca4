"""Which linear layers an activation follows at once: its backward could pack their grad_output.

Such a layer's grad_output is made elementwise: up of an MLP behind gelu, gate behind silu, up of a
gated MLP behind the product with the activated gate. A convolution has a batch norm in between, and
the gradient of a layer that writes the residual stream comes out of an addition.
"""

from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten
_OPS = {aten.gelu: "gelu", aten.silu: "silu", aten.silu_: "silu", aten.relu: "relu",
        aten.relu_: "relu"}  # fmt: skip
#: Classes of transformers that write an activation out in small ops.
_MODULES = {
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
}


class Activations:
    """Follows the outputs of linear layers into the activations of a forward pass.

    Attributes:
        found: number of a layer's call -> the activation behind it.
    """

    def __init__(self) -> None:
        self.found: dict[int, str] = {}
        self._made: dict[int, int] = {}
        self._activated: dict[int, str] = {}
        self._kept: list[Any] = []  # so that no storage's id is given out twice

    def made(self, output: Tensor, call: int) -> None:
        """Tell that a linear layer made this output."""
        self._made[self._key(output)] = call

    def entered(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Tell that a module's forward begins."""
        name = _MODULES.get(type(module).__name__)
        if name is not None and inputs and isinstance(inputs[0], Tensor):
            self._follow(inputs[0], name)

    def saw(self, packet: Any, args: tuple[Any, ...], out: Any) -> None:
        """Tell of an op that multiplied no matrices."""
        if packet in _OPS and isinstance(args[0], Tensor):
            self._follow(args[0], _OPS[packet])
            self._activated[self._key(out)] = _OPS[packet]
        elif packet is aten.mul and all(isinstance(x, Tensor) for x in args[:2]):
            for gate, up in ((args[0], args[1]), (args[1], args[0])):
                name = self._activated.get(self._key(gate))
                if name is not None:
                    self._follow(up, f"{name} gate")

    def _follow(self, x: Tensor, name: str) -> None:
        call = self._made.get(self._key(x))
        if call is not None:
            self.found.setdefault(call, name)

    def _key(self, x: Tensor) -> int:
        storage = x.untyped_storage()
        self._kept.append(storage)
        return id(storage)
