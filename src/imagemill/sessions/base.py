"""What a session is: one compiled model on one device, fed with batches and giving back outputs, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from imagemill.records import Batch, Outputs


class Session(Protocol):
    """One compiled model on one device.

    How many batches are in flight is the session's own business: it may take several before it gives the first back. A batch in which
    no place is filled is passed on without being computed.
    """

    backend: str
    """`openvino`, `onnxruntime`, …"""
    versions: dict[str, str]
    """Of the libraries that decide the answers."""

    def stream(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Outputs]]:
        """Yield each batch with its outputs, in order; ends when the batches end and nothing is in flight.

        Raises:
            ModelError: a batch of another shape than the model was compiled for.
        """
        ...

    def close(self) -> None:
        """Let go of the device."""
        ...
