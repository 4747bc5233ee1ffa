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
from imagemill.job import documents, ledger, store

if TYPE_CHECKING:
    from imagemill.job.documents import Frozen
    from imagemill.job.paths import JobPaths

_log = logging.getLogger(__name__)


def write(paths: JobPaths, frozen: Frozen) -> int:
    """Write `report.html` from what is committed; a job that is not finished gets a page that says
    so.

    Args:
        paths: of the output.
        frozen: the job.

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

    shards = documents.planned(paths, frozen)
    done = ledger.committed(paths, shards)
    found = figures.gather(
        paths,
        [s for s in shards if s.number in done],
        frozen.job.card.labels,
        int(frozen.job.plan_id, 16),
    )
    shown = [*found.most_certain, *found.least_certain, *found.sample]
    made = thumbnails.make(paths, frozen.job, shards, shown)
    summary = documents.read_summary(paths) if len(done) == len(shards) else None
    html = page.render(paths, frozen, summary, found, made)
    store.write(paths, paths.report, html)
    return len(html)


def attempt(paths: JobPaths, frozen: Frozen, say: Callable[[str], None]) -> None:
    """Write the report of a job that has just finished. Where that fails the job is no less
    finished: there is a note instead.
    """
    try:
        write(paths, frozen)
        say(f"report: {paths.shown(paths.report)}")
    except Interrupted:
        raise
    except Exception as error:
        _log.warning("no report", exc_info=True)
        say(
            f"note: no report could be made ({error}). The results are whole; `imagemill report"
            f" {paths.output}` tries again."
        )
