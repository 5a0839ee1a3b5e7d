"""An objective: what one expert is good at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Objective:
    """What one expert is good at.

    Attributes:
        name: the expert's name in the engine.
        data: an iterable of batches (a DataLoader, a list, ...); begun again whenever it ends.
        loss: (module, batch) -> a scalar tensor to minimize.
    """

    name: str
    data: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
