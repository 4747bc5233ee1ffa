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

import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from imagemill import errors
from imagemill.errors import ImagemillError, WorkerError
from imagemill.system import processes
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


@dataclass(frozen=True, slots=True)
class Failed:
    """The end: an error for the user."""

    kind: str
    """Class name in `imagemill.errors`."""
    message: str


def in_child(trial: Trial, say: Say = lambda _: None) -> dict[str, Record]:
    """`carry_out` in a process of its own; started once more, decoding in disposable processes, if
    it dies or hangs.

    Raises:
        ImagemillError: as `carry_out`. WorkerError: it died twice.
    """
    try:
        return _attempt_in_child(trial, say)
    except _DiedError as died:
        say(
            f"the trial process {died}: starting it again, each image decoded in a process of"
            " its own"
        )
    try:
        return _attempt_in_child(replace(trial, isolate=True), say)
    except _DiedError as died:
        raise WorkerError(
            f"the process that measures precisions {died}, twice. Use --precision fp32."
        ) from died


class _DiedError(Exception):
    """The child is gone without an answer; says how."""


def _attempt_in_child(trial: Trial, say: Say) -> dict[str, Record]:
    ours, theirs = Pipe()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            processes.command("imagemill.tuning.trial_process", theirs.fileno(), os.getpid()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            pass_fds=(theirs.fileno(),),
            env=processes.environment(),
        )
        theirs.close()
        try:
            ours.send(trial)
            return _listen(ours, say)
        except (EOFError, OSError):
            code = process.wait()
            how = (
                f"was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"ended with code {code}"
            )
            log.seek(0)
            last = log.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            raise _DiedError(": ".join([how, *last])) from None
        finally:
            process.kill()
            process.wait()
            ours.close()


def _listen(connection: Connection, say: Say) -> dict[str, Record]:
    patience_s: float | None = None
    while True:
        if not connection.poll(patience_s):
            raise _DiedError(f"said nothing for {patience_s:g} s while decoding")
        match connection.recv():
            case Said(line):
                say(line)
            case At(patience):
                patience_s = patience
            case Found(records):
                return dict(records)
            case Failed(kind, message):
                known = getattr(errors, kind, ImagemillError)
                raise known(message)


def main() -> int:
    """Be the child."""
    socket, parent = (int(argument) for argument in sys.argv[1:3])
    processes.end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    warnings.simplefilter("ignore")
    connection = Connection(socket)
    trial = connection.recv()
    assert isinstance(trial, Trial)
    processes.keep_to(trial.cores)
    try:
        found = carry_out(
            trial,
            lambda line: connection.send(Said(line)),
            lambda patience_s: connection.send(At(patience_s)),
        )
        connection.send(Found(found))
    except ImagemillError as error:
        kind = type(error).__name__
        connection.send(Failed(kind if hasattr(errors, kind) else "ImagemillError", str(error)))
    return 0
