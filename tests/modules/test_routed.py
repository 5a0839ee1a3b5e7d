"""Training without merged weights equals training through merged ones: outputs, Jacobian, routers' gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.modules.routed.layers import RoutedAttention, RoutedLinear
from tests.support.models import Net, net_and_experts, perturbed, same, tiny_gpt2

R = [0.2, 0.3, 0.5]

Loss = Callable[[nn.Module], Tensor]


def random_routers(engine: Engine) -> None:
    """Routers away from their start, so that all their gradients matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in engine.routers.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def learned(engine: Engine, loss: Loss, materialize: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss, the Jacobian, and the routers' gradients by a plain backward pass."""
    module = engine.module if materialize else engine.fused_module
    engine.train_at(R, materialize=materialize)
    value = loss(module)
    jacobian = engine.jacobian([value])
    assert all(p.grad is None for p in engine.routers.parameters())
    engine.train_at(R, materialize=materialize)
    loss(module).backward()
    gradients = [p.grad for p in engine.routers.parameters() if p.grad is not None]
    engine.routers.zero_grad()
    assert all(p.grad is None for p in module.parameters())
    return value.detach(), jacobian, gradients


def check(engine: Engine, loss: Loss, rtol: float = 2e-5) -> None:
    """Both ways agree, up to float32's rounding of sums in another order."""
    random_routers(engine)
    merged, fused = learned(engine, loss, True), learned(engine, loss, False)
    torch.testing.assert_close(fused[0], merged[0], rtol=rtol, atol=rtol)
    for ours, truth in zip([fused[1], *fused[2]], [merged[1], *merged[2]], strict=True):
        scale = truth.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(ours, truth, rtol=rtol, atol=rtol * scale)
    assert len(fused[2]) == len(list(engine.routers.parameters()))


def layers(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, layer in module.named_modules() if type(layer) is kind]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("route", ["module", "tensor"])
def test_plain_module_with_two_tied_linears(backend: str, route: str) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, route=route, backend=backend)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    check(engine, lambda m: m(x).square().mean())
    assert layers(engine.fused_module, RoutedLinear) == ["first", "second", "tied", "head"]
    assert "tied.weight" not in dict(engine.fused_module.named_parameters())
    assert type(engine.fused_module) is Net
    torch.testing.assert_close(engine.fused_module.head.weight, engine.merge(R).head.weight)
    assert layers(engine.module, nn.Linear) == ["first", "second", "tied", "head"], "the live module is whole"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # an old name, known to every transformers 5
def test_gpt2_keeps_its_tied_embedding_merged() -> None:
    from transformers.pytorch_utils import Conv1D

    base = tiny_gpt2()
    engine = pf.stack(base, {name: perturbed(base, i, 0.02) for i, name in enumerate("abc")}, route="tensor")
    ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))

    def loss(model: nn.Module) -> Tensor:
        logits = model(ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    check(engine, loss, rtol=1e-4)
    fused = engine.fused_module
    assert len(layers(fused, RoutedLinear)) == 8
    assert layers(fused, Conv1D) == []
    assert fused.lm_head.weight is fused.transformer.wte.weight
    assert tuple(fused.transformer.h[0].mlp.c_fc.weight.shape) == (32, 128)
    engine.train_at(R, materialize=False)
    torch.testing.assert_close(fused(ids).logits, engine.merge(R)(ids).logits, rtol=1e-4, atol=1e-5)
    fused.train()
    fused.gradient_checkpointing_enable()
    for module in fused.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    engine.train_at(R)
    expected = engine.jacobian([loss(engine.module)])
    engine.train_at(R, materialize=False)
    torch.testing.assert_close(engine.jacobian([loss(fused)]), expected, rtol=1e-4, atol=1e-5)


def tiny_clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
    )
    return CLIPVisionModel(config).eval()


def test_clip_vision_model() -> None:
    base = tiny_clip()
    engine = pf.stack(base, {name: perturbed(base, i, 0.02) for i, name in enumerate("abc")})
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    check(engine, lambda m: m(pixel_values=images).pooler_output.square().mean(), rtol=1e-4)
    assert len(layers(engine.fused_module, RoutedLinear)) == 12
    weights = {n for n, p in engine.fused_module.named_parameters() if p.dim() == 2}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in weights} == {"position_embedding"}


def tiny_tower(text: bool) -> nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    torch.manual_seed(0)
    if text:
        return transformer.TextTransformer(
            context_length=7, vocab_size=50, width=24, heads=3, layers=2, output_dim=16
        ).eval()
    return transformer.VisionTransformer(
        image_size=16, patch_size=8, width=24, layers=2, heads=3, mlp_ratio=2.0, output_dim=16
    ).eval()


@pytest.mark.parametrize("text", [False, True], ids=["vision", "text"])
def test_open_clip_tower(text: bool) -> None:
    base = tiny_tower(text)
    engine = pf.stack(base, {name: perturbed(base, i, 0.02) for i, name in enumerate("abc")})
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randint(1, 50, (3, 7), generator=generator)
        if text
        else torch.randn(3, 3, 16, 16, generator=generator)
    )
    check(engine, lambda m: m(x).square().mean(), rtol=1e-4)
    assert len(layers(engine.fused_module, RoutedAttention)) == 2
    assert layers(engine.fused_module, nn.MultiheadAttention) == []
    assert not any("attn" in n and n.endswith("weight") for n, _ in engine.fused_module.named_parameters())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("case", ["self", "cross", "masked", "per head", "unbatched"])
def test_attention_equals_torchs(batch_first: bool, need_weights: bool, case: str) -> None:
    torch.manual_seed(0)
    base = nn.MultiheadAttention(12, 3, bias=case != "cross", batch_first=batch_first).eval()
    engine = pf.stack(base, {name: perturbed(base, i) for i, name in enumerate("abc")}, route="tensor")
    x, other = torch.randn(5, 5, 12), torch.randn(5, 5, 12)
    options: dict[str, object] = {"need_weights": need_weights}
    arguments = (x, x, x)
    if case == "cross":
        arguments = (x, other, other * 2)
        options["average_attn_weights"] = False
    if case == "masked":
        options["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
        padding = torch.zeros(5, 5)
        padding[1, 3:] = float("-inf")
        options |= {"key_padding_mask": padding.isinf(), "is_causal": True}
    if case == "per head":
        options["attn_mask"] = torch.randn(15, 5, 5)
    if case == "unbatched":
        arguments = (x[0], other[0], other[1])
        options["key_padding_mask"] = torch.tensor([False, True, False, False, False])
    engine.train_at(R, materialize=False)
    engine.switch(R)
    ours, theirs = engine.fused_module(*arguments, **options), engine.module(*arguments, **options)
    assert type(engine.fused_module) is RoutedAttention
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert (ours[1] is None) == (theirs[1] is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)


def test_attention_in_torchs_own_encoder_layer() -> None:
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True).eval()
    engine = pf.stack(base, {name: perturbed(base, i) for i, name in enumerate("abc")})
    x = torch.randn(2, 5, 12)
    check(engine, lambda m: m(x).square().mean(), rtol=1e-4)
    with torch.no_grad():  # torch's fast path reads the layers' weights past their forward
        torch.testing.assert_close(engine.fused_module(x), engine.merge(R)(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="pass attn_mask"):
        engine.fused_module.self_attn(x, x, x, is_causal=True)


ROUTED = {"attention": "self_attn", "one layer": "linear1", "norms": "norm", "all": ""}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of merged models, which may take it
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("part", ROUTED)
def test_torchs_own_encoder_takes_no_shortcut_past_what_is_replaced(part: str, padded: bool) -> None:
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 2).eval()
    experts = {name: perturbed(base, i) for i, name in enumerate("abc")}
    engine = pf.stack(base, experts, route=lambda name: name if ROUTED[part] in name else None)
    x, padding = torch.randn(3, 5, 12), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    shut = padding if padded else None
    check(engine, lambda m: m(x, src_key_padding_mask=shut)[~padding].square().mean(), rtol=1e-4)
    engine.train_at(R, materialize=False)
    grid = [R, [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]
    with torch.no_grad():
        fused = engine.fused_module(x, src_key_padding_mask=shut)
        batched = engine.batched(grid)(x, src_key_padding_mask=shut)
        merged = [engine.merge(r)(x, src_key_padding_mask=shut) for r in grid]
    torch.testing.assert_close(fused[~padding], merged[0][~padding], rtol=1e-4, atol=1e-5)
    for b, own in enumerate(merged):
        torch.testing.assert_close(batched[b][~padding[b]], own[b][~padding[b]], rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """A layer used twice, under two names, with and without checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.again = self.layer
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layer, self.again):
            if self.reentrant is None:
                x = torch.tanh(layer(x))
            else:
                x = checkpoint(lambda y, f=layer: torch.tanh(f(y)), x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_layers_used_twice_and_checkpointing(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    base = Twice()
    engine = pf.stack(base, {name: perturbed(base, i) for i, name in enumerate("abc")})
    engine.module.reentrant = engine.fused_module.reentrant = reentrant
    assert engine.fused_module.layer is engine.fused_module.again
    inputs = torch.randn(
        5, 6
    ).requires_grad_()  # reentrant checkpointing needs an input that requires gradients
    check(engine, lambda m: m(inputs).square().mean())


def test_layers_that_are_not_plain_stay_merged() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Linear(4, 4), Own(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
    )
    base[3].weight = base[1].weight  # tied to a layer that must stay
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    base.append(hooked)
    engine = pf.stack(base, {name: perturbed(base, i) for i, name in enumerate("abc")})
    assert layers(engine.fused_module, RoutedLinear) == ["0"]
    x = torch.randn(3, 4)
    check(engine, lambda m: m(x).square().mean())


def test_layers_that_are_not_routed_stay_static() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, route=lambda name: name if name.startswith("first") else None)
    x = torch.randn(3, 8)
    check(engine, lambda m: m(x).square().mean())
    assert layers(engine.fused_module, RoutedLinear) == ["first"]


def test_it_holds_no_merged_weight_and_leaves_all_else_alone() -> None:
    base, experts = net_and_experts()
    before = copy.deepcopy(base)
    engine = pf.stack(base, experts, backend="reference")
    pristine = {name: tensor.clone() for name, tensor in engine._stack.base.items()}
    engine.train_at(R, materialize=False)
    assert not engine._in_place.built, "the live module is not built for it"
    engine.fused_module(torch.randn(3, 8)).sum().backward()
    stored = {t.untyped_storage().data_ptr() for t in engine._stack.base.values()}
    assert not any(p.untyped_storage().data_ptr() in stored for p in engine.fused_module.parameters())
    assert all(torch.equal(pristine[name], tensor) for name, tensor in engine._stack.base.items())
    assert same(base, before)


def test_half_precision_and_autocast() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, dtype=torch.bfloat16, delta_dtype=torch.float16)
    x = torch.randn(64, 8)
    jacobians = []
    for materialize, module in ((True, engine.module), (False, engine.fused_module)):
        engine.train_at(R, materialize=materialize)
        jacobians.append(engine.jacobian([module(x.bfloat16()).float().square().mean()]))
    assert (jacobians[0] - jacobians[1]).norm() < 0.02 * jacobians[0].norm()
    engine = pf.stack(base, experts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.train_at(R, materialize=False)
        first = engine.fused_module(x)
        engine.train_at([1.0, 0.0, 0.0], materialize=False)
        second = engine.fused_module(x)
        assert first.dtype == torch.bfloat16
        assert not torch.equal(first, second)


def test_training_at_another_preference_before_backward_is_an_error() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    engine.train_at(R, materialize=False)
    loss = engine.fused_module(torch.randn(3, 8)).square().mean()
    engine.train_at([1.0, 0.0, 0.0], materialize=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_several_losses_of_one_graph_and_several_passes() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    random_routers(engine)
    x = torch.randn(6, 8)
    jacobians, sums = [], []
    for materialize, module in ((True, engine.module), (False, engine.fused_module)):
        engine.train_at(R, materialize=materialize)
        out = module(x)
        jacobians.append(engine.jacobian([out.square().mean(), out.abs().sum()]))
        engine.train_at(R, materialize=materialize)
        for part in x.chunk(3):
            module(part).square().mean().backward()
        sums.append([p.grad.clone() for p in engine.routers.parameters()])
        engine.routers.zero_grad()
    torch.testing.assert_close(jacobians[1], jacobians[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(sums[1], sums[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_bare_tensors_have_no_fused_module() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base.state_dict(), {name: e.state_dict() for name, e in experts.items()})
    with pytest.raises(ValueError, match="knows no module class"):
        engine.train_at(R, materialize=False)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("family", ["scalar", "rows"])
def test_low_rank_planes_stay_factors(backend: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nn.Linear, attention and Conv1D: no dense plane is stacked, and all gradients are those of merged weights."""
    from paretofuse.engine.planes import choose
    from paretofuse.engine.stacking import deltas

    for user in (choose, deltas):  # as large matrices are; stacking keeps the smallest exact
        monkeypatch.setattr(user, "may_be_small", lambda shape: len(shape) > 1)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    losses: list[tuple[nn.Module, Loss]] = [
        (tiny_clip(), lambda m: m(pixel_values=images).pooler_output.square().mean()),
        (tiny_gpt2(), lambda m: m(ids).logits.square().mean()),
    ]
    for base, loss in losses:
        experts = {name: perturbed(base, i, 0.02) for i, name in enumerate("abc")}
        engine = pf.stack(base, experts, planes="lowrank:2", backend=backend, family=family)
        if family == "rows":
            engine.routers.rows.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        check(engine, loss, rtol=2e-4)
        stacked = {
            name for name in engine._bound.deltas._found if engine.planes["a"][name].format == "lowrank"
        }
        assert stacked == set()
        layer = next(m for m in engine.fused_module.modules() if isinstance(m, RoutedLinear))
        name = next(n for n, m in engine.fused_module.named_modules() if m is layer)
        merged = engine.merge(R).get_submodule(name)
        torch.testing.assert_close(layer.weight, merged.weight, rtol=1e-4, atol=1e-5)
