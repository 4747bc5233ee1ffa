from typing import Any

from numpy.typing import NDArray

def resample(
    source: NDArray[Any], box: tuple[float, float, float, float], cubic: bool, out: NDArray[Any], /
) -> None: ...
