"""A preference for each row: every row equals its own merged model, outputs and gradients of the routers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.modules.batched.module import PerRow
from paretofuse.engine.modules.routed.layers import RoutedLinear
from tests.modules.test_routed import layers, random_routers, tiny_clip, tiny_tower
from tests.support.models import Net, net_and_experts, perturbed, tiny_gpt2

ROWS = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.1, 0.1, 0.8]])

# On the CPU torch.vmap runs PyTorch's attention row by row, and says so once.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

Call = Callable[[nn.Module, Tensor], Tensor]


def engine_of(base: nn.Module, **options: object) -> Engine:
    experts = {name: perturbed(base, i, 0.05) for i, name in enumerate("abc")}
    engine = pf.stack(base, experts, **{"route": "tensor", **options})
    random_routers(engine)
    return engine


def check(engine: Engine, call: Call, x: Tensor, rtol: float = 2e-5, isolate: bool = False) -> nn.Module:
    """Row by row: outputs without and with gradients, and the routers' gradients, of two passes."""
    batched = engine.batched(ROWS, isolate=isolate)
    merged = torch.cat([call(engine.merge(r), x[i : i + 1]) for i, r in enumerate(ROWS)]).detach()
    with torch.no_grad():
        found = [call(batched, x) for _ in range(2)]
    found.append(call(batched, x))
    for result in found:
        torch.testing.assert_close(result.detach(), merged, rtol=rtol, atol=rtol)
    (found[2].square().mean() * 0.5).backward()
    (call(batched, x).square().mean() * 0.5).backward()
    ours = [p.grad.clone() for p in engine.routers.parameters()]
    engine.routers.zero_grad()
    for i, r in enumerate(ROWS):
        engine.train_at(r)
        (call(engine.module, x[i : i + 1]).square().mean() / len(ROWS)).backward()
    for mine, p in zip(ours, engine.routers.parameters(), strict=True):
        scale = p.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(mine, p.grad, rtol=10 * rtol, atol=10 * rtol * scale)
    engine.routers.zero_grad()
    return batched


def holds_no_merged_weight(batched: nn.Module, engine: Engine) -> None:
    """Nothing stored is as large as a weight: parameters are holes of NaN without memory."""
    for name, parameter in batched.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.element_size(), name
        assert parameter.isnan().all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_net_with_everything_that_is_hard(backend: str) -> None:
    engine = engine_of(net_and_experts()[0], backend=backend)
    batched = check(engine, lambda m, x: m(x), torch.randn(4, 8))
    assert layers(batched, RoutedLinear) == ["inner.first", "inner.second", "inner.tied", "inner.head"]
    holds_no_merged_weight(batched, engine)


def test_gpt2_with_padding_cache_and_generation() -> None:
    engine = engine_of(tiny_gpt2())
    ids = torch.randint(0, 101, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, :5] = 0

    def call(model: nn.Module, rows: Tensor) -> Tensor:
        own = mask if len(rows) == 4 else mask[[next(i for i in range(4) if torch.equal(ids[i], rows[0]))]]
        return model(rows, attention_mask=own).logits * own[:, :, None]

    batched = check(engine, call, ids)
    assert type(batched) is type(engine.module)
    holds_no_merged_weight(batched, engine)
    texts = batched.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    for i, r in enumerate(ROWS):
        own = engine.merge(r).generate(ids[i : i + 1], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(texts[i, : own.shape[1]], own[0])


def test_gpt2_isolated_gives_a_loss_for_each_row() -> None:
    engine = engine_of(tiny_gpt2())
    ids = torch.randint(0, 101, (4, 4), generator=torch.Generator().manual_seed(0))
    check(engine, lambda m, x: m(x, use_cache=False).logits, ids, isolate=True)
    losses = engine.batched(ROWS, isolate=True)(ids, labels=ids, use_cache=False).loss
    for i, r in enumerate(ROWS):
        torch.testing.assert_close(losses[i], engine.merge(r)(ids[i : i + 1], labels=ids[i : i + 1]).loss)
    with pytest.raises(TypeError, match=r"the model runs .* gave a DynamicCache.*use_cache=False"):
        engine.batched(ROWS, isolate=True)(ids)


@pytest.mark.parametrize("route", ["module", "mlp"])
def test_clip_vision_model(route: str) -> None:
    engine = engine_of(tiny_clip(), route=route)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batched = check(engine, lambda m, x: m(pixel_values=x).pooler_output, images)
    assert type(batched) is type(engine.module)
    if route == "module":
        holds_no_merged_weight(batched, engine)


@pytest.mark.parametrize("text", [False, True], ids=["vision", "text"])
def test_open_clip_tower(text: bool) -> None:
    engine = engine_of(tiny_tower(text))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 16, 16, generator=generator)
    if text:
        x = torch.randint(1, 50, (4, 7), generator=generator)
    batched = check(engine, lambda m, x: m(x), x)
    assert isinstance(batched, PerRow)
    assert batched.output_dim == engine.module.output_dim
    holds_no_merged_weight(batched, engine)


class Layers(nn.Module):
    """Layers that no replacement is for, and one with a hook; the batch stays first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3, padding=1, groups=3, padding_mode="circular")
        self.norm = nn.GroupNorm(2, 6)
        self.prelu = nn.PReLU()
        self.up = nn.ConvTranspose1d(6, 4, 2)
        self.hooked = nn.Linear(6, 6)
        self.hooked.register_forward_hook(lambda module, inputs, output: output * 2)
        self.bilinear = nn.Bilinear(6, 6, 5)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.prelu(self.norm(self.conv(x)))).contiguous()
        x = self.hooked(x)
        mixed, shares = self.attention(x, x, x, attn_mask=torch.ones(4, 4, dtype=torch.bool).triu(1))
        cross, _ = self.attention(x, mixed, x, need_weights=False)
        return self.bilinear(mixed + shares[:, :, :1], cross)


def test_other_layers() -> None:
    """Four rows, and a mask of 4 x 4 that is no batch."""
    torch.manual_seed(0)
    engine = engine_of(Layers().eval())
    batched = check(engine, lambda m, x: m(x), torch.randn(4, 3, 5), rtol=1e-4)
    for name in ("norm", "prelu", "up", "hooked", "bilinear"):
        assert isinstance(getattr(batched, name), PerRow), name


def test_what_is_not_routed_is_static() -> None:
    engine = engine_of(
        Layers().eval(),
        route=lambda n: n if n in ("attention.out_proj.bias", "conv.bias", "hooked.weight") else None,
    )
    check(engine, lambda m, x: m(x), torch.randn(4, 3, 5), rtol=1e-4)


def test_half_precision_and_autocast() -> None:
    engine = engine_of(tiny_gpt2(), dtype=torch.bfloat16)
    ids = torch.randint(0, 101, (4, 6))
    with torch.no_grad():
        found = engine.batched(ROWS)(ids).logits
        truth = torch.cat([engine.merge(r).float()(ids[i : i + 1]).logits for i, r in enumerate(ROWS)])
        plain = torch.cat([engine.merge(r)(ids[i : i + 1]).logits for i, r in enumerate(ROWS)])
        assert found.dtype == torch.bfloat16
        assert (found - truth).norm() <= 2 * (plain - truth).norm()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(engine_of(tiny_gpt2()).batched(ROWS)(ids).logits).all()


def test_one_row_and_given_weights() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    x = torch.randn(5, 8)
    one = engine.batched([{"a": 0.5, "b": 0.5, "c": 0.0}])
    torch.testing.assert_close(one(x), engine.merge([0.5, 0.5, 0.0])(x), rtol=1e-5, atol=1e-5)
    weights = torch.randn(5, len(engine.groups), 3, requires_grad=True)
    batched = engine.batched(weights=weights)
    found = batched(x)
    for i, own in enumerate(weights.detach()):
        torch.testing.assert_close(found[i], engine.merge(weights=own)(x[i : i + 1])[0], rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert weights.grad is not None
    assert all(p.grad is None for p in engine.routers.parameters())


def test_modules_of_other_preferences_do_not_touch_each_other() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    x = torch.randn(4, 8)
    first = engine.batched(ROWS)
    before = first(x)
    engine.batched(ROWS.flip(0))(x)
    engine.switch([1.0, 0.0, 0.0])
    assert torch.equal(first(x), before)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), r"layer '0'.*parametrization"),
        (nn.Embedding(5, 4, max_norm=1.0), r"layer '0': Embedding.*max_norm"),
        (
            nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True),
            r"layer '0': MultiheadAttention has kdim",
        ),
        (nn.LSTM(4, 4, batch_first=True), r"layer '0': LSTM is a recurrent layer"),
        (
            nn.MultiheadAttention(4, 2),
            r"layer '0' \(MultiheadAttention\) has batch_first=False.*isolate=True",
        ),
    ],
)
def test_layers_that_cannot_be_done_are_named(layer: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine_of(nn.Sequential(layer)).batched(ROWS)


def test_bad_calls_are_named() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    with pytest.raises(ValueError, match="expected either preferences or weights=, got neither"):
        engine.batched()
    with pytest.raises(ValueError, match="got no preferences"):
        engine.batched([])
    with pytest.raises(ValueError, match="sum of 1"):
        engine.batched([[0.2, 0.2, 0.2]])
    with pytest.raises(ValueError, match=r"expected \[B, G, P\]"):
        engine.batched(weights=torch.zeros(len(engine.groups), 3))
    linear = engine_of(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"layer '0': got an input of shape \[3, 4\], expected 4 rows first"):
        linear.batched(ROWS)(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"layer 'norm': got BatchNorm in training mode"):
        engine.batched(ROWS).train()(torch.randn(4, 8))
    bare = pf.stack(base.state_dict(), {name: e.state_dict() for name, e in experts.items()})
    with pytest.raises(ValueError, match="knows no module class"):
        bare.batched(ROWS)


def test_a_weight_read_past_its_layer_is_nan_not_wrong() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.layer.weight)

    assert engine_of(Past()).batched(ROWS)(torch.randn(4, 4)).isnan().all()
    assert isinstance(engine_of(net_and_experts()[0]).batched(ROWS).inner, Net)


class Scaled(nn.Module):
    """A block with a bare parameter, a layer, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return mask @ self.layer(x) * self.scale


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, torch.ones(x.shape[1], x.shape[1]).tril())


def test_a_mask_for_all_rows_is_never_taken_for_rows_of_masks() -> None:
    engine = engine_of(Block())
    check(engine, lambda m, x: m(x), torch.randn(4, 6, 5))
    with pytest.raises(
        ValueError, match=r"layer 'block': got a tensor of shape \[4, 4\] with 4 rows.*isolate=True"
    ):
        engine.batched(ROWS)(torch.randn(4, 4, 5))
    check(engine, lambda m, x: m(x), torch.randn(4, 4, 5), isolate=True)


@pytest.mark.parametrize("isolate", [False, True])
def test_many_threads_run_one_batched_module(isolate: bool) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    preferences = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).double().softmax(1)
    module = engine.batched(preferences, isolate=isolate)
    inputs = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with torch.no_grad():
        truths = [module(x) for x in inputs]
    start = threading.Barrier(4)

    def run(which: int) -> int:
        start.wait(60)
        with torch.no_grad():
            return sum(not torch.equal(module(inputs[which]), truths[which]) for _ in range(40))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [0] * 4


def test_gradients_of_many_threads_add_up() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    preferences = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).double().softmax(1)
    inputs = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    start = threading.Barrier(4)

    def gradients(run: Callable[[nn.Module, Tensor], None]) -> list[Tensor]:
        engine.routers.zero_grad()
        module = engine.batched(preferences)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda x: run(module, x), inputs))
        return [p.grad.clone() for p in engine.routers.parameters() if p.grad is not None]

    def together(module: nn.Module, x: Tensor) -> None:
        start.wait(60)
        module(x).square().mean().backward()

    lock = threading.Lock()

    def in_turn(module: nn.Module, x: Tensor) -> None:
        with lock:
            module(x).square().mean().backward()

    for ours, truth in zip(gradients(together), gradients(in_turn), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_delta_is_copied_on_the_cpu(backend: str) -> None:
    base = tiny_gpt2()
    engine = pf.stack(base, {"cola": perturbed(base, 1), "sst2": perturbed(base, 2)}, backend=backend)
    module = engine.batched([[0.3, 0.7], [1.0, 0.0]])
    with torch.no_grad():
        module(torch.arange(8).view(2, 4), use_cache=False)
    own = {
        t.untyped_storage().data_ptr()
        for planes in engine._stack.planes
        for p in planes.values()
        for t in [p.values]
    }
    found = [
        delta
        for part in module.modules()
        for mixed in (getattr(part, "mixed", None), *getattr(part, "own", {}).values())
        if mixed is not None and mixed.planes is not None
        for delta in mixed.planes
    ]
    assert len(found) >= 20
    assert {delta.untyped_storage().data_ptr() for delta in found} <= own
    assert not engine._bound.deltas._found


def test_batches_with_an_objectives_own_head() -> None:
    class Classifier(nn.Module):
        def __init__(self, labels: int) -> None:
            super().__init__()
            self.body, self.classifier = nn.Linear(4, 4), nn.Linear(4, labels)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.classifier(self.body(x))
            return result

    torch.manual_seed(0)
    engine = pf.stack(Classifier(2), {"a": Classifier(2), "b": Classifier(3)}, heads=["classifier"])
    x = torch.randn(2, 5, 4)
    found = engine.batched([[0.3, 0.7], [1.0, 0.0]], head="b")(x)
    for row, preference in enumerate(([0.3, 0.7], [1.0, 0.0])):
        torch.testing.assert_close(found[row], engine.merge(preference, head="b")(x[row]))
