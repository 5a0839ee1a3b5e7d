"""`pf.export`: the dense model compiled ahead of time (torch.export and AOTInductor), for programs without Python.

The package runs by itself, at the preference it was made for, and its weights can be replaced by those of any other:
every tensor of the engine that the model uses stays a constant with its own name, which a program may point at the
memory of `paretofuse::Engine` once (`load_constants` with `user_managed`), so that each switch changes the model.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from paretofuse.adapters import hf
from paretofuse.engine.engine import Engine
from paretofuse.engine.routing.preference import Preference, as_preference
from paretofuse.engine.store.atomic import fresh_named

_INLINED = 8  # AOTInductor writes vectors of up to so many numbers into the code

_COMPILER = {"joint_graph_constant_folding": False}
"""Without it, tensors whose elements are all equal (a fresh norm's) would become numbers in the code."""


def export(
    engine: Engine,
    path: str | os.PathLike[str],
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    dynamic: Sequence[int] | None = None,
    preference: Preference | None = None,
    head: str | None = None,
) -> Path:
    """Compile the engine's dense model into an AOTInductor package.

    Args:
        engine: on the CPU or a GPU; the package is for the same kind of device.
        path: the package to write; ends in .pt2. An older one is replaced.
        inputs: example inputs of the model's forward: a sequence of arguments, or a dict of keyword arguments. Axes
            that may vary need a size of at least 2 here. None for Hugging Face models that read `input_ids`.
        dynamic: axes of every input tensor that may vary, where the model allows it: the first by default, and the
            first two (batch and length) where `inputs` is None.
        preference: what the package holds until its weights are replaced; equal weights by default.
        head: the objective whose own tensors the model gets; they stay as they are.

    Returns:
        The path.

    Raises:
        ValueError: a wrong path, preference or head, no inputs, or a model class that is not known.
        RuntimeError: PyTorch cannot export or compile the model, or has put weights into the code.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(f"got path {str(path)!r}, expected a name that ends in .pt2")
    program = _program(engine, inputs, dynamic, preference, head)
    with fresh_named(target) as package:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(package), inductor_configs=dict(_COMPILER)
        )
        _check_constants(program, engine, package)
    return target


def _program(
    engine: Engine,
    inputs: Sequence[Any] | Mapping[str, Any] | None,
    dynamic: Sequence[int] | None,
    preference: Preference | None,
    head: str | None,
) -> ExportedProgram:
    """The dense model as a graph whose weights a compiler leaves alone."""
    count = len(engine.objectives)
    shares = (
        [1 / count] * count if preference is None else as_preference(preference, engine.objectives).tolist()
    )
    module: nn.Module = engine.merge(shares, head=head).eval()
    if inputs is None:
        inputs, usual = _text_inputs(engine, module), [0, 1]
    else:
        usual = [0]
    axes = usual if dynamic is None else list(dynamic)
    arguments, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    shapes = (
        {name: _dynamic(value, axes) for name, value in named.items()}
        if named
        else tuple(_dynamic(value, axes) for value in arguments)
    )
    with torch.no_grad():
        program = torch.export.export(module, arguments, named, dynamic_shapes=shapes or None)
    _keep_small_tensors(program)
    return program


def _text_inputs(engine: Engine, module: nn.Module) -> dict[str, Any]:
    """Example inputs of a Hugging Face model that reads tokens."""
    forward: Callable[..., Any] = module.forward
    if hf.CONFIG not in engine.blueprint.files or "input_ids" not in inspect.signature(forward).parameters:
        raise ValueError(
            f"got no inputs for {type(module).__name__}, which is no Hugging Face model that reads tokens; pass "
            "example inputs, inputs="
        )
    known = inspect.signature(forward).parameters
    fixed = {name: False for name in ("use_cache", "return_dict") if name in known}
    return {"input_ids": torch.ones(2, 8, dtype=torch.int64, device=engine.device), **fixed}


def _dynamic(value: Any, axes: Sequence[int]) -> Any:
    if not isinstance(value, Tensor):
        return None
    return {axis: Dim.AUTO for axis in axes if axis < value.dim()}


def _keep_small_tensors(program: ExportedProgram) -> None:
    """Store scalars and short vectors as rows [1, n], which AOTInductor does not write into the code as numbers."""
    graph, state = program.graph_module.graph, program.state_dict
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    rows: dict[int, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        name = spec.target
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or name is None or name not in state:
            continue
        tensor = state[name]
        if tensor.dim() > 1 or tensor.numel() > _INLINED:
            continue
        row = rows.setdefault(id(tensor), tensor.detach().reshape(1, -1))
        state[name] = nn.Parameter(row, False) if spec.kind == InputKind.PARAMETER else row
        node = nodes[spec.arg.name]
        with graph.inserting_before(first):
            view = graph.call_function(torch.ops.aten.view.default, (node, list(tensor.shape)))
        view.meta = dict(node.meta)
        node.replace_all_uses_with(view, delete_user_cb=lambda user, view=view: user is not view)
        node.meta = {**node.meta, "val": node.meta["val"].reshape(1, -1)}
    program.graph_module.recompile()


def _check_constants(program: ExportedProgram, engine: Engine, package: Path) -> None:
    """Raise RuntimeError if a tensor of the engine that the model uses is no constant of the package."""
    specs = engine.layout.by_name
    used = {node.name for node in program.graph_module.graph.nodes if node.op == "placeholder" and node.users}
    wanted = {
        specs[spec.target].name
        for spec in program.graph_signature.input_specs
        if spec.target in specs and spec.arg.name in used and specs[spec.target].role != "constant"
    }
    loaded = torch._inductor.aoti_load_package(str(package))
    found = {specs[name].name for name in loaded.get_constant_fqns() if name in specs}
    if lost := sorted(wanted - found):
        raise RuntimeError(
            f"PyTorch {torch.__version__} has put {', '.join(lost[:4])} into the code of the package, so a switch "
            "could not replace it; please report this with the model's class"
        )
