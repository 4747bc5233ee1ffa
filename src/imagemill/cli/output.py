"""What commands print: results to stdout, messages to stderr."""

from __future__ import annotations

import json
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


def print_result(result: str) -> None:
    """Print text for people, in lines that fit into a terminal."""
    from imagemill.display import text

    print(text.fit_to(result, sys.stdout))


def as_json(record: object) -> str:
    """Return a record as one JSON object."""
    from imagemill.system import serialization

    return json.dumps(serialization.to_plain(record))


def log(message: str) -> None:
    """Print a message to stderr."""
    from imagemill.display import text

    text.print_message(f"imagemill: {message}")
