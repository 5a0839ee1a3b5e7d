"""MiniLM on three tasks: topics of BBC sentences, and the sentiment of film reviews and of tweets.

Each task has a head of its own, fitted to the base's embeddings and frozen; an expert fine-tunes the upper layers under
its head. Sentiment is the sign of 20 people's mean rating, sentences rated near neutral left out.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import paretofuse as pf
from benchmarks.data_sets import texts
from benchmarks.experiments.experiment import Experiment, fine_tune
from benchmarks.harness.record import CACHE
from benchmarks.models import minilm, pwemoe

TASKS = ("topics", "movies", "tweets")
NEUTRAL = 0.4
"""Sentences rated closer to 0 than this are left out."""


@dataclass(frozen=True)
class Sizes:
    """Of data and training: sentences of a task, tokens of a sentence, the encoder's layers, steps and batches."""

    train: int = 2500
    test: int = 500
    tokens: int = 24
    layers: int = 2
    expert_steps: int = 300
    expert_batch: int = 16
    expert_lr: float = 5e-4
    learning_batch: int = 4
    points: int = 4
    pwemoe_steps: int = pwemoe.STEPS
    ours_steps: tuple[int, ...] = (40, 75, 400)
    family_steps: tuple[int, ...] = (75, 400)


TUNING = Sizes(train=1500)
"""Without the documents of the test there are 2014 sentences of one task left to learn from."""
QUICK = Sizes(24, 12, 8, 1, 4, 8, 1e-3, 2, 4, 3, (2, 3), (3,))
_LATER = ("learning_batch", "points", "pwemoe_steps", "ours_steps", "family_steps")
"""Sizes that base and experts do not depend on."""


@dataclass(frozen=True)
class Part:
    """Sentences as the frozen layers give them: hidden float16 [N, T, width], mask bool [N, T], labels int64 [N]."""

    hidden: Tensor
    mask: Tensor
    labels: Tensor

    def batch(self, rows: Tensor) -> Batch:
        """Some sentences in float32, cut to the longest of them."""
        length = int(self.mask[rows].sum(dim=1).max())
        return self.hidden[rows, :length].float(), self.mask[rows, :length], self.labels[rows]

    def by_length(self, size: int) -> list[Batch]:
        """All sentences in batches, shortest first, so that little is padding."""
        order = self.mask.sum(dim=1).argsort(stable=True)
        return [self.batch(rows) for rows in order.split(size)]


Batch = tuple[Tensor, Tensor, Tensor]


class Shuffled:
    """A part in batches, in a new order (torch's random state) each time it is iterated."""

    def __init__(self, part: Part, size: int) -> None:
        self._part, self._size = part, size

    def __iter__(self) -> Iterator[Batch]:
        for rows in torch.randperm(len(self._part.labels)).split(self._size):
            yield self._part.batch(rows)

    def tenth(self, held: bool) -> Shuffled:
        """Every tenth sentence, or all the others."""
        rows = (torch.arange(len(self._part.labels)) % 10 == 9) == held
        part = Part(self._part.hidden[rows], self._part.mask[rows], self._part.labels[rows])
        return Shuffled(part, self._size)


def loss_under(head: nn.Linear, encoder: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a batch under a frozen head."""
    hidden, mask, labels = batch
    return F.cross_entropy(head(encoder(hidden, mask)), labels)


def unsure_under(head: nn.Linear, encoder: nn.Module, batch: Batch) -> Tensor:
    """The entropy of what a frozen head says of a batch's sentences; the labels are not looked at."""
    hidden, mask, _ = batch
    return pf.entropy_loss(head(encoder(hidden, mask)))


def accuracies(
    tests: Mapping[str, Sequence[Batch]], heads: Mapping[str, nn.Linear], encoder: nn.Module
) -> dict[str, float]:
    """Accuracy on each task under its head, 0 to 1."""
    found = {}
    for name, batches in tests.items():
        right = [heads[name](encoder(x, mask)).argmax(dim=1) == y for x, mask, y in batches]
        found[name] = float(torch.cat(right).float().mean())
    return found


def sentences(task: str) -> list[texts.Sentence]:
    """A task's sentences, with the class as label.

    Raises:
        TextError: the text cannot be had.
    """
    if task != "topics":
        return [
            texts.Sentence(s.text, float(s.label > 0), s.document)
            for s in texts.rated(task)
            if abs(s.label) >= NEUTRAL
        ]
    found = []
    for article in texts.news():
        body = " ".join(article.text.split())
        for sentence in re.split(r"(?<=[.?!]) (?=[A-Z\"])", body):
            if 40 <= len(sentence) <= 200:
                found.append(texts.Sentence(sentence, article.label, article.document))
    return found


def held_documents(found: Sequence[texts.Sentence], chance: random.Random) -> set[str]:
    """A quarter of the documents."""
    names = sorted({sentence.document for sentence in found})
    chance.shuffle(names)
    return set(names[: len(names) // 4])


def split(found: Sequence[texts.Sentence], train: int, test: int) -> tuple[list[texts.Sentence], ...]:
    """So many sentences of some documents to learn from, and so many of others to test on."""
    chance = random.Random(0)
    held = held_documents(found, chance)
    parts = []
    for inside, count in ((False, train), (True, test)):
        part = [sentence for sentence in found if (sentence.document in held) is inside]
        chance.shuffle(part)
        if len(part) < count:
            raise texts.TextError(f"got {len(part)} sentences, expected at least {count}")
        parts.append(part[:count])
    return tuple(parts)


def made_up(sizes: Sizes) -> tuple[BertModel, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """A tiny BERT with random weights and random tokens whose sum is odd or even, for quick runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(minilm.small_config(), add_pooling_layer=False).eval()
        found = {}
        for task in TASKS:
            for part, count in (("train", sizes.train), ("test", sizes.test)):
                ids = torch.randint(1, 64, (count, sizes.tokens))
                mask = torch.arange(sizes.tokens) < torch.randint(2, sizes.tokens + 1, (count, 1))
                found[f"{part}/{task}"] = ids * mask, mask, ids[:, 0] % 2
    return model, found


def for_tuning(found: Sequence[texts.Sentence]) -> list[texts.Sentence]:
    """Without the documents that `split` holds for testing, so that splitting again holds others."""
    held = held_documents(found, random.Random(0))
    return [sentence for sentence in found if sentence.document not in held]


def real(sizes: Sizes, tuning: bool) -> tuple[BertModel, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """MiniLM and each task's tokens, mask and labels.

    Raises:
        TextError: model or text cannot be had.
    """
    model, tokenizer = minilm.whole()
    found = {}
    for task in TASKS:
        found_of_task = sentences(task)
        both = split(for_tuning(found_of_task) if tuning else found_of_task, sizes.train, sizes.test)
        for name, part in zip(("train", "test"), both, strict=True):
            ids, mask = minilm.token_ids(tokenizer, [s.text for s in part], sizes.tokens)
            found[f"{name}/{task}"] = ids, mask, torch.tensor([int(s.label) for s in part])
    return model, found


def prepared(sizes: Sizes, quick: bool, tuning: bool) -> dict[str, Tensor]:
    """Everything that does not depend on the seed, from the cache where it is there.

    "PART/TASK/hidden", "/mask" and "/labels" of each part and task; "head/TASK/weight" and "/bias"; "base/NAME", the
    encoder's own tensors; "config", the BERT's configuration as bytes.
    """
    about = [sizes.train, sizes.test, sizes.tokens, sizes.layers, NEUTRAL, TASKS, minilm.PACKAGE, quick]
    about += ["tune"] if tuning else []
    digest = hashlib.sha256(json.dumps([about, sorted(texts.SHA256.items())]).encode()).hexdigest()
    path = CACHE / f"text-{digest[:10]}.safetensors"
    if not path.exists():
        model, found = made_up(sizes) if quick else real(sizes, tuning)
        encoder = minilm.upper(model, sizes.layers)
        kept = {f"base/{name}": tensor for name, tensor in encoder.state_dict().items()}
        for name, (ids, mask, labels) in found.items():
            hidden = minilm.lower(model, ids, mask, sizes.layers).half()
            kept |= {f"{name}/hidden": hidden, f"{name}/mask": mask, f"{name}/labels": labels}
        for task in TASKS:
            weight, bias = fit_head(encoder, part_of(kept, f"train/{task}"))
            kept |= {f"head/{task}/weight": weight, f"head/{task}/bias": bias}
        kept["config"] = torch.tensor(list(model.config.to_json_string().encode()), dtype=torch.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".partial")
        save_file(kept, beside)
        beside.replace(path)
    return load_file(path)


def part_of(kept: Mapping[str, Tensor], name: str) -> Part:
    """A part of what was prepared."""
    return Part(*(kept[f"{name}/{kind}"] for kind in ("hidden", "mask", "labels")))


@torch.no_grad()
def fit_head(encoder: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
    """A logistic regression on the encoder's embeddings: weight [C, width] and bias [C]."""
    batches = part.by_length(64)
    embedded = np.concatenate([encoder(x, mask).numpy() for x, mask, _ in batches])
    labels = np.concatenate([y.numpy() for _, _, y in batches])
    probe = LogisticRegression(C=1.0, max_iter=1000).fit(embedded.astype(np.float64), labels)
    weight, bias = (torch.tensor(x, dtype=torch.float32) for x in (probe.coef_, probe.intercept_))
    if len(weight) == 1:  # two classes have one score; half of it for, half against
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight.contiguous(), bias.contiguous()


def frozen_head(kept: Mapping[str, Tensor], task: str) -> nn.Linear:
    """A task's head."""
    weight, bias = kept[f"head/{task}/weight"], kept[f"head/{task}/bias"]
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    head.requires_grad_(False)
    return head


def load(sizes: Sizes, quick: bool, tuning: bool) -> Experiment:
    """The experiment in some sizes; quick: a tiny random BERT and tokens; `tuning`: without its test documents."""
    kept = prepared(sizes, quick, tuning)
    config = BertConfig(**json.loads(bytes(kept["config"].tolist())))
    config._attn_implementation = "sdpa"
    heads = {task: frozen_head(kept, task) for task in TASKS}
    tests = {task: part_of(kept, f"test/{task}").by_length(50) for task in TASKS}

    def objectives(batch: int, loss: Callable[..., Tensor] = loss_under) -> tuple[pf.Objective, ...]:
        return tuple(
            pf.Objective(task, Shuffled(part_of(kept, f"train/{task}"), batch), partial(loss, head))
            for task, head in heads.items()
        )

    def make_encoder() -> nn.Module:
        return minilm.Encoder(config, sizes.layers)

    def base(seed: int) -> nn.Module:
        del seed  # MiniLM is what it is
        encoder = make_encoder()
        own = {name.removeprefix("base/"): t for name, t in kept.items() if name.startswith("base/")}
        encoder.load_state_dict(own)
        return encoder.eval()

    def tune(model: nn.Module, preference: Sequence[float], seed: int) -> None:
        # The sentences of a step are shared out among the tasks that count, so that each model sees as many.
        data = objectives(max(1, sizes.expert_batch // sum(share > 0 for share in preference)))
        fine_tune(
            model, data, preference, steps=sizes.expert_steps, lr=sizes.expert_lr, seed=seed + 1, clip=1.0
        )

    return Experiment(
        name="text-tune" if tuning else "text",
        title="MiniLM: BBC topics, sentiment of film reviews and tweets, frozen heads",
        objectives=objectives(sizes.learning_batch),
        evaluate=partial(accuracies, tests, heads),
        metric="accuracy",
        maximize=True,
        reference=(0.0,) * 3,
        make=make_encoder,
        train_base=base,
        fine_tune=tune,
        identity=json.dumps([{k: v for k, v in asdict(sizes).items() if k not in _LATER}, TASKS, quick]),
        preferences=pf.simplex_grid(3, sizes.points),
        scalarized=np.concatenate([pf.simplex_grid(3, 3), np.full((1, 3), 1 / 3)]),
        pwemoe_steps=sizes.pwemoe_steps,
        ours_steps=sizes.ours_steps,
        unlabelled=objectives(sizes.learning_batch, unsure_under),
        family_steps=sizes.family_steps,
        notes=("The base is the base with its probes: each head was fitted to its embeddings and frozen.",),
    )


def make(quick: bool, tuning: bool = False) -> Experiment:
    """The experiment."""
    return load(QUICK if quick else TUNING if tuning else Sizes(), quick, tuning)
