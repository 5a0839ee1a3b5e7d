"""A small GPT-2 (transformers' GPT2LMHeadModel) and three styles of English: news, film reviews, scripture.

The base is pretrained here on all three, each expert fine-tuned on one; objectives are perplexities a token on held-out
documents, in tokens of a byte-level BPE that is trained on the same text. What is fetched and tokenized is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import paretofuse as pf
from benchmarks.data_sets import texts
from benchmarks.experiments.experiment import Experiment, fine_tune
from benchmarks.harness.record import CACHE
from benchmarks.models import pwemoe

STYLES = ("news", "reviews", "scripture")


@dataclass(frozen=True)
class Sizes:
    """Of model, text and training. Batches are sequences of `context` tokens, of all styles together in training.

    Attributes:
        characters: of a style's training text, at most.
        windows: sequences of a style that perplexity is measured on.
        reference: of the hypervolume: just beyond the worst perplexity that an expert has of each style (55.9, 55.8 and
            41.2), so that the whole range between the experts counts; empty: the vocabulary's size, which a uniform
            guess has.
    """

    vocabulary: int = 512
    context: int = 64
    width: int = 64
    layers: int = 4
    characters: int = 1_200_000
    windows: int = 96
    base_steps: int = 1500
    base_batch: int = 24
    base_lr: float = 3e-3
    expert_steps: int = 500
    expert_batch: int = 16
    expert_lr: float = 1e-3
    learning_batch: int = 4
    points: int = 4
    pwemoe_steps: int = pwemoe.STEPS
    ours_steps: tuple[int, ...] = (40, 75, 400)
    family_steps: tuple[int, ...] = (75, 400)
    reference: tuple[float, ...] = (57.0, 57.0, 42.0)


QUICK = Sizes(260, 16, 16, 1, 3000, 4, 4, 6, 3e-3, 4, 4, 1e-3, 2, 4, 3, (2, 3), (3,), ())


class Windows:
    """A text's tokens as batches of sequences [B, T], cut anew and in a new order each time it is iterated."""

    def __init__(self, tokens: Tensor, context: int, batch: int) -> None:
        self._tokens, self._context, self._batch = tokens, context, batch

    def __iter__(self) -> Iterator[Tensor]:
        start = int(torch.randint(self._context, ()))
        cut = windows(self._tokens[start:], self._context)
        for rows in torch.randperm(len(cut)).split(self._batch):
            yield cut[rows].long()

    def tenth(self, held: bool) -> Windows:
        """The last tenth of the text, or all before it."""
        first = len(self._tokens) * 9 // 10
        return Windows(self._tokens[first:] if held else self._tokens[:first], self._context, self._batch)


def windows(tokens: Tensor, context: int) -> Tensor:
    """Tokens [N] as sequences [N // T, T], one after the other."""
    count = len(tokens) // context
    return tokens[: count * context].view(count, context)


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean negative log-likelihood of a token of ids [B, T], each given those before it in its sequence."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def perplexities(tests: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
    """Of each style: the exponential of the mean loss over sequences [W, T]."""
    found = {}
    for style, ids in tests.items():
        losses = [mean_loss(model, part).item() * len(part) for part in ids.long().split(32)]
        found[style] = float(torch.tensor(sum(losses) / len(ids)).exp())
    return found


def documents(style: str) -> list[str]:
    """A style's documents: articles, single sentences of reviews, chapters.

    Raises:
        TextError: the text cannot be had.
    """
    if style == "news":
        return [" ".join(article.text.split()) for article in texts.news()]
    if style == "reviews":
        return [sentence.text for sentence in texts.rated("movies")]
    chapters: dict[str, list[str]] = {}
    for verse in texts.verses():
        chapters.setdefault(verse.document, []).append(verse.text)
    return [" ".join(verses) for verses in chapters.values()]


def made_up(style: str) -> list[str]:
    """Documents of no meaning, for quick runs: each style repeats three words of its own."""
    chance = random.Random(style)
    words = [" ".join(style[chance.randrange(len(style))] * 3 for _ in range(2)) for _ in range(3)]
    return [" ".join(chance.choices(words, k=20)) for _ in range(40)]


def split(found: Sequence[str], characters: int) -> tuple[str, str]:
    """Training text of about so many characters, and a twelfth of the documents, shuffled, for testing."""
    shuffled = list(found)
    random.Random(0).shuffle(shuffled)
    border = max(1, len(shuffled) // 12)
    return "\n".join(shuffled[border:])[:characters], "\n".join(shuffled[:border])


def tokenized(sizes: Sizes, quick: bool) -> dict[str, Tensor]:
    """ "train/STYLE" and "test/STYLE" -> tokens [N] int16, from the cache where they are there.

    Raises:
        TextError: the text cannot be had.
    """
    about = [sizes.vocabulary, sizes.characters, sorted(texts.SHA256.items()), quick]
    folder = CACHE / f"language-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:10]}"
    path = folder / "tokens.safetensors"
    if not path.exists():
        source = made_up if quick else documents
        parts = {style: split(source(style), sizes.characters) for style in STYLES}
        tokenizer = train_tokenizer([train for train, _ in parts.values()], sizes.vocabulary)
        found = {}
        for style, both in parts.items():
            for part, text in zip(("train", "test"), both, strict=True):
                found[f"{part}/{style}"] = torch.tensor(tokenizer.encode(text).ids, dtype=torch.int16)
        _keep(folder, path, tokenizer, found)
    return load_file(path)


def train_tokenizer(parts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(parts, trainer)
    return tokenizer


def _keep(folder: Path, path: Path, tokenizer: Tokenizer, found: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    beside = path.with_suffix(".partial")
    save_file(found, beside)
    beside.replace(path)


def make_model(sizes: Sizes) -> GPT2LMHeadModel:
    """A GPT-2 without dropout; weights from torch's random state."""
    config = GPT2Config(
        vocab_size=sizes.vocabulary,
        n_positions=sizes.context,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def for_tuning(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The training texts alone: the last eighth of each is for testing."""
    found = {}
    for style in STYLES:
        whole = tokens[f"train/{style}"]
        border = len(whole) * 7 // 8
        found |= {f"train/{style}": whole[:border], f"test/{style}": whole[border:]}
    return found


def load(sizes: Sizes, quick: bool, tuning: bool) -> Experiment:
    """The experiment in some sizes; quick: on made-up text; `tuning`: without its test texts."""
    tokens = tokenized(sizes, quick)
    if tuning:
        tokens = for_tuning(tokens)
    of_models = {name: value for name, value in asdict(sizes).items() if name not in _LATER}
    of_base = {name: value for name, value in of_models.items() if not name.startswith("expert")}
    identity = json.dumps([of_base, quick, *(["tune"] if tuning else [])])
    tests = {s: windows(tokens[f"test/{s}"], sizes.context)[: sizes.windows] for s in STYLES}

    def objectives(batch: int) -> tuple[pf.Objective, ...]:
        return tuple(
            pf.Objective(s, Windows(tokens[f"train/{s}"], sizes.context, max(1, batch)), mean_loss)
            for s in STYLES
        )

    def train_base(seed: int) -> nn.Module:
        del seed  # one pretrained model for all seeds, as one that is downloaded would be
        path = CACHE / f"language-base-{hashlib.sha256(identity.encode()).hexdigest()[:10]}.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make_model(sizes)
        if not path.exists():
            data, equal = objectives(max(1, sizes.base_batch // 3)), [1 / 3] * 3
            fine_tune(model, data, equal, steps=sizes.base_steps, lr=sizes.base_lr, seed=0, clip=1.0)
            beside = path.with_suffix(f".{os.getpid()}")
            save_model(model, str(beside))
            beside.replace(path)
        load_model(model, path)
        return model.eval()

    def tune(model: nn.Module, preference: Sequence[float], seed: int) -> None:
        # The sequences of a step are shared out among the styles that count, so that each model sees as many.
        data = objectives(sizes.expert_batch // sum(share > 0 for share in preference))
        fine_tune(
            model, data, preference, steps=sizes.expert_steps, lr=sizes.expert_lr, seed=seed + 1, clip=1.0
        )

    return Experiment(
        name="language-tune" if tuning else "language",
        title="A small GPT-2: news, film reviews, scripture",
        objectives=objectives(sizes.learning_batch),
        evaluate=partial(perplexities, tests),
        metric="perplexity",
        maximize=False,
        reference=sizes.reference or (float(sizes.vocabulary),) * 3,
        make=lambda: make_model(sizes),
        train_base=train_base,
        fine_tune=tune,
        identity=json.dumps([of_models, quick]),
        preferences=pf.simplex_grid(3, sizes.points),
        scalarized=np.concatenate([pf.simplex_grid(3, 3), np.full((1, 3), 1 / 3)]),
        pwemoe_steps=sizes.pwemoe_steps,
        ours_steps=sizes.ours_steps,
        family_steps=sizes.family_steps,
    )


_LATER = ("learning_batch", "points", "pwemoe_steps", "ours_steps", "family_steps", "reference", "windows")
"""Sizes that base and experts do not depend on."""


def make(quick: bool, tuning: bool = False) -> Experiment:
    """The experiment."""
    return load(QUICK if quick else Sizes(), quick, tuning)
