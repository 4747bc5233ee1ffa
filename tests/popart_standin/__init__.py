"""How tests put the stand-in for popart in the place of the real one: `popart.py` beside this file,
which is not imported by it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

PYTHON_VARIABLE = "IMAGEMILL_TEST_POPART_PYTHON"
"""Names an old interpreter with numpy, onnx and onnxruntime to run program and stand-in by; else
this one.
"""


def environment(folder: Path, **variables: object) -> dict[str, str]:
    """What is to be set; `variables` are the stand-in's, without their prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {f"POPART_STANDIN_{name.upper()}": str(value) for name, value in variables.items()}
    paths = [
        str(Path(__file__).parent),
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    return {
        "IMAGEMILL_POPART_PYTHON": os.environ.get(PYTHON_VARIABLE, sys.executable),
        "PYTHONPATH": os.pathsep.join(paths),
        "POPART_STANDIN_FOLDER": str(folder),
        **given,
    }


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path, **variables: object) -> None:
    """Set it."""
    for name, value in environment(folder, **variables).items():
        monkeypatch.setenv(name, value)


def calls(folder: Path) -> list[dict[str, Any]]:
    """What was asked of the stand-in so far."""
    file = folder / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
