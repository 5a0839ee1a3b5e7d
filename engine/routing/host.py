"""The groups' routers evaluated by NumPy, for one preference: ten calls instead of a dozen of PyTorch's dispatches.

For a preference this arithmetic is so little that a GPU, or PyTorch on the CPU, spends all its time on being asked.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


class HostRouters:
    """What `Routers` is for the groups, without row coefficients.

        L(r) = init(r) + W2 relu(W1 r + b1) + b2

    Args:
        init: "identity", "sqrt" or "constant", as the routers'.
        hidden, hidden_bias: W1 [G, H, M] and b1 [G, H].
        output, output_bias: W2 [G, P, H] and b2 [G, P].
        owner: each plane's objective by number, int64 [P].
        share: each plane's share of it, float64 [P].
    """

    def __init__(
        self,
        init: str,
        hidden: Array,
        hidden_bias: Array,
        output: Array,
        output_bias: Array,
        owner: Array,
        share: Array,
    ) -> None:
        self._init = init
        self._hidden = hidden.reshape(-1, hidden.shape[2]).astype(np.float64)  # [G H, M]
        self._hidden_bias = hidden_bias.astype(np.float64)
        self._output, self._output_bias = output.astype(np.float64), output_bias.astype(np.float64)
        self._owner, self._share = owner.copy(), share.copy()

    def __call__(self, r: Array) -> Array:
        """Routing weights float32 [G, P] of a checked preference float64 [M]; computed in float64, rounded once."""
        hidden = (self._hidden @ r).reshape(self._hidden_bias.shape)  # [G, H]
        hidden += self._hidden_bias
        np.maximum(hidden, 0, out=hidden)
        weights = (self._output @ hidden[..., None])[..., 0]  # [G, P]
        weights += self._output_bias
        if self._init != "constant":
            start = r if self._init == "identity" else np.sqrt(r)
            weights += start[self._owner] * self._share
        rounded: Array = weights.astype(np.float32)
        return rounded
