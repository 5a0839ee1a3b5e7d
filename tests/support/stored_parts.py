"""A store of every dtype and role of tensor, and its merge in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.layout import Layout, TensorSpec
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.store.writer import StoreWriter

EPSILON = {"F32": 2**-23, "BF16": 2**-7, "F16": 2**-10}
PREFERENCE = {"x": 0.5, "y": 0.2, "z": 0.3}
SPECS = (
    TensorSpec("embedding", (31, 7), "F32", "routed", "top", "F32", ("head.tied",)),
    TensorSpec("a.weight", (13, 5), "F32", "routed", "a", "BF16"),
    TensorSpec("a.bias", (5,), "F32", "static", None, "F16"),
    TensorSpec("b.weight", (3, 3, 3), "BF16", "routed", "b", "BF16"),
    TensorSpec("b.bias", (1,), "BF16", "static", None, "F32"),
    TensorSpec("c.weight", (129,), "F16", "routed", "a", "F16"),
    TensorSpec("empty", (0, 3), "F16", "routed", "a", "F16"),
    TensorSpec("steps", (), "I64", "constant", None, "I64"),
    TensorSpec("mask", (3, 3), "BOOL", "constant", None, "BOOL"),
    TensorSpec("classifier", (2, 2), "F32", "constant", None, "F32"),
)
LAYOUT = Layout(("x", "y", "z"), SPECS, -0.4)


class Parts:
    """Random tensors of a stack, and its merge in float64."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.base: dict[str, torch.Tensor] = {}
        self.deltas: list[dict[str, torch.Tensor]] = [{}, {}, {}]
        for index, spec in enumerate(SPECS):
            values = torch.randn(spec.shape, generator=generator)
            self.base[spec.name] = (values * 3).to(TO_TORCH[spec.dtype])
            for expert, own in enumerate(self.deltas):
                if spec.role != "constant" and (index + expert) % 3:  # every third is unchanged
                    delta = torch.randn(spec.shape, generator=generator)
                    own[spec.name] = delta.to(TO_TORCH[spec.delta_dtype])
        self.routers = Routers(LAYOUT.groups, LAYOUT.objectives, "sqrt")
        with torch.no_grad():
            for parameter in self.routers.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def write(self, path: Path, order: int = 1) -> Path:
        def data(tensors: dict[str, torch.Tensor]) -> list[Any]:
            specs = [spec for spec in SPECS if spec.name in tensors][::order]
            return [
                (s.name, s.dtype if tensors is self.base else s.delta_dtype, s.shape, [raw(tensors[s.name])])
                for s in specs
            ]

        with StoreWriter(path, objectives=LAYOUT.objectives) as writer:
            writer.write_base(data(self.base))
            for objective, own in zip(LAYOUT.objectives, self.deltas, strict=True):
                writer.write_expert(objective, data(own))
            state = self.routers.state_dict()
            writer.write_routers("sqrt", {name: tensor.numpy() for name, tensor in state.items()})
            writer.write_head("y", [("classifier", "F32", (3, 2), [np.full((3, 2), 7, np.float32)]),
                                    ("further", "BF16", (1,), [b"\x80\x3f"])])  # fmt: skip
            writer.add_model_file("config.json", b'{"labels": 2}')
            writer.add_model_file("sub/merges.txt", b"a b")
            writer.add_head_file("y", "config.json", b'{"labels": 3}')
            writer.finish(LAYOUT)
        return path

    def check(self, merged: dict[str, torch.Tensor], weights: np.ndarray) -> None:
        """Compare with the merge in float64; the bound is float32 accumulation and one rounding."""
        for spec in SPECS:
            base = self.base[spec.name]
            got = merged[spec.name]
            assert (got.dtype, got.shape) == (base.dtype, base.shape)
            if spec.role == "constant":
                assert torch.equal(got, base)
                continue
            row = weights[LAYOUT.groups.index(spec.group)] if spec.group else [LAYOUT.static_weight] * 3
            exact = base.double()
            size = base.double().abs()
            for weight, own in zip(row, self.deltas, strict=True):
                if spec.name in own:
                    exact = exact + float(weight) * own[spec.name].double()
                    size = size + abs(float(weight)) * own[spec.name].double().abs()
            bound = EPSILON[spec.dtype] / 2 * exact.abs() + 4 * EPSILON["F32"] * size + 2**-25
            assert bool(((got.double() - exact).abs() <= bound).all()), spec.name


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
