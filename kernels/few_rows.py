"""Products of a few rows on the CPU, by oneDNN where it can: y = x W^T with the weight where it lies.

BLAS packs a weight before it multiplies several rows by it, which for a few rows costs more than the product itself;
oneDNN's inner product, which PyTorch brings too, does not. All of GPT-2's blocks in float32 on two cores of an AMD EPYC
with AVX-512, milliseconds (weights as transformers' Conv1D has them, [I, O]; as `nn.Linear` has them it is the same):

    rows       1      4     16     64    256
    BLAS      18     33     65    147    483
    oneDNN    15     23     31     73    299

Held to AVX2: 15, 36, 53, 158, 352 where BLAS has 30, 29, 68, 151, 282. So on AVX-512 every product is oneDNN's, and
else those of at most `FEW` rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 32
_SMALL = 1 << 16
"""Numbers of a weight whose product takes so little that asking who computes it takes as long."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times weight^T, for a weight [O, I] that is first converted to x's dtype, plus bias [O]: [..., O]."""
    weight = weight.to(x.dtype)
    if not _is_for_onednn(x, weight):
        return x @ weight.T if bias is None else F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def multiply_few_rows(module: nn.Module) -> None:
    """Have the linear layers of a module, and transformers' Conv1D, multiply by `product` from now on.

    They stay what they are, with their parameters; layers of subclasses and of small weights are left alone.
    """
    layers: Iterable[Any] = module.modules()
    for layer in layers:
        kind = type(layer)
        is_conv1d = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
        if (kind is nn.Linear or is_conv1d) and layer.weight.numel() >= _SMALL:
            layer.forward = MethodType(_conv1d if is_conv1d else _linear, layer)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return product(x, layer.weight, layer.bias)


def _conv1d(layer: Any, x: Tensor) -> Tensor:
    return product(x, layer.weight.T, layer.bias)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes it: float32 on the CPU, by eager PyTorch, and without gradients, which its product lacks."""
    return (
        type(x) is Tensor
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and (x.numel() <= FEW * x.shape[-1] or torch.backends.cpu.get_cpu_capability() == "AVX512")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
