import numpy as np
import numpy.typing as npt

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
        threads: int,
        isa: str,
    ) -> str: ...

def inner(
    grad: int,
    planes: Planes,
    length: int,
    *,
    columns: int,
    by_row: bool,
    grad_dtype: int,
    threads: int,
    isa: str,
) -> npt.NDArray[np.float64]: ...
def copy(dst: int, src: int, nbytes: int, *, threads: int, isa: str) -> None: ...
def instruction_sets() -> list[tuple[str, bool]]: ...
def chosen_isa(isa: str) -> str: ...
