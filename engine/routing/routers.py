"""Routers: one tiny MLP for each group, all groups evaluated at once.

    L(r) = init(r) + W2 relu(W1 r + b1) + b2        W1 [G, H, M], b1 [G, H], W2 [G, P, H], b2 [G, P], H = 2 M

M objectives give the weights of P planes. "identity" starts plane j of objective m at r_m times its share (1 / k of k
experts), so that a one-hot preference starts as the mean of that objective's experts; "sqrt" at sqrt(r_m) times it;
planes of no objective start at 0. Both keep the MLP's last layer at zero. "constant" is PWEMoE's own start (Tang et
al., arXiv 2406.09770): no residual, all weights drawn with standard deviation 0.01 and the last bias at the
task-arithmetic coefficient times the share.

The family "rows" has a coefficient for each row of each routed tensor besides, "rows+columns" one for each column of
each routed matrix too, linear in the preference and zero at the start; R and C are the numbers of all rows and columns:

    coefficient of plane j at row i, column k of a matrix of group g      L(r)[g, j] + S(r)[i, j] + T(r)[k, j]
                                                                          S(r)[i, j] = sum_m r_m S[m, j, i], T(r) alike

All are one tensor [G + R + C, P] everywhere, groups first, then rows, so that whatever takes routing weights takes all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paretofuse.engine.extension import _C
from paretofuse.engine.layout import Layout, Member, one_for_each
from paretofuse.engine.routing.families import FAMILIES, PARTS, check_family
from paretofuse.engine.routing.preference import one_or_several

INITS = ("identity", "sqrt", "constant")
"""What the MLP's output is added to: the preference r, its square root, or nothing."""


def check_init(init: str) -> None:
    """ValueError unless it is one of INITS."""
    if init not in INITS:
        raise ValueError(f"got init={init!r}, expected one of {', '.join(INITS)}")


class GroupedLinear(nn.Module):
    """A linear map for each group: weight [G, out, in], bias [G, out]."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(groups, outputs, inputs, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(groups, outputs, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[..., G or 1, in] -> [..., G, out], computed in the dtype of x."""
        product: Tensor = self.weight.to(x.dtype) @ x.unsqueeze(-1)
        return product.squeeze(-1) + self.bias.to(x.dtype)


class LinearCoefficients(nn.Module):
    """S [M, P, N]: for each objective, plane and row (or column) what that objective's share of the preference adds."""

    def __init__(self, objectives: int, planes: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(objectives, planes, count, dtype=torch.float32))

    def forward(self, r: Tensor) -> Tensor:
        """[..., M] -> [..., N, P], summed in the dtype of r and in the order of the objectives, as in C++."""
        own = self.weight.to(r.dtype)
        total = r[..., 0, None, None] * own[0]
        for m in range(1, len(own)):
            total = total + r[..., m, None, None] * own[m]
        return total.mT


class Routers(nn.Module):
    """All routers of an engine; the only trained parameters: hundreds of numbers, or thousands with rows and columns.

    `planes` holds the trained planes where there are some (`pf.add_planes`): a module of its own that is kept here, so
    that whatever keeps, copies or restores the routers does the same with all that is trained.

    Args:
        groups: names of the routing groups, G of them.
        objectives: names of the objectives, M of them.
        init: "identity", "sqrt" or "constant".
        members: the planes, P of them; an expert for each objective unless told.
        constant: start value of every weight for init "constant", before the planes' shares.
        rows: rows of all routed tensors, R of them (`Layout.row_count`).
        columns: columns of all routed matrices, C of them (`Layout.column_count`).
        family: one of FAMILIES.
        seed: seed of the initial values; they do not touch torch's global random state.
    """

    rows: LinearCoefficients | None
    columns: LinearCoefficients | None
    planes: nn.Module | None
    _owner: Tensor
    _share: Tensor

    def __init__(
        self,
        groups: Sequence[str],
        objectives: Sequence[str],
        init: str = "identity",
        *,
        members: Sequence[Member] = (),
        constant: float = 0.3,
        rows: int = 0,
        columns: int = 0,
        family: str = "scalar",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_init(init)
        self.groups = tuple(groups)
        self.objectives = tuple(objectives)
        self.init = init
        self.constant = constant
        self.members = tuple(members) or one_for_each(self.objectives)
        count, hidden = len(self.objectives), 2 * len(self.objectives)
        self.hidden = GroupedLinear(len(self.groups), count, hidden)
        self.output = GroupedLinear(len(self.groups), hidden, len(self.members))
        owners, shares = _places(self.members, self.objectives)
        self.register_buffer("_owner", owners, persistent=False)
        self.register_buffer("_share", shares, persistent=False)
        self._counts = {"rows": rows, "columns": columns}
        self.rows = None
        self.columns = None
        self.planes = None
        self._host: tuple[list[tuple[int, int]], list[Tensor], _C.Routers] | None = None
        self.set_family(family)
        self.family_asked: str | None = None
        """The family that `set_family` was last called with by others: what `pf.fit` keeps."""
        self.reset(seed)

    @property
    def family(self) -> str:
        """One of FAMILIES."""
        return FAMILIES[len(self.linear)]

    @property
    def linear(self) -> tuple[LinearCoefficients, ...]:
        """The coefficients of rows and of columns, where the family has some, in the order of routing weights."""
        return tuple(own for own in (self.rows, self.columns) if own is not None)

    def set_family(self, family: str) -> None:
        """Have the coefficients of a family, new ones all zero so that every merge stays as it is, and no others.

        Raises:
            ValueError: no such family, or coefficients that are not zero would be lost.
        """
        check_family(family)
        if family == self.family:
            self.family_asked = family
            return
        parts = PARTS[FAMILIES.index(family)]
        for part in ("rows", "columns"):
            own: LinearCoefficients | None = getattr(self, part)
            if own is not None and part not in parts and bool(own.weight.any()):
                raise ValueError(
                    f"got family={family!r} for routers whose {part[:-1]} coefficients are trained and would be lost; "
                    f"stay with family={self.family!r}, or zero engine.routers.{part}.weight first"
                )
        for part in ("rows", "columns"):
            if part not in parts:
                setattr(self, part, None)
            elif getattr(self, part) is None:
                made = LinearCoefficients(len(self.objectives), len(self.members), self._counts[part])
                setattr(self, part, made.to(self.output.bias.device))
        self.family_asked = family

    @torch.no_grad()
    def append(self, members: Sequence[Member]) -> None:
        """Have more planes, behind the others; each starts with its share, and all other weights stay as they are."""
        for member in members:
            if member.objective not in (*self.objectives, None):
                raise ValueError(
                    f"got a plane of {member.objective!r}, expected one of {', '.join(self.objectives)}, or None"
                )
        count, old = len(members), len(self.members)
        self.members += tuple(members)
        owners, shares = _places(self.members, self.objectives)
        self._owner, self._share = owners.to(self._owner.device), shares.to(self._share.device)
        weight, bias = self.output.weight, self.output.bias
        constant = self.constant * self._share[old:] if self.init == "constant" else 0 * self._share[old:]
        self.output.weight = nn.Parameter(
            torch.cat([weight, weight.new_zeros(len(weight), count, weight.shape[2])], 1)
        )
        self.output.bias = nn.Parameter(
            torch.cat([bias, constant.to(bias.dtype).expand(len(bias), count)], 1)
        )
        for linear in self.linear:
            own = linear.weight
            linear.weight = nn.Parameter(torch.cat([own, own.new_zeros(len(own), count, own.shape[2])], 1))

    @property
    def width(self) -> int:
        """Length of the first axis of routing weights: G, G + R or G + R + C."""
        return self.widths[-1]

    @property
    def widths(self) -> list[int]:
        """Lengths that routing weights may be given in: G, and with rows G + R, and with columns G + R + C."""
        return list(accumulate((own.weight.shape[2] for own in self.linear), initial=len(self.groups)))

    def on_host(self) -> _C.Routers:
        """The groups' routers in C++, as a store evaluates them; kept until the parameters change."""
        layers: Any = self._modules  # every switch asks, and nn.Module's own lookup takes longer
        own = {
            f"{name}.{part}": tensor
            for name in ("hidden", "output")
            for part, tensor in layers[name]._parameters.items()
        }
        seen = [(tensor.data_ptr(), tensor._version) for tensor in own.values()]
        if self._host is None or self._host[0] != seen:
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in own.items()}
            members = list(zip(self._owner.tolist(), self._share.tolist(), strict=True))
            # What was copied is held, so that its addresses stay its own.
            held = [tensor.detach() for tensor in own.values()]
            self._host = (seen, held, _C.Routers(self.init, members, arrays))
        return self._host[2]

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which make their own of what lies in C++."""
        return {**self.__dict__, "_host": None}

    def stored(self) -> dict[str, np.ndarray]:
        """The parameters as a store keeps them, float32 by name: without trained planes, which are planes there.

        Raises:
            ValueError: one is not finite, which no store takes.
        """
        own = {name: t for name, t in self.state_dict().items() if not name.startswith("planes.")}
        for name, tensor in own.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"the router parameter {name!r} holds NaN or infinity, as after a training that diverged; train "
                    "anew with a lower lr"
                )
        return {name: tensor.detach().cpu().numpy() for name, tensor in own.items()}

    @property
    def size(self) -> str:
        """Family, trained numbers and their bytes, for people."""
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"family={self.family!r} with {count:,} trained numbers ({4 * count:,} bytes)"

    @torch.no_grad()
    def reset(self, seed: int = 0) -> None:
        """Draw the initial values anew; coefficients of rows and columns start at zero."""
        for own in self.linear:
            own.weight.zero_()
        generator = torch.Generator().manual_seed(seed)
        if self.init == "constant":
            for layer in (self.hidden, self.output):
                draw = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float32)
                layer.weight.copy_(0.01 * draw)
            self.hidden.bias.zero_()
            self.output.bias.copy_(self.constant * self._share)
            return
        bound = 1 / math.sqrt(len(self.objectives))
        for tensor in (self.hidden.weight, self.hidden.bias):
            draw = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
            tensor.copy_((2 * draw - 1) * bound)
        self.output.weight.zero_()
        self.output.bias.zero_()

    def forward(self, preference: Tensor | np.ndarray | Sequence[float] | Mapping[str, float]) -> Tensor:
        """Routing weights of one preference or of several.

        Computed in float64 and rounded once, by PyTorch, for gradients. Merges ask C++ instead (`on_host`), which may
        sum in another order: a number may differ from theirs in its last bit.

        Args:
            preference: [M], or a tensor or array [K, M], or a dict by objective name; non-negative, each row summing
                to 1.

        Returns:
            float32 [G, P] or [K, G, P], with row coefficients [.., G + R, P], with those of columns too
            [.., G + R + C, P]: groups, rows of all routed tensors, columns of all routed matrices, in the layout's
            order.

        Raises:
            ValueError: a preference is not valid.
        """
        checked = one_or_several(preference, self.objectives)
        return self.at(torch.from_numpy(checked).to(self.output.bias.device))

    def at(self, preference: Tensor) -> Tensor:
        """What `forward` returns for checked preferences, float64 [M] or [K, M] where the routers are.

        Nothing here waits for a GPU or depends on a value, so that a CUDA graph can hold it.
        """
        r = preference.unsqueeze(-2)
        weights: Tensor = self.output(torch.relu(self.hidden(r)))
        if self.init != "constant":
            start = r if self.init == "identity" else r.sqrt()
            weights = weights + start[..., self._owner] * self._share
        if self.linear:
            weights = torch.cat([weights, *(own(r.squeeze(-2)) for own in self.linear)], -2)
        return weights.to(torch.float32)

    def extra_repr(self) -> str:
        """Shown by print."""
        return (
            f"groups={len(self.groups)}, objectives={list(self.objectives)}, planes={len(self.members)}, "
            f"init={self.init!r}, {self.size}"
        )


def _places(members: Sequence[Member], objectives: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Each plane's objective by number (any, where its share is 0) and its share: int64 [P], float64 [P]."""
    owners = [objectives.index(m.objective) if m.objective is not None else 0 for m in members]
    return torch.tensor(owners), torch.tensor([m.share for m in members], dtype=torch.float64)


def routers_for(layout: Layout, init: str, family: str) -> Routers:
    """The routers of a model, as they are before any training."""
    return Routers(
        layout.groups,
        layout.objectives,
        init,
        members=layout.members,
        constant=layout.static_weight,
        rows=layout.row_count,
        columns=layout.column_count,
        family=family,
    )
