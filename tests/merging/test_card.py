"""The card of a merged model says of what it was made, and keeps the base's licence."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import paretofuse as pf
from paretofuse.engine.merging.disk import merge_store
from paretofuse.engine.store.reader import Store
from tests.support.models import perturbed, tiny_gpt2

BASE_CARD = """---
base_model: someone/else
license: other
license_name: a-licence-of-its-own
license_link: LICENSE.md
tags:
- untrue
language:
- en
- de
metrics: accuracy
---

# The base
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A trained store of a tiny GPT-2 whose directory has a card."""
    base = tiny_gpt2()
    for seed, name in enumerate(("base", "news", "poems")):
        perturbed(base, seed, 0.02).save_pretrained(tmp_path / name)
    (tmp_path / "base" / "README.md").write_text(BASE_CARD, encoding="utf-8")
    engine = pf.stack(tmp_path / "base", {name: tmp_path / name for name in ("news", "poems")})
    with torch.no_grad():
        for parameter in engine.routers.parameters():
            parameter.add_(0.01)
    engine.training = {"method": "ls", "steps": 7}
    engine.save(tmp_path / "s")
    return tmp_path / "s"


def rows(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", (path / "README.md").read_text(encoding="utf-8"), re.M))


def test_it_says_what_the_model_was_made_of(store: Path, tmp_path: Path) -> None:
    merge_store(store, {"news": 0.7, "poems": 0.3}, tmp_path / "out")
    told = rows(tmp_path / "out")
    for name, file in (("Base", "base"), ("Expert news", "experts/news"), ("Expert poems", "experts/poems")):
        digest = hashlib.sha256((store / f"{file}.safetensors").read_bytes()).hexdigest()
        assert f"`{digest[:16]}`" in told[name]
    assert "GPT2LMHeadModel" in told["Base"]
    assert told["Preference"] == "news 0.7, poems 0.3"
    assert told["Routers"] == "method ls, steps 7"
    opened = Store.open(store)
    weights = np.asarray(opened.routing_weights(np.array([0.7, 0.3])), "<f4")
    assert told["Routing weights"] == f"`{hashlib.sha256(weights.tobytes()).hexdigest()}`"
    assert told["Merged by"].startswith(f"paretofuse {pf.__version__}, Python 3.")


def test_the_base_card_stays_and_its_licence_moves(store: Path, tmp_path: Path) -> None:
    merge_store(store, {"news": 1.0}, tmp_path / "out")
    assert (tmp_path / "out" / "README-base.md").read_text(encoding="utf-8") == BASE_CARD
    front = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert front.splitlines() == [
        "license: other",
        "license_name: a-licence-of-its-own",
        "license_link: LICENSE.md",
        "language:",
        "- en",
        "- de",
        "tags:",
        "- merge",
        "- paretofuse",
    ]
    from transformers import GPT2LMHeadModel

    assert GPT2LMHeadModel.from_pretrained(tmp_path / "out") is not None


def test_the_same_merge_is_the_same_card_and_replaces_it(store: Path, tmp_path: Path) -> None:
    merge_store(store, {"news": 1.0}, tmp_path / "out")
    first = (tmp_path / "out" / "README.md").read_bytes()
    merge_store(store, [1.0, 0.0], tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes().replace(b", poems 0", b"") == first.replace(
        b", poems 0", b""
    )
    merge_store(store, {"poems": 1.0}, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() != first


def test_weights_files_have_no_card_and_bare_stores_a_short_head(tmp_path: Path) -> None:
    base = {"w|x": torch.ones(3)}
    pf.stack(base, {"a|b": {"w|x": torch.zeros(3)}}).save(tmp_path / "s")
    merge_store(tmp_path / "s", [1.0], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\ntags:\n")
    assert r"| Expert a\|b | `" in text
    assert not (tmp_path / "out" / "README-base.md").exists()
    merge_store(tmp_path / "s", None, tmp_path / "w", weights=np.full((1, 1), 0.5))
    assert rows(tmp_path / "w")["Preference"] == "given as routing weights"
    merge_store(tmp_path / "s", [1.0], tmp_path / "alone" / "x.safetensors")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["x.safetensors"]


def test_the_card_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import paretofuse.engine.merging.card"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
