import numpy as np
from numpy.typing import NDArray

Axis = tuple[float, int, int, int]

def resample_part(
    source: NDArray[np.uint8],
    x: Axis,
    y: Axis,
    filter: str,
    down_first: bool,
    out: NDArray[np.uint8],
    /,
) -> None: ...
