"""OpenVINO without its telemetry."""

from __future__ import annotations

import sys
from typing import Any


def load_openvino() -> Any:
    """Import OpenVINO with its telemetry off: importing it otherwise sends an event."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
