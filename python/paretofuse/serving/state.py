"""What the addresses of one app share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from paretofuse.serving.errors import ApiError
from paretofuse.serving.limits import Limits
from paretofuse.serving.model import ServedModel
from paretofuse.serving.preferences import Preferences


@dataclass
class State:
    """One app's.

    Attributes:
        model: what is served now.
        preferences: resolves them.
        limits: of requests.
        created: when the app was made, in seconds since 1970.
    """

    model: ServedModel
    preferences: Preferences
    limits: Limits
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.model.name:
            raise ApiError(
                404,
                f"got model {name!r}, expected {self.model.name!r}, the only one here",
                param="model",
                code="model_not_found",
            )

    def check_task(self, *tasks: str) -> None:
        """Refuse an address that the model does not serve.

        Raises:
            ApiError: 404.
        """
        if self.model.task not in tasks:
            raise ApiError(
                404,
                f"got a request for {' or '.join(tasks)}, and the model here is for {self.model.task}; /docs lists "
                "what this server answers",
                code="wrong_task",
            )
