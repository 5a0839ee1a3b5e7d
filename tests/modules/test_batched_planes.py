"""A preference for each row over low-rank and absent planes: two thin products, and nothing where nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.modules.batched.module import PerRow
from paretofuse.engine.modules.routed.low_rank import SideBySide
from paretofuse.engine.planes import choose
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.stacking import deltas
from tests.modules.test_batched import ROWS, Layers, check
from tests.modules.test_routed import random_routers, tiny_clip
from tests.support.models import net_and_experts, perturbed, tiny_gpt2

# On the CPU torch.vmap runs PyTorch's attention row by row, and says so once.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.fixture(autouse=True)
def _tiny_matrices_are_low_rank_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large ones are; stacking keeps the smallest exact."""
    for user in (choose, deltas):
        monkeypatch.setattr(user, "may_be_small", lambda shape: len(shape) > 1)


def engine_of(base: nn.Module, changes: str = "", planes: str = "lowrank:2", **options: object) -> Engine:
    """Experts that differ from the base in tensors whose names hold `changes`, and planes of a low rank."""
    experts = {name: perturbed(base, i, 0.05) for i, name in enumerate("abc")}
    start = base.state_dict()
    for expert in experts.values():
        expert.load_state_dict({n: t if changes in n else start[n] for n, t in expert.state_dict().items()})
    engine = pf.stack(base, experts, route="tensor", planes=planes, **options)  # type: ignore[arg-type]
    random_routers(engine)
    return engine


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_net_with_everything_that_is_hard(backend: str) -> None:
    engine = engine_of(net_and_experts()[0], planes="lowrank:1", backend=backend)
    assert "lowrank" in {plane.format for plane in engine.planes["a"].values()}
    check(engine, lambda m, x: m(x), torch.randn(4, 8))


def test_gpt2_whose_embeddings_are_low_rank_too() -> None:
    engine = engine_of(tiny_gpt2())
    assert engine.planes["a"]["transformer.wte.weight"].format == "lowrank"
    ids = torch.randint(0, 101, (4, 12), generator=torch.Generator().manual_seed(0))
    check(engine, lambda m, x: m(x).logits, ids)


def test_convolutions_and_attention() -> None:
    engine = engine_of(tiny_clip())
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    check(engine, lambda m, x: m(pixel_values=x).pooler_output, images)
    torch.manual_seed(0)
    check(engine_of(Layers().eval()), lambda m, x: m(x), torch.randn(4, 3, 5), rtol=1e-4)


def test_layers_that_nothing_changes_are_the_bases_own() -> None:
    """As with LoRA experts: norms, embeddings and the head; any number of rows, as of position ids, goes through."""
    base = tiny_gpt2()
    engine = engine_of(base, changes="attn.c_attn.weight")
    ids = torch.randint(0, 101, (4, 6), generator=torch.Generator().manual_seed(0))
    batched = check(engine, lambda m, x: m(x).logits, ids)
    assert not [name for name, layer in batched.named_modules() if isinstance(layer, PerRow)]
    own, named = dict(base.named_parameters()), dict(batched.named_parameters())
    assert torch.equal(named["transformer.wte.weight"], own["transformer.wte.weight"])
    assert batched.transformer.h[0].attn.c_attn.weight.isnan().all()  # type: ignore[union-attr, index]


def test_no_plane_is_made_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny_gpt2())
    batched = engine.batched(ROWS)
    monkeypatch.setattr(LowRank, "decode", lambda plane: pytest.fail(f"decoded a plane of {plane.shape}"))
    with torch.no_grad():
        batched(torch.randint(0, 101, (4, 3)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("coefficients", ["scalars", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thin_products_are_those_of_dense_planes(
    transposed: bool, coefficients: str, dtype: torch.dtype
) -> None:
    """Ranks 1, 3 and 63, of which the second belongs to no listed plane's neighbour: plane 1 has none."""
    outs, ins, count = 33, 65, 4
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    planes, dense = {}, torch.zeros(count, outs, ins, dtype=torch.float64)
    for e, rank in ((0, 1), (2, 3), (3, 63)):
        rows, columns = (ins, outs) if transposed else (outs, ins)
        planes[e] = LowRank.of_factors(draw(rows, rank).float(), draw(rank, columns).float(), (rows, columns))
        whole = planes[e].b.double() @ planes[e].a.double()
        dense[e] = whole.T if transposed else whole
    x = draw(5, 7, ins).to(dtype)
    scalars = coefficients == "scalars"
    weights = draw(5, count, *([] if scalars else [ins if transposed else outs])).float()
    wide = weights.double()
    if scalars:
        parts = torch.einsum("bpi,eoi,be->bpo", x.double(), dense, wide)
    elif transposed:
        parts = torch.einsum("bpi,eoi,bei->bpo", x.double(), dense, wide)
    else:
        parts = torch.einsum("bpi,eoi,beo->bpo", x.double(), dense, wide)
    side = SideBySide.of(planes, transposed)
    found = side.product(x, weights, transposed)
    assert found.dtype == torch.float32
    assert (found - parts).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * parts.norm()
    if not transposed:
        part = side.part(5, 9).product(x, weights if scalars else weights[..., 5:9], transposed)
        torch.testing.assert_close(part, found[..., 5:9], rtol=1e-2, atol=1e-2 * float(parts.std()))
