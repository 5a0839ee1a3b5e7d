"""Sketches: gradients are those of low-rank planes, merges are of the whole ones, no linear weight has a gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.lowrank import LowRank, token_sums
from paretofuse.engine.planes.plane import Sums
from paretofuse.engine.planes.sketch import sketch
from paretofuse.engine.planes.trained import trained_planes
from tests.modules.test_linear_coefficients import Attention, learned
from tests.support.models import perturbed, tiny_gpt2
from tests.training.test_fit import equal, problem, state

R = [0.2, 0.3, 0.5]
RANK = 3
Call = Callable[..., Tensor]


@contextmanager
def sketched(engine: Engine, rank: int = RANK, *, materialize: bool = True) -> Iterator[None]:
    """What pf.fit does around its steps."""
    with engine._in_place.sketched(rank, materialize=materialize):
        yield


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 33), nn.ReLU(inplace=True), nn.LayerNorm(33), nn.Linear(33, 29)).eval()


def experts_of(base: nn.Module) -> dict[str, nn.Module]:
    return {name: perturbed(base, i + 1, 0.05) for i, name in enumerate("abc")}


def expected(
    engine: Engine, loss: Callable[[Call], Tensor], sketches: Callable[[str, int], Tensor | None]
) -> Tensor:
    """dLoss/dL or dLoss/dC in float64 by plain autograd of W, as the sums with the planes' stand-ins."""
    model = copy.deepcopy(engine.module).double().requires_grad_(True)
    loss(model).backward()
    found = torch.zeros(engine.routers.width, len(engine.experts), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        spec = engine.layout.by_name[name]
        assert parameter.grad is not None
        for j, own in enumerate(engine._stack.planes):
            if spec.name not in own:
                continue
            stand_in = sketches(spec.name, j)
            delta = own[spec.name].decode().double() if stand_in is None else stand_in.double()
            products = (parameter.grad * delta).reshape(parameter.shape[0] if parameter.dim() > 1 else 1, -1)
            found[engine.groups.index(str(spec.group)), j] += products.sum()
            spans = engine.layout.spans[spec.name]
            if engine.routers.rows is not None:
                found[spans.rows, j] += products.sum(1)
            if engine.routers.columns is not None and spans.columns is not None:
                found[spans.columns, j] += products.sum(0)
    return found


def of_rank(engine: Engine, names: set[str], rank: int = RANK) -> Callable[[str, int], Tensor | None]:
    """The sketches of these tensors' planes."""

    def stand_in(name: str, j: int) -> Tensor | None:
        own = sketch(engine._stack.planes[j][name], rank) if name in names else None
        return None if own is None else own.decode()

    return stand_in


def close(ours: Tensor, exact: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == exact.shape
    assert (ours - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("by", get_args(Sums))
def test_sums_over_tokens_are_products_with_the_weights_gradient(by: Sums) -> None:
    torch.manual_seed(1)
    planes = [LowRank(torch.randn(7, r).bfloat16(), torch.randn(r, 5).bfloat16(), (7, 5)) for r in (2, 1, 9)]
    given = [planes[0], None, Dense(torch.randn(7, 5)), *planes[1:]]
    left, right = torch.randn(11, 7), torch.randn(11, 5)
    gradient = left.double().T @ right.double()
    sums = token_sums(given, left, right, by)
    zero = torch.zeros(7, 5, dtype=torch.float64)
    products = torch.stack(
        [gradient * p.decode().double() if isinstance(p, LowRank) else zero for p in given]
    )
    rows, columns = products.sum(2), products.sum(1)
    exact = {"whole": rows.sum(1), "row": rows, "row and column": torch.cat([rows, columns], 1)}[by]
    close(sums, exact, 1e-6)
    assert torch.equal(token_sums([None, given[2]], left, right, by), torch.zeros(2, *exact.shape[1:]))
    assert not token_sums(planes, left[:0], right[:0], by).any()


def test_a_sketch_is_the_nearest_plane_of_its_rank() -> None:
    torch.manual_seed(0)
    # Sizes that fall as those of a fine-tuned layer do, beyond which directions are not told apart.
    u, v = torch.linalg.qr(torch.randn(90, 60)).Q, torch.linalg.qr(torch.randn(60, 60)).Q
    sizes = 1.0 / (1 + torch.arange(60))
    delta = (u * sizes) @ v.T
    for rank in (1, 4, 16, 40, 60, 100):
        own = sketch(Dense(delta), rank)
        assert own is not None
        assert own.rank == min(rank, 60)
        error, best = (delta - own.decode()).norm(), sizes[rank:].norm()
        assert error <= 1.02 * best + 1e-5
    assert sketch(None, 4) is None
    held = LowRank(torch.randn(9, 6), torch.randn(6, 8), (9, 8))
    assert sketch(held, 2) is held
    zero = sketch(Dense(torch.zeros(50, 40)), 2)
    assert zero is not None
    assert not zero.decode().any()
    outside = torch.random.get_rng_state()
    first, second = sketch(Dense(delta), 4), sketch(Dense(delta), 4)
    assert first is not None
    assert second is not None
    assert torch.equal(first.b, second.b)
    assert torch.equal(outside, torch.random.get_rng_state())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("planes", ["dense", "int8"])
@pytest.mark.parametrize("family", ["scalar", "rows"])
def test_gradients_are_those_of_sketched_deltas(family: str, planes: str, backend: str) -> None:
    base = net()
    engine = learned(
        pf.stack(base, experts_of(base), route="tensor", family=family, planes=planes, backend=backend)
    )
    x = torch.randn(3, 5, 40)

    def loss(model: Call) -> Tensor:
        return model(x.to(next(model.parameters()).dtype)).square().mean()  # type: ignore[attr-defined]

    for rank, linear in ((RANK, {"0.weight", "3.weight"}), (40, set[str]())):  # full rank: the exact gradient
        engine.train_at(R)
        exact = expected(engine, loss, of_rank(engine, linear, rank))
        modes = (True, False) if backend == "native" else (True,)
        for materialize in modes:
            with sketched(engine, rank, materialize=materialize):
                engine.train_at(R, materialize=materialize)
                module = engine.module if materialize else engine.fused_module
                close(engine.jacobian([loss(module)])[0], exact)
    engine.train_at(R)
    close(engine.jacobian([loss(engine.module)])[0], expected(engine, loss, lambda name, j: None))


def test_linear_layers_make_no_weight_gradient_and_all_else_does() -> None:
    base = net()
    engine = pf.stack(base, experts_of(base))
    made = set()
    engine.train_at(R)
    for name, parameter in engine.module.named_parameters():
        parameter.register_hook(lambda gradient, name=name: made.add(name))
    x = torch.randn(5, 40)
    with sketched(engine):
        engine.train_at(R)
        output = engine.module(x)
        assert all(parameter.requires_grad for parameter in engine.module.parameters())
        engine.jacobian([output.sum()])
        assert made == {"0.bias", "2.weight", "2.bias", "3.bias"}
        engine.switch(R)
        assert not engine.module(x).requires_grad
        engine.train_at(R)
        with torch.no_grad():
            assert not engine.module(x).requires_grad
    engine.train_at(R)
    assert torch.equal(engine.module(x), output)
    engine.jacobian([engine.module(x).sum()])
    assert {"0.weight", "3.weight"} < made
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in engine.module.modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # an old name, known to every transformers 5
@pytest.mark.parametrize("materialize", [True, False])
def test_gpt2_whose_conv1d_is_transposed_and_whose_output_layer_is_tied(materialize: bool) -> None:
    base = tiny_gpt2()
    engine = learned(pf.stack(base, experts_of(base), family="rows"))
    ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))

    def loss(model: Call) -> Tensor:
        logits = model(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    names = {f"transformer.h.{i}.{part}.weight" for i in range(2)
             for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip
    engine.train_at(R)
    exact = expected(engine, loss, of_rank(engine, names))
    with sketched(engine, materialize=materialize):
        engine.train_at(R, materialize=materialize)
        module = engine.module if materialize else engine.fused_module
        close(engine.jacobian([loss(module)])[0], exact, 1e-4)


@pytest.mark.parametrize("materialize", [True, False])
def test_attention_is_sketched_layer_by_layer_and_exact_in_the_live_module(materialize: bool) -> None:
    torch.manual_seed(0)
    base = Attention()
    engine = learned(pf.stack(base, experts_of(base), family="rows"))
    ids = torch.randint(0, 11, (3, 5))
    names = {"out.weight"} | (set() if materialize else {"attend.in_proj_weight", "attend.out_proj.weight"})
    engine.train_at(R)
    exact = expected(engine, lambda model: model(ids).square().mean(), of_rank(engine, names))
    with sketched(engine, materialize=materialize):
        engine.train_at(R, materialize=materialize)
        module = engine.module if materialize else engine.fused_module
        close(engine.jacobian([module(ids).square().mean()])[0], exact, 1e-4)


class Reads(nn.Module):
    """A weight that is read past its layer, a layer that is called twice, and activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(24, 24, bias=False), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(input=x))
        x = checkpoint(self.body, x, use_reentrant=False)
        return F.linear(self.out(x).relu_(), self.out.weight)


def test_weights_that_are_read_past_their_layer_and_layers_that_run_twice() -> None:
    torch.manual_seed(0)
    base = Reads()
    engine = pf.stack(base, experts_of(base), route="tensor")
    x = torch.randn(5, 24)
    full = 24
    engine.train_at(R)
    exact = expected(engine, lambda model: model(x.to(model.out.weight.dtype)).sum(), lambda name, j: None)  # type: ignore[attr-defined]
    with sketched(engine, full):
        engine.train_at(R)
        close(engine.jacobian([engine.module(x).sum()])[0], exact)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            engine.module(torch.randn(5, 23))
        assert all(parameter.requires_grad for parameter in engine.module.parameters())
        assert not torch.equal(exact, torch.zeros_like(exact))


@pytest.mark.parametrize("shape", [(40,), (1, 40), (0, 40), (2, 3, 40)])
def test_any_number_of_axes_before_the_inputs_is_served(shape: tuple[int, ...]) -> None:
    base = net()
    engine = pf.stack(base, experts_of(base), route="tensor")
    x = torch.randn(shape)

    def loss(model: Call) -> Tensor:
        return model(x.to(next(iter(model.parameters())).dtype)).square().sum()  # type: ignore[attr-defined]

    with sketched(engine):
        engine.train_at(R)
        (ours,) = engine.jacobian([loss(engine.module)])
    close(ours, expected(engine, loss, of_rank(engine, {"0.weight", "3.weight"})))


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("family", ["scalar", "rows"])
def test_trained_planes_keep_their_exact_gradients(family: str, materialize: bool) -> None:
    base = net()
    engine = pf.stack(base, experts_of(base), route="tensor", family=family)
    pf.add_planes(engine, 2)
    learned(engine)
    planes = trained_planes(engine.routers)
    assert planes is not None
    with torch.no_grad():
        for factor in planes.factors:
            factor.add_(0.1 * torch.randn(factor.shape))
    x = torch.randn(6, 40)
    found = []
    for context in (nullcontext(), sketched(engine, 33, materialize=materialize)):
        with context:
            engine.train_at(R, materialize=materialize)
            module = engine.module if materialize else engine.fused_module
            found.append(engine.jacobian([module(x).square().mean()], flat=True))
    assert found[0][0, -planes.size :].abs().median() > 0
    close(found[1], found[0])


@pytest.mark.parametrize("materialize", [True, False])
def test_fit_repeats_resumes_and_knows_the_rank(materialize: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 8, "sketch": 2, "materialize": materialize, "progress": False}
    whole = []
    for _ in range(2):
        engine, objectives = problem()
        engine.fused_module.train()
        pf.fit(engine, objectives, **settings)
        whole.append(state(engine))
    assert equal(*whole)
    path = tmp_path / "run.ckpt"
    engine, objectives = problem()
    engine.fused_module.train()
    pf.fit(engine, objectives, checkpoint=path, callback=lambda record: record["step"] == 5, **settings)
    engine, objectives = problem()
    engine.fused_module.train()
    assert pf.fit(engine, objectives, checkpoint=path, **settings)[0]["step"] == 6
    assert equal(whole[0], state(engine))
    for other in (None, 3):
        engine, objectives = problem()
        engine.fused_module.train()
        with pytest.raises(ValueError, match=rf"sketch=2 \(now {other}\)"):
            pf.fit(engine, objectives, checkpoint=path, **{**settings, "sketch": other})
    exact, objectives = problem()
    exact.fused_module.train()
    pf.fit(exact, objectives, **{**settings, "sketch": None})
    assert not equal(whole[0], state(exact))


def test_a_fused_module_keeps_its_training_mode_when_it_is_made_anew() -> None:
    engine = problem(family="scalar")[0]
    engine.fused_module.train()
    engine.fused_module.net[2].eval()
    held = engine.fused_module
    engine.set_family("rows")
    assert engine.fused_module is not held
    assert [m.training for m in engine.fused_module.modules()] == [m.training for m in held.modules()]
    assert engine.fused_module.training
    assert not engine.fused_module.net[2].training


def test_what_is_refused() -> None:
    engine, objectives = problem()
    for wrong, kind in (
        (0, ValueError),
        (-3, ValueError),
        (2.5, TypeError),
        (True, TypeError),
        ("16", TypeError),
    ):
        with pytest.raises(kind, match="got sketch="):
            pf.fit(engine, objectives, steps=1, sketch=wrong, progress=False)  # type: ignore[arg-type]
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    convolutions = pf.stack(base, experts_of(base))
    tasks = {name: ([torch.randn(2, 3, 5, 5)], lambda module, x: module(x).square().mean()) for name in "abc"}
    for materialize in (True, False):
        with pytest.raises(ValueError, match="got sketch=4 for a model without routed linear layers"):
            pf.fit(convolutions, tasks, steps=1, sketch=4, materialize=materialize, progress=False)
    reference, objectives = problem(backend="reference")
    with pytest.raises(ValueError, match=r"sketch=4 and materialize=False with the reference backend"):
        pf.fit(reference, objectives, steps=1, sketch=4, materialize=False, progress=False)
