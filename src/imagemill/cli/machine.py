"""The commands about this machine and its files: devices, bench, partition."""

from __future__ import annotations

import argparse

from imagemill.cli.options import JSON, Command, add_settings
from imagemill.cli.output import log, print_result
from imagemill.runner.settings import SETTINGS, ValueKind, number


def add(command: Command) -> None:
    """Add these commands."""
    _add_devices(command)
    _add_bench(command)
    _add_partition(command)


def _add_devices(command: Command) -> None:
    sub = command("devices", _devices, "list the devices of this machine")
    sub.add_argument("--json", **JSON)


def _devices(parsed: argparse.Namespace) -> int:
    from imagemill.display import results
    from imagemill.pipeline.backends.offers import offers

    found = offers()
    print_result(parsed, {"devices": found}, results.format_devices(found))
    return 0


def _add_bench(command: Command) -> None:
    sub = command(
        "bench",
        _bench,
        "measure decoding, inference and both; show the bottleneck and how to remove it",
    )
    sub.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="images to measure with, as for `run`; none with --synthetic",
    )
    sub.add_argument(
        "--synthetic", action="store_true", help="measure inference only, on images made in memory"
    )
    shared = "model models_dir devices precision batch_size batches_per_step num_workers limit"
    options = {name: SETTINGS[name] for name in shared.split()}
    options["batch_size"] = options["batch_size"]._replace(
        help="images per batch, or `search` for the fastest size (default: as `run`)",
        kind=ValueKind(_number_or_search),
    )
    options["batches_per_step"] = options["batches_per_step"]._replace(
        help="batches handed to a device at a time (default: about 2 s of them)"
    )
    options["limit"] = options["limit"]._replace(
        help="the first N images per iteration (default: about 10 s of them)"
    )
    add_settings(sub, options)
    sub.add_argument(
        "--iterations",
        type=int,
        default=3,
        metavar="N",
        help="report the median over N iterations (default: %(default)s)",
    )
    sub.add_argument("--json", **JSON)


def _number_or_search(text: str) -> int | str | None:
    return text if text == "search" else number(text)


_number_or_search.__name__ = "number"  # in argparse's messages


def _bench(parsed: argparse.Namespace) -> int:
    from imagemill import bench
    from imagemill.display import results
    from imagemill.system import serialization

    settings = serialization.from_plain(bench.BenchSettings, vars(parsed))
    report = bench.run(settings, log)
    print_result(parsed, report, results.format_bench(report))
    return 0


def _add_partition(command: Command) -> None:
    sub = command(
        "partition", _partition, "divide a folder of images into sub-folders, one per device"
    )
    sub.add_argument(
        "--data-dir", required=True, metavar="DIR", help="folder of images (searched recursively)"
    )
    sub.add_argument(
        "--partitions",
        type=int,
        required=True,
        metavar="N",
        help="number of sub-folders; their sizes differ by at most one image",
    )
    sub.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="output folder; run the same command again to continue",
    )
    sub.add_argument(
        "--link",
        choices=["hard", "symbolic", "copy"],
        help="default: hard, or symbolic if hard links are impossible",
    )
    sub.add_argument("--json", **JSON)


def _partition(parsed: argparse.Namespace) -> int:
    from imagemill.arrange import partition
    from imagemill.arrange.links import Link
    from imagemill.display import results

    link = Link(parsed.link) if parsed.link else None
    made = partition.partition(parsed.data_dir, parsed.partitions, parsed.output, link, log)
    print_result(parsed, made, results.format_partitioned(made))
    return 0
