"""Image training in the way of timm: ResNet or RegNet, channels_last, warm-up and cosine, workers.

python examples/image_training.py --steps 200 --arch resnet
Classifies the digits of scikit-learn, 8 x 8 pixels, drawn larger and shifted by the workers.
"""

import torch
from sklearn.datasets import load_digits
from tiny_gpt import arguments
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import sdgp_cusparselt as sdgp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_labels": 10}


class Digits(Dataset):
    """Digits as [3, 16, 16] images; each look at one shifts it by up to two pixels."""

    def __init__(self) -> None:
        self.images, self.labels = load_digits(return_X_y=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.tensor(self.images[index] / 16.0).float().view(1, 1, 8, 8)
        image = nn.functional.interpolate(image, size=(16, 16)).expand(3, -1, -1, -1)
        shifts = torch.randint(-2, 3, (2,)).tolist()  # each worker's generator is seeded by torch
        return image[:, 0].roll(shifts, dims=(-2, -1)), int(self.labels[index])


def build_model(arch: str) -> nn.Module:
    torch.manual_seed(0)
    if arch == "resnet":
        return ResNetForImageClassification(ResNetConfig(**SIZES, layer_type="basic"))
    return RegNetForImageClassification(RegNetConfig(**SIZES, groups_width=16))


def train(steps: int, arch: str = "resnet", workers: int = 2) -> tuple[nn.Module, list[float]]:
    """Return the trained model and the loss of every step."""
    model = build_model(arch).to(DEVICE, memory_format=torch.channels_last)
    # The paper's rule for convolutions; the stem and the classifier stay dense by themselves.
    print(sdgp.convert_(model, sdgp.SDGPConfig(prune="rescaled_magnitude")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps + 1)
    loader = DataLoader(Digits(), batch_size=64, shuffle=True, num_workers=workers, drop_last=True)
    losses: list[float] = []
    model.train()
    while len(losses) < steps:
        for images, labels in loader:
            images = images.to(DEVICE, memory_format=torch.channels_last)
            logits = model(images).logits
            loss = nn.functional.cross_entropy(logits, labels.to(DEVICE), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return model, losses


if __name__ == "__main__":
    options = arguments(__doc__, arch=["resnet", "regnet"], workers=["2", "0", "4"])
    _, losses = train(options.steps, options.arch, int(options.workers))
    print(f"final loss {losses[-1]:.4f}")
