"""One training run: its state, and a step."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretofuse.engine.distributed import rank_and_size
from paretofuse.engine.engine import Engine
from paretofuse.engine.evaluation.objective import Objective
from paretofuse.engine.layout import one_for_each
from paretofuse.engine.planes.trained import trained_factors, trained_planes
from paretofuse.engine.routing.sampling import make_sampler
from paretofuse.engine.solvers import Solver, solve_each
from paretofuse.engine.training.batches import Batches
from paretofuse.engine.training.checkpoint import damaged, like, read_checkpoint, write_checkpoint
from paretofuse.engine.training.identity import differences, plain
from paretofuse.engine.training.measure import Measuring, Trained
from paretofuse.engine.training.random_state import gpus_of, random_states, set_random_states
from paretofuse.engine.training.settings import PLANES_ONLY, ROWS_ONLY, Settings, check_number
from paretofuse.engine.training.smoothing import LossAtEqualPreference
from paretofuse.engine.training.validation import EarlyStopping, Validation

Record = dict[str, float]
"""One step: "step" (from 1), "lr", "preference/<objective>" and "loss/<objective>" (means over its preferences),
"equal/<objective>" (the loss at equal preference, smoothed over the last steps), and with a validation "validation",
the latest hypervolume."""


class Run:
    """A run's state: routers, optimizer, preference sampler and data streams.

    Args:
        engine: the engine; only its routers change.
        objectives: in the engine's order.
        solver: losses, Jacobian, preference -> direction.
        settings: everything else that the result depends on.
        validation: when to stop early, or None.
        materialize: whether the live module is trained through, or `engine.fused_module`.
        capture: whether all but the first measurement are replays of a CUDA graph.
    """

    def __init__(
        self,
        engine: Engine,
        objectives: Sequence[Objective],
        solver: Solver,
        settings: Settings,
        validation: Validation | None = None,
        materialize: bool = True,
        capture: bool = False,
    ) -> None:
        self.engine = engine
        self.trained = Trained(engine, materialize)
        self.objectives = objectives
        self.solver = solver
        self.settings = settings
        self.planes = trained_planes(engine.routers)
        self.gpus = gpus_of([engine.device, *(p.device for p in self.trained.module.parameters())])
        self.optimizer = torch.optim.Adam(self._parameter_groups(), lr=settings.lr)
        self.sampler = make_sampler(
            settings.sampler,
            len(objectives),
            settings.seed,
            alpha=settings.alpha,
            corner_every=settings.corner_every,
        )
        self.start = copy.deepcopy(engine.routers).requires_grad_(False)
        self.early_stopping = (
            None
            if validation is None
            else EarlyStopping(validation, self.trained, engine.routers, settings.seed, self.gpus)
        )
        self.streams = [Batches(o.data, o.name, settings.seed, i) for i, o in enumerate(objectives)]
        self.smoothed = LossAtEqualPreference(len(objectives))
        self.measuring = Measuring(
            self.trained, objectives, self.streams, settings.accumulate, capture=capture
        )
        self.taken = 0
        """Steps taken, those before a resumed checkpoint included."""
        # Described before the first step: a solver may keep a state of its own while it works.
        self._identity = self._describe()
        self._kept: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def step(self, step: int) -> Record:
        """Take a step (counted from 0): sample, measure, solve, update the routers."""
        preferences = self.sampler.draw(self.settings.preferences_per_step)
        rays = torch.from_numpy(preferences)
        measured = [self.measuring.at(ray) for ray in rays]
        losses = torch.stack([losses for losses, _ in measured])
        jacobians = torch.stack([jacobian for _, jacobian in measured])  # [K, M, *L.shape] or [K, M, 1, D]
        if self.taken == 0:
            self._check_jacobians(losses, jacobians)
        directions = solve_each(self.solver, losses, jacobians, rays)
        self.optimizer.zero_grad()
        weights = self.engine.routers(rays)
        if self.planes is not None:
            whole = directions.flatten(1)  # [K, D]
            size = weights[0].numel()
            self.planes.take_gradient(whole[:, size:].mean(0), add=False)
            directions = whole[:, :size].view(weights.shape)
        directions = directions / len(rays) + self._pull(weights.detach(), rays)
        weights.backward(directions.to(device=weights.device, dtype=weights.dtype))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(step, group["start"])
        self._shrink(step)
        self.optimizer.step()
        if self.early_stopping is not None:
            self.early_stopping.validate(step + 1)
        for preference, own in zip(preferences, losses.numpy(), strict=True):
            self.smoothed.add(preference, own)
        self.taken = step + 1
        return self._record(step, preferences, losses)

    def keep(self) -> None:
        """Hold on to the state after this step: what `save` writes, whatever happens in the middle of the next."""
        routers = self.engine.routers.state_dict()
        tensors = {f"routers.{name}": value for name, value in routers.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items()}
        if self.settings.regularization:
            tensors |= {f"start.{name}": value for name, value in self.start.state_dict().items()}
        state: dict[str, Any] = {
            "settings": {**self._identity, "steps": self.settings.steps},
            "step": self.taken,
            "preferences": self.sampler.state(),
            "streams": [(stream.epoch, stream.taken) for stream in self.streams],
            "smoothed": self.smoothed.state(),
        }
        if self.early_stopping is not None:
            state["validation"] = self.early_stopping.state()
            tensors |= {f"best.{name}": value for name, value in self.early_stopping.best.items()}
        tensors |= {f"random.{name}": value for name, value in random_states(self.gpus).items()}
        copies = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
        self._kept = copies, state

    def save(self, path: Path) -> None:
        """Write what was kept last as a checkpoint, once; with several processes, the first one does."""
        if self._kept is not None and rank_and_size()[0] == 0:
            write_checkpoint(path, *self._kept)
        self._kept = None

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint. A refusal leaves the routers as they are.

        Raises:
            ValueError: it belongs to a run with other settings or data, or has more steps than are asked for.
            StoreError: it is damaged or is not a checkpoint.
        """
        tensors, state = read_checkpoint(path)
        self._check_same(path, state.get("settings"))
        try:
            step, places = state["step"], [(epoch, taken) for epoch, taken in state["streams"]]
            for number, least in ((step, 1), *((place, 0) for pair in places for place in pair)):
                check_number("a place", number, least)
            if len(places) != len(self.streams):
                raise ValueError(f"{len(places)} streams of data")
            self.sampler.restore(state["preferences"])
            self.smoothed.restore(state["smoothed"])
            if self.early_stopping is not None:
                self.early_stopping.restore(state["validation"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise damaged(path, f"{type(error).__name__}: {error}") from error
        if step > self.settings.steps:
            raise ValueError(
                f"got steps={self.settings.steps}, but {path} holds a run of {step} steps already; give at least as "
                "many, or name another checkpoint file to start anew"
            )
        self._restore_tensors(path, tensors, places)
        self.taken = step

    def _restore_tensors(
        self, path: Path, tensors: Mapping[str, Tensor], places: Sequence[tuple[int, int]]
    ) -> None:
        """Check every tensor first, then put them in their places, the routers last."""
        routers = self.engine.routers.state_dict()
        cpu = {name: value.cpu() for name, value in routers.items()}

        def part(prefix: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
            named = like(path, tensors, {f"{prefix}.{name}": value for name, value in expected.items()})
            return {name.removeprefix(f"{prefix}."): value for name, value in named.items()}

        slots = {
            index: part(f"optimizer.{index}", {**dict.fromkeys(("exp_avg", "exp_avg_sq"), p), "step": p.new_zeros(())})
            for index, p in enumerate(p.detach().cpu() for g in self.optimizer.param_groups for p in g["params"])
        }  # fmt: skip
        expected = random_states(self.gpus)
        present = {name: value for name, value in expected.items() if f"random.{name}" in tensors}
        random = part("random", {"cpu": expected["cpu"], **present})
        start = part("start", cpu) if self.settings.regularization else None
        best = part("best", cpu) if self.early_stopping is not None else None
        trained = part("routers", cpu)
        for stream, (epoch, taken) in zip(self.streams, places, strict=True):
            stream.seek(epoch, taken)
        self.optimizer.load_state_dict(
            {"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        if start is not None:
            self.start.load_state_dict(start)
        if self.early_stopping is not None and best is not None:
            self.early_stopping.best = {n: t.to(routers[n].device) for n, t in best.items()}
        set_random_states(random, self.gpus)
        self.engine.routers.load_state_dict(trained)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """All that is trained, each with the learning rate that it starts from: MLPs, rows and columns, planes."""
        routers, settings = self.engine.routers, self.settings
        mlps = [*routers.hidden.parameters(), *routers.output.parameters()]
        linear = [own.weight for own in routers.linear]
        planes = [] if self.planes is None else list(self.planes.factors)
        rates = ((mlps, settings.lr), (linear, settings.row_lr), (planes, settings.plane_lr))
        return [{"params": params, "start": start} for params, start in rates if params]

    @torch.no_grad()
    def _shrink(self, step: int) -> None:
        """Shrink rows, columns and planes and turn planes apart, decoupled as weight decay is (arXiv 1711.05101)."""
        for linear in self.engine.routers.linear:
            rate = self.settings.rate(step, self.settings.row_lr)
            linear.weight.mul_(1 - rate * self.settings.row_shrinkage)
        if self.planes is not None:
            rate = self.settings.rate(step, self.settings.plane_lr)
            self.planes.shrink(rate * self.settings.plane_shrinkage)
            if self.settings.plane_orthogonality > 0:
                self.planes.turn_apart(rate * self.settings.plane_orthogonality)

    def _check_jacobians(self, losses: Tensor, jacobians: Tensor) -> None:
        """Refuse an objective that nothing can be learned from, in the first step of K preferences.

        A loss of exactly 0 is let go on: a margin may well be met by the first batch.

        Args:
            losses: [K, M].
            jacobians: [K, M, ...].
        """
        for index, objective in enumerate(self.objectives):
            if losses[:, index].any() and not jacobians[:, index].any():
                raise ValueError(
                    f"got a loss of objective {objective.name!r} that does not change with the routing weights (its "
                    "gradient is zero everywhere), expected one computed from the module that it is given; check that "
                    "it uses that module, and that the experts differ from the base in routed tensors"
                )

    def _pull(self, weights: Tensor, rays: Tensor) -> Tensor:
        """Gradient of regularization * mean over preferences and groups of |L(r) - L_start(r)|^2, of L's shape, or 0.

        A mean over groups, because each group's share of a loss's gradient falls with their number. Row coefficients
        have a shrinkage of their own.
        """
        strength = self.settings.regularization
        if not strength:
            return torch.zeros(())
        with torch.no_grad():
            moved: Tensor = (weights - self.start(rays)).cpu().double()
            moved[:, len(self.engine.groups) :] = 0
        return 2 * strength * moved / (len(rays) * len(self.engine.groups))

    def _record(self, step: int, preferences: np.ndarray, losses: Tensor) -> Record:
        names = self.engine.objectives
        record: Record = {"step": step + 1, "lr": self.settings.rate(step)}
        record |= {f"preference/{n}": float(r) for n, r in zip(names, preferences.mean(0), strict=True)}
        record |= {f"loss/{n}": float(loss) for n, loss in zip(names, losses.mean(0), strict=True)}
        record |= {f"equal/{n}": float(loss) for n, loss in zip(names, self.smoothed.value(), strict=True)}
        return record if self.early_stopping is None else record | {"validation": self.early_stopping.score}

    def _describe(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to belong to this run, as JSON gives it back; not the steps."""
        layout = self.engine.layout
        left_out = {"steps", *(ROWS_ONLY if self.settings.family == "scalar" else ())}
        left_out |= set(PLANES_ONLY if self.planes is None else ())
        described = {
            "objectives": self.engine.objectives,
            # Checkpoints from before there were others are of an expert for each objective, and say nothing of it.
            "experts": None if layout.members == one_for_each(layout.objectives) else layout.members,
            "groups": self.engine.groups,
            "init": self.engine.routers.init,
            "rank": None if self.planes is None else self.planes.rank,
            "weights": self._fingerprint(_first),
            "tensors": self._fingerprint(_many, self.engine.heads),
            "static_weight": layout.static_weight,
            "method": self.solver,
            "validation": None if self.early_stopping is None else self.early_stopping.identity(),
            "batches": {stream.name: stream.length for stream in self.streams},
            "train_mode": self.trained.module.training,
            **{name: value for name, value in asdict(self.settings).items() if name not in left_out},
        }
        return {name: plain(value) for name, value in described.items()}

    def _fingerprint(
        self, part: Callable[[Tensor], Tensor], heads: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> str:
        """Tells one base, its experts and their heads from others, by a part of each tensor, and its group."""
        digest = hashlib.sha256()
        stack = self.engine._stack
        planes = [
            {name + end: t for name, plane in own.items() for end, t in plane.tensors().items()}
            for own in stack.planes
            if not any(map(trained_factors, own.values()))
        ]
        for tensors in (stack.base, *planes, *(heads or {}).values()):
            for name, tensor in tensors.items():
                own = part(tensor.detach().flatten()).contiguous().cpu()
                digest.update(name.encode() + own.view(torch.uint8).numpy().tobytes())
        digest.update(json.dumps(self.engine.tensor_groups).encode())
        return digest.hexdigest()[:16]

    def _check_same(self, path: Path, theirs: Any) -> None:
        if not isinstance(theirs, Mapping):
            raise damaged(path, "it does not say whose run it is")
        # Checkpoints from before there were families are of scalar runs; those of 0.1.0 tell tensors by their start.
        older = {"family": "scalar", "tensors": self._identity["tensors"]}
        different = list(differences({**older, **theirs}, self._identity))
        if different:
            raise ValueError(
                f"{path} belongs to a run with {', '.join(different)}; use the same settings to resume it, or name "
                "another checkpoint file to start anew"
            )


def _first(numbers: Tensor) -> Tensor:
    """The start of a tensor [N], by which checkpoints of version 0.1.0 tell it."""
    return numbers[:64]


def _many(numbers: Tensor) -> Tensor:
    """A tensor [N] as a whole, or of a large one, which may lie in a file, 64 pieces of 1024 numbers all over it."""
    if len(numbers) <= 1 << 16:
        return numbers
    return numbers[: len(numbers) // 64 * 64].view(64, -1)[:, :1024]
