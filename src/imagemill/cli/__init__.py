"""The command line: arguments → Settings → one call → print.

Progress and logs go to stderr, the result to stdout; with `--json` stdout holds exactly one JSON
object.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from imagemill.cli import job, machine, models, results
from imagemill.cli.options import Call
from imagemill.cli.output import log
from imagemill.cli.parser import Parser, PrintCompletion
from imagemill.errors import ImagemillError, Interrupted
from imagemill.version import __version__


def make_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser. `arguments` are what the user typed, for suggestions in errors."""
    parser = Parser(
        prog="imagemill",
        description="Classify images in bulk: folders in, one Parquet row per image out.",
        allow_abbrev=False,
    )
    parser.arguments = arguments
    parser.add_argument("--version", action="version", version=f"imagemill {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=["bash", "zsh", "fish"],
        help="print a script that completes commands, options and files in this shell",
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )

    def command(name: str, call: Call, text: str) -> argparse.ArgumentParser:
        sub: Parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.arguments = arguments
        sub.set_defaults(call=call)
        return sub

    for module in (job, results, models, machine):
        module.add(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Expected errors are one line on stderr, never a traceback.
    """
    if arguments is None:  # this process runs nothing but this command
        from imagemill.system.without_pandas import hide_pandas

        hide_pandas()
        _open_standard_streams()
        arguments = sys.argv[1:]
    arguments = list(arguments)
    # OpenBLAS sends SIGINT if it cannot start its threads; this process needs none of them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A file name that the terminal cannot show must not end the command. A replaced stdout may
    # have no `reconfigure`.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        parsed = make_parser(arguments).parse_args(arguments)
        with contextlib.suppress(ValueError):  # only the main thread can set a signal handler
            signal.signal(signal.SIGTERM, _terminated)
        code: int = parsed.call(parsed)
        if sys.stdout is not None:  # None if the caller closed it
            sys.stdout.flush()
    except ImagemillError as error:
        log(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print("imagemill: interrupted. Run the same command again to continue.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout, such as `head`, has closed it
        _drop_stdout()
        return 0
    except Exception as error:
        if message := _shortage(error):
            print(f"imagemill: {message}", file=sys.stderr)
            return 1
        if not isinstance(error, OSError) or not _is_stdout_at_fault():
            raise
        _drop_stdout()
        print(
            f"imagemill: the result cannot be printed: {error.strerror}. The job itself is not"
            " affected.",
            file=sys.stderr,
        )
        return 1
    return code


def _open_standard_streams() -> None:
    """Open the null device in place of standard streams that the caller closed. Otherwise the next
    files would get their numbers, and messages would go to stdout.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115 - until the end


def _shortage(error: Exception) -> str | None:
    try:
        from imagemill.system import processes
    except (ImportError, MemoryError):  # too little memory for one import is too little for another
        what = " ".join(str(error).split()) or "out of memory"
        return f"{what}. Free some memory, or raise the limits of this shell (ulimit -v)."
    return processes.shortage(error)


def _is_stdout_at_fault() -> bool:
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _drop_stdout() -> None:
    """Send stdout to /dev/null, so that the interpreter's flush at exit does not fail."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminated(number: int, _frame: object) -> NoReturn:
    """Handle SIGTERM outside the launcher's loop, which has its own handler."""
    raise Interrupted("terminated. Run the same command again to continue.", 128 + number)
