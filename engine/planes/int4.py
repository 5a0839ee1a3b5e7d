"""Int4 planes: half a byte for each element, and a scale for each group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from paretofuse.engine.planes.groups import Quantized


class Int4(Quantized):
    """A plane whose `packed` is uint8 [ceil(numel / 2)].

    Two elements lie in a byte, the first in the low half, each 8 more than its value. compressed-tensors packs them so.
    """

    format = "int4"
    limit = 7
    per_byte = 2

    @classmethod
    def encode(cls, delta: Tensor, group: int = 32) -> Quantized:
        """See `Quantized.encode`."""
        return super().encode(delta, group)

    @staticmethod
    def pack(quantized: Tensor) -> Tensor:
        """See `Quantized.pack`."""
        halves = (F.pad(quantized, (0, quantized.numel() % 2)) + 8).to(torch.uint8)
        return halves[0::2] | (halves[1::2] << 4)

    @staticmethod
    def unpack(packed: Tensor) -> Tensor:
        """See `Quantized.unpack`."""
        return torch.stack([packed & 15, packed >> 4], dim=1).view(-1).float() - 8
