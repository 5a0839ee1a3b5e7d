"""Progress bars: on stderr, and only where somebody sees them move."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(show: bool, **options: Any) -> tqdm[Any]:
    """A bar that is silent unless it is wanted and stderr is a terminal: logs and pipes get no half-drawn lines.

    Args:
        show: whether it is wanted.
        options: tqdm's own.
    """
    return tqdm(
        disable=not (show and sys.stderr is not None and sys.stderr.isatty()), file=sys.stderr, **options
    )
