"""A method and its parameters in one text: "ties:density=0.2,seed=1"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretofuse.engine.methods.method import Parameter


def parse_words(
    given: str, text: str, choices: Mapping[str, Mapping[str, Parameter]]
) -> tuple[str, dict[str, Any], int]:
    """The method's name, its parameters by name (the rest at their defaults), and the seed (0 unless told).

    Args:
        given: the text as messages quote it, such as "transform='ties'".
        text: a method, and after a colon its parameters.
        choices: the methods that may be named, and of each the parameters that may be.

    Raises:
        TypeError: no text.
        ValueError: no such method, a parameter that it lacks, or a value out of range.
    """
    if not isinstance(text, str):
        raise TypeError(f"got {given}, expected a text such as 'ties:density=0.2'")
    name, _, rest = text.partition(":")
    if name not in choices:
        raise ValueError(f"got {given}, expected one of {', '.join(choices)}, such as ties:density=0.2")
    own = choices[name]
    options: dict[str, Any] = {key: parameter.default for key, parameter in own.items()}
    seed = 0
    for part in filter(None, rest.split(",")):
        key, equals, value = (word.strip() for word in part.partition("="))
        if key == "seed" and value.isdecimal():
            seed = int(value)
        elif key not in own or not equals:
            raise ValueError(
                f"got {given}, but {name} has no {part.strip()!r}; expected NAME=VALUE of "
                f"{', '.join([*own, 'seed'])}"
            )
        else:
            options[key] = own[key].value(value)
    return name, options, seed
