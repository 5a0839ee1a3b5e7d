"""Products of a few rows on the CPU: oneDNN's where it can, with the numbers of any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from paretofuse.kernels.few_rows import FEW, for_rows, product
from paretofuse.kernels.routed_rows import routed_rows

has_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


class Seen(profile):
    """The operators that ran inside, those of custom operators' own code too."""

    def __init__(self) -> None:
        super().__init__(activities=[ProfilerActivity.CPU])

    @property
    def onednn(self) -> bool:
        return any(event.name == "mkldnn::_linear_pointwise" for event in self.events() or ())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {
    "linear": drawn(40, 24, seed=1),
    "conv1d": drawn(24, 40, seed=2).T,
    "a part of a larger one": drawn(50, 60, seed=3)[5:45, 7:31],
    "every other column": drawn(40, 48, seed=4)[:, ::2],
}


@has_onednn
@pytest.mark.parametrize("layout", WEIGHTS)
@pytest.mark.parametrize("shape", [(1, 24), (16, 24), (3, 5, 24), (2, 0, 24)])
def test_it_is_the_product(layout: str, shape: tuple[int, ...]) -> None:
    x, weight = drawn(*shape), WEIGHTS[layout]
    with torch.inference_mode(), Seen() as seen:
        found = product(x, weight)
    assert seen.onednn == (x.numel() > 0)
    torch.testing.assert_close(found, (x.double() @ weight.double().T).float(), rtol=1e-5, atol=1e-5)


@has_onednn
def test_what_onednn_does_not_take_is_multiplied_all_the_same() -> None:
    x, weight = drawn(4, 24), WEIGHTS["linear"]
    expected = x @ weight.T
    wants = x.clone().requires_grad_()
    with Seen() as seen:
        y = product(wants, weight)
        y.sum().backward()
        torch.testing.assert_close(product(x.bfloat16(), weight).float(), expected, rtol=0.05, atol=0.3)
        torch.testing.assert_close(torch.vmap(lambda row: product(row, weight))(x), expected)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(wants.grad, weight.sum(0).expand(4, -1))
    assert not seen.onednn


@has_onednn
def test_without_avx512_only_few_rows_are_onednns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for rows in (FEW, FEW + 1):
        with torch.inference_mode(), Seen() as seen:
            product(drawn(rows, 24), WEIGHTS["linear"])
        assert seen.onednn == (rows == FEW)


@has_onednn
def test_rows_with_preferences_of_their_own_are_multiplied_by_it() -> None:
    base, deltas, weights = drawn(40, 24, seed=1), drawn(2, 40, 24, seed=2), drawn(16, 2, seed=3)
    with torch.inference_mode(), Seen() as seen:
        routed_rows(drawn(16, 1, 24), base, deltas, weights)
    assert seen.onednn


@has_onednn
def test_a_models_layers_multiply_by_it_inside() -> None:
    transformers = pytest.importorskip("transformers")
    conv1d = transformers.pytorch_utils.Conv1D(300, 260)
    model = torch.nn.Sequential(torch.nn.Linear(256, 260), conv1d, torch.nn.Linear(300, 4, bias=False))
    x = drawn(5, 256)
    with torch.inference_mode():
        expected = model(x)
        with for_rows(5), Seen() as seen:
            found = model(x)
    products = [event for event in seen.events() or () if event.name == "mkldnn::_linear_pointwise"]
    assert len(products) == 2  # the third is small
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode(), for_rows(1), Seen() as seen:
        model(x[:1])
    assert not seen.onednn
    with for_rows(5):
        model(x).sum().backward()  # with gradients, as ever
    assert model[0].weight.grad is not None
