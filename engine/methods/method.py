"""What a merge method is: its name, its parameters, how many models it takes, and its arithmetic."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from paretofuse.engine.methods.numbers import Floats, Numbers


@dataclass(frozen=True)
class Parameter:
    """One of a method's numbers or switches.

    Attributes:
        name: as recipes write it.
        kind: float or bool.
        default: what it is unless given; None where the method then does without.
        each: one for each model, instead of one for the tensor.
        required: it must be given.
        low, high: the range that its values lie in, both ends included.
    """

    name: str
    kind: type[float] | type[bool]
    default: float | bool | None = None
    each: bool = False
    required: bool = False
    low: float = -math.inf
    high: float = math.inf

    def value(self, given: Any) -> float | bool:
        """A value as it stands in a recipe, checked.

        Raises:
            ValueError: of another kind, not finite, or out of range.
        """
        number: float | bool | None = None
        if self.kind is bool:
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            number = words.get(str(given).lower())
        elif not isinstance(given, bool):
            try:
                number = float(given)  # YAML reads 1e-3 as a string
            except (TypeError, ValueError):
                number = None
        if number is None or not math.isfinite(number):
            wanted = "true or false" if self.kind is bool else "a finite number"
            raise ValueError(f"got {self.name}: {given!r}, expected {wanted}")
        if not self.low <= number <= self.high:
            raise ValueError(f"got {self.name}: {given!r}, expected {self.low:g} to {self.high:g}")
        return number


@dataclass(frozen=True)
class Group:
    """One tensor of every model that goes into a merge, with the parameters that hold for it.

    Attributes:
        name: of the tensor that will be written.
        base: the base model's tensor; None for methods that take it as one of the models.
        models: the other models' tensors, of the same shape, in the recipe's order.
        each: of every one of these models, its parameters by name.
        shared: the tensor's own parameters by name.
        seed: what random methods start from.
        threads: of the native kernels; None for as many as this process may use.
    """

    name: str
    base: Numbers | None
    models: tuple[Numbers, ...]
    each: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    threads: int | None = None

    def values(self, parameter: str) -> list[Any]:
        """A parameter of every model."""
        return [own[parameter] for own in self.each]


class Method(ABC):
    """A merge method. A class of its own names itself, its parameters and its models, and computes `reference`.

    Attributes:
        name: as recipes call it.
        base: "required" (a base model whose tensor is given apart), "optional", or "none" (a base model counts as one
            of the models).
        models: the least and the largest number of models beside that base; None for no limit.
        parameters: what it takes.
    """

    name: str
    base: Literal["required", "optional", "none"] = "none"
    models: tuple[int, int | None] = (1, None)
    parameters: tuple[Parameter, ...] = ()

    @abstractmethod
    def reference(self, group: Group) -> Floats:
        """The merged tensor in plain NumPy: float32 (float64 where the inputs are), of the inputs' shape."""

    def merge(self, group: Group, out: Numbers) -> None:
        """Write the merged tensor, rounded once; by default the reference's."""
        out.store(self.reference(group))


def base_of(group: Group) -> Numbers:
    """The base of a group that a method with `base = "required"` was given."""
    if group.base is None:
        raise ValueError(
            f"got no base tensor for {group.name!r}, expected one: this method works on differences to it"
        )
    return group.base
