"""Ray as an executor, which Ray itself does not bring."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class RayPool(Executor):
    """Calls functions as Ray tasks: `pf.sweep(engine, evaluate, executor=RayPool(num_gpus=1))`.

    Ray itself starts a task again whose worker died, three times unless `max_retries` says otherwise.

    Args:
        options: of each task, as `ray.remote` takes them: num_cpus, num_gpus, resources, max_retries, ...

    Raises:
        ImportError: Ray is not installed.
        ValueError: Ray does not know an option.
    """

    def __init__(self, **options: Any) -> None:
        import ray

        self._call = ray.remote(**options)(_call) if options else ray.remote(_call)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Start a task; the future's `result` raises what the function raised, as Ray wraps it."""
        future: Future[Any] = self._call.remote(function, arguments, named).future()
        return future


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return function(*arguments, **named)
