from __future__ import annotations

import math

import pytest
import torch

import paretofuse as pf


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 4, 9)])
def test_it_is_the_mean_entropy(shape):
    logits = torch.randn(shape, requires_grad=True)
    sure = logits.detach().double().softmax(-1)
    reference = -(sure * sure.log()).sum(-1).mean()
    loss = pf.entropy_loss(logits)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(pf.entropy_loss, logits.detach().double().requires_grad_())


def test_its_ends():
    assert pf.entropy_loss(torch.zeros(3, 10)).item() == pytest.approx(math.log(10))
    assert pf.entropy_loss(torch.tensor([[1000.0, 0.0]])).item() == 0.0


def test_a_class_that_is_ruled_out_says_nothing():
    logits = torch.randn(4, 5)
    masked = torch.cat([logits, torch.full((4, 1), -math.inf)], 1).requires_grad_()
    loss = pf.entropy_loss(masked)
    torch.testing.assert_close(loss, pf.entropy_loss(logits))
    loss.backward()
    assert torch.isfinite(masked.grad).all()


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0)])
def test_no_logits_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[\.\.\., classes\]"):
        pf.entropy_loss(torch.zeros(shape))


def test_what_is_no_tensor_is_told():
    with pytest.raises(TypeError, match=r"got dict, expected a tensor such as module\(batch\)\.logits"):
        pf.entropy_loss({"logits": torch.zeros(2, 3)})
