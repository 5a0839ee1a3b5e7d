"""Stores whose rows have coefficients of their own: read again, merged from disk, told, and refused where they lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import paretofuse as pf
from paretofuse.api import stack_to_store
from paretofuse.cli import main
from paretofuse.engine.engine import Engine
from paretofuse.engine.errors import StoreError
from paretofuse.engine.merging import disk, native
from paretofuse.engine.store.reader import Store
from tests.store.test_planes import mixed_store
from tests.support.models import Net, net_and_experts, same

R = {"a": 0.2, "b": 0.8}
FORMAT1 = Path(__file__).parent / "data" / "format1.pareto"


def learned(engine: Engine, seed: int = 0) -> Engine:
    """Row coefficients, and all routers away from their start."""
    engine.set_family("rows")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in engine.routers.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return engine


def rows_store(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A store of a few kB with row coefficients over planes of every format, odd sizes and absent planes."""
    mixed_store(path, dtype)
    learned(pf.load(path)).save(path)
    return path


@pytest.mark.parametrize("asked", ["scalar", "rows", None])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_fit_keeps_the_family_that_was_asked_for(tmp_path: Path, asked: str | None, streamed: bool) -> None:
    """Also one that was asked of another process: "hundreds of numbers" must not become thousands in silence."""
    base, experts = net_and_experts()
    if streamed:
        stack_to_store(base, experts, tmp_path / "store", family=asked)
    else:
        pf.stack(base, experts, family=asked).save(tmp_path / "store")
    engine = pf.load(tmp_path / "store", module=Net())
    objectives = {name: ([torch.ones(2, 8)], lambda module, x: module(x).square().mean()) for name in experts}
    pf.fit(engine, objectives, steps=1, progress=False)
    assert engine.routers.family == (asked or "rows")
    engine.save(tmp_path / "store")
    again = pf.load(tmp_path / "store", module=Net())
    assert again.routers.family_asked == asked
    pf.fit(again, objectives, steps=1, progress=False)
    assert again.routers.family == (asked or "rows")


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    base, experts = net_and_experts()
    engine = learned(pf.stack(base, experts, route="tensor"))
    engine.save(tmp_path / "store")
    again = pf.load(tmp_path / "store", module=Net(), verify=True)
    assert again.routers.family == "rows"
    r = [0.2, 0.3, 0.5]
    assert torch.equal(again.routers(r), engine.routers(r))
    assert same(again.merge(r), engine.merge(r))
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["version"] == 2, "programs that know no row coefficients must refuse it"
    assert Store.open(tmp_path / "store").trained
    with pytest.raises(ValueError, match="is a trained store"):
        pf.stack(base, experts).save(tmp_path / "store")
    pf.stack(base, experts).save(tmp_path / "scalar")
    assert json.loads((tmp_path / "scalar" / "manifest.json").read_text())["version"] == 1
    assert set(load_file(tmp_path / "scalar" / "routers.safetensors")) == {
        "hidden.weight", "hidden.bias", "output.weight", "output.bias",
    }  # fmt: skip


def test_trained_row_coefficients_alone_make_a_trained_store(tmp_path: Path) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, family="rows")
    engine.save(tmp_path / "store")
    assert not Store.open(tmp_path / "store").trained
    assert engine.routers.rows is not None
    with torch.no_grad():
        engine.routers.rows.weight[0, 0, 0] = 1
    engine.save(tmp_path / "store")
    assert Store.open(tmp_path / "store").trained


def test_a_store_of_format_1_opens_as_before_and_takes_them_on(tmp_path: Path) -> None:
    engine = pf.load(FORMAT1, module=Net())
    assert engine.routers.family == "scalar"
    before = engine.merge_state_dict([0.25, 0.75])
    engine.set_family("rows")
    engine.save(tmp_path / "store")
    again = pf.load(tmp_path / "store", module=Net()).merge_state_dict([0.25, 0.75])
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_from_disk_gives_the_same_bits(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_store(tmp_path / "store", dtype)
    weights = Store.open(path).routing_weights(np.array([0.2, 0.8]))
    engine = pf.load(path)
    np.testing.assert_array_max_ulp(weights, engine.routers(R).detach().numpy(), maxulp=1)
    expected = engine.merge_state_dict(weights=torch.from_numpy(weights))
    for batch in (8, 1000, 8 << 20):
        monkeypatch.setattr(disk, "BATCH_BYTES", batch)
        for isa in [name for name, usable in native.instruction_sets().items() if usable]:
            disk.merge_store(path, R, tmp_path / "merged.safetensors", isa=isa)
            merged = load_file(tmp_path / "merged.safetensors")
            assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    groups = len(engine.groups)
    disk.merge_store(path, None, tmp_path / "merged.safetensors", weights=weights[:groups])
    scalar = engine.merge_state_dict(weights=torch.from_numpy(weights[:groups]))
    merged = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in scalar.items())
    assert not torch.equal(merged["whole.weight"], expected["whole.weight"])
    for wrong in (weights[: groups + 1], weights[:, :1]):
        with pytest.raises(ValueError, match=r"expected finite numbers of shape \(\d, 2\) or \(\d+, 2\)"):
            disk.merge_store(path, None, tmp_path / "merged.safetensors", weights=wrong)


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Any]], None]:
    return lambda held: held.update({"rows.weight": torch.zeros(shape, dtype=dtype)})


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "fewer rows": (shaped(2, 2, 3), "lack 'rows.weight' of a shape that fits"),
    "one dimension": (shaped(4), "lack 'rows.weight' of a shape that fits"),
    "other experts": (shaped(3, 2, 69), "lack 'rows.weight' of a shape that fits"),
    "no numbers": (shaped(2, 2, 0), "lack 'rows.weight' of a shape that fits"),
    "no finite number": (
        lambda held: held["rows.weight"].fill_(float("inf")),
        "'rows.weight' holds NaN or infinity",
    ),
    "half floats": (shaped(2, 2, 69, dtype=torch.float16), "should be F32"),
    "another parameter": (lambda held: held.update(columns=torch.zeros(2)), "unknown router parameters"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_routers_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    path = rows_store(tmp_path / "store")
    held = dict(load_file(path / "routers.safetensors"))
    ATTACKS[name][0](held)
    save_file(held, path / "routers.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["routers.safetensors"]["bytes"] = (path / "routers.safetensors").stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError) as caught:
        Store.open(path)
    assert ATTACKS[name][1] in str(caught.value)


def test_more_rows_than_can_be_counted_are_refused(tmp_path: Path) -> None:
    path = rows_store(tmp_path / "store")
    manifest = json.loads((path / "manifest.json").read_text())
    for spec in manifest["tensors"]:
        if spec["role"] == "routed":
            spec["shape"] = [(1 << 62) - 1, 0]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="has too many rows"):
        Store.open(path)


TASKS = """
import torch


def loss(module, batch):
    return module(batch).square().mean()


def objectives():
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 3, generator=generator)]
    return {"news": (data, loss), "poems": (data, loss)}


def build():
    return torch.nn.Linear(3, 2)
"""


def test_the_command_line_stacks_trains_tells_and_merges_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows_tasks.py").write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    for name in ("base", "news", "poems"):
        save_file(torch.nn.Linear(3, 2).state_dict(), f"{name}.safetensors")
    words = [
        "stack",
        "base.safetensors",
        "--expert",
        "news=news.safetensors",
        "--expert",
        "poems=poems.safetensors",
    ]
    assert main([*words, "-o", "rows", "--family", "rows", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    # One group of two tensors: 2 x 4 + 4 + 2 x 4 + 2 numbers of its router, and 2 x 2 x (2 + 1) of rows.
    assert (told["family"], told["router_parameters"], told["router_bytes"]) == ("rows", 34, 136)
    assert main([*words, "-o", "scalar"]) == 0
    assert main(["info", "scalar"]) == 0
    assert "family scalar, 22 router parameters (88 B)" in capsys.readouterr().out
    for store, family in (("rows", []), ("scalar", ["--family", "rows"])):
        fit = [
            "fit",
            store,
            "--objectives",
            "rows_tasks:objectives",
            "--module",
            "rows_tasks:build",
            "--steps",
            "3",
        ]
        more = ["--row-lr", "0.02", "--row-shrinkage", "0.1", "-o", f"{store}-trained", "--threads", "1"]
        assert main([*fit, *family, *more]) == 0
        assert "family rows, 34 router parameters" in capsys.readouterr().out
        assert (
            main(
                [
                    "merge",
                    f"{store}-trained",
                    "--preference",
                    "news=0.3,poems=0.7",
                    "-o",
                    f"{store}.safetensors",
                ]
            )
            == 0
        )
        engine = pf.load(f"{store}-trained")
        assert engine.routers.rows is not None
        assert (engine.routers.rows.weight != 0).all()
        expected = engine.merge_state_dict({"news": 0.3, "poems": 0.7})
        merged = load_file(f"{store}.safetensors")
        assert all((merged[name] - tensor).abs().max() < 1e-6 for name, tensor in expected.items())
    first, second = (load_file(f"{name}.safetensors") for name in ("rows", "scalar"))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    shutil.copytree("scalar", "again")
    assert main(["fit", "again", "--objectives", "rows_tasks:objectives", "--module", "rows_tasks:build",
                 "--family", "scalar", "--steps", "1", "--row-lr", "0.1"]) != 0  # fmt: skip
    assert "without row coefficients" in capsys.readouterr().err
