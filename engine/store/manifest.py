"""The manifest of a store: what manifest.json says, written, and read with every field checked. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast, get_args

from paretofuse.engine.errors import StoreError
from paretofuse.engine.layout import ITEM_SIZE, MERGED_DTYPES, Layout, Role, TensorSpec

FORMAT = "paretofuse"
VERSION = 1
MANIFEST = "manifest.json"
BASE = "base.safetensors"
ROUTERS = "routers.safetensors"

_SAFE_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of one file of the store."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything manifest.json says. File names are relative to the store, with forward slashes.

    Attributes:
        layout: objectives, static weight and tensor table.
        init: what the routers add to: "identity", "sqrt" or "constant".
        base: file of the base tensors.
        routers: file of the router parameters.
        experts: file of each objective's deltas.
        heads: file of each objective's head tensors, where it has any.
        model_class: qualified name of the base model's class, if it had one.
        model_files: names below model/.
        head_files: names below heads/<stem>/ by objective, where there are any.
        files: every file but the manifest.
        training: how the routers were trained, for people and for other programs; None if that is not recorded.
        created_by: the program and version that wrote it, for people; this one unless read from a file.
    """

    layout: Layout
    init: str
    base: str
    routers: str
    experts: dict[str, str]
    heads: dict[str, str]
    model_class: str | None
    model_files: tuple[str, ...]
    head_files: dict[str, tuple[str, ...]]
    files: dict[str, FileRecord]
    training: dict[str, Any] | None = None
    created_by: str = ""

    def model_path(self, name: str, head: str | None = None) -> str:
        """Path of a model file, or of a head's own one, relative to the store."""
        if head is None:
            return f"model/{name}"
        return f"heads/{file_stems(self.layout.objectives)[head]}/{name}"

    def to_json(self) -> str:
        """The text of manifest.json."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "created_by": self.created_by or f"paretofuse {own_version()}",
            "objectives": self.layout.objectives,
            "static_weight": self.layout.static_weight,
            "routers": {"init": self.init, "file": self.routers},
            "base": self.base,
            "experts": self.experts,
            "heads": self.heads,
            "model": {"class": self.model_class, "files": self.model_files, "heads": self.head_files},
            "tensors": [asdict(spec) for spec in self.layout.tensors],
            "files": {path: asdict(record) for path, record in self.files.items()},
        }
        if self.training is not None:
            document["training"] = self.training
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def file_stems(objectives: Sequence[str]) -> dict[str, str]:
    """A file name stem for each objective: its name if all names are safe and distinct, or its index."""
    safe = all(_SAFE_STEM.fullmatch(name) and not name.endswith((".", ".safetensors")) for name in objectives)
    distinct = len({name.casefold() for name in objectives}) == len(objectives)
    return {name: name if safe and distinct else f"{index:03d}" for index, name in enumerate(objectives)}


def is_safe_path(path: str) -> bool:
    """Whether a relative path with forward slashes stays below where it starts, on any system."""
    pure = PurePosixPath(path)
    clean = not any(mark in path for mark in ("\\", "\0", ":"))
    return (
        clean and bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and str(pure) == path
    )


def is_model_file(name: str) -> bool:
    """Whether a file may stand beside a merged model's weights: a safe path, and no weights itself."""
    weights = (
        ".safetensors",
        ".safetensors.index.json",
        ".bin",
        ".bin.index.json",
        ".pt",
        ".pth",
        ".ckpt",
        ".pkl",
    )
    return is_safe_path(name) and not name.endswith(weights)


def read_manifest(root: Path) -> Manifest:
    """Read and check the manifest of a store; the files it names are not looked at.

    Raises:
        StoreError: it is missing, damaged, of a newer version, or contradicts itself.
    """
    path = root / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")
        document = json.loads(text)
    except FileNotFoundError:
        reason = f"it has no {MANIFEST}" if root.is_dir() else "there is no such directory"
        raise StoreError(f"{root} is not a store: {reason}; create one with `paretofuse stack`") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not valid JSON ({error}); create the store again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise StoreError(f'{path}: its format is not "{FORMAT}", so {root} is not a store')
    found = document.get("version")
    if type(found) is not int or found < 1:
        raise StoreError(f"{path}: got version {found!r}, expected an integer from 1 to {VERSION}")
    if found > VERSION:
        raise StoreError(
            f"{path}: made by a newer paretofuse ({document.get('created_by')!r}, store "
            f"version {found}, this one reads up to {VERSION}); upgrade with `pip install -U paretofuse`"
        )
    try:
        return _parse(document)
    except ValueError as error:
        raise StoreError(f"{path}: {error}; create the store again") from error


def _parse(document: Mapping[str, Any]) -> Manifest:
    objectives = _strings(document, "objectives")
    if not objectives or len(set(objectives)) != len(objectives):
        raise ValueError(f"got objectives {list(objectives)}, expected at least one, each once")
    static_weight = document.get("static_weight")
    if (
        isinstance(static_weight, bool)
        or not isinstance(static_weight, int | float)
        or not math.isfinite(static_weight)
    ):
        raise ValueError(f"got static_weight {static_weight!r}, expected a finite number")
    specs = tuple(_spec(entry) for entry in _get(document, "tensors", list))
    names = [name for spec in specs for name in (spec.name, *spec.aliases)]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"tensor {twice!r} appears twice in the tensor table")
    routers, model = _get(document, "routers", dict), _get(document, "model", dict)
    experts, heads = _string_map(document, "experts"), _string_map(document, "heads")
    if set(experts) != set(objectives):
        raise ValueError(f"got experts {sorted(experts)}, expected one for each of {sorted(objectives)}")
    head_names = _get(model, "heads", dict)
    unknown = sorted((set(heads) | set(head_names)) - set(objectives))
    if unknown:
        raise ValueError(f"got heads for {unknown}, expected only objectives: {sorted(objectives)}")
    model_class = model.get("class")
    if model_class is not None and not isinstance(model_class, str):
        raise ValueError(f"got model class {model_class!r}, expected a name or null")
    manifest = Manifest(
        layout=Layout(objectives, specs, float(static_weight)),
        init=_get(routers, "init", str),
        base=_get(document, "base", str),
        routers=_get(routers, "file", str),
        experts={name: experts[name] for name in objectives},
        heads=heads,
        model_class=model_class,
        model_files=_strings(model, "files"),
        head_files={name: _strings(head_names, name) for name in head_names},
        files={path: _record(path, entry) for path, entry in _get(document, "files", dict).items()},
        training=_get(document, "training", dict) if document.get("training") is not None else None,
        created_by=str(document.get("created_by")),
    )
    for name in (*manifest.model_files, *(name for names in manifest.head_files.values() for name in names)):
        if not is_model_file(name):
            raise ValueError(f"model file {name!r} would escape the store or pass for weights")
    named = [manifest.base, manifest.routers, *manifest.experts.values(), *manifest.heads.values()]
    named += [manifest.model_path(name) for name in manifest.model_files]
    named += [
        manifest.model_path(name, head) for head, names in manifest.head_files.items() for name in names
    ]
    for path in (*named, *manifest.files):
        if not is_safe_path(path):
            raise ValueError(f"file name {path!r} would escape the store")
        if path not in manifest.files:
            raise ValueError(f"no size and checksum for file {path!r}")
    return manifest


def _spec(entry: Any) -> TensorSpec:
    if not isinstance(entry, dict):
        raise ValueError(f"got {entry!r} in the tensor table, expected an object")
    name, group = _get(entry, "name", str), entry.get("group")
    shape = _get(entry, "shape", list)
    role, dtype, delta_dtype = (_get(entry, key, str) for key in ("role", "dtype", "delta_dtype"))
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise ValueError(f"tensor {name!r} has shape {shape}, expected integers >= 0")
    if role not in get_args(Role):
        raise ValueError(f"tensor {name!r} has role {role!r}, expected one of {', '.join(get_args(Role))}")
    if (role == "routed") != (isinstance(group, str) and bool(group)) or (
        role != "routed" and group is not None
    ):
        raise ValueError(
            f"tensor {name!r} has role {role!r} and group {group!r}; only routed tensors have a group"
        )
    allowed = tuple(ITEM_SIZE) if role == "constant" else MERGED_DTYPES
    if dtype not in allowed or delta_dtype not in allowed:
        raise ValueError(
            f"tensor {name!r} has dtypes {dtype} and {delta_dtype}, expected any of {', '.join(allowed)}"
        )
    return TensorSpec(
        name, tuple(shape), dtype, cast(Role, role), group, delta_dtype, _strings(entry, "aliases")
    )


def _record(path: str, entry: Any) -> FileRecord:
    if not isinstance(entry, dict):
        raise ValueError(f"got {entry!r} for file {path!r}, expected bytes and sha256")
    size, digest = _get(entry, "bytes", int), _get(entry, "sha256", str)
    if size < 0 or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"got {entry!r} for file {path!r}, expected bytes and sha256")
    return FileRecord(size, digest)


def _get(entry: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"got {value!r} for {key!r}, expected a JSON {kind.__name__}")
    return value


def _strings(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = _get(entry, key, list)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"got {values!r} for {key!r}, expected a list of strings")
    return tuple(values)


def _string_map(entry: Mapping[str, Any], key: str) -> dict[str, str]:
    values = _get(entry, key, dict)
    if not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"got {values!r} for {key!r}, expected strings by name")
    return values


def own_version() -> str:
    """This installation's version; "unknown" where it was never installed."""
    try:
        return version("paretofuse")
    except PackageNotFoundError:
        return "unknown"
