"""The engine: a stack, its routers, and everything that turns a preference into a dense model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paretofuse.engine.merging.backends import choose_backend
from paretofuse.engine.merging.bound import BoundStack
from paretofuse.engine.merging.disk import merge_store
from paretofuse.engine.merging.publish import push, stored
from paretofuse.engine.modules.ahead import Ahead
from paretofuse.engine.modules.batched.module import batched_module
from paretofuse.engine.modules.captured import CapturedSwitch
from paretofuse.engine.modules.factory import dense_module
from paretofuse.engine.modules.heads import with_head
from paretofuse.engine.modules.in_place import InPlaceModules
from paretofuse.engine.modules.replicas import ReplicaPool
from paretofuse.engine.modules.slots import as_timeout
from paretofuse.engine.planes.plane import PlaneInfo, nbytes
from paretofuse.engine.routing.preference import Preference
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.routing.weights import check_one, is_several, routing_of, rows_of
from paretofuse.engine.stacking import persist
from paretofuse.engine.stacking.adapter import write_adapter
from paretofuse.engine.stacking.sources import Blueprint
from paretofuse.engine.stacking.stack import Stack


class Engine:
    """One base and P planes, ready to become any mixture of them. Made by `pf.stack` and `pf.load`.

    Attributes:
        layout: the tensor table.
        routers: the trained part; `routers(preference)` gives the routing weights, [G, P] or more.
        device: where the routers live; and base, deltas and merged models, unless the base was split over devices.
        backend: "reference", "native" or "triton"; with several devices, the first one's.
        pool: the replicas; its length says how many `replica` may keep.
        notes: what happened while stacking or loading that one should know, a sentence each.
        training: how the routers were trained (steps, method, data names, when, versions), JSON only; None if that is
            not known. `save` keeps it in the store, and `pf.load` gives it back.
        origin: the checksum of the routers in the store that it was loaded from or saved to last, which `save` may
            replace by what was trained since; None if there is none.
        path: that store's directory; None if there is none.
    """

    def __init__(
        self, stack: Stack, routers: Routers, blueprint: Blueprint, *, device: torch.device,
        backend: str | None = None, replicas: int = 2, notes: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.device = device
        self.blueprint = blueprint
        self.training: dict[str, Any] | None = None
        self.origin: str | None = None
        self.path: str | None = None
        self.routers = routers.to(device)
        self._asked = backend
        self._replicas = replicas
        self._rebind(stack)
        self.notes = (*notes, *self._bound.notes)
        self._bound.check_rows(routers.width)
        self.backend = self._bound.backends.get(device) or choose_backend(device, backend)

    def _rebind(self, stack: Stack) -> None:
        """Work with this stack from now on, with modules made anew."""
        self._bound = BoundStack(stack, self._asked, self.blueprint.shardings)
        self._stack, self.layout = self._bound.stack, stack.layout
        self._let_go()

    def _let_go(self) -> None:
        """Forget every merged module; each is built anew when it is asked for."""
        self._in_place = InPlaceModules(self._bound, self.blueprint, self.routers)
        self.pool = ReplicaPool(self._replicas, self.device)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives' names, in the order of every [.., M] axis."""
        return self.layout.objectives

    @property
    def experts(self) -> dict[str, str | None]:
        """Each plane's objective, or None, by the plane's name; in the order of every [.., P] axis."""
        return {member.plane: member.objective for member in self.layout.members}

    @property
    def groups(self) -> tuple[str, ...]:
        """The routing groups, in the order of every [G, ..] axis."""
        return self.layout.groups

    @property
    def tensor_groups(self) -> dict[str, str]:
        """The group of each routed tensor."""
        return {spec.name: spec.group for spec in self.layout.tensors if spec.group is not None}

    @property
    def planes(self) -> dict[str, dict[str, PlaneInfo]]:
        """Each expert's planes by tensor, with format, bytes and error. An absent one leaves the tensor unchanged."""
        return {
            expert: {name: PlaneInfo(p.format, nbytes(p), p.error) for name, p in own.items()}
            for expert, own in zip(self.layout.planes, self._stack.planes, strict=True)
        }

    @property
    def heads(self) -> dict[str, dict[str, Tensor]]:
        """Each objective's own tensors by name, for the objectives that have any."""
        return {objective: dict(own) for objective, own in self._stack.heads.items()}

    @property
    def module(self) -> nn.Module:
        """The live module, built when first asked for, at equal preferences until the first switch."""
        return self._in_place.live().module

    @property
    def fused_module(self) -> nn.Module:
        """The module that `train_at(..., materialize=False)` trains through, built when first asked for.

        A module apart, of the base's own class, but its linear layers (nn.Linear, transformers' Conv1D,
        nn.MultiheadAttention) are thin layers of ours that mix their weight on the way into the product and never
        store it. On the CPU each merges its weight when it runs, and again in the backward pass, from deltas that may
        stay mapped; on GPUs the weight stays in registers. The "reference" backend copies the deltas first.
        """
        return self._in_place.fused().module

    def head(self, objective: str) -> nn.Module:
        """The live module with an objective's own head; it shares all else with `module` and is switched with it.

        Raises:
            ValueError: the objective has no head, or head and base do not make a whole model.
        """
        self._stack.head(objective)
        return with_head(self.module, objective)

    @property
    def preference(self) -> dict[str, float] | None:
        """What the live module was last merged for, by objective; None before a switch, and after given `weights=`."""
        return self._in_place.preference

    def switch(self, preference: Preference | None = None, *, weights: Tensor | None = None) -> None:
        """Rewrite the live module in place for a preference, or for given routing weights [G, P].

        No parameter's address changes. Invalid input changes nothing.

        Raises:
            ValueError: the preference or the weights are not valid.
        """
        self._in_place.switch(preference, weights)

    def warmup(self) -> None:
        """Compile, load and allocate all that a switch needs, so that the first one costs what others do.

        The live module is built if it was not, and stays merged for what it is.
        """
        self._in_place.warmup()

    def capture(self) -> CapturedSwitch:
        """`switch` as a CUDA graph, which costs the host one launch: `engine.capture()` once, then its `switch`.

        The live module is built if it was not, and stays merged for what it is.

        Raises:
            ValueError: the model is not merged by the Triton kernels of one GPU.
        """
        return (made := self._in_place).capture(lambda: self._in_place is made)

    def replica(
        self, preference: Preference, *, head: str | None = None, timeout: float | None = None
    ) -> AbstractContextManager[nn.Module]:
        """A module merged for this preference that stays as it is inside a `with` block; for use by many threads.

            with engine.replica({"news": 0.7, "poems": 0.3}) as module:
                text = module.generate(prompt)

        The engine holds up to `replicas` of them (see `pf.load` and `pf.stack`), apart from `module`. A preference
        that is merged already is served at once; otherwise the least recently used replica that nobody holds is
        merged anew, while users of the others go on. Where all are held or being merged, entering waits, and who
        waits is served in the order of coming. A thread (or asyncio task) that holds one and asks for another
        preference needs two. Only use the module inside the block, and leave its weights alone. Routers that were
        trained further since count; do not train or change them while replicas are asked for.

        Args:
            preference: by objective name, or in the order of `objectives`.
            head: the objective whose own head the module has.
            timeout: seconds to wait for a replica; None or infinity waits for ever.

        Raises:
            ValueError: the preference is not valid, the timeout is NaN or below 0, or the model cannot be built (bare
                tensors, no transformers). On entering: somebody moved this replica's module.
            TypeError: the timeout is no number.
            TimeoutError: on entering, when no replica became free.
        """
        return self.pool.acquire(self._in_place.replica_of(preference, head), as_timeout(timeout))

    def areplica(
        self, preference: Preference, *, head: str | None = None, timeout: float | None = None
    ) -> AbstractAsyncContextManager[nn.Module]:
        """`replica`, with its arguments and errors, for asyncio: neither wait nor merge blocks the event loop.

            async with engine.areplica({"news": 0.7, "poems": 0.3}, timeout=10) as module:
                text = await asyncio.to_thread(module.generate, prompt)

        A task that is cancelled while it waits leaves nothing behind.
        """
        return self.pool.acquire_async(self._in_place.replica_of(preference, head), as_timeout(timeout))

    def is_merged(self, preference: Preference) -> bool:
        """Whether a replica holds this preference now, so that `replica` would give it without a merge."""
        return self.pool.holds(self._in_place.replica_of(preference, None))

    def modules(self, preferences: Any, *, at_once: int = 4, live: bool = False) -> Iterator[nn.Module]:
        """A module for each preference [P, E], valid until the next is asked for; the live module stays as it is.

        While `at_once` are used, a thread merges the next in one pass: the memory of 2 x `at_once` models. With
        at_once=1 and live=True the live module takes turns with one other, and is left at the last preference."""
        return self.ahead(at_once, live=live).modules(preferences)

    def ahead(self, at_once: int, *, live: bool = False) -> Ahead:
        """What has `modules(preferences)` for many calls, one after the other, that all use the same memory."""
        return Ahead(self._bound, self.blueprint, self.routers, at_once, self._in_place if live else None)

    def merge(
        self, preference: Preference | None = None, *, weights: Tensor | None = None, head: str | None = None
    ) -> Any:
        """A new, independent dense model for a preference, or for given routing weights [G, P].

        Args:
            preference: by objective name, or in the order of `objectives`; several, as a tensor or array [K, M] such as
                `pf.simplex_grid` makes or as a list, give a list of K models.
            weights: routing weights instead, [G, P] or [K, G, P].
            head: the objective whose own tensors the model gets.

        Returns:
            A module of the base's own class (of the expert's, with `head`), or a list of them.

        Raises:
            ValueError: invalid input, or the model cannot be built (bare tensors, no transformers).
        """
        self._stack.head(head)
        skeleton = self.blueprint.of_head(head).make()
        states = self.merge_state_dict(preference, weights=weights, head=head)
        if isinstance(states, list):
            return [dense_module(self._stack, skeleton, state, head) for state in states]
        return dense_module(self._stack, skeleton, states, head)

    def merge_state_dict(
        self, preference: Preference | None = None, *, weights: Tensor | None = None, head: str | None = None
    ) -> Any:
        """Like `merge`, but the tensors only: a dict by state-dict name, or a list of K dicts.

        Tied names share one tensor. Every tensor is new, and has its own storage. Of a base sharded over processes,
        DTensors sharded alike, made without communication: `model.load_state_dict` writes them into such a model.
        """
        routing = routing_of(self.routers, preference, weights)
        states = self._bound.states(routing, self._stack.head(head))
        return states if is_several(preference, weights) else states[0]

    def named_tensors(
        self, preference: Preference, *, head: str | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The merged model's (name, tensor) pairs, of tied names the first, as weight-transfer interfaces take them.

        Raises:
            ValueError: invalid input; before the first pair.
        """
        state = self.merge_state_dict(preference, head=head)
        first = {id(tensor): name for name, tensor in reversed(state.items())}
        return ((name, tensor) for name, tensor in state.items() if first[id(tensor)] == name)

    def train_at(self, preference: Preference, *, materialize: bool = True) -> Tensor:
        """Merge the live module at a preference and let gradients flow from it into the routers.

        After this, `loss.backward()` through `engine.module` adds to the gradients of `engine.routers.parameters()`;
        the module's own gradients are reduced at once and freed. Several backward passes add up.

        Args:
            preference: by objective name, or in the order of `objectives`.
            materialize: False to train through `engine.fused_module` instead, whose linear layers never store their
                merged weight nor its gradient; the routers' gradients are the same.

        Returns:
            The routing weights [G, P], part of the routers' graph: `weights.backward(gradient)` carries a gradient
            that a solver made of `jacobian` into the routers.

        Raises:
            ValueError: the preference is not valid.
        """
        self._bound.check_whole("training")
        return self._in_place.train_at(preference, materialize=materialize)

    def batched(
        self,
        preferences: Tensor | Sequence[Preference] | None = None,
        *,
        weights: Tensor | None = None,
        isolate: bool = False,
        head: str | None = None,
    ) -> nn.Module:
        """A module for batches of B rows, each at a preference of its own; no row's large weights are ever stored.

        Row b of its result is what the model merged for preference b gives for row b alone. Each layer's products of
        base and deltas are mixed for each row, and small tensors (biases, norms, class tokens) as well. It is made for
        these preferences and the routers as they are; after a change ask for another, which is cheap. It may run in
        many threads at once. `loss.backward()` through it adds to the gradients of `engine.routers.parameters()`.

        The batch must stay the first dimension throughout the model. `isolate=True` lifts that: each row runs as a
        batch of its own under `torch.vmap`, every tensor given having the batch first. Code that looks at values to
        decide what to do (transformers' attention masks) or keeps a cache (`use_cache=False`) cannot run so.

        Args:
            preferences: one for each row, [B, M], or a list of what `merge` takes.
            weights: routing weights instead, [B, G, P]; gradients flow into them.
            isolate: see above.
            head: the objective whose own head all rows have.

        Returns:
            A module of the base's own class, or a wrapper of it where that class has routed tensors of its own.

        Raises:
            ValueError: invalid input, no known module class, or a layer that cannot be done exactly, by name.
        """
        self._bound.check_whole("batches")
        routing = rows_of(self.routers, preferences, weights)
        own, skeleton = self._stack.head(head), self.blueprint.of_head(head).make()
        return batched_module(self._bound, skeleton, routing, isolate=isolate, head=own)

    def jacobian(self, losses: Sequence[Tensor] | Tensor, *, flat: bool = False) -> Tensor:
        """Gradients of losses with respect to the routing weights; the parameters' own gradients stay as they are.

        Args:
            losses: M scalars, each computed by the module that `train_at` merged, `module` or `fused_module`.
            flat: with the gradients of all factors of trained planes behind, in their order.

        Returns:
            float64 [M, G, P] (or G + R, G + R + C); flat [M, D].

        Raises:
            ValueError: a loss is not a scalar, or `train_at` was not called.
        """
        routing, factors = self._in_place.jacobian(list(losses))
        return torch.cat([routing.flatten(1), factors], 1) if flat else routing

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write everything to a store: a directory of safetensors files and a manifest, atomically.

        Args:
            path: the store's directory; an older store there is replaced.
            force: replace a trained store too; its training is lost. Without it only what goes on from that training
                may: an engine that was loaded from that store, or saved to it before.

        Raises:
            ValueError: the path exists and is not a store, or is a trained store whose training would be lost.
            OSError: writing failed; what was there before is untouched.
        """
        self._bound.check_whole("saving")
        self.origin = persist.save(
            path,
            self._stack,
            self.routers,
            self.blueprint,
            training=self.training,
            force=force,
            origin=self.origin,
        )
        self.path = os.path.abspath(path)

    def export_adapter(
        self, preference: Preference, path: str | os.PathLike[str], *, rank: int | None = None
    ) -> float:
        """Write a preference as a LoRA adapter that PEFT, vLLM and others load onto the base.

        Args:
            preference: by objective name, or in the order of `objectives`.
            path: the directory to write; an adapter there is replaced, and nothing else is.
            rank: cut every module's update to this rank by SVD; None keeps the experts' factors side by side.

        Returns:
            The relative error of the update, 0 where nothing was cut.

        Raises:
            ValueError: invalid input, or an update that no LoRA holds: vectors, dense planes without `rank`.
            OSError: writing failed; what was there before is untouched.
        """
        self._bound.check_whole("an adapter")
        routing = check_one(routing_of(self.routers, preference, None)).cpu()
        return write_adapter(path, self._stack, routing[0], self.blueprint, rank)

    def save_pretrained(
        self, path: str | os.PathLike[str], preference: Preference, *, head: str | None = None
    ) -> None:
        """Write a preference's model, from the engine's store or a temporary one, to a directory with a model card.

        Raises:
            ValueError: invalid input, or a path that holds other files.
            OSError: writing failed; what was there before is untouched.
        """
        self._bound.check_whole("a directory")
        with stored(self.path, self._stack, self.routers, self.blueprint, self.training) as store:
            merge_store(store, preference, path, head=head)

    def push_to_hub(
        self, repo_id: str, preference: Preference, *, head: str | None = None, private: bool | None = None,
        revision: str | None = None, token: str | None = None,
    ) -> str:  # fmt: skip
        """Upload what `save_pretrained` writes to the Hugging Face Hub; returns the commit's address.

        Raises as it does, OSError also where the Hub refuses it, ImportError without huggingface_hub.

        Args:
            repo_id: "org/name"; made if it is not there, `private` or not.
            preference, head: as for `merge`.
            revision: the branch, made if it is not there; "main" unless told.
            token: to log in; the saved one unless told.
        """
        with tempfile.TemporaryDirectory(prefix="paretofuse-") as folder:
            self.save_pretrained(place := Path(folder, "model"), preference, head=head)
            return push(place, repo_id, private=private, revision=revision, token=token)

    def unload(self, preference: Preference, *, head: str | None = None) -> nn.Module:
        """Like `merge`, letting go of the live module, the fused one and the replicas first, with their memory."""
        self._let_go()
        return self.merge(preference, head=head)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        """Sizes at a glance, and what the live module is merged for."""
        at = "given as weights" if self._in_place.at_weights else self._in_place.preference
        what = f"{self.layout.summary()}, {self.routers.size}, backend={self.backend!r}"
        return f"Engine({what}, device={str(self.device)!r}, preference={at})"

    def __reduce__(self) -> str:
        """Refuse to be pickled or copied: it would take with it every tensor that processes otherwise share."""
        raise TypeError(
            "got an engine to pickle or copy, expected its store's path; pf.load(path) in the other process"
        )

    def set_family(self, family: str) -> None:
        """Give the routers a family's coefficients ("rows", "rows+columns", "scalar": none), zero: merges stay alike.

        Raises:
            ValueError: no such family, shards of one process, or coefficients that are not zero would be lost.
        """
        if family != "scalar":
            self._bound.check_rows(self.layout.widths[1])
        self.routers.set_family(family)
