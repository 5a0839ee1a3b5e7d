"""Small stores of random bytes, for tests of what lies on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from paretofuse.engine.errors import StoreError
from paretofuse.engine.layout import ITEM_SIZE, Layout, TensorSpec
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.store.writer import StoreWriter

SPECS = (
    TensorSpec("steps", (), "I64", "constant", None, "I64"),
    TensorSpec("a.weight", (3, 5), "F32", "routed", "a", "BF16", ("tied.weight",)),
    TensorSpec("a.bias", (5,), "F32", "static", None, "BF16"),
    TensorSpec("b.weight", (7, 1), "BF16", "routed", "b", "BF16"),
    TensorSpec("nothing", (0, 4), "BF16", "routed", "b", "BF16"),
    TensorSpec("mask", (3,), "BOOL", "constant", None, "BOOL"),
)


OBJECTIVES = ("cola", "sst2")


LAYOUT = Layout(OBJECTIVES, SPECS, 0.3)


def random_bytes(rng: np.random.Generator, nbytes: int) -> np.ndarray:
    return rng.integers(0, 256, nbytes, dtype=np.uint8)


def random_routers(rng: np.random.Generator, groups: int, experts: int) -> dict[str, np.ndarray]:
    shapes = {
        "hidden.weight": (groups, 4, experts),
        "hidden.bias": (groups, 4),
        "output.weight": (groups, experts, 4),
        "output.bias": (groups, experts),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_store(path: Path, seed: int = 0, layout: Layout = LAYOUT, **writer_options: Any) -> dict[str, Any]:
    """Write a store of random bytes and return what went into it."""
    rng = np.random.default_rng(seed)
    merged = layout.with_role("routed", "static")
    parts: dict[str, Any] = {
        "base": {s.name: random_bytes(rng, s.nbytes) for s in layout.tensors},
        "deltas": [
            {s.name: random_bytes(rng, s.numel * ITEM_SIZE[s.delta_dtype]) for s in merged[expert % 2 :]}
            for expert in range(len(layout.objectives))
        ],
        "routers": random_routers(rng, len(layout.groups), len(layout.objectives)),
    }
    with StoreWriter(path, objectives=layout.objectives, force=True, **writer_options) as writer:
        writer.write_base([(s.name, s.dtype, s.shape, [parts["base"][s.name]]) for s in layout.tensors])
        for objective, own in zip(layout.objectives, parts["deltas"], strict=True):
            # A generator, cut into pieces of one byte and the rest; None for what is left out.
            writer.write_expert(
                objective,
                (
                    (
                        s.name,
                        s.delta_dtype,
                        s.shape,
                        [own[s.name][:1], own[s.name][1:]] if s.name in own else None,
                    )
                    for s in merged
                ),
            )
        writer.write_routers("sqrt", parts["routers"])
        writer.write_head("cola", [("head.weight", "F32", (2, 2), [np.eye(2, dtype=np.float32)])])
        writer.add_model_file("config.json", b'{"labels": 1}')
        writer.add_model_file("sub/vocabulary.txt", "naïve\n".encode())
        writer.add_head_file("cola", "config.json", b'{"labels": 2}')
        writer.finish(layout, "torch.nn.Linear")
    return parts


def edit_manifest(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((store / "manifest.json").read_text())
    change(document)
    (store / "manifest.json").write_text(json.dumps(document))


def check_message(error: StoreError, path: Path, words: str) -> None:
    """The message names the path, and says the words elsewhere (the path holds the test's own name)."""
    assert str(path) in str(error)
    assert re.search(words, str(error).replace(str(path), ""))


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.endswith(".partial")]


def untrained(init: str) -> dict[str, np.ndarray]:
    state = Routers(LAYOUT.groups, OBJECTIVES, init).state_dict()
    return {name: tensor.numpy() for name, tensor in state.items()}
