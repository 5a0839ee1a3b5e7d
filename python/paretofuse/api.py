"""`pf.stack` and `pf.load`: from models and paths to an engine."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from paretofuse.adapters import hf, openclip, other_classes
from paretofuse.adapters.hf_config import check_configurations
from paretofuse.adapters.resolve import resolve
from paretofuse.engine.dtypes import TO_TORCH, merged_dtype_name
from paretofuse.engine.engine import Engine
from paretofuse.engine.layout import Layout
from paretofuse.engine.methods.transform import parse_transform
from paretofuse.engine.planes.choose import parse
from paretofuse.engine.routing.families import check_family
from paretofuse.engine.routing.groups import Route
from paretofuse.engine.routing.routers import check_init, routers_for
from paretofuse.engine.stacking import persist
from paretofuse.engine.stacking.plan import Plan, make_plan
from paretofuse.engine.stacking.skeleton import make_skeleton, materialize
from paretofuse.engine.stacking.sources import Blueprint
from paretofuse.engine.stacking.stack import Stack, build, on_cpu
from paretofuse.engine.stacking.threads import one_thread
from paretofuse.engine.store.reader import Store


@on_cpu()
def stack(
    base: Any,
    experts: Mapping[str, Any],
    route: str | Route = "module",
    init: str = "identity",
    static_weight: float = 0.3,
    dtype: torch.dtype | str | None = None,
    *,
    objectives: Mapping[str, Sequence[str]] | None = None,
    delta_dtype: torch.dtype | str | None = None,
    planes: str | torch.dtype = "dense",
    family: str | None = None,
    heads: Sequence[str] = (),
    device: str | torch.device | None = None,
    backend: str | None = None,
    replicas: int = 2,
    allow_misfit: bool = False,
    transform: str | None = None,
    tokenizer: str | None = None,
) -> Engine:
    """Stack the experts of one base model into an engine; the inputs are never changed.

    Tensors sharded over processes (DTensor: FSDP2's fully_shard, tensor parallelism) are stacked shard by shard: every
    process calls this alike, and its merges communicate nothing. Such an engine merges only; see `Engine.merge`.

    Args:
        base: an nn.Module, a state dict, or a path (a Hugging Face directory, sharded or not, an open_clip
            directory, a .safetensors file; or a Hub id, org/name or org/name@revision).
        experts: the experts by name, one for each objective unless `objectives` says otherwise; like base, or a LoRA of
            PEFT (a directory, or a live PeftModel).
        route: which tensors share a router: "mlp" (one for each MLP block, nothing else routed), "module", "tensor",
            or a callable from a tensor's name to its group's name or None.
        init: where the routers start: "identity" (L = r), "sqrt" (L = sqrt(r)) or "constant" (PWEMoE's).
        static_weight: weight of every expert in tensors that are not routed, and of "constant" at its start; k experts
            of one objective share it.
        dtype: of base, deltas and merged models; None keeps each base tensor's own. Experts of other dtypes are
            converted, and `engine.notes` says which.
        objectives: which experts belong to which objective, {"news": ["news_a", "news_b"], "poems": ["poems"]}: a
            one-hot preference starts at the mean of that objective's experts. Experts that none has belong to none
            (another merge, a curve's control point) and start at 0. An objective has the head of its first expert.
            None: an objective for each expert, of its name.
        delta_dtype: of the deltas alone, for example bfloat16 under a float32 base; None takes the base's.
        planes: how what each expert adds is held. "dense" (in delta_dtype), "fp32", "bf16" or "fp16" (dense, in that
            dtype, by any of its names); "int8" or "int4" (a scale for each group of elements); "lowrank:32" or
            "lowrank:99%" (factors of a rank, or of an energy, by SVD); "auto": LoRA experts as their own factors, int8
            where the merged tensor is as exact as with dense planes. With all but dense ones LoRA experts stay
            factors, and vectors (norms, biases) stay exact. `engine.planes` tells each plane's format, bytes and error.
        family: "scalar" for one coefficient for each group and expert, a few hundred trained numbers; "rows" for one
            for each row of each routed tensor besides, linear in the preference and zero at the start: thousands;
            "rows+columns" for one for each column of each routed matrix too. None: scalar, until `pf.fit` trains rows
            as well.
        heads: names, dotted prefixes or globs of tensors that belong to one objective each, such as "classifier".
        device: where the engine lives; by default each tensor stays on the base's own device (the CPU for paths), so
            that a base split over devices gives models split alike, its routers on the first tensor's device.
        backend: "reference", "native" or "triton"; chosen by device by default.
        replicas: how many merged modules `engine.replica` may keep, each as large as the model.
        allow_misfit: stack experts whose configuration makes another model of the same tensors (another rope_theta,
            eps or number of heads), and say so in `engine.notes`.
        transform: what is done to every expert's difference to the base first, by a merge method: "ties:density=0.2",
            "dare_linear:density=0.3,seed=1", ...; see docs/recipes.md.
        tokenizer: of directories with different vocabularies (added tokens, resized embeddings): the base's tokenizer
            ("base"), the base's with every token added that an expert has ("union"), or a directory's. Embeddings and
            heads are matched token by token, and merged models bring that tokenizer; see docs/checkpoints.md.

    Raises:
        CheckpointError: base and experts do not fit together; the message names the tensor or the setting, and both
            sides.
        ValueError: an argument is out of range.
        TypeError: a model is of no known kind.
    """
    place = None if device is None else _device(device)
    if family is not None:
        check_family(family)
    plan = _plan(
        base,
        experts,
        route,
        init,
        static_weight,
        dtype,
        delta_dtype,
        planes,
        heads,
        allow_misfit,
        objectives,
        transform,
        tokenizer,
    )
    routers = routers_for(plan.layout, init, family or "scalar")
    with _threads_for(plan):
        built = build(plan, place)
    main = place or next((tensor.device for tensor in built.base.values()), torch.device("cpu"))
    engine = Engine(
        built, routers, _blueprint(plan), device=main, backend=backend, replicas=replicas, notes=_notes(plan)
    )
    if family is not None:
        engine.set_family(family)
    return engine


@on_cpu()
def stack_to_store(
    base: Any,
    experts: Mapping[str, Any],
    store: str | os.PathLike[str],
    *,
    route: str | Route = "module",
    init: str = "identity",
    static_weight: float = 0.3,
    dtype: torch.dtype | str | None = None,
    objectives: Mapping[str, Sequence[str]] | None = None,
    delta_dtype: torch.dtype | str | None = None,
    planes: str | torch.dtype = "dense",
    family: str | None = None,
    heads: Sequence[str] = (),
    allow_misfit: bool = False,
    transform: str | None = None,
    tokenizer: str | None = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[str, ...]:
    """Like `stack(...).save(store)`, streamed from checkpoint to store without holding a model in memory.

    Args:
        store: the store's directory; written atomically.
        force: replace a trained store; its training is lost.
        progress: called with the number of parameters done since the last call.

    Returns:
        What a user should know about it, a sentence each.

    Raises:
        as `stack`, and OSError when writing fails.
    """
    if family is not None:
        check_family(family)
    plan = _plan(
        base,
        experts,
        route,
        init,
        static_weight,
        dtype,
        delta_dtype,
        planes,
        heads,
        allow_misfit,
        objectives,
        transform,
        tokenizer,
    )
    routers = routers_for(plan.layout, init, family or "scalar")
    routers.family_asked = family
    parts = persist.streamed(plan, progress)
    with _threads_for(plan):
        persist.write(store, parts, plan.layout, routers, _blueprint(plan), force=force)
    return _notes(plan)


@on_cpu()
def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    module: nn.Module | None = None,
    *,
    backend: str | None = None,
    replicas: int = 2,
    verify: bool = False,
) -> Engine:
    """Open a store. On the CPU its files are mapped, not read.

    What is found at once is a file that is missing, has another size, or contradicts the manifest. Flipped bits in the
    tensors are found by `verify` alone.

    Args:
        path: the store's directory.
        device: where the engine lives.
        module: the model's structure, where the store has no configuration that tells it; its weights are not used.
        backend: "reference", "native" or "triton"; chosen by device by default.
        replicas: how many merged modules `engine.replica` may keep, each as large as the model.
        verify: read every file first and compare its checksum with the manifest.

    Raises:
        StoreError: not a store, or a damaged, incomplete or too new one.
        ValueError: the module does not have the store's tensors.
    """
    place = _device(device)
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(
            f"got module={type(module).__name__}, expected an nn.Module of the stored model's class"
        )
    store = Store.open(path)
    if verify:
        store.verify()
    stack, routers = persist.read(store, place)
    base = stored_blueprint(store)
    if module is not None:
        skeleton = make_skeleton(module)
        _check_fits(skeleton, stack)
        base = replace(base, skeleton=lambda: skeleton)
    owners = _owners(stack.layout)
    heads = {
        objective: _blueprint_of(store.model_files(objective), None, owners | {name: name for name in own})
        for objective, own in stack.heads.items()
    }
    heads = {
        objective: replace(own, skeleton=own.skeleton or base.skeleton) for objective, own in heads.items()
    }
    engine = Engine(
        stack, routers, replace(base, heads=heads), device=place, backend=backend, replicas=replicas
    )
    engine.training = store.training
    engine.origin = store.routers_checksum
    engine.path = os.path.abspath(path)
    return engine


def stored_blueprint(store: Store) -> Blueprint:
    """What makes models of a store's tensors, as far as the store's own files tell."""
    return _blueprint_of(store.model_files(), store.model_class, _owners(store.layout))


def _owners(layout: Layout) -> dict[str, str]:
    """The stored name of each tensor by all of its names."""
    return {name: spec.name for name, spec in layout.by_name.items()}


def _check_fits(skeleton: nn.Module, stack: Stack) -> None:
    """ValueError unless a module has the store's tensors, in their shapes (heads may have another)."""
    metas = {spec.name: torch.empty(spec.shape, device="meta") for spec in stack.layout.tensors}
    tensors = {name: metas[spec.name] for name, spec in stack.layout.by_name.items()}
    materialize(
        skeleton,
        tensors,
        "the store's tensors",
        {name for own in stack.heads.values() for name in own},
        {spec.name for spec in stack.layout.with_role("constant")},
    )


def _plan(
    base: Any,
    experts: Mapping[str, Any],
    route: str | Route,
    init: str,
    static_weight: float,
    dtype: torch.dtype | str | None,
    delta_dtype: torch.dtype | str | None,
    planes: str | torch.dtype,
    heads: Sequence[str],
    allow_misfit: bool,
    objectives: Mapping[str, Sequence[str]] | None,
    transform: str | None,
    tokenizer: str | None,
) -> Plan:
    if not isinstance(experts, Mapping):
        raise TypeError(f"got experts of type {type(experts).__name__}, expected a dict {{name: model}}")
    check_init(init)
    change = None if transform is None else parse_transform(transform)
    names = merged_dtype_name(dtype, "dtype"), merged_dtype_name(delta_dtype, "delta_dtype")
    wanted = parse(planes)
    if wanted.dtype and names[1]:
        raise ValueError(f"got planes={planes!r} and delta_dtype={delta_dtype}, expected only one of them")
    source = resolve(base, "the base")
    if len({str(name) for name in experts}) < len(experts):
        raise ValueError(f"got experts named {list(experts)}, expected names that differ as text")
    sources = {str(name): resolve(model, f"expert {name!r}", source) for name, model in experts.items()}
    fitted: tuple[str, ...] = ()
    if tokenizer is not None:
        from paretofuse.recipes.stacked_vocabulary import with_one_vocabulary

        source, sources, fitted = with_one_vocabulary(tokenizer, source, sources, (base, experts))
    misfits = [
        note for expert in sources.values() for note in check_configurations(source, expert, allow_misfit)
    ]
    plan = make_plan(
        source,
        sources,
        route=route,
        static_weight=static_weight,
        dtype=names[0],
        delta_dtype=wanted.dtype or names[1],
        heads=heads,
        planes=wanted,
        objectives=objectives,
    )
    changes: tuple[str, ...] = ()
    if change is not None:
        if source.blueprint.shardings:
            raise ValueError(
                f"got transform={transform!r} of sharded tensors, whose elements no process sees all of; transform "
                "whole models"
            )
        changes = (f"every expert's difference is transformed by {transform}",)
    return replace(plan, notes=(*fitted, *misfits, *plan.notes, *changes), transform=change)


def _notes(plan: Plan) -> tuple[str, ...]:
    """What a user should know, once every tensor was read."""
    return (*plan.notes, *plan.norms.notes(expert.label for expert in plan.experts.values()))


def _threads_for(plan: Plan) -> AbstractContextManager[None]:
    """All of torch's threads where planes are computed: those that are neither dense nor an adapter's own factors."""
    computed = plan.planes.kind != "dense" and not all(e.factors for e in plan.experts.values())
    return nullcontext() if computed else one_thread()


def _device(device: str | torch.device) -> torch.device:
    """The device of a name.

    Raises:
        ValueError, TypeError: it names none.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"got device={device!r}, expected a torch.device or a name such as 'cuda:0'")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"got device={device!r}, expected a name such as 'cpu' or 'cuda:0'") from error
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"got device={str(device)!r}, which cannot be used here ({reason}); take 'cpu', or a machine that has it"
        ) from error
    return place


def _blueprint(plan: Plan) -> Blueprint:
    """What makes models of a plan's tensors, in the dtype that was asked for."""
    dtype = TO_TORCH[plan.dtype] if plan.dtype else None
    heads = {}
    for objective, names in plan.heads.items():
        expert = plan.head_expert(objective)
        if names:
            heads[objective] = _converted(expert.blueprint, dtype)
    return replace(_converted(plan.base.blueprint, dtype), heads=heads)


def _converted(blueprint: Blueprint, dtype: torch.dtype | None) -> Blueprint:
    """A blueprint whose module and configuration have the dtype; what is not stored (rotary tables) follows too."""
    if dtype is None:
        return blueprint
    original, files = blueprint.skeleton, dict(blueprint.files)
    if hf.CONFIG in files:
        config = json.loads(files[hf.CONFIG])
        if other_classes.class_name(config) is None:  # timm and diffusers know no dtype there
            config["dtype"] = str(dtype).removeprefix("torch.")
            files[hf.CONFIG] = json.dumps(config, indent=2).encode()
    skeleton = cache(lambda: copy.deepcopy(original()).to(dtype)) if original is not None else None
    return replace(blueprint, skeleton=skeleton, files=files)


def _blueprint_of(
    files: Mapping[str, bytes], model_class: str | None, owners: Mapping[str, str]
) -> Blueprint:
    """The blueprint of a stored model, by the library that its files belong to."""
    if openclip.CONFIG in files:
        return openclip.blueprint_from_files(files)
    if hf.CONFIG in files:
        return hf.blueprint_from_files(files, owners=owners)
    return Blueprint(files=dict(files), model_class=model_class)
