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

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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


def for_rows(count: int) -> AbstractContextManager[object]:
    """Inside, linear layers and transformers' Conv1D are computed by `product`, but those of small weights.

    with for_rows(x.shape[0]):
        y = module(x)

    One row alone is BLAS's, which packs nothing for it: looking at each operation would take longer than is gained.
    """
    return _FewRows() if count > 1 else nullcontext()


class _FewRows(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """`F.linear(x, weight, bias)` of nn.Linear, `torch.addmm(bias, x, weight)` of Conv1D; all else as it is."""
        if func is F.linear and not kwargs and args[1].numel() >= _SMALL:
            return product(*args)
        if func is torch.addmm and not kwargs and args[2].numel() >= _SMALL and args[0].dim() == 1:
            bias, x, weight = args
            return product(x, weight.T, bias)
        return func(*args, **(kwargs or {}))


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
