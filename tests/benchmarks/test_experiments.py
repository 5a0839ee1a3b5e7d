from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import paretofuse as pf
from benchmarks.data_sets import texts
from benchmarks.experiments import ablation, language, report, tables, text, vision
from benchmarks.experiments.__main__ import EXPERIMENTS, loader
from benchmarks.experiments.contenders import contenders
from benchmarks.experiments.experiment import Models, fine_tune
from benchmarks.experiments.run import Plan, run
from benchmarks.harness.record import BenchmarkError

pytest.importorskip("peft", reason="TIES and DARE are PEFT's")
pytest.importorskip("sklearn", reason="the quick experiment is about scikit-learn's digits")

CHOSEN = (
    "expert digits",
    "expert negatives",
    "rewarded soups",
    "PWEMoE-LS module 0.6",
    "ours (scalar), 3 steps",
    "ours (rows and rank 4), 3 steps",
    "ours, 3 steps of 4 preferences",
    "ours, 3 steps",
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan([3], jobs=2, threads=1, quick=True, cache=tmp_path_factory.mktemp("cache"), only=CHOSEN)


@pytest.fixture(scope="module")
def results(plan: Plan):
    return run(vision.two, plan, say=lambda line: None)


def test_every_contender_is_measured_as_it_says(plan, results):
    assert [r.contender for r in results] == list(CHOSEN)
    experiment = vision.two(True)
    [folder] = plan.cache.iterdir()
    models = Models(experiment, 3, folder / "seed3")
    for r in results[:2]:
        found = experiment.evaluate(models.expert(r.contender.removeprefix("expert ")))
        assert r.values == [[found[name] for name in experiment.names]]
        assert r.kind == "model"
        assert r.wall_s is None
    soups = next(r for r in results if r.contender == "rewarded soups")
    # At its two ends, and at no learning, the straight line is the experts.
    np.testing.assert_allclose(soups.values[0], results[0].values[0], atol=1e-9)
    np.testing.assert_allclose(soups.values[-1], results[1].values[0], atol=1e-9)
    learned = next(r for r in results if r.contender == "ours, 3 steps")
    assert learned.steps == 3
    assert learned.peak_mb is not None
    assert learned.peak_mb > 0
    for name, family, rank in (
        ("ours", "rows", None),
        ("ours (scalar)", "scalar", None),
        ("ours (rows and rank 4)", "rows", 4),
    ):
        found = next(r for r in results if r.contender == f"{name}, 3 steps")
        engine = pf.stack(models.base(), models.experts(), **found.settings["stack"], family=family)
        if rank is not None:
            pf.add_planes(engine, rank)
        assert found.parameters == sum(p.numel() for p in engine.routers.parameters())


def test_tuning_has_no_part_in_the_test_data():
    """Its images and texts are those of training alone, some of them held back from all that learns."""
    whole, tuned = vision.tasks_of(2, True)[0], vision.for_tuning(vision.tasks_of(2, True)[0])
    kept = {image.numpy().tobytes() for image in whole.train.images}
    parts = [{image.numpy().tobytes() for image in part.images} for part in (tuned.train, tuned.test)]
    assert parts[0] | parts[1] == kept
    assert len(tuned.train.labels) + len(tuned.test.labels) == len(whole.train.labels)
    assert len(tuned.test.labels) == -(-len(whole.train.labels) // 5)
    tuned_ones = [name for name in EXPERIMENTS if name not in ("openclip", "restoration")]
    made = [loader(name, tuning)(True).name for name in tuned_ones for tuning in (False, True)]
    names = [name + end for name in tuned_ones for end in ("", "-tune")]
    assert made == names, "each with models and results of its own"
    found = language.for_tuning({f"train/{s}": torch.arange(80) for s in language.STYLES})
    assert found["train/news"].tolist() == list(range(70))
    assert found["test/news"].tolist() == list(range(70, 80))
    sentences = [texts.Sentence(f"s{i}", 0.0, f"d{i}") for i in range(16)]
    tested = text.split(sentences, 4, 2)[1]
    again = text.split(text.for_tuning(sentences), 4, 2)
    assert not {s.document for part in again for s in part} & {s.document for s in tested}


def test_what_is_finished_can_be_told_alone(plan, results):
    other = Plan([3, 4], 1, 1, True, plan.cache, plan.only, finished=True)
    assert run(vision.two, other) == results
    assert "(seeds 0 and 2 alone)" in tables.markdown(
        [row("x", s, 1.0) for s in (0, 2)] + [row("y", s, 1.0) for s in range(3)]
    )


def test_a_run_goes_on_with_what_is_missing(plan, results):
    [folder] = plan.cache.iterdir()
    said: list[str] = []
    assert run(vision.two, plan, say=said.append) == results
    assert said == []
    kept = folder / "seed3" / "results"
    (kept / "rewarded soups.json").unlink()
    changed = json.loads((kept / "ours (scalar), 3 steps.json").read_text())
    changed["settings"] = {"other": 1}
    (kept / "ours (scalar), 3 steps.json").write_text(json.dumps(changed))
    again = run(vision.two, plan, say=said.append)
    assert sorted(line.rpartition(": ")[2] for line in said) == [
        "ours (scalar), 3 steps",
        "rewarded soups",
    ]
    assert [(r.values, r.settings) for r in again] == [(r.values, r.settings) for r in results]


def test_an_unknown_contender_is_refused(plan):
    wrong = Plan([3], 1, 1, True, plan.cache, ["nobody"])
    with pytest.raises(BenchmarkError, match="nobody"):
        run(vision.two, wrong)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tables_and_pictures_come_from_the_csv_files(tmp_path, results):
    experiment = vision.two(True)
    rows = tables.measure(experiment, results)
    tables.write(experiment, results, rows, tmp_path)
    assert tables.read(tmp_path / "experiment_vision.csv") == rows
    points = tables.read_points(tmp_path / "experiment_vision_points.csv")
    for r in results:
        assert points[r.contender][3] == tables.front_of(experiment, r)
    ablation = [row("ablation plain @ 9", s, 0.5) for s in range(2)]
    ablation += [row("ablation lr 2 @ 9", s, 0.6 + s) for s in range(2)]
    tables.write_rows(ablation, tmp_path / "ablation_vision.csv")
    text = report.write(tmp_path, tmp_path).read_text()
    assert tables.markdown(rows) in text
    assert "Helped with every seed: lr 2 (+0.6000)" in text
    for name in ("experiment-vision.png", "ablation-vision-9.png"):
        assert f"({name})" in text
        assert (tmp_path / name).stat().st_size > 10_000


def row(contender: str, seed: int, hypervolume: float, share: float | None = 1.0, steps: int = 1):
    return tables.Row(
        "vision", contender, seed, "front", hypervolume, "a=1; b=2", "", share, 1.0, 0.0, 1.0, steps, 10, 1.0, 1.0, 1.0,
        "", "cpu", 1, "torch", "commit",
    )  # fmt: skip


def test_targets_are_judged_by_means_over_seeds():
    rows = [
        *(row("rewarded soups", s, v) for s, v in enumerate([0.5, 0.7])),
        *(row("PWEMoE-LS module 0.3", s, v, steps=4000) for s, v in enumerate([0.6, 0.7])),
        row("PWEMoE-EPO mlp 0.6", 1, 0.69, steps=4000),  # of one seed, in which ours has 0.7
        *(row("dense scalarization", s, 5.0) for s in range(2)),
        *(row("ours, 75 steps", s, v, 0.8) for s, v in enumerate([0.7, 0.5])),
        *(row("ours, 400 steps", s, v, 0.9) for s, v in enumerate([0.64, 0.7])),
        *(row("ours, 400 steps of 4 preferences", s, 1.0) for s in range(2)),
    ]
    said = report.targets(rows)
    above = [line for line in said if "baseline that shares" in line]
    assert ": met; ours, 400 steps: 0.7000, PWEMoE-EPO mlp 0.6: 0.6900 (ahead with 1 of 1" in above[0]
    assert len(above) == 2
    dense = [line for line in said if "fine-tuned" in line]
    assert "**missed**; ours, 400 steps: 0.6700, dense scalarization: 5.0000" in dense[0]
    early = [
        line for line in said if "in at most 1/10" in line
    ]  # four preferences a step are more than a tenth
    assert "**missed**; ours, 75 steps: 0.5000, PWEMoE-EPO mlp 0.6: 0.6900" in early[0]
    assert len(early) == 2
    shares = [line for line in said if "non-dominated" in line]
    assert "ours, 75 steps: **missed** (0.80" in shares[0]
    assert "ours, 400 steps: met (0.90" in shares[1]


def test_ends_and_the_experts_own_scores_are_told():
    def front(values, preferences=((1.0, 0.0), (0.0, 1.0))):
        return pf.Front(np.array(preferences), np.array(values), ("a", "b"), ("a", "b"), True)

    one = [(0.5, 0.5)]
    fronts = {
        "expert a": {0: front([(0.9, 0.1)], one), 1: front([(0.8, 0.1)], one)},
        "expert b": {0: front([(0.2, 0.5)], one), 1: front([(0.1, 0.6)], one)},
        "ours, 5 steps": {0: front([(0.8, 0.3), (0.1, 0.6)]), 1: front([(0.8, 0.3), (0.1, 0.6)])},
    }
    [said] = report.ends(fronts)
    assert "ours, 5 steps: -0.050 / +0.050" in said
    rows = [row("ours, 5 steps", s, v) for s, v in enumerate([0.5, 0.4])]
    [bound] = report.experts_bound(fronts, rows, (0.0, 0.0))
    assert "it would span 0.4650 ± 0.0212" in bound  # .9 x .5 and .8 x .6
    assert "Above it: none of ours." in bound
    above = [row("ours, 5 steps", s, v) for s, v in enumerate([0.5, 0.44])]
    assert "Above it: ours, 5 steps." in report.experts_bound(fronts, above, (0.0, 0.0))[0]


def test_ablations_compare_seed_by_seed():
    rows = [
        row("ablation plain @ 4", 0, 1.0),
        row("ablation plain @ 4", 1, 2.0),
        row("ablation plain @ 8", 0, 9.0),
    ]
    rows += [row("ablation x @ 4", 1, 2.5), row("ablation x @ 4", 0, 0.75)]
    assert ablation.differences(rows, "ablation x @ 4") == [0.5, -0.25]
    assert ablation.differences(rows, "ablation plain @ 4") == []
    assert "x (+0.1250)" in report.verdicts({"x": [0.5, -0.25]})[1]
    names = [c.name for c in ablation.listed(vision.two(True))]
    assert len(set(names)) == len(names)


class Forbidden:
    def __iter__(self):
        raise AssertionError("an objective of weight 0 costs nothing")


def test_fine_tuning_goes_to_the_weighted_minimum():
    model = nn.Linear(1, 3, bias=False)
    targets = torch.randn(2, 3)

    def objective(index: int) -> pf.Objective:
        return pf.Objective(f"{index}", [targets[index]], lambda m, t: (m.weight[:, 0] - t).square().sum())

    both = [objective(0), objective(1), pf.Objective("never", Forbidden(), lambda m, b: m.weight.sum())]
    state = torch.get_rng_state()
    fine_tune(model, both, [0.25, 0.75, 0.0], steps=400, lr=0.1, seed=0, weight_decay=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    wanted = 0.25 * targets[0] + 0.75 * targets[1]
    torch.testing.assert_close(model.weight[:, 0].detach(), wanted, atol=1e-2, rtol=0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_models_keep_ties_and_integers(tmp_path: Path):
    experiment = vision.two(True)
    made = Tied()
    made.count.fill_(7)
    tied = type(experiment)(**{**vars(experiment), "make": Tied, "train_base": lambda seed: made})
    again = Models(tied, 0, tmp_path).base()
    assert again.second.weight is again.first.weight
    for name, tensor in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_the_third_task_is_no_other_than_it_says():
    experiment = vision.three(True)
    assert experiment.names == ("digits", "negatives", "turned")
    assert experiment.preferences.shape[1] == experiment.scalarized.shape[1] == 3
    names = [c.name for c in contenders(experiment)]
    assert len(set(names)) == len(names)
    found = experiment.evaluate(experiment.make())
    assert all(math.isfinite(found[name]) for name in experiment.names)
