"""Keep pandas out of processes that belong to imagemill alone.

pyarrow imports pandas, which NNCF installs, to ask whether a list is a pandas object: 0.2 s and
53 MiB in each process, for nothing. A user's own process (`imagemill.run`) is left as it is.
"""

from __future__ import annotations

import sys


class _NoPandas:
    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("imagemill does without pandas", name=name)


def hide_pandas() -> None:
    """Make `import pandas` fail in this process from now on."""
    sys.meta_path.insert(0, _NoPandas)
