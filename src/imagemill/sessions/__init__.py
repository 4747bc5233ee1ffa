"""Sessions: one compiled model on one device. `open_session` picks the class by the device's backend."""

from __future__ import annotations

from importlib import import_module

from imagemill.errors import DeviceError
from imagemill.records import DeviceSpec, Job
from imagemill.sessions.base import Session
from imagemill.stopwatch import Stopwatch

_CLASSES = {
    "openvino": ("imagemill.sessions.openvino", "OpenVinoSession"),
    "null": ("imagemill.sessions.null", "NullSession"),
}
"""Backend → module and class; a further backend is one file and one line here. Imported when asked for."""


def open_session(job: Job, device: DeviceSpec, clock: Stopwatch) -> Session:
    """Compile the job's model for a device.

    Raises:
        DeviceError: no such backend. ModelError: the model cannot be compiled.
    """
    if device.backend not in _CLASSES:
        raise DeviceError(f"backend {device.backend} is not known. Known: {', '.join(_CLASSES)}.")
    module, name = _CLASSES[device.backend]
    session: Session = getattr(import_module(module), name)(job, device, clock)
    return session
