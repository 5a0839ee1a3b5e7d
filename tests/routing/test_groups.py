"""Routes: which tensors share a router, for the names that models have."""

from __future__ import annotations

from typing import Any

import pytest

from paretofuse.engine.routing.groups import assign_groups

MLPS = {
    "vision_model.encoder.layers.0.mlp.fc1.weight": "vision_model.encoder.layers.0.mlp",  # CLIP
    "transformer.h.11.mlp.c_fc.bias": "transformer.h.11.mlp",  # GPT-2
    "model.layers.3.mlp.gate_proj.weight": "model.layers.3.mlp",  # LLaMA
    "encoder.block.0.layer.1.DenseReluDense.wi.weight": "encoder.block.0.layer.1.DenseReluDense",  # T5
    "mlp.0.weight": "mlp",
    "blocks.2.ffn.up.weight": "blocks.2.ffn",
    "blocks.2.ff.net.0.weight": "blocks.2.ff",
    "blocks.2.feed_forward.w1.weight": "blocks.2.feed_forward",
    "blocks.2.feedforward.w1.weight": "blocks.2.feedforward",
    "encoder.layer.5.intermediate.dense.weight": "encoder.layer.5.mlp",  # BERT
    "encoder.layer.5.output.dense.bias": "encoder.layer.5.mlp",
    "layers.1.linear1.weight": "layers.1.mlp",  # torch
    "layers.1.linear2.bias": "layers.1.mlp",
    "model.decoder.layers.0.fc2.weight": "model.decoder.layers.0.mlp",  # BART
    "fc1.weight": "mlp",
}
NOT_MLPS = [
    "encoder.layer.5.attention.output.dense.weight", "encoder.layer.5.output.LayerNorm.weight", "wte.weight",
    "layers.1.linear3.weight", "layers.1.fc1", "smlp.0.weight", "layers.1.linear1.scale", "mlp",
]  # fmt: skip


@pytest.mark.parametrize("name", MLPS)
def test_the_mlp_of_each_family(name: str) -> None:
    assert assign_groups([name], "mlp") == {name: MLPS[name]}


@pytest.mark.parametrize("name", NOT_MLPS)
def test_what_is_no_mlp_is_not_routed(name: str) -> None:
    routed = "mlp.0.weight"
    assert assign_groups([name, routed], "mlp") == {name: None, routed: "mlp"}


def test_modules_and_tensors() -> None:
    names = ["embed", "body.0.weight", "body.0.bias", "body.1.weight"]
    assert assign_groups(names, "module") == {
        "embed": "(top)", "body.0.weight": "body.0", "body.0.bias": "body.0", "body.1.weight": "body.1",
    }  # fmt: skip
    assert assign_groups(iter(names), "tensor") == {name: name for name in names}
    assert assign_groups(names, lambda name: None if name == "embed" else name[:4]) == {
        "embed": None, "body.0.weight": "body", "body.0.bias": "body", "body.1.weight": "body",
    }  # fmt: skip


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got route 'layer', expected one of \['mlp', 'module', 'tensor'\]"):
        assign_groups(["a.weight"], "layer")
    with pytest.raises(ValueError, match=r"'mlp' matches none of the 5 tensors \(a, b, c, d, ...\)"):
        assign_groups(list("abcde"), "mlp")
    wrong: list[Any] = [3, "", b"a", ["a"], False]
    for group in wrong:
        with pytest.raises(TypeError, match="for tensor 'a', expected a non-empty group name"):
            assign_groups(["a"], lambda name, group=group: group)
