"""A parameter's value for one tensor: a number, a gradient over the layers, or one of these by a tensor's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paretofuse.engine.methods.method import Parameter
from paretofuse.recipes.reading import Node

Settings = Mapping[str, Node]
"""A `parameters:` block: values by parameter."""


def check_setting(node: Node, parameter: Parameter) -> None:
    """Check every value that a setting could have.

    Raises:
        ValueError: a value of another kind; names the line.
    """
    if isinstance(node.value, list):
        for item in node.value:
            check_setting(item, parameter)
    elif isinstance(node.value, dict):
        check_setting(_conditional(node)["value"], parameter)
    else:
        _checked(node, parameter)


def evaluate(node: Node, parameter: Parameter, tensor: str, t: float) -> float | bool | None:
    """A setting's value for a tensor.

    Args:
        node: a scalar; a list of scalars, which are the values at equal distances from the first layer to the last
            and are interpolated (switches are not: the one before counts); {value, filter}, or a list of these, of
            which the first counts whose filter is part of the tensor's name (or "*", or absent).
        parameter: what it is a value of.
        tensor: the tensor's name.
        t: how far its layer is from the first to the last; 0 for tensors of no layer.

    Returns:
        None where no filter fits.
    """
    if isinstance(node.value, dict):
        return _first_that_fits([node], parameter, tensor, t)
    if not isinstance(node.value, list):
        return _checked(node, parameter)
    if any(isinstance(item.value, dict) for item in node.value):
        return _first_that_fits(node.value, parameter, tensor, t)
    values = [_checked(item, parameter) for item in node.value]
    if not values:
        return None
    place = t * (len(values) - 1)
    before = int(place)
    if parameter.kind is bool:
        return values[before]
    after = min(len(values) - 1, before + 1)
    return (1 - (place - before)) * values[before] + (place - before) * values[after]


def resolve(
    parameter: Parameter, blocks: Iterable[Settings], tensor: str, t: float, where: str
) -> float | bool | None:
    """A parameter's value: of the first block that has one, else its default.

    Raises:
        ValueError: it is required and no block has one.
    """
    for block in blocks:
        if parameter.name in block:
            value = evaluate(block[parameter.name], parameter, tensor, t)
            if value is not None:
                return value
    if parameter.required:
        raise ValueError(
            f"{where}: got no {parameter.name} for tensor {tensor!r}, which the method requires; give it under "
            "parameters:"
        )
    return parameter.default


def _first_that_fits(choices: list[Node], parameter: Parameter, tensor: str, t: float) -> float | bool | None:
    for choice in choices:
        own = _conditional(choice)
        wanted = own["filter"].value if "filter" in own else None
        if wanted is None or wanted == "*" or str(wanted) in tensor:
            return evaluate(own["value"], parameter, tensor, t)
    return None


def _conditional(node: Node) -> dict[str, Node]:
    found = node.mapping("a parameter's value", ("value", "filter"))
    if "value" not in found:
        raise node.error("got a filter without a value, expected both, such as {filter: mlp, value: 0.5}")
    return found


def _checked(node: Node, parameter: Parameter) -> float | bool:
    if isinstance(node.value, list | dict) or node.value is None:
        raise node.error(f"got {node.shown()} for {parameter.name}, expected one value")
    try:
        return parameter.value(node.value)
    except ValueError as error:
        raise node.error(str(error)) from None
