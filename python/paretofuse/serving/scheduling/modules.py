"""The modules that a plan needs: replicas, held while rows use them, and the mixed one of engine.batched."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

from torch import nn

from paretofuse.engine.engine import Engine
from paretofuse.serving.metrics import Metrics
from paretofuse.serving.scheduling.job import Key

_LOG = logging.getLogger("paretofuse.serving")


class Modules:
    """Used by one thread.

    Args:
        engine: whose modules.
        metrics: counts merges.
        timeout: seconds to wait for a replica that others hold.

    Attributes:
        can_mix: whether rows of different preferences may share a batch; None until `try_to_mix`.
    """

    def __init__(self, engine: Engine, metrics: Metrics, timeout: float) -> None:
        self._engine, self._metrics, self._timeout = engine, metrics, timeout
        self._held: dict[tuple[Key, str | None], tuple[ExitStack, nn.Module]] = {}
        self._mixed: tuple[tuple[Key, ...], str | None, nn.Module] | None = None
        self.can_mix: bool | None = None

    def named(self, key: Key) -> Mapping[str, float]:
        """A preference by name."""
        return dict(zip(self._engine.objectives, key, strict=True))

    def is_merged(self, key: Key) -> bool:
        """Whether a preference can be served without a merge."""
        return self._engine.is_merged(self.named(key))

    def keep(self, keys: Iterable[tuple[Key, str | None]]) -> None:
        """Let go of all replicas but those."""
        for key in set(self._held) - set(keys):
            self._held.pop(key)[0].close()

    def merged(self, key: Key, head: str | None = None) -> nn.Module:
        """The replica at a preference, held until `keep` leaves it out.

        Raises:
            TimeoutError: others hold all replicas.
        """
        if (key, head) not in self._held:
            hit, started = self.is_merged(key), time.perf_counter()
            with ExitStack() as stack:
                module = stack.enter_context(
                    self._engine.replica(self.named(key), head=head, timeout=self._timeout)
                )
                self._held[key, head] = stack.pop_all(), module
            if not hit:
                self._metrics.merged(time.perf_counter() - started)
                self._metrics.replicas.set(self._engine.pool.merged())
        return self._held[key, head][1]

    def mixed(self, keys: Sequence[Key], head: str | None = None) -> nn.Module:
        """A module whose row b is at preference keys[b]."""
        wanted = tuple(keys), head
        if self._mixed is None or self._mixed[:2] != wanted:
            module = self._engine.batched([self.named(key) for key in keys], head=head)
            self._mixed = (*wanted, module)
        return self._mixed[2]

    def try_to_mix(self, trial: Callable[[nn.Module], object]) -> None:
        """Find out whether engine.batched can run this model, by computing two rows; sets `can_mix`.

        Args:
            trial: runs a module of two rows as requests will.
        """
        count = len(self._engine.objectives)
        key = (1 / count,) * count
        try:
            trial(self.mixed((key, key)))
            self.can_mix = True
        except Exception as error:  # whatever a layer that it does not know may raise
            _LOG.info("rows of different preferences do not share a batch: %s", error)
            self.can_mix = False

    def close(self) -> None:
        """Let go of everything."""
        self.keep(())
        self._mixed = None
