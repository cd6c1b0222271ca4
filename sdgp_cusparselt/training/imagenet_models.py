"""ResNets and RegNets of transformers with fresh weights, from images to logits."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sdgp_cusparselt.extras import require


class ImageClassifier(nn.Module):
    """A classifier of transformers that returns its logits only.

    Args:
        model: takes ``pixel_values`` and returns an object with ``logits``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, num_classes]."""
        logits: Tensor = self.model(pixel_values=input).logits
        return logits


def build_resnet(
    num_classes: int, layer: str, stem_width: int, widths: Sequence[int], depths: Sequence[int]
) -> ImageClassifier:
    """Return a ResNet as torchvision builds it, strides in the 3x3 convolutions.

    Args:
        num_classes: outputs.
        layer: ``basic`` (ResNet-18 and -34) or ``bottleneck``.
        stem_width: output channels of the 7x7 stem.
        widths: output channels of the stages.
        depths: blocks of the stages.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    return _build(
        "ResNet",
        num_labels=num_classes,
        layer_type=layer,
        embedding_size=stem_width,
        hidden_sizes=list(widths),
        depths=list(depths),
    )


def build_regnet_x(
    num_classes: int,
    stem_width: int,
    widths: Sequence[int],
    depths: Sequence[int],
    group_width: int,
) -> ImageClassifier:
    """Return a RegNetX: 1x1, grouped 3x3 and 1x1 convolutions beside a shortcut.

    Args:
        num_classes: outputs.
        stem_width: output channels of the 3x3 stem.
        widths: output channels of the stages, multiples of ``group_width``.
        depths: blocks of the stages.
        group_width: channels in each group of the 3x3 convolutions.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    return _build(
        "RegNet",
        num_labels=num_classes,
        layer_type="x",
        embedding_size=stem_width,
        hidden_sizes=list(widths),
        depths=list(depths),
        groups_width=group_width,
    )


def _build(family: str, **options: Any) -> ImageClassifier:
    # Its modules, not the package's lazy attributes: those may look at unrelated models.
    purpose = f"a {family}"
    package = f"transformers.models.{family.lower()}"
    configuration = require(
        f"{package}.configuration_{family.lower()}", package="transformers", purpose=purpose
    )
    modeling = require(
        f"{package}.modeling_{family.lower()}", package="transformers", purpose=purpose
    )
    config = getattr(configuration, f"{family}Config")(**options)
    return ImageClassifier(getattr(modeling, f"{family}ForImageClassification")(config))
