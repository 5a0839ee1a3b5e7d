"""Every operator as PyTorch's compilers see it: opcheck, whole graphs, export, and capture in a CUDA graph.

Operators that need a GPU for their numbers are checked by their fake implementations here, and by value in Triton's
interpreter (`test_kernels_*_interpreted.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap

import paretofuse.engine.modules.routed.layerwise
import paretofuse.kernels.routed_linear
import paretofuse.kernels.routed_merge
import paretofuse.kernels.routed_rows  # noqa: F401  (each registers its operators)

ops = torch.ops.paretofuse

E, G, K, TILE, N = 3, 2, 2, 32, 96
TILE_GROUP = torch.tensor([1, 0, 1], dtype=torch.int32)
"""The group of each tile."""


def inputs(device: str = "cpu", seed: int = 0) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator by name."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    base, deltas, tiles = r(N), r(E, N), TILE_GROUP.to(device)
    plan = [torch.tensor(t, dtype=torch.int32, device=device) for t in ([1, 0, 2], [0, 1, 3], [0, 1, 2])]
    weight, planes = r(6, 7), r(E, 6, 7)
    return {
        "routed_merge": (base, deltas, tiles, r(K, G, E), None, TILE),
        "routed_merge_out": (
            base,
            deltas,
            tiles,
            r(K, G, E),
            None,
            None,
            torch.zeros(K, N, device=device),
            TILE,
            0,
        ),
        "group_sums": (r(3, E), *plan),
        "routed_linear": (r(5, 7), weight, planes, r(E), r(6)),
        "routed_linear_weights_grad": (r(5, 6), r(5, 7), planes),
        "routed_rows": (r(4, 2, 7), weight, planes, r(4, E), r(4, 6)),
        "routed_rows_weights_grad": (r(4, 2, 6), r(4, 2, 7), planes),
    }


ON_CPU = [name for name in inputs() if not name.startswith("routed_merge")]
"""Operators with an implementation for the CPU; the merge's is the native core, which is no operator."""


def wrapped(name: str) -> Callable[..., Any]:
    return lambda *arguments: getattr(ops, name)(*arguments)


def test_every_operator_is_here() -> None:
    known = {str(schema).partition("(")[0] for schema in torch._C._jit_get_all_schemas()}
    ours = {n.removeprefix("paretofuse::") for n in known if n.startswith("paretofuse::")}
    layerwise = {
        "layerwise_linear",
        "layerwise_weights_grad",
        "layerwise_factors_grad",
    }  # tests/modules, training
    assert ours == set(inputs()) | layerwise


@pytest.mark.parametrize("name", ON_CPU)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, inputs()[name])


@pytest.mark.parametrize("name", list(inputs()))
def test_fake_implementations_give_shapes_without_a_device(name: str) -> None:
    """What torch.compile sees of each operator, the merge's too, whose kernel needs a GPU."""
    shapes = {
        "routed_merge": (K, N), "group_sums": (G, E), "routed_linear": (5, 6),
        "routed_linear_weights_grad": (E,), "routed_rows": (4, 2, 6), "routed_rows_weights_grad": (4, E),
    }  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in inputs()[name]]
        found = getattr(ops, name)(*arguments)
    assert found is None if name == "routed_merge_out" else tuple(found.shape) == shapes[name]


@pytest.mark.parametrize("name", ON_CPU)
def test_compiles_as_one_graph(name: str) -> None:
    arguments = inputs()[name]
    compiled = torch.compile(wrapped(name), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), wrapped(name)(*arguments))


@pytest.mark.parametrize("name", ON_CPU)
def test_exports_as_one_node(name: str) -> None:
    class Module(nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return getattr(ops, name)(*arguments)

    arguments = inputs()[name]
    program = torch.export.export(Module(), arguments)
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert calls == [getattr(ops, name).default]
    torch.testing.assert_close(program.module()(*arguments), getattr(ops, name)(*arguments))


@pytest.mark.parametrize("name", ["routed_linear", "routed_rows"])
def test_gradients_flow_through_a_compiled_graph(name: str) -> None:
    x, base, deltas, weights, bias = inputs()[name]

    def loss(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = getattr(ops, name)(x, base, deltas, weights, bias)
        return found.square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, weights, bias)]
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("mapped", [(0, 0, 0), (None, 0, None), (1, None, 0)], ids=str)
def test_rows_under_vmap(mapped: tuple[int | None, ...]) -> None:
    """Mapping over batches of rows is one larger batch, gradients included."""
    _, base, deltas, _, _ = inputs()["routed_rows"]
    sizes = ((4, 2, 7), (4, E), (4, 6))
    g = torch.Generator().manual_seed(1)
    leaves = []
    for size, dim in zip(sizes, mapped, strict=True):
        shape = list(size)
        if dim is not None:
            shape.insert(dim, 5)
        leaves.append(torch.randn(shape, generator=g).requires_grad_())
    found = vmap(lambda x, w, b: ops.routed_rows(x, base, deltas, w, b), in_dims=mapped)(*leaves)
    rows = [
        [t if d is None else t.select(d, i) for t, d in zip(leaves, mapped, strict=True)] for i in range(5)
    ]
    truth = torch.stack([ops.routed_rows(x, base, deltas, w, b) for x, w, b in rows])
    torch.testing.assert_close(found, truth)
    upstream = torch.randn(truth.shape, generator=g)
    ours, theirs = (torch.autograd.grad(y, leaves, upstream) for y in (found, truth))
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("name", list(inputs()))
def test_captured_in_a_cuda_graph(name: str) -> None:
    """A replay reads the arguments anew."""
    arguments, other = inputs("cuda"), inputs("cuda", seed=1)
    target, fresh = arguments[name], other[name]
    index = 5 if name == "routed_merge_out" else None

    def call() -> Tensor:
        found: Tensor = getattr(ops, name)(*target)
        return found if index is None else target[index]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for mine, new in zip(target, fresh, strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(new)
    graph.replay()
    expected = getattr(ops, name)(*fresh)
    torch.testing.assert_close(result, expected if index is None else fresh[index])
