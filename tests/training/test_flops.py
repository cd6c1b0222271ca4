"""grad_input FLOPs against numbers worked out by hand from the layers' shapes."""

import torch

from sdgp_cusparselt.layers.convert import convert_
from sdgp_cusparselt.training.flops import count_grad_input_flops
from sdgp_cusparselt.training.methods import parse_method
from sdgp_cusparselt.training.models import ByteGPT, SmallResNet


def test_resnet_by_hand() -> None:
    model = SmallResNet(1, (32, 64), depth=1, num_classes=10)
    report = convert_(model, parse_method("magnitude").config("dense"), preset="all")
    with count_grad_input_flops(model) as flops:
        model(torch.rand(2, 1, 8, 8)).sum().backward()
    # Two images; 64 output pixels in the first stage and 16 in the second.
    converted = {
        "blocks.0.conv1.0": 2 * 2 * 64 * 32 * (32 * 9),
        "blocks.0.conv2.0": 2 * 2 * 64 * 32 * (32 * 9),
        "blocks.1.conv1.0": 2 * 2 * 16 * 64 * (32 * 9),
        "blocks.1.conv2.0": 2 * 2 * 16 * 64 * (64 * 9),
        "blocks.1.shortcut.0": 2 * 2 * 16 * 64 * 32,
    }
    # The stem reads the image, which needs no gradient.
    assert flops.by_layer == converted | {"fc": 2 * 2 * 64 * 10}
    assert sorted(report.converted) == sorted(converted)
    pruned = sum(converted.values())
    assert flops.share(report.converted) == pruned / (pruned + 2560)


def test_gpt_by_hand() -> None:
    width, layers, batch, length = 32, 2, 3, 8
    model = ByteGPT(length, width, layers, num_heads=2)
    report = convert_(model, parse_method("magnitude").config("dense"), preset="all")
    with count_grad_input_flops(model) as flops:
        model(torch.zeros(batch, length, dtype=torch.long)).sum().backward()
    # qkv, proj, up and down hold 3 + 1 + 4 + 4 times width^2 weights; the head stays dense.
    pruned = 2 * batch * length * layers * 12 * width**2
    head = 2 * batch * length * width * 256
    assert sum(flops.by_layer.values()) == pruned + head
    assert flops.share(report.converted) == pruned / (pruned + head)


def test_grouped_and_unused_and_ungraded_layers() -> None:
    conv = torch.nn.Conv2d(8, 12, 3, stride=2, groups=4, bias=False)
    model = torch.nn.ModuleDict({"conv": conv, "unused": torch.nn.Linear(4, 4)})
    with count_grad_input_flops(model) as flops:
        conv(torch.rand(1, 8, 9, 9))
        assert flops.by_layer == {}
        with torch.no_grad():
            conv(torch.rand(1, 8, 9, 9, requires_grad=True))
        assert flops.by_layer == {}
        conv(torch.rand(1, 8, 9, 9, requires_grad=True))
    assert flops.by_layer == {"conv": 2 * 4 * 4 * 12 * (8 // 4 * 9)}
    conv(torch.rand(1, 8, 9, 9, requires_grad=True))
    assert flops.by_layer == {"conv": 2 * 4 * 4 * 12 * (8 // 4 * 9)}


def test_share_of_nothing_is_zero() -> None:
    with count_grad_input_flops(torch.nn.Linear(4, 4)) as flops:
        pass
    assert flops.share(["anything"]) == 0.0
