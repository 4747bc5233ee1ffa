"""The process that a trial of precisions runs in, and its parent.

An image that kills its decoder does not kill the job, the memory of quantising is given back, and
heavy libraries stay out of the launcher. A child that dies or hangs is started once more, and then
decodes every image in a disposable process.

parent                        child
Trial ───────────────────────►
      ◄─────────────────────── Said(line)
      ◄─────────────────────── At(patience_s)     the next message comes within that time;
                                                  None: it may take long
      ◄─────────────────────── Found or Failed    the end
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

from imagemill.errors import WorkerError
from imagemill.system import processes
from imagemill.system.processes import Child, ChildError
from imagemill.tuning.trial import Record, Say, Trial, carry_out


@dataclass(frozen=True, slots=True)
class Said:
    """A line for the user."""

    line: str


@dataclass(frozen=True, slots=True)
class At:
    """How long the parent should wait for the next message."""

    patience_s: float | None


@dataclass(frozen=True, slots=True)
class Found:
    """The end: what was found, by precision, also noted in the card."""

    records: Mapping[str, Record] = field(default_factory=dict)


def in_child(trial: Trial, say: Say = lambda _: None) -> dict[str, Record]:
    """`carry_out` in a process of its own; started once more, decoding in disposable processes, if
    it dies or hangs.

    Raises:
        ImagemillError: as `carry_out`. WorkerError: it died twice.
    """
    try:
        return _attempt_in_child(trial, say)
    except ChildError as died:
        say(
            f"the trial process {died}: starting it again, each image decoded in a process of"
            " its own"
        )
    try:
        return _attempt_in_child(replace(trial, isolate=True), say)
    except ChildError as died:
        raise WorkerError(
            f"the process that measures precisions {died}, twice. Use --precision fp32. The last"
            f" lines of its log:\n{died.log_tail}"
        ) from died


def _attempt_in_child(trial: Trial, say: Say) -> dict[str, Record]:
    with contextlib.closing(Child("imagemill.tuning.trial_process")) as child:
        child.send(trial)
        patience_s: float | None = None
        while True:
            match child.receive(patience_s):
                case Said(line):
                    say(line)
                case At(patience):
                    patience_s = patience
                case Found(records):
                    return dict(records)


def main() -> int:
    """Be the child."""
    return processes.run_child(_work)


def _work(connection: Connection) -> None:
    trial = connection.recv()
    assert isinstance(trial, Trial)
    processes.keep_to(trial.cores)
    found = carry_out(
        trial,
        lambda line: connection.send(Said(line)),
        lambda patience_s: connection.send(At(patience_s)),
    )
    connection.send(Found(found))
