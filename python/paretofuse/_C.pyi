from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paretofuse.engine.layout import Role

class Planes:
    def __init__(
        self,
        *,
        values: npt.NDArray[np.uint64],
        factors: npt.NDArray[np.uint64],
        sizes: npt.NDArray[np.int64],
        formats: npt.NDArray[np.uint8],
        dtypes: npt.NDArray[np.uint8],
    ) -> None: ...

class MergePlan:
    def __init__(
        self,
        *,
        base: npt.NDArray[np.uint64],
        lengths: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        columns: npt.NDArray[np.int64],
        dtypes: npt.NDArray[np.uint8],
        planes: Planes,
        plane_count: int,
        row_count: int,
    ) -> None: ...
    def run(
        self,
        weights: npt.NDArray[np.float32],
        out: npt.NDArray[np.uint64],
        *,
        row_weights: npt.NDArray[np.uint64] | None,
        column_weights: npt.NDArray[np.uint64] | None = None,
        threads: int,
        isa: str,
    ) -> str: ...

def keep_largest(
    model: tuple[int, int],
    base: tuple[int, int],
    length: int,
    mask: npt.NDArray[np.uint8],
    *,
    first: int,
    count: int,
    threads: int,
    isa: str,
) -> tuple[float, float]: ...
def keep_drawn(
    model: tuple[int, int],
    base: tuple[int, int],
    length: int,
    mask: npt.NDArray[np.uint8],
    *,
    key: tuple[int, int],
    threshold: int,
    threads: int,
    isa: str,
) -> tuple[float, float]: ...
def keep_ranked(
    model: tuple[int, int],
    base: tuple[int, int],
    length: int,
    mask: npt.NDArray[np.uint8],
    *,
    columns: int,
    key: tuple[int, int],
    low: float,
    rise: float,
    threads: int,
    isa: str,
) -> tuple[float, float]: ...
def merge_differences(
    base: tuple[int, int],
    shares: Sequence[tuple[int, int, npt.NDArray[np.uint8] | None, float, float]],
    length: int,
    out: tuple[int, int],
    *,
    elects: bool,
    normalizes: bool,
    scale: float,
    threads: int,
    isa: str,
) -> None: ...
def products(
    base: tuple[int, int],
    models: Sequence[tuple[int, int]],
    length: int,
    *,
    columns: int,
    threads: int,
    isa: str,
) -> npt.NDArray[np.float64]: ...
def inner(
    grad: int,
    planes: Planes,
    length: int,
    *,
    columns: int,
    by: str,
    grad_dtype: int,
    threads: int,
    isa: str,
) -> npt.NDArray[np.float64]: ...
def copy(dst: int, src: int, nbytes: int, *, threads: int, isa: str) -> None: ...
def instruction_sets() -> list[tuple[str, bool]]: ...
def chosen_isa(isa: str) -> str: ...
def file_stems(names: Sequence[str]) -> dict[str, str]: ...
def plane_parts(
    name: str, shape: Sequence[int], format: str, size: int
) -> list[tuple[str, str, tuple[int, ...]]]: ...
def is_model_file(name: str) -> bool: ...
def is_safe_path(path: str) -> bool: ...
def shard_ends(nbytes: Sequence[int], shard_bytes: int) -> list[int]: ...
def shard_name(stem: str, number: int, count: int) -> str: ...
def index_name(stem: str) -> str: ...
def index_text(total_parameters: int, total_size: int, weight_map: dict[str, str]) -> str: ...

class TensorView:
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def data(self) -> npt.NDArray[np.uint8]: ...

class SafetensorsFile:
    def __init__(self, path: str | PathLike[str]) -> None: ...
    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def tensors(self) -> dict[str, TensorView]: ...
    @property
    def data(self) -> npt.NDArray[np.uint8]: ...
    def release(self, start: int, stop: int) -> None: ...

class SafetensorsWriter:
    def __init__(self, path: str | PathLike[str], *, metadata: dict[str, str], reserve: int) -> None: ...
    def begin(self, name: str, dtype: str, shape: Sequence[int]) -> None: ...
    def write(self, chunk: object) -> None: ...
    def end(self) -> None: ...
    def finish(self) -> None: ...

class Fresh:
    def __init__(self, place: str | PathLike[str], *, directory: bool) -> None: ...
    @property
    def path(self) -> Path: ...
    @property
    def target(self) -> Path: ...
    def place(self, exchange: bool = True) -> None: ...
    def discard(self) -> None: ...

class Merged:
    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def isa(self) -> str | None: ...

class Routers:
    def __init__(
        self, init: str, members: Sequence[tuple[int, float]], parameters: dict[str, npt.NDArray[np.float32]]
    ) -> None: ...
    def weights(self, preferences: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]: ...

class Store:
    def __init__(self, path: str | PathLike[str]) -> None: ...
    @property
    def objectives(self) -> list[str]: ...
    @property
    def members(self) -> list[tuple[str, str | None, float]]: ...
    @property
    def static_weight(self) -> float: ...
    @property
    def specs(
        self,
    ) -> list[tuple[str, tuple[int, ...], str, Role, str | None, str, tuple[str, ...]]]: ...
    @property
    def planes(self) -> list[dict[str, tuple[str, int, float | None, str, str]]]: ...
    @property
    def init(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def model_class(self) -> str: ...
    @property
    def created_by(self) -> str: ...
    @property
    def training(self) -> str: ...
    @property
    def files(self) -> dict[str, tuple[int, str]]: ...
    @property
    def base(self) -> SafetensorsFile: ...
    @property
    def experts(self) -> list[SafetensorsFile]: ...
    @property
    def heads(self) -> dict[str, SafetensorsFile]: ...
    @property
    def routers(self) -> dict[str, npt.NDArray[np.float32]]: ...
    def model_files(self, head: str) -> dict[str, bytes]: ...
    def routing_weights(self, preference: Sequence[float]) -> npt.NDArray[np.float32]: ...
    def check_unchanged(self) -> None: ...
    def merge(
        self,
        weights: npt.NDArray[np.float32],
        path: str | PathLike[str],
        *,
        head: str,
        files: dict[str, bytes],
        threads: int,
        isa: str,
        progress: Callable[[int, int], None] | None,
        batch_bytes: int,
        shard_bytes: int,
    ) -> Merged: ...

class Places:
    def __init__(self, tensors: list[Any], exchange: object) -> None: ...
    def hold(self, tensors: list[Any]) -> bool: ...

def tables_hold(tables: list[tuple[dict[str, Any], tuple[Any, ...]]]) -> bool: ...
