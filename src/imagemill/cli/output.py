"""What commands print: results to stdout, messages to stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagemill.job.open_job import OpenJob


def open_job(output: str) -> OpenJob:
    """Return the job of an output folder or URL. Raises: OutputError."""
    from imagemill.job.open_job import OpenJob

    return OpenJob.open(output)


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
