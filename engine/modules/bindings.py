"""Where a module holds the tensors that mergers write, so that one which was replaced is noticed.

Mergers write to fixed memory. `module.half()`, `load_state_dict(assign=True)`, `parameter.data = ...`, a
parametrization, `share_memory()` and the like give a parameter other memory, or another parameter to the module: a
switch would then write where nobody reads, or to memory that is freed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from paretofuse.engine.extension import _C
from paretofuse.engine.stacking.sharding import shard

PLAIN = frozenset({Tensor, nn.Parameter})
"""Classes of tensors that are no part of another."""

Slot = tuple[nn.Module, dict[str, Any], str, Tensor, str]
"""A module, its table of parameters or buffers, a key of it, the tensor that it held when bound, and its name."""

Table = tuple[dict[str, Any], tuple[Any, ...]]
"""A module's table of parameters, buffers or children, and the keys and values that it had (k, v, k, v, ..)."""


class Bindings:
    """The places of a module's tensors, and the memory of each.

    Args:
        module: the module.
        tensors: those to watch, by name, as the very objects that the module holds.
        layers: layers of the module to watch that may hold none of them.
    """

    def __init__(
        self, module: nn.Module, tensors: Mapping[str, Tensor], layers: Collection[nn.Module] = ()
    ) -> None:
        self._module = module
        self._layers = layers
        unique = {id(tensor): (tensor, name) for name, tensor in reversed(list(tensors.items()))}
        names = {key: name for key, (_, name) in unique.items()}
        self._tensors = [tensor for tensor, _ in unique.values()]
        self._names = list(names.values())
        self._memory = _memory(self._tensors)
        self._lie = _places(self._tensors)
        self._slots: list[Slot] = [  # of tied tensors several
            (owner, table, key, tensor, names[id(tensor)])
            for owner in module.modules()
            for table in (owner._parameters, owner._buffers)
            for key, tensor in table.items()
            if tensor is not None and id(tensor) in names
        ]
        self._tables = self._find_tables()

    def check(self) -> None:
        """Compare with what was bound, in C++: some ten microseconds for a model of 200 tensors.

        Raises:
            ValueError: a tensor was replaced, moved or taken out of the module.
        """
        if not _C.tables_hold(self._tables):
            self._check_places()
        if self._lie is not None and self._lie.hold(self._tensors):
            return
        memory = _memory(self._tensors)
        if memory != self._memory:
            moved = [was != now for was, now in zip(_each(self._memory), _each(memory), strict=True)]
            name = self._names[moved.index(True)]
            raise ValueError(_moved(name, "has other memory, another dtype or another shape now"))

    def _check_places(self) -> None:
        """Something was replaced: an error, unless all tensors still are where they were, as inside a new wrapper."""
        reached = set(self._module.modules())
        for owner, table, key, held, name in self._slots:
            if table.get(key) is not held:
                raise ValueError(_moved(name, "was replaced"))
            if owner not in reached:
                raise ValueError(_moved(name, "belongs to a layer that was taken out of the module"))
        if not reached.issuperset(self._layers):
            raise ValueError(_moved("weight", "belongs to a layer that was taken out of the module"))
        self._tables = self._find_tables()

    def _find_tables(self) -> list[Table]:
        """All that `check` looks at first: those of the slots, and of how the module reaches their owners and the
        layers. Another entry in one of them costs a look at all slots, once."""
        owners = {*(owner for owner, *_ in self._slots), *self._layers}
        found = {id(table): table for _, table, *_ in self._slots}
        for parent in self._module.modules():
            children = [child for child in parent._modules.values() if child is not None]
            if any(not owners.isdisjoint(child.modules()) for child in children):
                found[id(parent._modules)] = parent._modules
        return [(table, tuple(part for entry in table.items() for part in entry)) for table in found.values()]


def _places(tensors: list[Tensor]) -> _C.Places | None:
    """What `_memory` says, for C++ to compare; None of parts of tensors, and where this torch or the device has
    no words for it."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None or not PLAIN.issuperset(map(type, tensors)):
        return None
    try:
        return _C.Places(tensors, exchange)
    except (RuntimeError, ValueError):  # such as the meta device's
        return None


def _memory(tensors: list[Tensor]) -> tuple[list[Any], ...]:
    """What a write by address relies on: all addresses, all dtypes, all shapes, all strides."""
    here = tensors if PLAIN.issuperset(map(type, tensors)) else [shard(tensor) for tensor in tensors]
    # Where C++ cannot tell, every switch does this: map calls what each class has in C, with no step between.
    return (
        list(map(Tensor.data_ptr, here)),
        list(map(Tensor.dtype.__get__, here)),  # type: ignore[attr-defined]
        list(map(Tensor.size, here)),
        list(map(Tensor.stride, here)),
    )


def _each(memory: tuple[list[Any], ...]) -> list[tuple[Any, ...]]:
    """What `_memory` says of each tensor."""
    return list(zip(*memory, strict=True))


def _moved(name: str, what: str) -> str:
    return (
        f"got a live module whose tensor {name!r} {what} (module.half(), .to(), .cuda(), load_state_dict(assign=True), "
        "a parametrization, ...), expected it as it was made: it is rewritten in place. Move a model of your own, "
        "engine.merge(preference); choose device= and dtype= where the engine is made; engine.unload(preference) lets "
        "go of this one, so that the next use makes it anew"
    )
