"""Routes: which tensors share a router. A route maps a tensor's name to its group's name, or None (not routed).

The names are all that a route sees, so that a module, a state dict and a file of the same model route alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from paretofuse.engine.layout import is_text

Route = Callable[[str], "str | None"]

# The blocks that the field calls the MLP of a transformer layer: CLIP, GPT-2, LLaMA (mlp), T5 (DenseReluDense),
# BART and torch (fc1/fc2, linear1/linear2), BERT (intermediate and output, but not attention.output).
_MLP_BLOCK = re.compile(r"^(?P<group>.*?(?:^|\.)(?:mlp|ffn|ff|feed_forward|feedforward|DenseReluDense))\.")
_MLP_PAIR = re.compile(r"^(?P<group>.*?)\.?(?:fc1|fc2|linear1|linear2)\.(?:weight|bias)$")
_BERT_PAIR = re.compile(
    r"^(?P<group>.*?(?:^|\.)layers?\.\d+)\.(?:intermediate|output)\.(?:dense)\.(?:weight|bias)$"
)


def by_tensor(name: str) -> str:
    """A group for each tensor."""
    return name


def by_module(name: str) -> str:
    """A group for each module that owns tensors; bare parameters of the top module form the group "(top)"."""
    return name.rpartition(".")[0] or "(top)"


def by_mlp(name: str) -> str | None:
    """A group for the MLP of each transformer layer; nothing else is routed (PWEMoE's partial mode)."""
    if match := _MLP_BLOCK.match(name):
        return match["group"]
    if match := _BERT_PAIR.match(name) or _MLP_PAIR.match(name):
        return f"{match['group']}.mlp".lstrip(".")
    return None


_ROUTES: dict[str, Route] = {"mlp": by_mlp, "module": by_module, "tensor": by_tensor}


def assign_groups(names: Iterable[str], route: str | Route) -> dict[str, str | None]:
    """The group of each name.

    Args:
        names: tensor names.
        route: "mlp", "module", "tensor", or a callable from a name to a group name or None.

    Raises:
        ValueError: the route is unknown, or routes no tensor at all.
        TypeError: the callable returned something else than a string or None.
    """
    names = list(names)
    if callable(route):
        chosen = route
    elif isinstance(route, str) and route in _ROUTES:
        chosen = _ROUTES[route]
    else:
        raise ValueError(
            f"got route {route!r}, expected one of {sorted(_ROUTES)} or a callable name -> group"
        )
    groups: dict[str, str | None] = {}
    for name in names:
        group = chosen(name)
        if group is not None and not (group and is_text(group)):
            raise TypeError(
                f"route gave {group!r} for tensor {name!r}, expected a non-empty group name or None (not routed)"
            )
        groups[name] = group
    if not names:
        raise ValueError(
            "got no tensor to merge, expected some floats that are neither heads nor scalar buffers"
        )
    if all(group is None for group in groups.values()):
        shown = ", ".join(names[:4])
        raise ValueError(
            f"route {route!r} matches none of the {len(names)} tensors ({shown}, ...); "
            'use route="module", "tensor" or a callable'
        )
    return groups
