"""Scores that know the inputs: |weight| times the norm of what it is multiplied by."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.layers.convert import unwrapped
from sdgp_cusparselt.layers.modules import SDGPModule, sdgp_class_of
from sdgp_cusparselt.layers.weight_masks import groups_along


class InputNorms:
    """Sum up the squares of every layer's input while the model runs, then score its weights.

    score[o, i] = |weight[o, i]| * sqrt(sum over tokens of input[token, i] ** 2)

    Args:
        model: any module; its linear layers and convolutions are watched inside ``with``.

    Raises:
        TypeError: model is no module.

    Source: Sun et al., Wanda (arXiv 2306.11695), equation 1; convolutions by input channel, over
        images and pixels.

    Example:
        >>> import torch
        >>> from sdgp_cusparselt.weights import InputNorms, nm_mask
        >>> layer = torch.nn.Linear(4, 2, bias=False)
        >>> with InputNorms(layer) as norms:
        ...     _ = layer(torch.tensor([[3.0, 0.0, 0.0, 4.0]]))
        >>> nm_mask(norms.scores()[""], 2, 4).tolist()
        [[True, False, False, True], [True, False, False, True]]
    """

    def __init__(self, model: nn.Module) -> None:
        given: object = model
        if not isinstance(given, nn.Module):
            fix = "Pass the model itself."
            raise type_error("InputNorms", "model", "an nn.Module", type(given).__name__, fix)
        self._layers = {
            name: module
            for name, module in unwrapped(model).named_modules()
            if isinstance(module, SDGPModule) or sdgp_class_of(module) is not None
        }
        self._squares: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "InputNorms":
        """Begin to watch."""
        for name, layer in self._layers.items():
            hook = layer.register_forward_pre_hook(self._hook(name, layer))
            self._hooks.append(hook)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching; the sums stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def norm(self, name: str) -> Tensor:
        """Return the norm of each input feature of a layer.

        Args:
            name: fully qualified.

        Returns:
            [in_features] float32.

        Raises:
            ValueError: the layer saw no input.
        """
        if name not in self._squares:
            seen = ", ".join(repr(known) for known in self._squares) or "none"
            fix = "Run the model inside the with block."
            raise value_error(
                "InputNorms", "name", f"of a layer that ran ({seen})", repr(name), fix
            )
        return self._squares[name].sqrt()

    def scores(self) -> dict[str, Tensor]:
        """Return the scores of every layer that ran, for ``nm_mask`` or ``set_masks_``.

        Returns:
            Fully qualified name -> float32 of the weight's shape.
        """
        return {name: self._score(name) for name in self._squares}

    def _score(self, name: str) -> Tensor:
        layer: Any = self._layers[name]
        size: Tensor = layer.weight.detach().abs().float()
        shape = [1] * size.ndim
        shape[groups_along(layer)[0]] = -1
        norm, groups = self.norm(name), getattr(layer, "groups", 1)
        if groups > 1:  # the weight's rows of each group see that group's channels
            norm = norm.view(groups, 1, -1, 1, 1)
            return (size.view(groups, -1, *size.shape[1:]) * norm).flatten(0, 1)
        return size * norm.view(shape)

    def _hook(self, name: str, layer: nn.Module) -> Any:
        channels = 1 if isinstance(layer, nn.Conv2d) else -1

        @torch.no_grad()
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().float()
            at = channels if channels < 0 or x.ndim == 4 else 0
            squares = x.movedim(at, -1).flatten(0, -2).square().sum(0)
            self._squares[name] = self._squares.get(name, 0) + squares

        return add
