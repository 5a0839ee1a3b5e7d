"""An HTTP server over one engine: OpenAI's interface, with a preference in every request.

    app.py            puts everything together into an ASGI app; server.py runs it, and looks after its store
    guard.py          what every request passes first: size, key, host
    routes/           what each address answers; schemas.py says what requests look like
    state.py          what the addresses share
    model.py          what is served: engine, task, tokenizer or processor
    preferences.py    from what a request names to the numbers that are used
    scheduling/       which rows of work are computed when, and together with which others
    errors.py         every refusal, in OpenAI's shape
    metrics.py        what Prometheus reads

Needs the extra `paretofuse[serve]`; importing this package alone does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretofuse.serving.app import create_app, reload
    from paretofuse.serving.limits import Limits

__all__ = ["Limits", "create_app", "reload"]

_HOMES = {"Limits": "limits", "create_app": "app", "reload": "app"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'paretofuse.serving' has no attribute {name!r}")
    try:
        return getattr(import_module(f"paretofuse.serving.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"a server needs {error.name}; pip install 'paretofuse[serve]'") from error
