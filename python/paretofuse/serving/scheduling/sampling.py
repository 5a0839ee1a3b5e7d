"""How a row's next token is chosen: by transformers' own logits processors, greedily or at random with a seed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from paretofuse.serving.model import ServedModel


@dataclass(frozen=True)
class Sampling:
    """What a request says of it.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: the share of probability that is drawn from.
        seed: equal seeds give equal answers; None draws one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


class Chooser:
    """Chooses the tokens of one row.

    Args:
        model: whose generation configuration may ask for processors of its own, such as a repetition penalty.
        sampling: the request's.
        prompt: its tokens.
        max_tokens: that will be generated, at most.
    """

    def __init__(self, model: ServedModel, sampling: Sampling, prompt: list[int], max_tokens: int) -> None:
        config = copy.copy(model.generation)  # `update` sets attributes and changes none
        config.update(
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_p=sampling.top_p,
            num_beams=1,
            max_length=len(prompt) + max_tokens,
        )
        device = model.engine.device
        if model.ends:  # where transformers' processors look for them
            config._eos_token_tensor = torch.tensor(sorted(model.ends), device=device)
        self._processors = model.skeleton._get_logits_processor(
            config, input_ids_seq_length=len(prompt), device=device
        )
        self._draws: torch.Generator | None = None
        if sampling.temperature > 0:
            self._draws = torch.Generator(device)
            if sampling.seed is None:
                self._draws.seed()
            else:
                self._draws.manual_seed(sampling.seed)

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is taken and nothing else looked at."""
        return self._draws is None and not self._processors

    def choose(self, tokens: list[int], logits: Tensor) -> int:
        """The token after `tokens`, from logits [V]."""
        scores = logits.float().unsqueeze(0)
        if self._processors:
            scores = self._processors(torch.tensor([tokens], device=scores.device), scores)
        if self._draws is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._draws))


def choose_all(choosers: list[Chooser], tokens: list[list[int]], logits: Tensor) -> list[int]:
    """The next token of each row, from logits [B, V]."""
    best = logits.argmax(-1).tolist()
    return [
        best[i] if chooser.is_plain else chooser.choose(own, logits[i])
        for i, (chooser, own) in enumerate(zip(choosers, tokens, strict=True))
    ]
