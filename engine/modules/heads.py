"""Heads: a live module as one objective sees it, with that objective's own tensors in the place of the base's.

Such a view is a module of the expert's own class, with its number of labels and its configuration. Every part of it
that holds none of the head's tensors is the live module's own part: a switch, a hook or a mode of the live module
counts in every view, gradients flow the same way, and a view takes no more memory than the head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from paretofuse.engine.errors import some
from paretofuse.engine.stacking.skeleton import materialize, stored_tensors
from paretofuse.engine.stacking.sources import Blueprint
from paretofuse.engine.stacking.stack import lasting


class Heads:
    """The views of one live module.

    Args:
        tensors: for each objective that has a head, its own tensors by name.
        skeletons: for each of them, gives the structure of its module.
    """

    def __init__(
        self, tensors: Mapping[str, Mapping[str, Tensor]], skeletons: Mapping[str, Callable[[], nn.Module]]
    ) -> None:
        self._tensors = tensors
        self._skeletons = skeletons
        self._built: dict[str, tuple[nn.Module, set[str]]] = {}
        self._building = Lock()

    def of(self, module: nn.Module, objective: str) -> nn.Module:
        """The live module with an objective's head; the module itself where the objective has none.

        Raises:
            ValueError: head and live module do not make a whole model.
        """
        if objective not in self._tensors:
            return module
        with self._building:
            if objective not in self._built:
                self._built[objective] = self._build(objective)
        view, own = self._built[objective]
        _share(view, module, own, "")  # each time, as layers of the live module may have been wrapped
        lacking = [name for name, tensor in stored_tensors(view).items() if tensor.is_meta]
        if lacking:
            raise ValueError(
                f"got a head of {objective!r} for {type(view).__name__}, whose tensors {some(lacking)} neither the "
                f"head nor the base ({type(module).__name__}) has; name them in heads= too"
            )
        return view

    @lasting()
    def _build(self, objective: str) -> tuple[nn.Module, set[str]]:
        """A module of the objective's own class that has nothing but its head, and all names of the head's tensors."""
        skeleton, head = self._skeletons[objective](), self._tensors[objective]
        structure = stored_tensors(skeleton)
        replaced = {id(structure[name]) for name in head if name in structure}
        own = {
            name for name, tensor in structure.items() if id(tensor) in replaced
        }  # with the names tied to them
        others = {name: t for name, t in structure.items() if name not in own and t.is_meta}
        copies = {name: tensor.clone() for name, tensor in head.items()}
        view = materialize(skeleton, {**others, **copies}, f"the head of {objective!r}", any_shape=own)
        return view.requires_grad_(False), own


def _share(view: nn.Module, live: nn.Module, own: Collection[str], prefix: str) -> None:
    """Put the live module's parts into a view, wherever none of the view's own tensors is inside.

    Args:
        view, live: the same part of both.
        own: names of the view's own tensors in the whole model.
        prefix: of the part's own names.
    """
    for name, part in view._modules.items():
        living, path = live._modules.get(name), f"{prefix}{name}."
        if part is None or living is None:
            continue
        if any(tensor.startswith(path) for tensor in own):
            _share(part, living, own, path)
        else:
            view._modules[name] = living
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (view._parameters, live._parameters), (view._buffers, live._buffers)
    ]  # fmt: skip
    for table, theirs in tables:
        for key in table:
            if prefix + key not in own and key in theirs:
                table[key] = theirs[key]
    view.training = live.training


_HEADS: WeakKeyDictionary[nn.Module, Heads] = WeakKeyDictionary()
"""Of the live modules that there are. Kept beside them, because copies of a live module are nobody's."""


def bind_heads(module: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]], blueprint: Blueprint) -> None:
    """Have `with_head` know a live module's heads: the tensors of each objective that has one, and what builds it."""
    _HEADS[module] = Heads(tensors, {head: blueprint.of_head(head).make for head in tensors})


def with_head(module: nn.Module, objective: str) -> nn.Module:
    """A live module or a replica as one objective sees it: with the head that the objective has of its own.

    `pf.fit` and `pf.evaluate` ask this for every objective's loss and metric; code that is given `engine.module`
    alone, such as an evaluation of `pf.sweep`, may ask it too.

    Args:
        module: `engine.module`, `engine.fused_module`, or what `engine.replica` gives.
        objective: its name.

    Returns:
        A module of the expert's own class that shares all but the head with `module` and is switched with it. The
        module itself where the objective has no head, or where `module` is no engine's.

    Raises:
        ValueError: head and live module do not make a whole model.
    """
    heads = _HEADS.get(module)
    return module if heads is None else heads.of(module, objective)
