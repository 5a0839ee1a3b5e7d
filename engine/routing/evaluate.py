"""The routers evaluated without torch: from a preference to routing weights.

The torch routers compute the same in the same precision, and may differ in a number's last bit; this one serves
`paretofuse merge`, and C++ gives its very bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

PARAMETERS = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
"""Names of the routers' parameters, in the store as in torch."""

INITS = ("identity", "sqrt", "constant")


def check_init(init: str) -> None:
    """ValueError unless it is one of INITS."""
    if init not in INITS:
        raise ValueError(f"got init={init!r}, expected one of {', '.join(INITS)}")


"""What the routers' MLP adds to: the preference r, its square root, or nothing."""


def check_routers(shapes: Mapping[str, tuple[int, ...]], init: str, groups: int, experts: int) -> None:
    """Check the routers' parameters against a layout.

    Args:
        shapes: the parameters' shapes by name.
        init: "identity", "sqrt" or "constant".
        groups: number of routing groups G.
        experts: number of experts E.

    Raises:
        ValueError: an unknown init, a missing or unknown parameter, or a shape that does not fit G and E.
    """
    check_init(init)
    if set(shapes) != set(PARAMETERS):
        raise ValueError(f"got router parameters {sorted(shapes)}, expected {sorted(PARAMETERS)}")
    shape = tuple(shapes["hidden.bias"])
    hidden = shape[1] if len(shape) == 2 else 0
    expected = {
        "hidden.weight": (groups, hidden, experts),
        "hidden.bias": (groups, hidden),
        "output.weight": (groups, experts, hidden),
        "output.bias": (groups, experts),
    }
    for name, want in expected.items():
        if tuple(shapes[name]) != want:
            raise ValueError(
                f"got router parameter {name!r} of shape {tuple(shapes[name])}, expected {want} for {groups} "
                f"groups and {experts} experts"
            )


def routing_weights(parameters: Mapping[str, np.ndarray], init: str, preference: np.ndarray) -> np.ndarray:
    """Evaluate all routers for one preference: L = init(r) + W2 relu(W1 r + b1) + b2 in each group.

    Computed in float64 from the float32 parameters and rounded once at the end.

    Args:
        parameters: float32; hidden.weight [G, H, E], hidden.bias [G, H], output.weight [G, E, H],
            output.bias [G, E].
        init: "identity" (r), "sqrt" (sqrt(r)) or "constant" (0; the constant is part of output.bias).
        preference: r, float64 [E], as from `as_preference`.

    Returns:
        The routing weights L, float32 [G, E].

    Raises:
        ValueError: shapes or init that do not fit.
    """
    r = np.asarray(preference, dtype=np.float64)
    if r.ndim != 1:
        raise ValueError(f"got a preference of shape {r.shape}, expected (E,)")
    groups = parameters["hidden.bias"].shape[0] if "hidden.bias" in parameters else 0
    check_routers({name: array.shape for name, array in parameters.items()}, init, groups, r.shape[0])
    w1, b1, w2, b2 = (parameters[name].astype(np.float64) for name in PARAMETERS)
    hidden = np.maximum((w1 * r).sum(axis=-1) + b1, 0.0)  # [G, H]
    mixed = (w2 * hidden[:, None, :]).sum(axis=-1) + b2  # [G, E]
    if init == "identity":
        mixed = r + mixed
    elif init == "sqrt":
        mixed = np.sqrt(r) + mixed
    rounded: np.ndarray = mixed.astype(np.float32)
    return rounded


def was_trained(init: str, parameters: Mapping[str, np.ndarray]) -> bool:
    """Whether the routers' parameters that start at zero (see `Routers.reset`) are zero no more."""
    zero = ("hidden.bias",) if init == "constant" else ("output.weight", "output.bias")
    return any(parameters[name].any() for name in zero)
