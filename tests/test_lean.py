"""Processes that are ours alone do without pandas, which pyarrow otherwise imports to put one question."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
from imagemill.records import Bundle

WITHOUT = "from imagemill import lean; lean.without_pandas()"


def _python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], env=helpers.environment(), capture_output=True, text=True, check=True)
    return done.stdout


def test_pyarrow_then_takes_lists_without_pandas() -> None:
    told = _python(f"{WITHOUT}; import pyarrow as pa, sys; pa.array(['a']); print('pandas' in sys.modules)")
    assert told == "False\n"


def test_pandas_can_still_be_imported() -> None:
    assert _python(f"{WITHOUT}; import pandas; print(pandas.Series([7]).sum())") == "7\n"


def test_a_program_that_uses_pyarrow_keeps_to_pandas() -> None:
    told = _python(f"import pyarrow as pa; {WITHOUT}; print(pa.table([[7]], ['a']).to_pandas()['a'].sum())")
    assert told == "7\n"


def test_neither_launcher_nor_worker_of_a_run_imports_it(jpegs: Callable[..., Path], tiny: Bundle, imagemill: Any, tmp_path: Path) -> None:
    env = helpers.environment(PYTHONPROFILEIMPORTTIME="1")
    done = imagemill("run", jpegs(), "--output", tmp_path / "out", "--model", tiny.dir, env=env)
    assert done.code == 0
    for told in (done.err, (tmp_path / "out" / "logs" / "cpu#0.log").read_text()):
        imported = {line.rpartition("|")[2].strip() for line in told.splitlines() if line.startswith("import time:")}
        assert "pyarrow" in imported
        assert "pandas.core" not in imported  # the attempt that was refused is listed as `pandas`
