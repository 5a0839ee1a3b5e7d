"""Two small convex problems on the simplex, solved exactly: the shortest vector, and a linear program.

Both have at most a few dozen variables, where general solvers spend their time on being called.
"""

from __future__ import annotations

import numpy as np

_TOLERANCE = 1e-10


def shortest_in_hull(gram: np.ndarray) -> np.ndarray:
    """The weights of the shortest vector in the convex hull of M vectors: argmin beta' gram beta on the simplex.

    With y = s beta and s > 0 free, min y' gram y + (sum(y) - 1)^2 over y >= 0 has its solution along the same
    beta, and is a non-negative least-squares problem, which an active set solves exactly (Lawson and Hanson, 1974).

    Args:
        gram: [M, M] float64, positive semidefinite: inner products of the vectors.

    Returns:
        beta [M] float64, >= 0, with sum 1.
    """
    count = len(gram)
    scale = float(np.max(np.diag(gram)))
    if scale <= 0:
        return np.full(count, 1 / count)
    if count == 2:
        a, b, c = gram[0, 0], gram[0, 1], gram[1, 1]
        spread = a - 2 * b + c  # squared distance of the two vectors
        first = 0.5 if spread <= _TOLERANCE * scale else float(np.clip((c - b) / spread, 0.0, 1.0))
        return np.array([first, 1 - first])
    # Wolfe's trick: with 1 added to every inner product, the simplex's constraint may be dropped and y scaled to sum 1
    # at the end; what is left is the non-negative least squares of Lawson and Hanson, on the normal equations.
    normal = gram / scale + 1.0  # [M, M]
    active = np.zeros(count, dtype=bool)
    y = np.zeros(count)
    for _ in range(10 * count):
        pull = (
            1.0 - normal @ y
        )  # [M] how much the objective gains from each vector; 0 for those that take part
        pull[active] = -np.inf
        enter = int(np.argmax(pull))
        if pull[enter] <= _TOLERANCE:
            break
        active[enter] = True
        while True:
            chosen = np.flatnonzero(active)
            # Least squares rather than solve: twin vectors make this singular.
            target = np.linalg.lstsq(normal[np.ix_(chosen, chosen)], np.ones(len(chosen)), rcond=1e-13)[0]
            if (target > 0).all():
                y[chosen] = target
                break
            # Go only as far as all stay >= 0; whoever gets to 0 first takes part no more, and the rest try again.
            down = chosen[target <= 0]
            steps = y[down] / np.maximum(y[down] - target[target <= 0], 1e-300)
            y[chosen] += float(steps.min()) * (target - y[chosen])
            leave = down[np.argmin(steps)]
            y[leave], active[leave] = 0.0, False
            if not active.any():
                break
    total = float(y.sum())
    return y / total if total > 0 else np.full(count, 1 / count)


def maximize_on_simplex(gain: np.ndarray, matrix: np.ndarray, bound: np.ndarray) -> np.ndarray | None:
    """Solve the linear program max gain' beta, subject to matrix beta >= bound, on the simplex.

    The dual simplex method with Bland's rule. The corner of the largest gain is optimal while the constraints are
    left out, so that no first phase is needed; constraints are then met one pivot at a time.

    Args:
        gain: [M] float64.
        matrix: [R, M] float64.
        bound: [R] float64; -inf leaves a row out.

    Returns:
        beta [M] float64, >= 0, with sum 1; None if no such beta meets the constraints.
    """
    kept = np.isfinite(bound)
    size = np.abs(matrix[kept]).max(axis=1, initial=0.0)
    size = np.where(size > 0, size, 1.0)  # scaled rows: one tolerance then fits gradients of any length
    matrix, bound = matrix[kept] / size[:, None], bound[kept] / size
    gain = gain / max(float(np.abs(gain).max()), 1e-300)
    count = len(gain)
    top = int(np.argmax(gain))
    rest = np.delete(np.arange(count), top)
    # Dictionary over the free variables beta_rest: each basic variable is constant + row @ free, all must be >= 0.
    # Rows: the slack of each constraint, then beta_top = 1 - sum(beta_rest).
    slope = np.vstack([matrix[:, rest] - matrix[:, [top]], -np.ones((1, count - 1))])
    table = np.hstack([np.append(matrix[:, top] - bound, 1.0)[:, None], slope])  # [R + 1, 1 + free]
    cost = gain[top] - gain[rest]  # >= 0: what each free variable takes away; stays >= 0
    basic = np.append(count + np.arange(len(bound)), top)  # variable ids: beta below `count`, slacks above
    free = rest.copy()
    for _ in range(50 * (count + len(bound))):
        wrong = np.flatnonzero(table[:, 0] < -_TOLERANCE)
        if len(wrong) == 0:
            beta = np.zeros(count)
            real = basic < count
            beta[basic[real]] = np.maximum(table[real, 0], 0.0)
            return np.asarray(beta / beta.sum())
        row = int(
            wrong[np.argmin(basic[wrong])]
        )  # Bland: the smallest variable, or ties go round in a circle for ever
        helps = np.flatnonzero(table[row, 1:] > _TOLERANCE)
        if len(helps) == 0:
            return None  # every free variable makes this row smaller yet: no beta meets its constraint
        # The smallest ratio keeps every cost >= 0, that is, the corner optimal for the rows that it meets.
        ratio = cost[helps] / table[row, 1 + helps]
        ties = helps[ratio <= ratio.min() + _TOLERANCE]
        column = int(ties[np.argmin(free[ties])])
        pivot = table[row, 1 + column]
        # Solve the row for the free variable, then put it into all other rows and the cost.
        entering = -table[row] / pivot
        entering[1 + column] = 1 / pivot
        share = table[:, 1 + column].copy()
        table[:, 1 + column] = 0.0
        table += share[:, None] * entering
        table[row] = entering
        loss = cost[column]
        cost[column] = 0.0
        cost = np.maximum(cost + loss * entering[1:], 0.0)
        basic[row], free[column] = free[column], basic[row]
    return None
