"""An HTTP server over one engine: OpenAI's interface, with a preference in every request.

    app.py            puts everything together into an ASGI app
    routes/           what each address answers; schemas.py says what requests look like
    model.py          what is served: engine, task, tokenizer or processor
    preferences.py    from what a request names to the numbers that are used
    errors.py         every refusal, in OpenAI's shape

Needs the extra `paretofuse[serve]`; importing this package alone does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretofuse.serving.app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    if name != "create_app":
        raise AttributeError(f"module 'paretofuse.serving' has no attribute {name!r}")
    try:
        from paretofuse.serving.app import create_app
    except ImportError as error:
        raise ImportError(f"a server needs {error.name}; pip install 'paretofuse[serve]'") from error
    return create_app
