"""Run the accuracy check of precisions in a child process.

So an image that kills its decoder does not kill the job, the memory of quantising is freed, and
heavy libraries stay out of the launcher. If the child dies or hangs it is started once more, and
then decodes every image in a process of its own.

parent                        child
AccuracyCheck ───────────────────────►
      ◄─────────────────────── Said(line)
      ◄─────────────────────── At(patience_s)     the next message comes within that time;
                                                  None: it may take long
      ◄─────────────────────── Checked or Failed  the end
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from multiprocessing.connection import Connection

from msgspec import Struct
from msgspec.structs import replace

from imagemill.errors import WorkerError
from imagemill.models.variants import PrecisionRecord
from imagemill.pipeline.backends.nvidia import pinned
from imagemill.system import processes
from imagemill.system.messages import Notify
from imagemill.system.processes import Child, ChildError
from imagemill.tuning.check import AccuracyCheck, carry_out


class Said(Struct, frozen=True):
    """A line for the user."""

    line: str


class At(Struct, frozen=True):
    """How long the parent is to wait for the next message."""

    patience_s: float | None


class Checked(Struct, frozen=True):
    """The last message: the result by precision, which is also kept with the model."""

    records: Mapping[str, PrecisionRecord]


def in_child(asked: AccuracyCheck, notify: Notify = lambda _: None) -> dict[str, PrecisionRecord]:
    """Return what `carry_out` returns, from a child process.

    Raises:
        ImagemillError: as `carry_out`. WorkerError: the process died or hung twice.
    """
    try:
        return _attempt_in_child(asked, notify)
    except ChildError as died:
        notify(
            f"the accuracy check process {died}: starting it again, each image decoded in a"
            " process of its own"
        )
    try:
        return _attempt_in_child(replace(asked, isolate=True), notify)
    except ChildError as died:
        raise WorkerError(
            f"the process that measures precisions {died}, twice. Use --precision fp32. The last"
            f" lines of its log:\n{died.log_tail}"
        ) from died


def _attempt_in_child(asked: AccuracyCheck, notify: Notify) -> dict[str, PrecisionRecord]:
    variables: Mapping[str, str] = {}
    if asked.gpus:
        visible, variables = pinned(asked.gpus[0])
        asked = replace(asked, gpus=(visible, *asked.gpus[1:]))
    child = Child("imagemill.tuning.check_process", variables=variables)
    with contextlib.closing(child):
        child.send(asked)
        patience_s: float | None = None
        while True:
            match child.receive(patience_s):
                case Said(line):
                    notify(line)
                case At(patience):
                    patience_s = patience
                case Checked(records):
                    return dict(records)


def main() -> int:
    """Run the child process."""
    return processes.run_child(_work)


def _work(connection: Connection) -> None:
    asked = connection.recv()
    assert isinstance(asked, AccuracyCheck)
    processes.pin_to_cores(asked.cores)
    found = carry_out(
        asked,
        lambda line: connection.send(Said(line)),
        lambda patience_s: connection.send(At(patience_s)),
    )
    connection.send(Checked(found))
