"""lm-evaluation-harness on live modules, offline: the same numbers as by hand, its own JSON, and fronts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import paretofuse as pf
from paretofuse.fronts.harness import LMEvalMetrics
from tests.support.command import call
from tests.support.models import perturbed, tiny_gpt2

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the harness and what it imports

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{choices}
metric_list:
  - metric: {metric}
    aggregation: {aggregation}
    higher_is_better: {higher}
"""
QUESTIONS = [
    {"question": f"w{i} w{i + 1}", "options": ["w3", "w4", "w50"], "answer": i % 3} for i in range(7)
]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<e>": 0} | {f"w{i}": i + 1 for i in range(100)}
    made = Tokenizer(models.WordLevel(words, unk_token="<e>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", unk_token="<e>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of our own with their data."""
    path = tmp_path_factory.mktemp("tasks")
    data = path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    pick = {
        "name": "pick",
        "kind": "multiple_choice",
        "target": "answer",
        "choices": "doc_to_choice: options",
    }
    word = {"name": "word", "kind": "loglikelihood", "target": '" w5"', "choices": ""}
    ways = {"metric": "acc", "aggregation": "mean", "higher": "true"}
    losses = {"metric": "perplexity", "aggregation": "perplexity", "higher": "false"}
    (path / "pick.yaml").write_text(TASK.format(data=data, **pick, **ways))
    (path / "word.yaml").write_text(TASK.format(data=data, **word, **losses))
    return path


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def by_hand(module: torch.nn.Module) -> dict[str, float]:
    def likelihood(question: str, answer: str) -> float:
        numbers = torch.tensor([[int(word[1:]) + 1 for word in f"{question} {answer}".split()]])
        logits = module(numbers).logits[0, -2].double().log_softmax(-1)
        return float(logits[numbers[0, -1]])

    right = [
        max(range(3), key=lambda i, q=q: likelihood(q["question"], q["options"][i])) == q["answer"]
        for q in QUESTIONS
    ]
    logs = torch.tensor([likelihood(q["question"], "w5") for q in QUESTIONS], dtype=torch.float64)
    return {"pick": sum(right) / len(right), "word": float((-logs.mean()).exp())}


def test_a_front_by_tasks_of_ones_own(folder: Path, tmp_path: Path) -> None:
    base = tiny_gpt2()
    engine = pf.stack(base, {"a": perturbed(base, 1, 0.1), "b": perturbed(base, 2, 0.1)})
    metrics = pf.lm_eval_metrics(
        ["pick", "word"], tokenizer=tokenizer(), include_path=folder, results=tmp_path / "results"
    )
    assert metrics.maximize == {"pick": True, "word": False}
    grid = pf.simplex_grid(2, 2)
    front = pf.sweep(engine, metrics, grid, maximize=metrics.maximize, progress=False)
    assert front.directions == (True, False)
    for number, (preference, values) in enumerate(zip(grid, front.values, strict=True), start=1):
        with torch.no_grad():
            expected = by_hand(engine.merge(preference))
        assert values[0] == pytest.approx(expected["pick"])
        assert values[1] == pytest.approx(expected["word"], rel=1e-4)
        told = json.loads((tmp_path / "results" / f"{number}.json").read_text())
        assert told["results"]["pick"]["acc,none"] == values[0]
        assert told["results"]["word"]["perplexity,none"] == values[1]
        assert told["configs"]["pick"]["test_split"] == "test"
    again = pickle.loads(pickle.dumps(metrics))
    assert again.maximize == metrics.maximize


def test_the_command_line_takes_the_tokenizer_from_the_store(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_gpt2()
    for name, model in (("base", base), ("a", perturbed(base, 1, 0.1)), ("b", perturbed(base, 2, 0.1))):
        model.save_pretrained(tmp_path / name)
        if name == "base":
            tokenizer().save_pretrained(tmp_path / name)
    engine = pf.stack(tmp_path / "base", {"a": tmp_path / "a", "b": tmp_path / "b"})
    engine.save(tmp_path / "s")
    usual = ["sweep", tmp_path / "s", "--points", "2", "-o", tmp_path / "f.csv", "--lm-eval", "pick,word"]
    code, _, err = call(capsys, *usual, "--lm-eval-path", folder, "--lm-eval-results", tmp_path / "json")
    assert code == 0, err
    front = pf.Front.from_csv(tmp_path / "f.csv")
    assert (front.metrics, front.directions) == (("pick", "word"), (True, False))
    with torch.no_grad():
        expected = by_hand(engine.merge(front.preferences[1]))
    assert front.values[1].tolist() == pytest.approx(list(expected.values()), rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "json").iterdir()) == ["1.json", "2.json"]
    code, _, err = call(capsys, *usual, "--minimize")
    assert (code, "leave it out" in err) == (1, True)
    code, _, err = call(capsys, *usual, "--evaluate", "json:dumps")
    assert (code, "expected one of them" in err) == (1, True)


def test_wrong_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    def with_ours_only(include_path: str, include_defaults: bool = True) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)  # its own take half a minute

    monkeypatch.setattr("lm_eval.tasks.TaskManager", with_ours_only)
    unknown = LMEvalMetrics(["pick", "pikc"], tokenizer=None, include_path=folder)
    with pytest.raises(ValueError, match=r"got tasks \['pikc'\], which the harness does not know"):
        unknown.maximize  # noqa: B018
    for tasks in ("pick", []):
        with pytest.raises(ValueError, match="expected a list of task names"):
            LMEvalMetrics(tasks, tokenizer=None)
    for option in ("limit", "batch_size"):
        with pytest.raises(ValueError, match=f"got {option}=0"):
            LMEvalMetrics(["pick"], tokenizer=None, **{option: 0})  # type: ignore[arg-type]
