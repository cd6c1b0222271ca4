"""Fifteen architectures of timm with random weights."""

import pytest
import torch
from torch import Tensor, nn

from tests.foreign.models import check_model
from tests.foreign.tally import Tally

timm = pytest.importorskip(
    "timm", reason="timm needs a torchvision of torch's own build", exc_type=Exception
)

pytestmark = pytest.mark.foreign

#: name -> what makes it small; the others are small as they are.
ARCHITECTURES: dict[str, dict[str, object]] = {
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "deit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "mixer_s32_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "resnet10t": {},
    "resnext26ts": {},
    "regnetx_002": {},
    "repvgg_a0": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "efficientnet_lite0": {},
    "ghostnet_050": {},
    "poolformer_s12": {},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str, tally: Tally) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=4, **ARCHITECTURES[name]).double()
    for parameter in model.parameters():
        if not parameter.any():  # a head that starts at zero lets no gradient through
            nn.init.normal_(parameter, std=0.1)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])

    def loss(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        return nn.functional.cross_entropy(model(images.to(dtype)), labels)

    check_model(tally, f"timm {name}", model, loss)
