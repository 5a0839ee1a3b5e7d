"""Linear: the weighted mean of the models (model soups, arXiv 2203.05482), or their weighted sum."""

from __future__ import annotations

import numpy as np

from paretofuse.engine.methods import native
from paretofuse.engine.methods.method import Group, Method, Parameter
from paretofuse.engine.methods.numbers import Floats, Numbers


class Linear(Method):
    """out = sum_k w_k x_k / sum_k w_k, or without the division where `normalize` is false."""

    name = "linear"
    parameters = (Parameter("weight", float, each=True, required=True), Parameter("normalize", bool, True))

    def coefficients(self, group: Group) -> list[float]:
        """What each model counts.

        Raises:
            ValueError: normalized weights that sum to 0.
        """
        weights = group.values("weight")
        total = sum(weights) if group.shared["normalize"] else 1.0
        if total == 0:
            raise ValueError(
                f"got weights {weights} for tensor {group.name!r}, which sum to 0; expected another sum, or normalize: "
                "false"
            )
        return [weight / total for weight in weights]

    def reference(self, group: Group) -> Floats:
        """The weighted sum."""
        merged = np.zeros(group.models[0].shape, group.models[0].floats().dtype)
        for coefficient, model in zip(self.coefficients(group), group.models, strict=True):
            merged = merged + coefficient * model.floats()
        return merged

    def merge(self, group: Group, out: Numbers) -> None:
        """The same in C++ where the dtypes allow."""
        if native.can((*group.models, out)):
            native.combine(group.models, np.array(self.coefficients(group)), out, group.threads)
        else:
            super().merge(group, out)
