"""Cores of OpenVINO leave the main thread as it was."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import imagemill

ROOT = Path(imagemill.__file__).parent
SHOWS = """
import os, signal, threading, time
from imagemill.system.openvino_library import new_core

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
cores = [new_core() for _ in range(3)]
for core in cores:
    core.get_property("CPU", "FULL_DEVICE_NAME")
del core, cores[0], cores[0]
thread = threading.Thread(target=cores.clear)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0)
"""


@pytest.mark.process
def test_a_signal_is_handled_after_cores_have_gone_in_any_order() -> None:
    ended = subprocess.run([sys.executable, "-c", SHOWS], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr


def test_cores_are_made_in_one_place() -> None:
    """There, with care; elsewhere the next Ctrl-C could kill the process."""
    found = [
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if re.search(r"\.Core\(|\bov\.compile_model\(|openvino\.compile_model\(", path.read_text())
    ]
    assert found == ["system/openvino_library.py"]
