"""What commands print: results to stdout, messages to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagemill.job.open_job import OpenJob


def open_job(
    output: str, moved: Sequence[tuple[str, str]] | None = None, user_agent: str | None = None
) -> OpenJob:
    """Return the job of an output folder or URL, with its sources read as these options say.

    Raises:
        OutputError: it is no job. UsageError: `--moved` makes no sense.
    """
    from imagemill.job.open_job import OpenJob

    opened = OpenJob.open(output)
    if moved or user_agent:
        from imagemill.runner import listing
        from imagemill.runner.settings import check_setting

        check_setting("user_agent", user_agent)
        opened = listing.at_new_places(opened, moved or (), user_agent)
    return opened


def print_result(parsed: argparse.Namespace, record: object, text: str) -> None:
    """Print a result: with `--json` the record as one JSON object, else the text for people, in
    lines that fit into a terminal.
    """
    import json

    from imagemill.display.text import fit_to
    from imagemill.system import serialization

    if parsed.json:
        print(json.dumps(serialization.to_plain(record)))
    else:
        print(fit_to(text, sys.stdout))


def log(message: str) -> None:
    """Print a message to stderr."""
    from imagemill.display import text

    text.print_message(f"imagemill: {message}")
