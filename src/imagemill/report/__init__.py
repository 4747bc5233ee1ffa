"""`report.html`, a self-contained page about a job (docs/report.md).

figures.py      figures from the parts, in one pass, and what the page shows of `score.json`
thumbnails.py   small WebP files of images, fetched and decoded again
charts.py       scales and lines for the template to draw
page.py         the HTML, from page.html.j2, page.css and page.js
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from imagemill.errors import Interrupted, OutputError
from imagemill.job import documents
from imagemill.records import Status
from imagemill.system import files

if TYPE_CHECKING:
    from imagemill.job.open_job import OpenJob
    from imagemill.scoring.record import Score

_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())  # of commands without a log, nothing goes to stderr


def write(job: OpenJob, output: str | None = None) -> None:
    """Write `report.html` from the finished parts. The page says whether the job is finished.

    Args:
        job: finished or not.
        output: another file to write the page to.

    Raises:
        PartError: a part is damaged. OutputError: the plan is, or the page cannot be written.
    """
    # Jinja and Pillow are of no use to other commands.
    from imagemill.report import figures, page, thumbnails

    found = figures.gather(job)
    scored = figures.gather_accuracy(job)
    truncated = found.examples.get(Status.TRUNCATED, ())
    shown = [
        *(*found.most_certain, *found.least_certain, *found.sample),
        *(*scored.examples, *truncated),
    ]
    made = thumbnails.make(job, list({image.index: image for image in shown}.values()))
    is_complete = found.images == job.frozen.images
    summary = documents.read_summary(job.store) if is_complete else None
    html = page.render(job, summary, found, scored, made)
    if output:
        files.write_whole(Path(output), html)
    else:
        job.store.write(job.paths.report, html)


def attempt(job: OpenJob, notify: Callable[[str], None]) -> None:
    """Write the report of a job that has just finished. If that fails, the user gets a note and the
    job is still finished.
    """
    notify("writing the report")
    try:
        write(job)
    except Interrupted:
        raise
    except Exception as error:
        _log.warning("no report", exc_info=True)
        notify(
            "note: the results are complete, but the report could not be written:"
            f" {str(error).rstrip('.')}. Run `imagemill report {job.paths.output}` to try again."
        )


def add_score(
    job: OpenJob, found: Score, notify: Callable[[str], None], *, rewrite: bool = True
) -> None:
    """Write a job's `score.json`, and its report again if there is one. If that fails, the user
    gets a note.

    Args:
        job: the job.
        found: its score.
        notify: called with messages.
        rewrite: whether the report is written again.
    """
    from imagemill.scoring import score

    try:
        score.save(job, found)
        if rewrite and job.store.exists(job.paths.report):
            attempt(job, notify)
    except (OutputError, OSError) as error:
        notify(f"note: the score is not in the report: {error}")
