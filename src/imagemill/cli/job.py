"""The commands that run a job or look at one: run, demo, status, verify."""

from __future__ import annotations

import argparse

from imagemill.cli.options import JOB, JSON, Command, add_settings
from imagemill.cli.output import log, open_job, print_result
from imagemill.runner.settings import SETTINGS, make_settings


def add(command: Command) -> None:
    """Add these commands."""
    _add_run(command)
    _add_demo(command)
    _add_status(command)
    _add_verify(command)


def _add_run(command: Command) -> None:
    sub = command(
        "run", _run, "classify all images of the sources; run the same command again to resume"
    )
    add_settings(sub, SETTINGS)
    sub.usage = "%(prog)s SOURCE... --output DIR [options]"
    _add_summary_options(sub)


def _run(parsed: argparse.Namespace) -> int:
    from imagemill.display import observer, results
    from imagemill.runner import dry_run, run

    settings = make_settings(vars(parsed))
    if settings.dry_run:
        found = dry_run.dry_run(settings)
        for note in found.notes:
            log(note)
        print_result(parsed, found, results.format_dry_run(found))
    else:
        summary = run.run(settings, observer.Terminal())
        print_result(parsed, summary, results.format_summary(summary, verbose=parsed.verbose))
    return 0


def _add_demo(command: Command) -> None:
    sub = command(
        "demo", _demo, "classify the sample images with the model that comes with the package"
    )
    demo = {name: setting for name, setting in SETTINGS.items() if name != "sources"}
    demo["output"] = demo["output"]._replace(
        help="output folder (default: %(default)s)", options={"default": "imagemill-demo"}
    )
    demo["model"] = demo["model"]._replace(
        help="name, folder, file.onnx or hf:owner/name of a model (default: %(default)s)",
        options={"default": "efficientnet_lite0"},
    )
    add_settings(sub, demo)
    sub.usage = "%(prog)s [options]"
    _add_summary_options(sub)


def _demo(parsed: argparse.Namespace) -> int:
    from importlib.resources import as_file, files
    from itertools import chain

    from imagemill.display import results

    with as_file(files("imagemill") / "data" / "demo") as images:
        parsed.sources = [str(images)]
        code = _run(parsed)
    if not parsed.json and not parsed.dry_run:
        columns = ["path", "status", "label", "probability", "error"]
        job = open_job(parsed.output)
        tables = job.tables(job.committed_shards(), columns)
        rows = chain.from_iterable(table.to_pylist() for _, table in tables)
        print(f"\n{results.format_rows(rows)}")
    return code


def _add_summary_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    sub.add_argument(
        *("-v", "--verbose"),
        action="store_true",
        help="also print what decoding alone and computing alone would reach",
    )


def _add_status(command: Command) -> None:
    sub = command("status", _status, "show the progress of a job, which may be running")
    sub.add_argument("dir", **JOB)
    sub.add_argument("--json", **JSON)


def _status(parsed: argparse.Namespace) -> int:
    from imagemill.display import results

    job, command = open_job(parsed.dir), ""
    found = job.status()
    if not (parsed.json or found.complete or found.running):
        from imagemill.runner import resume  # takes 0.3 s to import

        command = resume.command_of(job)
    print_result(parsed, found, results.format_status(found, command))
    return 0


def _add_verify(command: Command) -> None:
    sub = command(
        "verify", _verify, "check all results; exit 0 only if the job is complete and undamaged"
    )
    sub.add_argument("dir", **JOB)
    sub.add_argument(
        "--quarantine",
        action="store_true",
        help="move damaged parts to another folder, so that `run` computes them again",
    )
    sub.add_argument("--json", **JSON)


def _verify(parsed: argparse.Namespace) -> int:
    from imagemill.display import results

    job = open_job(parsed.dir)
    problems, moved = job.verify(quarantine=parsed.quarantine)
    shown = job.paths.shown
    found = [{"shard": p.shard, "path": shown(p.path), "problem": p.what} for p in problems]
    moved_to = [shown(path) for path in moved]
    images = job.frozen.images
    report = {"sound": not found, "images": images, "problems": found, "moved": moved_to}
    print_result(parsed, report, results.format_problems(found, moved_to, images))
    if any(p.damaged for p in problems) and not (parsed.quarantine or parsed.json):
        log(
            f"to repair it, run `imagemill verify --quarantine {parsed.dir}`, which moves damaged"
            " parts to another folder, then repeat the run"
        )
    return 1 if found else 0
