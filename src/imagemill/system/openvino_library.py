"""OpenVINO without its telemetry, and without harm to the main thread."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any


def load_openvino() -> Any:
    """Import OpenVINO with its telemetry off: importing it otherwise sends an event."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def new_core() -> Any:
    """Return an `openvino.Core` whose CPU plugin was loaded in a thread that has ended.

    The plugin gives the thread that loads it a stack for signal handlers, and frees that stack when
    the core goes. Of two cores that go in the order they came, and of one that goes in another
    thread, the main thread would keep a freed stack, and the next Ctrl-C would kill the process
    without a word (OpenVINO 2026.4).
    """
    core = load_openvino().Core()

    def load_plugin() -> None:
        with contextlib.suppress(RuntimeError):  # an OpenVINO without it has other devices
            core.get_property("CPU", "FULL_DEVICE_NAME")

    thread = threading.Thread(target=load_plugin)
    thread.start()
    thread.join()
    return core
