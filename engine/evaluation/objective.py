"""An objective: what one expert is good at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from paretofuse.engine.evaluation.arguments import check_function


@dataclass(frozen=True)
class Objective:
    """What one expert is good at.

    Attributes:
        name: the expert's name in the engine.
        data: an iterable of batches (a DataLoader, a list, ...); begun again whenever it ends.
        loss: (module, batch) -> a scalar tensor to minimize.

    Raises:
        TypeError: the name is no string, the data cannot be iterated, or the loss is no function.
    """

    name: str
    data: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(
                f"got an objective named {self.name!r}, expected the name of an expert (a string)"
            )
        if not hasattr(self.data, "__iter__") and not hasattr(self.data, "__getitem__"):
            raise TypeError(
                f"got data of type {type(self.data).__name__} for objective {self.name!r}, expected an iterable of "
                "batches such as a DataLoader or a list"
            )
        check_function(
            f"loss of objective {self.name!r}", self.loss, "loss(module, batch) that gives a scalar tensor"
        )


Objectives = Sequence[Objective] | Mapping[str, tuple[Iterable[Any], Callable[..., Any]]]
"""Objectives, or {name: (data, loss)}."""


def as_objectives(given: Objectives) -> list[Objective]:
    """The objectives, from either form.

    Raises:
        TypeError: something else, or one of them is.
    """
    form = "expected pf.Objective(name, data, loss) for each, or a dict {name: (data, loss)}"
    if isinstance(given, Mapping):
        pairs = [(name, pair) for name, pair in given.items()]
        for name, pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"got {type(pair).__name__} for objective {name!r}, {form}")
        return [Objective(name, data, loss) for name, (data, loss) in pairs]
    if isinstance(given, str | bytes | Objective) or not isinstance(given, Sequence):
        raise TypeError(f"got objectives of type {type(given).__name__}, {form}")
    for one in given:
        if not isinstance(one, Objective):
            raise TypeError(f"got an objective of type {type(one).__name__}, {form}")
    return list(given)


def in_order(objectives: Sequence[Objective], names: tuple[str, ...]) -> list[Objective]:
    """The objectives in an engine's order.

    Raises:
        ValueError: they are not one for each name.
    """
    given = {objective.name: objective for objective in objectives}
    if set(given) != set(names) or len(given) != len(objectives):
        raise ValueError(
            f"got objectives {[o.name for o in objectives]}, expected one for each of {list(names)}"
        )
    return [given[name] for name in names]
