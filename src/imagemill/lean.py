"""Keep pandas out of processes that are ours alone.

pyarrow asks, when it is first given a list, whether that may be a pandas object; where pandas is installed it imports it for the question:
0.2 s and 53 MiB in the launcher and in every worker, for nothing (pyarrow 26, pandas 3; 2026-11-26). It asks once.
"""

from __future__ import annotations

import sys
from typing import Any


class _NoPandas:
    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is kept out", name=name)


def without_pandas() -> None:
    """Have pyarrow ask while pandas cannot be found. Afterwards `import pandas` works as ever; only pyarrow does not know of it.

    Does nothing where pyarrow is loaded already: then the process is somebody's program, which may want `Table.to_pandas`.
    """
    if "pyarrow" in sys.modules:
        return
    import pyarrow as pa

    sys.meta_path.insert(0, _NoPandas)
    try:
        pa.array([])
    finally:
        sys.meta_path.remove(_NoPandas)
