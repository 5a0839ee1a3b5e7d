"""Int8 planes: one byte for each element, and a scale for each group."""

from __future__ import annotations

import torch
from torch import Tensor

from paretofuse.engine.planes.groups import Quantized


class Int8(Quantized):
    """A plane whose `packed` is int8 [numel]."""

    format = "int8"
    limit = 127
    per_byte = 1

    @classmethod
    def encode(cls, delta: Tensor, group: int = 1024) -> Quantized:
        """See `Quantized.encode`."""
        return super().encode(delta, group)

    @staticmethod
    def pack(quantized: Tensor) -> Tensor:
        """See `Quantized.pack`."""
        return quantized.to(torch.int8)

    @staticmethod
    def unpack(packed: Tensor) -> Tensor:
        """See `Quantized.unpack`."""
        return packed.float()
