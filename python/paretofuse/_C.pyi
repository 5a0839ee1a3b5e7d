import numpy as np
import numpy.typing as npt

class MergePlan:
    def __init__(
        self,
        *,
        base: npt.NDArray[np.uint64],
        deltas: npt.NDArray[np.uint64],
        lengths: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        dtypes: npt.NDArray[np.uint8],
        experts: int,
        row_count: int,
    ) -> None: ...
    def run(
        self, weights: npt.NDArray[np.float32], out: npt.NDArray[np.uint64], *, threads: int, isa: str
    ) -> str: ...

def inner(
    grad: int,
    deltas: npt.NDArray[np.uint64],
    length: int,
    *,
    grad_dtype: int,
    delta_dtype: int,
    threads: int,
    isa: str,
) -> npt.NDArray[np.float64]: ...
def copy(dst: int, src: int, nbytes: int, *, threads: int, isa: str) -> None: ...
def instruction_sets() -> list[tuple[str, bool]]: ...
def chosen_isa(isa: str) -> str: ...
