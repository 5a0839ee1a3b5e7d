"""Tokens become text, piece by piece, up to a stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"
"""What decoders put where the bytes of a character are not all there."""


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: decodes.
        stops: texts that end the answer and are not part of it.
        streams: whether pieces are wanted; else only the whole at its end.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], streams: bool) -> None:
        self._tokenizer, self._stops, self._streams = tokenizer, tuple(stops), streams
        self._sent = 0  # characters
        self.stopped = False

    def piece(self, tokens: list[int], *, last: bool) -> str:
        """The text that is new and certain. Sets `stopped` where a stop was found, which then is the last piece.

        Args:
            tokens: all that were generated.
            last: no more will come: what was held back is given too.
        """
        if not (last or self._streams or self._stops):
            return ""
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif not last:
            text = text[: len(text) - self._held_back(text)]
        if not (last or self.stopped or self._streams):
            return ""
        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return str(new)

    def _held_back(self, text: str) -> int:
        """Characters at the end that may still change or become a stop."""
        incomplete = len(text) - len(text.rstrip(_INCOMPLETE))
        begun = [
            size
            for stop in self._stops
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ]
        return max([incomplete, *begun])
