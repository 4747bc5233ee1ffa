"""Keep pandas out of processes that belong to imagemill alone.

pyarrow imports pandas, which NNCF installs, to ask whether a list is a pandas object: 0.2 s and
53 MiB in each process, for nothing. A user's own process (`imagemill.run`) is left as it is.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec


class _NoPandas:
    """Finds pandas, as `importlib.util.find_spec` expects, and fails when it is imported."""

    @staticmethod
    def find_spec(name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, _NoPandas) if name == "pandas" else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        raise ModuleNotFoundError("imagemill does without pandas", name=spec.name)

    @staticmethod
    def exec_module(_module: object) -> None:
        """Never called."""


def hide_pandas() -> None:
    """Make `import pandas` fail in this process from now on."""
    sys.meta_path.insert(0, _NoPandas)
