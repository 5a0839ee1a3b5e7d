"""YAML with line numbers, so that whatever a recipe or a study gets wrong is named with its place."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

_SHOWN = 80
"""Characters of a value that a message repeats."""


@dataclass(frozen=True)
class Node:
    """A value of a file and where it stands.

    Attributes:
        value: a scalar, a list of nodes, or nodes by key.
        line: counted from 1; of a list or of keys and values the line of its own key.
        file: the file's name.
        keys: of a mapping, the line of each key.
    """

    value: Any
    line: int
    file: str
    keys: dict[str, int]

    def error(self, message: str, line: int | None = None) -> ValueError:
        """An error that names the place."""
        return ValueError(f"{self.file}, line {line or self.line}: {message}")

    def mapping(self, what: str, known: Collection[str] | None = None) -> dict[str, Node]:
        """The nodes by key.

        Raises:
            ValueError: it is no mapping, or has a key that is not known.
        """
        if not isinstance(self.value, dict):
            raise self.error(f"got {self.shown()} for {what}, expected keys and values")
        for key in self.value:
            if known is not None and key not in known:
                raise self.error(
                    f"got the key {key!r} in {what}, which is not supported; expected one of {', '.join(known)}",
                    self.keys[key],
                )
        return self.value

    def items(self, what: str) -> list[Node]:
        """The nodes of a list.

        Raises:
            ValueError: it is none, or empty.
        """
        if not isinstance(self.value, list) or not self.value:
            raise self.error(f"got {self.shown()} for {what}, expected a list of at least one")
        return self.value

    def text(self, what: str) -> str:
        """A string.

        Raises:
            ValueError: it is none, or empty.
        """
        if not isinstance(self.value, str) or not self.value:
            raise self.error(f"got {self.shown()} for {what}, expected a text")
        return self.value

    def number(self, what: str) -> int:
        """A whole number.

        Raises:
            ValueError: it is none.
        """
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            raise self.error(f"got {self.shown()} for {what}, expected a whole number")
        return self.value

    def plain(self) -> Any:
        """The value as Python has it, without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def shown(self) -> str:
        """The value for a message."""
        if isinstance(self.value, dict):
            return "keys and values"
        if isinstance(self.value, list):
            return "a list" if self.value else "an empty list"
        text = repr(self.value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def read_yaml(text: str, file: str) -> Node:
    """The only document of a YAML text.

    Raises:
        ValueError: it is no YAML, or empty, or has a key twice; names the line.
        ImportError: PyYAML is missing.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            'YAML files need PyYAML, which is not installed; pip install "paretofuse[recipe]"'
        ) from error

    loader = yaml.SafeLoader(text)

    def node_of(found: Any, within: tuple[Any, ...]) -> Node:
        line = found.start_mark.line + 1
        if any(found is outer for outer in within):
            raise ValueError(f"{file}, line {line}: got a value that contains itself")
        within = (*within, found)
        if isinstance(found, yaml.SequenceNode):
            return Node([node_of(item, within) for item in found.value], line, file, {})
        if not isinstance(found, yaml.MappingNode):
            return Node(loader.construct_object(found), line, file, {})
        loader.flatten_mapping(found)
        values: dict[str, Node] = {}
        keys: dict[str, int] = {}
        for key_node, value in found.value:
            key = str(loader.construct_object(key_node))
            key_line = key_node.start_mark.line + 1
            if key in values:
                raise ValueError(f"{file}, line {key_line}: got the key {key!r} twice, expected it once")
            own = node_of(value, within)
            values[key] = own if isinstance(value, yaml.ScalarNode) else replace(own, line=key_line)
            keys[key] = key_line
        return Node(values, line, file, keys)

    try:
        root = loader.get_single_node()
        if root is None:
            raise ValueError(f"{file}: got an empty file, expected keys and values")
        return node_of(root, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{file}{place}: this is no YAML: {reason}") from error
    finally:
        loader.dispose()
