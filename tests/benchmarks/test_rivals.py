from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from benchmarks.experiments import rivals, vision
from benchmarks.experiments.contenders import COEFFICIENTS, contenders
from benchmarks.experiments.experiment import Context, Meter, Models

pytest.importorskip("sklearn", reason="the quick experiment is about scikit-learn's digits")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    experiment = vision.two(True)
    return Context(experiment, Models(experiment, 1, tmp_path_factory.mktemp("models")), 1, Meter())


def state(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_dense_models_start_where_they_say(context):
    experts = [state(expert) for expert in context.models.experts().values()]
    starts = {
        rivals.from_base: [state(context.models.base())] * 3,
        rivals.from_average: [(experts[0] + experts[1]) / 2] * 3,
        rivals.from_nearest: [experts[0], experts[0], experts[1]],
    }
    where = np.array([[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75]])
    for start, wanted in starts.items():
        seen: list[tuple[Tensor, list[float]]] = []

        def keep(model, preference, seed, seen=seen):
            seen.append((state(model), preference))

        own = replace(context.experiment, fine_tune=keep, scalarized=where)
        outcome = rivals.dense(start)(replace(context, experiment=own, meter=Meter()))
        assert [preference for _, preference in seen] == where[1:].tolist()  # the corner is the expert itself
        for (found, _), right in zip(seen, wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
        first = context.models.expert(context.experiment.names[0])
        assert outcome.front.values[0].tolist() == context.measured(first)


def test_the_search_begins_at_experts_and_average(context):
    pytest.importorskip("optuna", reason="the search is Optuna's")
    outcome = rivals.evolved(3)(context)
    engine = pf.stack(context.models.base(), context.models.experts(), route="module")
    shares = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    begun = [context.measured(engine.merge(weights=s.expand(len(engine.groups), 2))) for s in shares]
    assert len(outcome.front.values) == len(context.experiment.preferences)
    for values in outcome.front.values.tolist():
        assert values in begun
    assert outcome.parameters == len(engine.groups) * 2


def test_the_search_finds_what_weighs_least(context):
    pytest.importorskip("optuna", reason="the search is Optuna's")
    experiment, seen = context.experiment, []

    def size(index):  # no data's part: a loss of the weights alone, which the half sum of deltas would halve
        def loss(model, batch):
            seen.append(index)
            return state(model).sub(state(experts[index])).square().sum()

        return loss

    experts = list(context.models.experts().values())
    objectives = tuple(pf.Objective(o.name, [0], size(i)) for i, o in enumerate(experiment.objectives))
    far = nn.utils.parameters_to_vector
    own = replace(
        experiment,
        objectives=objectives,
        evaluate=lambda m: {
            o.name: float((far(m.parameters()) - state(e)).square().sum())
            for o, e in zip(objectives, experts, strict=True)
        },
    )
    front = rivals.evolved(30)(replace(context, experiment=own)).front
    assert len(seen) == 30 * rivals.PASSES * 2
    at = [row.tolist() for row in front.values]
    assert at[0][0] == pytest.approx(0, abs=1e-6)  # nothing is nearer to an expert than the expert
    assert at[-1][1] == pytest.approx(0, abs=1e-6)
    gap = at[0][1]
    assert all(
        r @ np.array(v) <= min(r[0], r[1], 0.25) * gap + 1e-6
        for r, v in zip(front.preferences, at, strict=True)
    )


def test_entropies_see_no_label(context):
    class Hidden:
        def __init__(self, data):
            self.data = data

        def __iter__(self):
            for images, labels in self.data:
                yield images, torch.full_like(labels, -1)

    own = replace(
        context.experiment,
        unlabelled=tuple(pf.Objective(o.name, Hidden(o.data), o.loss) for o in context.experiment.unlabelled),
    )
    blind = rivals.without_labels(3)(replace(context, experiment=own)).front
    assert blind == rivals.without_labels(3)(context).front


def test_they_are_listed_once_and_entropies_only_where_there_are_classes(context):
    names = [contender.name for contender in contenders(context.experiment)]
    assert {"dense, from the average", "dense, from the nearest expert", "MGDA", "NSGA-II"} < set(names)
    assert "entropy, no labels" in names
    none = [c.name for c in contenders(replace(context.experiment, unlabelled=()))]
    assert set(names) - set(none) == {"entropy, no labels"}


@pytest.mark.parametrize(("name", "method"), [("TSV", "tsv"), ("Iso-C", "iso_c"), ("RegMean", "regmean")])
def test_a_single_merge_is_its_methods_plane_at_the_best_coefficient(context, name, method):
    (contender,) = (c for c in contenders(context.experiment) if c.name == name)
    outcome = contender.run(context)
    best = float(outcome.note.rpartition(": ")[2])
    model, experts = context.models.base(), context.models.experts()
    engine = pf.stack(model, experts)
    reads = context.experiment.objectives if method == "regmean" else None
    pf.add_consensus(engine, method, objectives=reads)
    with torch.no_grad():
        for parameter, plane in ((model.get_parameter(n), p) for n, p in engine._stack.planes[-1].items()):
            parameter.add_(best * plane.decode())
    np.testing.assert_allclose(
        outcome.front.values[0], context.measured(model), atol=0.051
    )  # two images of 40
    assert best in COEFFICIENTS
