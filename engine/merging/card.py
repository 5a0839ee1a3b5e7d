"""The model card of a merge: README.md of the merged directory, in the form that model hubs read. No torch.

It says of what the model was made, so that the same can be made again: base and experts by the checksums of their
tensors, the preference, the routing weights by their digest, and the versions. It has no date: the same merge is the
same bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping

import numpy as np

from paretofuse.engine.store.reader import Store, describe_training
from paretofuse.engine.store.writer import own_version

CARD = "README.md"
BASE_CARD = "README-base.md"
"""The base's own card, kept beside the merged model's."""

_KEPT = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")
"""What the card takes over from the head of the base's: what holds for the merged model as well."""


def with_card(
    files: Mapping[str, bytes],
    store: Store,
    preference: Mapping[str, float] | None,
    weights: np.ndarray,
    head: str | None,
) -> dict[str, bytes]:
    """A model's own files with the card among them; the base's own card goes on as README-base.md.

    Args:
        files: of the model directory by name, the base's card among them if it has one.
        store: what was merged.
        preference: each objective's share; None where routing weights were given instead.
        weights: the routing weights, float32 [G, P].
        head: the objective whose head the model got.
    """
    found = dict(files)
    old = found.pop(CARD, None)
    if old is not None:
        found[BASE_CARD] = old
    found[CARD] = _card(store, preference, weights, head, old, found.get("config.json")).encode()
    return found


def _card(
    store: Store,
    preference: Mapping[str, float] | None,
    weights: np.ndarray,
    head: str | None,
    old: bytes | None,
    config: bytes | None,
) -> str:
    shares = "given as routing weights"
    if preference is not None:
        shares = ", ".join(f"{name} {share:g}" for name, share in preference.items())
    paths = [file.path.relative_to(store.path).as_posix() for file in store.files]
    base, *experts = (store.checksums[path][1][:16] for path in paths)
    digest = hashlib.sha256(np.ascontiguousarray(weights, "<f4").tobytes()).hexdigest()
    rows = {
        "Base": f"{_name(config) or store.model_class or 'not recorded'} (`{base}`)",
        **{f"Expert {name}": f"`{own}`" for name, own in zip(store.layout.planes, experts, strict=True)},
        "Preference": shares,
        "Head": head or "the base's",
        "Routers": describe_training(store.training) if store.trained else "not trained",
        "Routing weights": f"`{digest}`",
        "Store": store.created_by,
        "Merged by": f"paretofuse {own_version()}, Python {platform.python_version()}, NumPy {np.__version__}",
    }
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())
    kept = f"\nThe base's own card is [{BASE_CARD}]({BASE_CARD}).\n" if old is not None else ""
    return f"""---
{kept_lines(old)}tags:
- merge
- paretofuse
---

# A merged model

One of the models that [ParetoFuse](https://arxiv.org/abs/2406.09770) makes of a base and its fine-tuned experts:
ordinary dense weights at one preference between them.

| | |
|---|---|
{table}

Base and experts: the first 16 digits of the SHA-256 of the store's file with their tensors. Routing weights: the
SHA-256 of the numbers [groups, planes], float32, little-endian.
{kept}"""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _name(config: bytes | None) -> str | None:
    """What the configuration calls the base, if it is a name rather than somebody's path."""
    try:
        name = json.loads(config or b"{}").get("_name_or_path")
    except (ValueError, AttributeError):
        return None
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def kept_lines(old: bytes | None) -> str:
    """The lines of the base's card that hold for the merged model too: its licence above all."""
    text = (old or b"").decode("utf-8", errors="replace").replace("\r\n", "\n")
    front = re.match(r"---\n(.*?\n)---\s*(\n|$)", text, re.S)
    kept, keep = [], False
    for line in front[1].splitlines() if front else []:
        key = re.match(r"([A-Za-z_]+)\s*:", line)
        if key:
            keep = key[1] in _KEPT
        if keep:
            kept.append(line + "\n")
    return "".join(kept)
