"""`report.html`: one self-contained page about a job, for people. See `docs/report.md`.

figures.py      the parts → figures, in one pass
thumbnails.py   images → small JPEGs, fetched and decoded again
charts.py       numbers → what the template draws
page.py         all of it → HTML, by page.html.j2, page.css and page.js
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from imagemill.errors import Interrupted
from imagemill.job import documents

if TYPE_CHECKING:
    from imagemill.job.open_job import OpenJob

_log = logging.getLogger(__name__)


def write(job: OpenJob) -> int:
    """Write `report.html` from what is committed; a job that is not finished gets a page that says
    so.

    Args:
        job: finished or not.

    Returns:
        the page's size, bytes.

    Raises:
        PartError: a part is damaged. OutputError: the plan is, or the page cannot be written.
    """
    from imagemill.report import (
        figures,
        page,
        thumbnails,
    )  # Jinja and Pillow are of no use to other commands

    found = figures.gather(job)
    shown = [*found.most_certain, *found.least_certain, *found.sample]
    made = thumbnails.make(job, shown)
    is_complete = found.images == job.frozen.images
    summary = documents.read_summary(job.store) if is_complete else None
    html = page.render(job, summary, found, made)
    job.store.write(job.paths.report, html)
    return len(html)


def attempt(job: OpenJob, say: Callable[[str], None]) -> None:
    """Write the report of a job that has just finished. Where that fails the job is no less
    finished: there is a note instead.
    """
    try:
        write(job)
        say(f"report: {job.paths.shown(job.paths.report)}")
    except Interrupted:
        raise
    except Exception as error:
        _log.warning("no report", exc_info=True)
        say(
            f"note: no report could be made ({error}). The results are whole; `imagemill report"
            f" {job.paths.output}` tries again."
        )
