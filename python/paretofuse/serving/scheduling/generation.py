"""Continuous batching: rows join and leave between steps, and each step gives every row a token.

transformers has continuous batching of its own. It serves one model at a time with one generation configuration, and on
the CPU its paged cache costs more than the model: 16 prompts of 16 tokens took 17.9 s where `generate` on a padded
batch took 0.9 s (six layers of 384). So the loop is ours, and what makes it right is transformers': models, masks, the
cache's interface, logits processors.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from paretofuse.kernels.few_rows import for_rows
from paretofuse.serving.errors import too_late
from paretofuse.serving.metrics import Metrics
from paretofuse.serving.model import ServedModel
from paretofuse.serving.scheduling.cache import RowCache, mask_of
from paretofuse.serving.scheduling.costs import EACH, Plan, make_plan, size_of_planes
from paretofuse.serving.scheduling.job import Job, Key, Piece
from paretofuse.serving.scheduling.modules import Modules
from paretofuse.serving.scheduling.sampling import Chooser, Sampling, choose_all
from paretofuse.serving.scheduling.text import TextStream


@dataclass(frozen=True)
class Prompt:
    """The payload of a generation.

    Attributes:
        tokens: at least one.
        max_tokens: to generate, at most.
        sampling: how.
        stops: texts that end it.
        streams: whether pieces are wanted.
    """

    tokens: list[int]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    streams: bool = False


@dataclass(eq=False)
class Row:
    """An answer in the making."""

    job: Job
    prompt: Prompt
    text: TextStream
    chooser: Chooser
    new: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt.tokens + self.new

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.prompt.max_tokens - len(self.new)


class GenerationRunner:
    """Generates the answers of the rows that it was given. Used by one thread.

    Args:
        model: for text generation.
        modules: of its engine.
        metrics: counts tokens and batches.
        max_batch: rows at once.
        replicas: of the engine.
        cache_columns: rows times the columns of the longest, at most; a single row may have more.
    """

    def __init__(
        self,
        model: ServedModel,
        modules: Modules,
        metrics: Metrics,
        *,
        max_batch: int,
        replicas: int,
        cache_columns: int,
    ) -> None:
        self._model, self._modules, self._metrics = model, modules, metrics
        self._max_batch, self._replicas, self._columns = max_batch, replicas, cache_columns
        self._planes = size_of_planes(model.engine)
        self._each = EACH.get(model.engine.device.type, 0.0)
        self._takes = frozenset(inspect.signature(model.skeleton.forward).parameters)
        self._new: list[Row] = []
        self._rows: list[Row] = []  # in the order of the cache, neighbours where they share a step
        self._cache = RowCache()
        self._plan = Plan((), ())
        self._stale = False  # the plan is of other rows

    @property
    def active(self) -> int:
        """Rows in work."""
        return len(self._rows) + len(self._new)

    def room(self, job: Job) -> bool:
        """Whether a job may join now."""
        rows = self._rows + self._new
        if not rows:
            return True
        keys = {row.job.key for row in rows} | {job.key}
        if len(rows) >= self._max_batch or (not self._modules.can_mix and len(keys) > self._replicas):
            return False
        longest = max(_columns(row.prompt) for row in rows)
        return (len(rows) + 1) * max(longest, _columns(job.payload)) <= self._columns

    def add(self, job: Job) -> None:
        """Take a job; its prompt is read in the next step."""
        prompt: Prompt = job.payload
        job.hit = self._modules.is_merged(job.key)
        text = TextStream(self._model.processor, prompt.stops, prompt.streams)
        chooser = Chooser(self._model, prompt.sampling, prompt.tokens, prompt.max_tokens)
        self._new.append(Row(job, prompt, text, chooser))

    def try_to_mix(self, job: Job) -> None:
        """Find out whether rows of different preferences may share a step, on the beginning of a job's prompt."""
        ids = torch.tensor([job.payload.tokens[:4]] * 2, device=self._model.engine.device)

        def trial(module: nn.Module) -> None:
            cache = DynamicCache()
            with torch.inference_mode():
                for tokens in (ids, ids[:, -1:]):
                    self._call(module, tokens, cache, None, None)

        self._modules.try_to_mix(trial)

    def step(self) -> None:
        """A token for every row; rows that end, or that nobody waits for any more, leave."""
        self._leave()
        if self._new:
            self._replan()
            with torch.inference_mode():
                for keys in self._groups():
                    for rows in _of_like_length([row for row in self._new if row.job.key in keys]):
                        self._prefill(rows)
            self._new = []
            self._leave()
        if self._stale and self._rows:
            self._replan()
        with torch.inference_mode():
            first = 0
            for keys in self._groups():
                last = first + sum(row.job.key in keys for row in self._rows)
                if last > first:
                    self._decode(first, last)
                first = last
        self._cache.advance()
        self._leave()

    def fail(self, error: Exception) -> None:
        """Tell all rows that they failed, and forget them."""
        for row in self._rows + self._new:
            row.job.tell(error)
        self._rows, self._new, self._cache = [], [], RowCache()
        self._modules.keep(())

    def _leave(self) -> None:
        """Forget rows that are done, late or cancelled."""
        now = monotonic()
        for row in self._rows + self._new:
            if not row.done and row.job.deadline < now:
                row.job.tell(too_late())
                row.done = True
        stay = [i for i, row in enumerate(self._rows) if not (row.done or row.job.cancelled)]
        self._new = [row for row in self._new if not (row.done or row.job.cancelled)]
        if len(stay) < len(self._rows):
            self._cache.arrange(stay)
            self._rows = [self._rows[i] for i in stay]
            self._stale = True
        if not self._rows and not self._new:
            self._modules.keep(())

    def _replan(self) -> None:
        """Choose what shares a step, hold the replicas that it needs, and make neighbours of rows that share one."""
        rows = self._rows + self._new
        counts = Counter(row.job.key for row in rows)
        steps = {key: max(row.left for row in rows if row.job.key == key) for key in counts}
        self._plan = make_plan(
            counts,
            steps,
            [key for key in counts if self._modules.is_merged(key)],
            replicas=self._replicas,
            planes=self._planes,
            each=self._each,
            can_mix=bool(self._modules.can_mix),
        )
        self._modules.keep((key, None) for key in self._plan.merged)
        place = {key: number for number, keys in enumerate(self._groups()) for key in keys}
        order = sorted(range(len(self._rows)), key=lambda i: place[self._rows[i].job.key])
        self._cache.arrange(order)
        self._rows = [self._rows[i] for i in order]
        self._stale = bool(self._new)  # rows that are read now stand at the end

    def _groups(self) -> Iterator[tuple[Key, ...]]:
        """The preferences of each step."""
        yield from ((key,) for key in self._plan.merged)
        if self._plan.mixed:
            yield self._plan.mixed

    def _module(self, rows: Sequence[Row]) -> nn.Module:
        """The module that computes rows of one group."""
        key = rows[0].job.key
        if key in self._plan.merged:
            self._metrics.batch.labels("merged").observe(len(rows))
            return self._modules.merged(key)
        self._metrics.batch.labels("mixed").observe(len(rows))
        return self._modules.mixed([row.job.key for row in rows])

    def _prefill(self, rows: Sequence[Row]) -> None:
        """Read the prompts of rows, choose their first tokens, and let them join the cache."""
        lengths = [len(row.prompt.tokens) for row in rows]
        width = max(lengths)
        device = self._model.engine.device
        ids = torch.tensor(
            [[0] * (width - len(r.prompt.tokens)) + r.prompt.tokens for r in rows], device=device
        )
        starts = [width - length for length in lengths]
        columns = torch.arange(width, device=device)
        positions = (columns - torch.tensor(starts, device=device).unsqueeze(1)).clamp(min=0)  # [b, width]
        cache = DynamicCache()
        logits = self._forward(rows, ids, cache, mask_of(starts, 0, width, device), positions)
        self._cache.join(cache, lengths)
        self._rows += rows
        self._choose(rows, logits)

    def _decode(self, first: int, last: int) -> None:
        """One token for rows first .. last."""
        rows = self._rows[first:last]
        device = self._model.engine.device
        ids = torch.tensor([[row.new[-1]] for row in rows], device=device)
        positions = torch.tensor([[len(row.tokens) - 1] for row in rows], device=device)
        window, start = self._cache.window(first, last)
        mask = mask_of(self._cache.starts[first:last], start, self._cache.end + 1, device)
        self._choose(rows, self._forward(rows, ids, window, mask, positions))

    def _forward(
        self, rows: Sequence[Row], ids: Tensor, cache: Cache, mask: Tensor | None, positions: Tensor
    ) -> Tensor:
        """The logits [b, V] of the last column."""
        return self._call(self._module(rows), ids, cache, mask, positions)

    def _call(
        self, module: nn.Module, ids: Tensor, cache: Cache, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        given: dict[str, Any] = {"cache" if "cache" in self._takes else "past_key_values": cache}
        if "position_ids" in self._takes and positions is not None:
            given["position_ids"] = positions
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        with for_rows(ids.numel()):
            found = module(input_ids=ids, attention_mask=mask, use_cache=True, **given)
        logits: Tensor = found.logits[:, -1]
        return logits

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Give each row its token and tell its request what is new."""
        tokens = choose_all([row.chooser for row in rows], [row.tokens for row in rows], logits)
        self._metrics.tokens.inc(len(rows))
        for row, token in zip(rows, tokens, strict=True):
            ended = token in self._model.ends
            row.new.append(token)
            shown = row.new[:-1] if ended else row.new
            text = row.text.piece(shown, last=ended or row.left == 0)
            finish = "stop" if ended or row.text.stopped else "length" if row.left == 0 else None
            if text or finish:
                row.job.tell(Piece(text, len(row.new), finish))
            row.done = finish is not None


def _columns(prompt: Prompt) -> int:
    """Columns that a row may come to have."""
    return len(prompt.tokens) + prompt.max_tokens


def _of_like_length(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows whose prompts may be padded to one length: none to more than twice its own, and 16."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.prompt.tokens)):
        if batch and len(row.prompt.tokens) > 2 * len(batch[0].prompt.tokens) + 16:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
