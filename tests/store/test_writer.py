"""How a store is written: each file's data once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from paretofuse.engine.layout import Layout, TensorSpec
from paretofuse.engine.store.safetensors_file import TensorData
from paretofuse.engine.store.writer import StoreWriter


@pytest.mark.parametrize(
    "given", [list, lambda tensors: (tensor for tensor in tensors)], ids=["a list", "who knows how many"]
)
def test_headers_have_room_from_the_start(
    tmp_path: Path, given: Callable[[list[TensorData]], Iterable[TensorData]]
) -> None:
    """A header that outgrows the room reserved for it costs a second pass over the data, and is a tight one then."""
    names = [f"transformer.layers.{number}.attention.output.dense.weight" for number in range(400)]
    data = np.zeros(4, dtype=np.uint8)
    layout = Layout(("a",), tuple(TensorSpec(name, (), "F32", "static", None, "F32") for name in names), 0.3)
    shapes = {
        "hidden.weight": (0, 4, 1),
        "hidden.bias": (0, 4),
        "output.weight": (0, 1, 4),
        "output.bias": (0, 1),
    }
    routers = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    with StoreWriter(tmp_path / "store", objectives=layout.objectives) as writer:
        writer.write_base(given([(name, "F32", (), [data]) for name in names]))
        writer.write_expert("a", given([(name, "F32", (), [data]) for name in names]))
        writer.write_routers("sqrt", routers)
        writer.finish(layout)
    for file in ("base.safetensors", "experts/a.safetensors"):
        content = (tmp_path / "store" / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert len(content) == 8 + length + 4 * len(names)
        assert content[: 8 + length].endswith(b" " * 100)
