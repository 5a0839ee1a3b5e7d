"""Batches of rows that take one forward pass each: classifications, embeddings, and users' own functions."""

from __future__ import annotations

from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from paretofuse.kernels.few_rows import for_rows
from paretofuse.serving.errors import ApiError, too_late
from paretofuse.serving.metrics import Metrics
from paretofuse.serving.model import ServedModel
from paretofuse.serving.scheduling.costs import EACH, make_plan, size_of_planes
from paretofuse.serving.scheduling.job import Job, Piece
from paretofuse.serving.scheduling.modules import Modules


class ForwardRunner:
    """Computes all rows that it was given in one step. Used by one thread.

    Args:
        model: for any task but text generation.
        modules: of its engine.
        metrics: counts batches.
        max_batch: rows at once.
        replicas: of the engine.
    """

    def __init__(
        self, model: ServedModel, modules: Modules, metrics: Metrics, *, max_batch: int, replicas: int
    ) -> None:
        self._model, self._modules, self._metrics = model, modules, metrics
        self._max_batch, self._replicas = max_batch, replicas
        self._planes = size_of_planes(model.engine)
        self._each = EACH.get(model.engine.device.type, 0.0)
        self._jobs: list[Job] = []

    @property
    def active(self) -> int:
        """Rows in work."""
        return len(self._jobs)

    def room(self, job: Job) -> bool:
        """Whether a job may join: rows of one batch have one head, and a callable's come one by one."""
        if not self._jobs:
            return True
        if len(self._jobs) >= self._max_batch or job.head != self._jobs[0].head:
            return False
        return bool(self._modules.can_mix) or job.key == self._jobs[0].key

    def add(self, job: Job) -> None:
        """Take a job for the next step."""
        job.hit = self._modules.is_merged(job.key)
        self._jobs.append(job)

    def try_to_mix(self, job: Job) -> None:
        """Find out whether rows of different preferences may share a batch, on a job's input."""
        if self._model.predict is None:

            def trial(module: nn.Module) -> None:
                with torch.inference_mode():
                    self._outputs(module, [job.payload] * 2)

            self._modules.try_to_mix(trial)
        else:
            self._modules.can_mix = False

    def step(self) -> None:
        """Compute all, and tell each request its result."""
        now = monotonic()
        for job in self._jobs:
            if job.deadline < now:
                job.tell(too_late())
                job.cancelled = True
        self._jobs = [job for job in self._jobs if not job.cancelled]
        rows: dict[Any, list[Job]] = {}
        for job in self._jobs:
            rows.setdefault(job.key, []).append(job)
        plan = make_plan(
            {key: len(jobs) for key, jobs in rows.items()},
            dict.fromkeys(rows, 1),
            [key for key in rows if self._modules.is_merged(key)],
            replicas=self._replicas,
            planes=self._planes,
            each=self._each,
            can_mix=bool(self._modules.can_mix),
        )
        for key in plan.merged:
            self._compute(rows[key], self._modules.merged(key, rows[key][0].head), "merged")
            self._modules.keep(())
        mixed = [job for key in plan.mixed for job in rows[key]]
        if mixed:
            module = self._modules.mixed([job.key for job in mixed], mixed[0].head)
            self._compute(mixed, module, "mixed")
        self._jobs = []

    def fail(self, error: Exception) -> None:
        """Tell all rows that they failed, and forget them."""
        for job in self._jobs:
            job.tell(error)
        self._jobs = []
        self._modules.keep(())

    def _compute(self, jobs: list[Job], module: nn.Module, kind: str) -> None:
        self._metrics.batch.labels(kind).observe(len(jobs))
        if self._model.predict is not None:
            for job in jobs:
                job.tell(self._predicted(module, job.payload))
            return
        with torch.inference_mode():
            found = self._outputs(module, [job.payload for job in jobs])
        for job, own in zip(jobs, found, strict=True):
            job.tell(Piece(own.float().tolist(), finish="stop"))

    def _predicted(self, module: nn.Module, given: Any) -> Piece | Exception:
        """What the user's function says; what it raises is this request's, not the batch's."""
        assert self._model.predict is not None
        try:
            with torch.inference_mode():
                return Piece(self._model.predict(module, given), finish="stop")
        except (ValueError, TypeError) as error:
            return ApiError(400, str(error), param="input")
        except Exception as error:
            return error

    def _outputs(self, module: nn.Module, inputs: list[Any]) -> Tensor:
        """Logits [B, labels], or embeddings [B, D]."""
        device = self._model.engine.device
        if self._model.takes_images:
            batch = {"pixel_values": torch.cat(inputs).to(device)}
        else:
            batch = self._model.padded(inputs)
        with for_rows(sum(map(len, inputs))):
            found = module(**batch)
        if self._model.task != "feature-extraction":
            return found.logits  # type: ignore[no-any-return]
        return self._model.pooling(found.last_hidden_state, batch.get("attention_mask"))
