"""The methods by name; whoever has one of their own hands it over beside these."""

from __future__ import annotations

from collections.abc import Sequence

from paretofuse.engine.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from paretofuse.engine.methods.dare import DareLinear, DareTies
from paretofuse.engine.methods.della import Della, DellaLinear
from paretofuse.engine.methods.iso_c import IsoC
from paretofuse.engine.methods.linear import Linear
from paretofuse.engine.methods.method import Method
from paretofuse.engine.methods.model_stock import ModelStock
from paretofuse.engine.methods.nuslerp import NuSlerp
from paretofuse.engine.methods.passthrough import Passthrough
from paretofuse.engine.methods.slerp import Slerp
from paretofuse.engine.methods.task_arithmetic import TaskArithmetic
from paretofuse.engine.methods.ties import Ties
from paretofuse.engine.methods.tsv import Tsv

METHODS: tuple[Method, ...] = (
    Linear(), TaskArithmetic(), Ties(), DareLinear(), DareTies(), Breadcrumbs(), BreadcrumbsTies(), Della(),
    DellaLinear(), Slerp(), NuSlerp(), ModelStock(), Passthrough(), Tsv(), IsoC(),
)  # fmt: skip


def by_name(own: Sequence[Method] = ()) -> dict[str, Method]:
    """All methods by name, with a user's own.

    Raises:
        TypeError: one of the own is no Method.
        ValueError: it has no name, or that of another.
    """
    found = {method.name: method for method in METHODS}
    for method in own:
        if not isinstance(method, Method):
            raise TypeError(f"got the method {method!r}, expected an instance of a subclass of Method")
        if not getattr(method, "name", ""):
            raise ValueError(f"got a {type(method).__name__} without a name; give it one: name = 'my_method'")
        if method.name in found:
            raise ValueError(
                f"got a method named {method.name!r}, which there is already; choose another name"
            )
        found[method.name] = method
    return found
