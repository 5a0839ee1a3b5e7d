"""Heads: every objective is trained, judged and served with its own, also where the numbers of labels differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paretofuse as pf
from paretofuse.engine.training.validation import Validation
from tests.support.models import same

LABELS = {"cola": 2, "mnli": 3}
R = [0.4, 0.6]


class Body(nn.Module):
    """What has no head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu(self.norm(self.body(x))))


class Classifier(Body):
    """Knows its number of labels, as transformers' classes do."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.labels = labels
        self.classifier = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, labels))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(super().forward(x))
        return scores.view(-1, self.labels)


def experts(seed: int = 0) -> tuple[Classifier, dict[str, Any]]:
    torch.manual_seed(seed)
    return Classifier(2).eval(), {name: Classifier(labels).eval() for name, labels in LABELS.items()}


def batches(name: str, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """With every label, so that a head with too few raises an error."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(12) % LABELS[name]
    return [(torch.randn(12, 4, generator=generator), labels) for _ in range(2)]


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def accuracy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
    return float((module(batch[0]).argmax(-1) == batch[1]).sum()), len(batch[1])


OBJECTIVES = {name: (batches(name), loss) for name in LABELS}
METRICS = {name: (batches(name, 1), accuracy) for name in LABELS}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("heads", [["classifier"], ["classifier.1"]])
def test_a_view_is_the_merged_model_with_that_head(backend: str, heads: list[str]) -> None:
    base, models = experts()
    engine = pf.stack(base, models, heads=heads, backend=backend)
    views = {name: engine.head(name) for name in LABELS}
    for preference in (R, [1.0, 0.0], [0.0, 1.0]):
        engine.switch(preference)
        for name, view in views.items():
            truth = engine.merge(preference, head=name)
            assert type(view) is Classifier
            assert same(view, truth)
            x = torch.randn(5, 4)
            assert torch.equal(view(x), truth(x))
            assert view(x).shape == (5, LABELS[name])
    live = engine.module
    assert isinstance(live, Classifier)
    assert torch.equal(
        live.classifier[1].weight, base.classifier[1].weight
    )  # the live module's own stays the base's
    stored = {t.data_ptr() for t in live.state_dict().values()}
    held = [n for n, t in views["mnli"].state_dict().items() if t.data_ptr() not in stored]
    assert held
    assert all(name.startswith(tuple(heads)) for name in held)  # a view holds its head and no more


def test_a_view_has_the_live_modules_modes_and_hooks() -> None:
    base, models = experts()
    engine = pf.stack(base, models, heads=["classifier"])
    calls: list[nn.Module] = []
    live = engine.module
    assert isinstance(live, Classifier)
    live.body.register_forward_hook(lambda module, *_: calls.append(module))
    live.train()
    view = engine.head("mnli")
    assert all(part.training for part in view.modules())
    view(torch.randn(5, 4))
    assert calls == [live.body]
    live.eval()
    assert not any(part.training for part in engine.head("mnli").modules())


def test_a_base_without_a_head() -> None:
    _, models = experts()
    body = Body().eval()
    engine = pf.stack(body, models, heads=["classifier"])
    for name in LABELS:
        engine.switch(R)
        assert same(engine.head(name), engine.merge(R, head=name))
    assert engine.module(torch.randn(5, 4)).shape == (5, 8)
    states = {name: model.state_dict() for name, model in models.items()}
    bare = pf.stack(body, states, heads=["classifier"])  # nothing tells of a class with a head
    with pytest.raises(ValueError, match=r"the head of 'cola' and Body do not fit: .*classifier"):
        bare.head("cola")


class HeadFirst(Body):
    """Its head comes before all that it shares with others."""

    def __init__(self, labels: int) -> None:
        nn.Module.__init__(self)
        self.classifier = nn.Linear(8, labels)
        shared = Body()
        self.body, self.norm, self.drop = shared.body, shared.norm, shared.drop

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(super().forward(x))
        return scores


def test_a_head_may_stand_before_the_body() -> None:
    models = {name: HeadFirst(labels).eval() for name, labels in LABELS.items()}
    engine = pf.stack(Body().eval(), models, heads=["classifier"])
    engine.switch(R)
    for name, labels in LABELS.items():
        assert same(engine.head(name), engine.merge(R, head=name))
        assert engine.head(name)(torch.randn(5, 4)).shape == (5, labels)


def test_what_has_no_head_is_the_module_itself() -> None:
    base, models = experts()
    engine = pf.stack(base, {"cola": models["cola"]}, heads=["classifier"])
    merged = engine.merge([1.0])
    assert pf.with_head(engine.module, "other") is engine.module
    assert pf.with_head(merged, "cola") is merged
    with pytest.raises(ValueError, match="got head='other', expected an objective that has a head"):
        engine.head("other")


def test_evaluation_is_by_each_objectives_own_head() -> None:
    base, models = experts()
    engine = pf.stack(base, models, heads=["classifier"])
    for name in LABELS:
        engine.switch({name: 1.0})
        found = pf.evaluate(engine.module, METRICS)
        assert found[name] == pf.evaluate(models[name], {name: METRICS[name]})[name]
        for other in LABELS:
            merged = engine.merge({name: 1.0}, head=other)
            assert found[other] == pf.evaluate(merged, {other: METRICS[other]})[other]


@pytest.mark.parametrize("materialize", [True, False])
def test_training_is_by_each_objectives_own_head(materialize: bool) -> None:
    base, models = experts()
    engine = pf.stack(base, models, heads=["classifier"])
    seen: dict[str, set[tuple[int, ...]]] = {name: set() for name in LABELS}

    def watched(name: str) -> Any:
        def watching(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen[name].add(tuple(module(batch[0]).shape))
            return loss(module, batch)

        return watching

    objectives = {name: (batches(name), watched(name)) for name in LABELS}
    validation = Validation(lambda module: pf.evaluate(module, METRICS), maximize=True, every=2)
    pf.fit(
        engine, objectives, steps=4, family="scalar", validation=validation, materialize=materialize, progress=False
    )  # fmt: skip
    assert seen == {"cola": {(12, 2)}, "mnli": {(12, 3)}}
    # The gradient of one loss, against that of the merged model with that head in float64.
    engine.train_at(R, materialize=materialize)
    module = engine.module if materialize else engine.fused_module
    x, y = batches("mnli")[0]
    found = engine.jacobian([loss(pf.with_head(module, "mnli"), (x, y))])[0]
    model = engine.merge(R, head="mnli").double()
    F.cross_entropy(model(x.double()), y).backward()
    truth = torch.zeros(len(engine.groups), 2, dtype=torch.float64)
    for name, group in engine.tensor_groups.items():
        if isinstance(tensor := model.state_dict(keep_vars=True)[name], nn.Parameter):
            for column, expert in enumerate(models.values()):
                delta = expert.state_dict()[name].double() - base.state_dict()[name].double()
                assert tensor.grad is not None
                truth[engine.groups.index(group), column] += (tensor.grad * delta).sum()
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


def test_sweeps_and_the_command_line_are_by_each_objectives_own_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paretofuse.cli import main

    base, models = experts()
    engine = pf.stack(base, models, heads=["classifier"])
    front = pf.sweep(engine, lambda module: pf.evaluate(module, METRICS), maximize=True, progress=False)
    for name, column in zip(LABELS, front.values.T, strict=True):
        corner = int(np.argmax(front.preferences[:, list(LABELS).index(name)]))
        assert column[corner] == pf.evaluate(models[name], {name: METRICS[name]})[name]
    engine.save(tmp_path / "store")
    (tmp_path / "tasks_with_heads.py").write_text(
        "from tests.modules.test_heads import METRICS, Classifier, pf\n"
        "def model():\n    return Classifier(2)\n"
        "def judge(module):\n    return pf.evaluate(module, METRICS)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "store", "--evaluate", "tasks_with_heads:judge", "--module", "tasks_with_heads:model"]
    # The store knows no class of the experts, so the base's with a head of another size has to do.
    monkeypatch.setattr(Classifier, "forward", lambda self, x: self.classifier(Body.forward(self, x)))
    assert main([*command, "-o", "front.csv", "--quiet"]) == 0
    sys.modules.pop("tasks_with_heads")
    rows = [line.split(",") for line in Path("front.csv").read_text().splitlines() if line[0] in "01"]
    assert np.array_equal(np.array([row[2:4] for row in rows], float), front.values)


def test_replicas_have_heads() -> None:
    base, models = experts()
    engine = pf.stack(base, models, heads=["classifier"], replicas=1)
    for name in LABELS:  # one replica, shown with either head
        with engine.replica(R, head=name, timeout=0) as module:
            assert same(module, engine.merge(R, head=name))
    with engine.replica(R, timeout=0) as module:
        assert same(module, engine.merge(R))
        assert same(pf.with_head(module, "mnli"), engine.merge(R, head="mnli"))
    for ask in (engine.replica, engine.areplica):
        with pytest.raises(ValueError, match="got head='x'"):
            ask(R, head="x")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_heads_of_transformers_models_and_of_adapters(tmp_path: Path) -> None:
    """Losses that the model computes itself ask it for its number of labels."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    def model(labels: int) -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            num_labels=labels,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config).eval()

    base = model(2)
    lora = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    adapted = peft.get_peft_model(model(3), lora)
    adapted.save_pretrained(tmp_path / "lora")
    truth = adapted.merge_and_unload()
    models: dict[str, Any] = {"cola": model(2), "mnli": model(4), "adapter": str(tmp_path / "lora")}
    engine = pf.stack(base, models, heads=["classifier"])
    tokens = torch.arange(10).view(2, 5)
    for name, labels in (("cola", 2), ("mnli", 4), ("adapter", 3)):
        given = {"input_ids": tokens, "labels": torch.tensor([labels - 1, 0])}
        engine.switch({name: 1.0})
        merged = engine.merge({name: 1.0}, head=name)
        shown = engine.head(name)
        assert torch.equal(shown(**given).loss, merged(**given).loss)
        assert shown(**given).logits.shape == (2, labels)
        assert shown.num_labels == labels
    assert torch.equal(engine.head("adapter").classifier.weight, truth.classifier.weight)
    assert engine.module.num_labels == 2
