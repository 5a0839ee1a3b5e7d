"""Routing weights from what users give: a preference or several, or the weights themselves.

With coefficients of rows, [G, P] below is [G + R, P], of columns too [G + R + C, P] (see `Routers`); weights given
without them have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretofuse.engine.layout import Spans
from paretofuse.engine.routing.preference import Preference, as_preference, is_grid, one_or_several
from paretofuse.engine.routing.routers import Routers


def is_several(preference: Preference | None, weights: Any) -> bool:
    """Whether K preferences or sets of weights were given, rather than one."""
    return is_grid(preference) if weights is None else _tensor(weights).dim() == 3


def routing_of(routers: Routers, preference: Preference | None, weights: Any) -> Tensor:
    """Routing weights of a preference [M] or of several [K, M], or given ones [G, P] or [K, G, P], without a graph.

    Returns:
        float32 [K, G, P], contiguous, where the routers are.

    Raises:
        ValueError: neither or both are given, or they are not valid.
    """
    _only_one_given("a preference", preference, weights)
    device = routers.output.bias.device
    if preference is None:
        routing = _checked(routers, _tensor(weights).detach())
    else:
        routing = sent(routing_at(routers, one_or_several(preference, routers.objectives)), device)
    return (routing if routing.dim() == 3 else routing.unsqueeze(0)).contiguous()


def routing_at(routers: Routers, preference: np.ndarray) -> Tensor:
    """Routing weights [..., G, P] of checked preferences [M] or [K, M], for a merger to fetch.

    A group's are computed on the host, as a store's are and in the same bits, and of routers on a GPU lie in pinned
    memory, so that nobody waits for it. Those of rows and columns are many: on a GPU the preference is sent in their
    place and all is computed there.
    """
    device = routers.output.bias.device
    if routers.rows is None or device.type != "cpu":
        return received(routers, pinned(to_send(routers, preference), device))
    groups = torch.from_numpy(_on_host(routers, preference))
    with torch.no_grad():  # in the order of the sums in C++, so in the same bits
        linear = [own(torch.from_numpy(preference)).to(torch.float32) for own in routers.linear]
    return torch.cat([groups, *linear], -2)


def to_send(routers: Routers, preference: np.ndarray) -> Tensor:
    """What the host tells a GPU of checked preferences [M] or [K, M].

    It is the groups' routing weights [..., G, P]; with row coefficients the preferences themselves.
    """
    return torch.from_numpy(preference if routers.rows is not None else _on_host(routers, preference))


def received(routers: Routers, told: Tensor) -> Tensor:
    """Routing weights [..., G, P] of what the host tells, from pinned memory without waiting."""
    if routers.rows is None:
        return told
    with torch.no_grad():
        return routers.at(told.to(routers.output.bias.device, non_blocking=True))


def _on_host(routers: Routers, preference: np.ndarray) -> np.ndarray:
    """The groups' routing weights [..., G, P] of checked preferences [M] or [K, M]."""
    return routers.on_host().weights(preference)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the CPU as it is, or in pinned memory where a GPU shall fetch it.

    torch gives that memory to nobody else before every copy from it that was asked for is done.
    """
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def sent(routing: Tensor, device: torch.device) -> Tensor:
    """Routing weights or a preference on a device; from the CPU to a GPU without waiting for it."""
    if device.type != "cuda" or routing.device.type != "cpu" or routing.requires_grad:
        return routing.to(device)
    return pinned(routing, device).to(device, non_blocking=True)


def check_one(routing: Tensor) -> Tensor:
    """Routing weights [K, G, P] as they are; ValueError unless they are those of one preference."""
    if len(routing) != 1:
        raise ValueError(f"got {len(routing)} preferences, expected one: there is one live module")
    return routing


def rows_of(
    routers: Routers, preferences: Tensor | Sequence[Preference] | None, weights: Tensor | None
) -> Tensor:
    """Routing weights for the rows of a batch, from a preference for each, or given; gradients flow into both.

    Returns:
        float32 [B, G, P], where the routers are.

    Raises:
        ValueError: as `routing_of`, or no rows.
    """
    _only_one_given("preferences", preferences, weights)
    if weights is None:
        given = () if preferences is None else preferences  # `_only_one_given` has seen to it
        rows = [torch.from_numpy(as_preference(row, routers.objectives)) for row in given]
        if not rows:
            raise ValueError("got no preferences, expected one for each row of the batch")
        weights = routers(torch.stack(rows))
    weights = _tensor(weights)
    if weights.dim() != 3:
        raise ValueError(f"got weights of shape {list(weights.shape)}, expected [B, G, P]")
    return _checked(routers, weights)


def coefficients(weights: Tensor, spans: Spans) -> Tensor:
    """What multiplies the planes of one tensor: [..., P], [..., P, rows] or [..., P, rows + columns].

    With rows they have the group's in them already; at row i and column k it is number i plus number rows + k.

    Args:
        weights: routing weights [..., G, P], [..., G + R, P] or [..., G + R + C, P].
        spans: where the tensor's lie (`Layout.spans`).
    """
    own = weights[..., spans.group, :]
    if spans.rows is None or weights.shape[-2] < spans.rows.stop:
        return own
    rows = own.unsqueeze(-1) + weights[..., spans.rows, :].mT
    if spans.columns is None or weights.shape[-2] < spans.columns.stop:
        return rows
    return torch.cat([rows, weights[..., spans.columns, :].mT], -1)


def _only_one_given(what: str, preference: Any, weights: Any) -> None:
    if (preference is None) == (weights is None):
        got = "neither" if weights is None else "both"
        raise ValueError(f"expected either {what} or weights=, got {got}")


def _checked(routers: Routers, weights: Tensor) -> Tensor:
    device, count = routers.output.bias.device, len(routers.members)
    groups = len(routers.groups)
    allowed = {"[G, P]": [groups, count]}
    for name, width in zip(("[G + R, P]", "[G + R + C, P]"), routers.widths[1:], strict=False):
        allowed[name] = [width, count]
    routing = weights.to(torch.float32)
    if list(routing.shape[-2:]) not in allowed.values() or routing.dim() not in (2, 3):
        expected = " or ".join(f"{name} = {shape}" for name, shape in allowed.items())
        raise ValueError(
            f"got weights of shape {list(routing.shape)}, expected {expected}; with [K, ...] for several"
        )
    if not torch.isfinite(routing).all():
        raise ValueError("got routing weights with NaN or infinity, expected finite numbers")
    return sent(routing, device)


def _tensor(weights: object) -> Tensor:
    """Routing weights as a tensor; TypeError where they are none, or no real numbers."""
    try:
        tensor = weights if isinstance(weights, Tensor) else torch.as_tensor(weights, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"got weights={type(weights).__name__}, expected a tensor of routing weights [G, P]"
        ) from None
    if tensor.is_complex() or tensor.dtype == torch.bool or tensor.is_meta or tensor.layout != torch.strided:
        kind = "meta" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
        raise TypeError(f"got weights that are {kind}, expected a dense tensor of real numbers [G, P]")
    return tensor
