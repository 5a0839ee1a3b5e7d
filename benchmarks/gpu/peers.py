"""Cases of `gpu.bench` beside peers that take a whole model: PEFT's merges of LoRA experts, AOTInductor's constants."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paretofuse as pf
from benchmarks.gpu.cases import Case, Contender, Tools, allowed, merged_exactly, row_of, short, stacked
from benchmarks.harness.record import MissingContender, check

FACTOR_SIZE = 0.02
"""Standard deviation of both factors of a LoRA."""


def lora_case(
    name: str, make: Callable[[], nn.Module], layers: tuple[str, ...], experts: int, rank: int, tools: Tools
) -> Case:
    """A switch between mixtures of LoRA experts: ours, which keeps factors, and PEFT's weighted adapters.

    Args:
        make: the base, whose layers of these names are transformers' Conv1D, weight [I, O].
        layers: the last parts of the adapted layers' names.
        rank: of each expert.
    """
    base = make()
    weights = {
        key: p for key, p in base.named_parameters()
        if key.endswith(".weight") and key.split(".")[-2] in layers
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = {f"task{e}": Path(folder) / f"task{e}" for e in range(experts)}
        factors = [_adapter(path, weights, layers, rank, seed) for seed, path in enumerate(paths.values())]
        engine = pf.stack(
            base,
            {key: str(path) for key, path in paths.items()},
            planes="auto",
            backend="triton",
            device=tools.device,
        )
        share = 1 / experts
        truth = torch.cat([
            (w.double() + share * sum(own[key][0].double().T @ own[key][1].double().T for own in factors)).flatten()
            for key, w in weights.items()
        ])  # fmt: skip
        n, item = len(truth), next(iter(weights.values())).element_size()
        held = sum(f.nbytes for own in factors for pair in own.values() for f in pair)
        case = Case(f"switch {name} {short(next(iter(weights.values())).dtype)} E={experts} LoRA rank {rank}",
                    truth, 2 * experts * rank * n)  # fmt: skip
        dtype = next(iter(weights.values())).dtype

        def ours() -> dict[str, Tensor]:
            engine.switch([share] * experts)
            return dict(engine.module.named_parameters())

        def flat(state: dict[str, Tensor]) -> Tensor:
            return torch.cat([state[key].flatten() for key in weights])

        moved = 2 * n * item + held
        case.contenders["engine.switch(preference)"] = Contender(
            ours, moved, allowed(dtype, 1), flat, ours=True
        )
        try:
            merged = _by_peft(base, paths, list(weights))
        except MissingContender as error:
            print(f"PEFT is left out: {error}")
        else:
            # Each switch takes the last mixture out again, and rounds as it does.
            case.contenders["PEFT, add_weighted_adapter and merge"] = Contender(
                merged, moved, allowed(dtype, 8), flat
            )
    return case


def _adapter(
    path: Path, weights: dict[str, Tensor], layers: tuple[str, ...], rank: int, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Write a LoRA directory as PEFT does, without PEFT; its factors A [R, I] and B [O, R] by weight."""
    path.mkdir()
    device = next(iter(weights.values())).device
    generator = torch.Generator(device).manual_seed(2000 + seed)

    def drawn(*shape: int) -> Tensor:
        return FACTOR_SIZE * torch.randn(*shape, generator=generator, device=device)

    found = {key: (drawn(rank, w.shape[0]), drawn(w.shape[1], rank)) for key, w in weights.items()}
    tensors = {
        f"base_model.model.{key.removesuffix('weight')}lora_{letter}.weight": tensor.cpu()
        for key, pair in found.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(layers), "fan_in_fan_out": True,
        "lora_dropout": 0.0, "bias": "none", "task_type": None, "base_model_name_or_path": None,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return found


def _by_peft(base: nn.Module, paths: dict[str, Path], keys: list[str]) -> Callable[[], dict[str, Tensor]]:
    """What a user of PEFT does for another preference: a weighted adapter of all, merged into the weights in place.

    Raises:
        MissingContender: PEFT is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingContender(str(error)) from error
    first, *others = paths.items()
    # The annotation keeps type checkers from PEFT's own, of which there are none here on a GPU machine.
    model: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(first[1]), adapter_name=first[0])
    for key, path in others:
        model.load_adapter(str(path), adapter_name=key)
    layers = {key: model.get_submodule(f"base_model.model.{key.removesuffix('.weight')}") for key in keys}
    mixed = False

    def merged() -> dict[str, Tensor]:
        nonlocal mixed
        if mixed:
            model.unmerge_adapter()
            model.delete_adapter("mix")
        model.add_weighted_adapter(list(paths), [1 / len(paths)] * len(paths), "mix", combination_type="cat")
        model.merge_adapter(["mix"])
        mixed = True
        return {key: layer.base_layer.weight for key, layer in layers.items()}

    return merged


def package_case(
    name: str, make: Callable[[], nn.Module], example: tuple[Tensor, ...], experts: int, tools: Tools
) -> Case:
    """From preference to an AOTInductor package that answers at it: ours in place, or new constants for each.

    Ours hands the live module's tensors to the package once, whose memory every switch rewrites; without us a merged
    state dict is made by PyTorch and loaded. The truth is the answer of the model merged in float64.

    Args:
        make: the base, in float32: in half types the answers' own rounding would hide a wrong merge.
        example: what the package is given.
    """
    engine = stacked(make(), experts, tools)
    preference = [1 / experts] * experts
    live, flat = engine.module, engine._bound.flat[0]
    wide = copy.deepcopy(live).double()
    rows = torch.full((1, len(engine.groups) + 1, experts), 1 / experts, device=tools.device)
    wide.load_state_dict(dict(flat.bucket.view(merged_exactly(flat, rows)[0])), strict=False)
    planes = [engine.merge(row_of(e, experts)).state_dict() for e in range(experts)]
    base = dict(engine._stack.base)
    with torch.no_grad():
        truth = _answer(wide, tuple(x.double() if x.is_floating_point() else x for x in example))
    dtype = next(iter(base.values())).dtype
    n, item = sum(t.numel() for t in base.values()), next(iter(base.values())).element_size()
    case = Case(f"package {name} {short(dtype)} E={experts}", truth, 2 * experts * n)
    with tempfile.TemporaryDirectory() as folder:
        path = pf.export(engine, Path(folder) / "model.pt2", example, preference=preference)
        packages = [torch._inductor.aoti_load_package(str(path)) for _ in range(2)]
    names = packages[0].get_constant_fqns()

    def constants(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the package keeps them: scalars and short vectors as rows."""
        shaped = {key: state[key] for key in names if key in state}
        return {key: t.view(1, -1) if t.dim() < 2 and t.numel() <= 8 else t for key, t in shaped.items()}

    packages[0].load_constants(constants(live.state_dict()), check_full_update=False, user_managed=True)

    def ours() -> Any:
        engine.switch(preference)
        return packages[0]

    def loaded() -> Any:
        merged = {
            key: base[key] + sum(
                share * (own[key] - base[key]) for share, own in zip(preference, planes, strict=True)
            )
            for key in base
        }  # fmt: skip
        packages[1].load_constants(constants(merged), check_full_update=False)
        return packages[1]

    def answer(package: Any) -> Tensor:
        with torch.no_grad():
            return _answer(package, example)

    moved, error = n * (2 + experts) * item, 1e-4
    engine.switch(row_of(0, experts))  # a switch that did nothing would be seen
    case.contenders["engine.switch, constants shared"] = Contender(ours, moved, error, answer, ours=True)
    case.contenders["PyTorch's merge, load_constants"] = Contender(loaded, moved, error, answer)
    check(len(names) > 0, f"{case.name}: the package has no constants")
    return case


def _answer(model: Any, example: tuple[Tensor, ...]) -> Tensor:
    """The first tensor that a model gives."""
    found = model(*example)
    while not isinstance(found, Tensor):
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    return found
