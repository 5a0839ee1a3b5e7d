"""Metrics of one module over batches, in eval mode and without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paretofuse.engine.evaluation.objective import Objective, as_objectives
from paretofuse.engine.modules.heads import with_head

Number = Tensor | float
Metric = Callable[[nn.Module, Any], Number | tuple[Number, Number]]
"""(module, batch) -> the batch's mean, or (sum, count) where batches differ in size."""


def evaluate(
    module: nn.Module, objectives: Sequence[Objective] | Mapping[str, tuple[Iterable[Any], Metric]]
) -> dict[str, float]:
    """Each objective's loss or metric over all of its batches: what `pf.sweep` and `pf.Validation` want to hear.

    An objective with a head of its own (`heads=`) is judged with that head, where `module` is an engine's; see
    `pf.with_head`. The module is in eval mode meanwhile, under torch.no_grad(); afterwards each submodule has its own
    mode again.

    Args:
        module: `engine.module`, or any other.
        objectives: what `pf.fit` takes: objectives, or {name: (data, metric)} with metric(module, batch). A metric
            returns a number, and the result is the mean over batches; or it returns (sum, count), such as correct
            answers and all answers, and the result is the total sum by the total count.

    Returns:
        A number for each objective.

    Raises:
        ValueError: data without batches, or counts that sum to 0.
        TypeError: `module` is none, `objectives` are none, or a metric returned something else.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"got {type(module).__name__} to evaluate, expected an nn.Module such as engine.module or "
            "engine.merge(preference)"
        )
    asked = as_objectives(objectives)
    with torch.no_grad(), eval_mode(module):
        return {
            each.name: _mean(with_head(module, each.name), each.name, each.data, each.loss) for each in asked
        }


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a while."""
    # Each submodule keeps its own flag: a frozen BatchNorm may well be in eval mode inside a training model.
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def _mean(module: nn.Module, name: str, data: Iterable[Any], metric: Metric) -> float:
    total = count = 0.0
    for batch in data:
        result = metric(module, batch)
        numbers = result if isinstance(result, tuple) else (result, 1.0)
        try:
            more, weight = (float(number) for number in numbers)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"got {type(result).__name__} from the metric of {name!r}, expected one number or (sum, count)"
            ) from None
        total, count = total + more, count + weight
    if not count > 0:
        raise ValueError(
            f"got {count:g} examples of {name!r}, expected some; is its data an iterator that has already ended?"
        )
    return total / count
