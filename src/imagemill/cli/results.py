"""The commands that use the rows of a job: export, report, score, sort."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from imagemill.cli.options import ACCESS, JOB, JSON, Command, add_settings, probability
from imagemill.cli.output import log, open_job, print_result
from imagemill.errors import UsageError

if TYPE_CHECKING:
    from imagemill.job.open_job import OpenJob


def add(command: Command) -> None:
    """Add these commands."""
    _add_export(command)
    _add_report(command)
    _add_score(command)
    _add_sort(command)


def _add_export(command: Command) -> None:
    sub = command(
        "export",
        _export,
        "write all rows of a job as CSV or JSON lines, in the order of its images",
    )
    sub.add_argument("dir", **JOB)
    sub.add_argument(
        "--to",
        required=True,
        choices=["csv", "jsonl"],
        help="csv: lists are JSON in a cell; jsonl: one JSON object per line",
    )
    sub.add_argument("--output", metavar="FILE", help="output file (default: standard output)")
    sub.add_argument(
        "--columns", metavar="A,B,…", help="columns to write, in this order (default: all)"
    )
    sub.add_argument(
        "--partial", action="store_true", help="if the job is not finished, write the existing rows"
    )


def _export(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from imagemill.job import export

    job = open_job(parsed.dir)
    _check_output(job, parsed.output)
    columns = parsed.columns.split(",") if parsed.columns else None
    form = export.Form(parsed.to)
    pieces = export.export(job, form, columns=columns, partial=parsed.partial, notify=log)
    if parsed.output:
        export.write(pieces, Path(parsed.output))
    elif sys.stdout is None:
        raise UsageError("standard output is closed. Give --output FILE.")
    else:
        sys.stdout.buffer.writelines(pieces)
    return 0


def _check_output(job: OpenJob, output: str | None) -> None:
    """Raise UsageError if a file that a command is to write is one of the job's own."""
    from pathlib import Path

    if output and not job.paths.url and job.paths.is_own(Path(output)):
        raise UsageError(f"--output {output}: the job needs this name. Give another file.")


def _add_report(command: Command) -> None:
    sub = command(
        "report",
        _report,
        "write the report again: results, speed, failures and sample images of a job",
    )
    sub.add_argument("dir", **JOB)
    add_settings(sub, ACCESS)
    sub.add_argument("--output", metavar="FILE", help="file of the page (default: DIR/report.html)")


def _report(parsed: argparse.Namespace) -> int:
    from imagemill import report

    job = open_job(parsed.dir, parsed.moved, parsed.user_agent)
    _check_output(job, parsed.output)
    report.write(job, parsed.output)
    print(parsed.output or job.paths.shown(job.paths.report))
    return 0


def _add_score(command: Command) -> None:
    sub = command(
        "score", _score, "compare a job's rows with true labels: accuracy, confusions, calibration"
    )
    sub.add_argument("dir", **JOB)
    add_settings(sub, ACCESS)
    sub.add_argument(
        "--truth",
        required=True,
        metavar="WHERE",
        help=(
            "where the true labels are: folders (the image's folder is its label), regex:PATTERN"
            " (a group in the path), @FILE.csv#path,label (also .tsv, .parquet), column:NAME (of"
            " the source table), or cls (WebDataset). Labels, class ids, or ImageNet synsets"
        ),
    )
    sub.add_argument(
        "--min-top1",
        type=probability,
        metavar="SHARE",
        help="exit 1 if the top-1 accuracy over all images is lower, such as 0.8",
    )
    sub.add_argument(
        "--no-report", dest="report", action="store_false", help="do not write report.html again"
    )
    sub.add_argument("--json", **JSON)


def _score(parsed: argparse.Namespace) -> int:
    from imagemill import report
    from imagemill.display.results import format_score
    from imagemill.scoring import score

    job = open_job(parsed.dir, parsed.moved, parsed.user_agent)
    found = score.score(job, parsed.truth)
    for note in found.notes:
        log(note)
    print_result(parsed, found, format_score(found))
    report.add_score(job, found, log, rewrite=parsed.report)
    top1 = found.top1.value or 0.0
    if parsed.min_top1 is not None and top1 < parsed.min_top1:
        log(f"top-1 {top1:.4f} is lower than --min-top1 {parsed.min_top1:g}")
        return 1
    if parsed.min_top1 is not None and found.rows < found.images:
        log("--min-top1 is not met before the job is finished")
        return 1
    return 0


def _add_sort(command: Command) -> None:
    sub = command(
        "sort",
        _sort,
        "put the images of a job into one folder per label, as links or copies",
    )
    sub.add_argument("dir", **JOB)
    add_settings(sub, ACCESS)
    sub.add_argument(
        "--into",
        required=True,
        metavar="FOLDER",
        help="output folder; run the same command again to continue, or to add new rows",
    )
    sub.add_argument(
        "--by",
        default="label",
        metavar="label|status|COLUMN",
        help="column whose values are the folders (default: %(default)s)",
    )
    sub.add_argument(
        "--min-probability",
        type=probability,
        metavar="P",
        help="leave out images whose first class is less probable",
    )
    sub.add_argument(
        "--failed", action="store_true", help="also put failed images into _failed/STATUS"
    )
    sub.add_argument(
        "--link",
        choices=["hard", "symbolic", "copy"],
        help=(
            "default: hard, or symbolic if hard links are impossible; images in archives and behind"
            " URLs are copied"
        ),
    )
    sub.add_argument("--dry-run", action="store_true", help="show the folders, and write nothing")
    sub.add_argument("--json", **JSON)


def _sort(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from imagemill.arrange import sort
    from imagemill.arrange.links import Link
    from imagemill.display.results import format_sorted

    if "://" in parsed.into:
        raise UsageError(f"--into {parsed.into} is a URL. Give a folder on this machine.")
    choice = sort.Choice(parsed.by, parsed.min_probability, parsed.failed)
    link = Link(parsed.link) if parsed.link else None
    done = sort.sort(
        open_job(parsed.dir, parsed.moved, parsed.user_agent),
        Path(parsed.into),
        choice,
        link,
        dry_run=parsed.dry_run,
        log=log,
    )
    print_result(parsed, done, format_sorted(done, dry_run=parsed.dry_run))
    return 1 if done.unreadable or done.missing else 0
