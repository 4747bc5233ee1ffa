"""The records of `imagemill bench`: what is asked, and what is reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

SEARCH: Final = "search"


class BenchSettings(Struct, frozen=True):
    """What the user asked for; None leaves it to imagemill, as in `Settings`."""

    sources: tuple[str, ...] = ()
    """None with `synthetic`, else at least one."""
    synthetic: bool = False
    """Compute alone, on images made in memory."""
    model: str | None = None
    models_dir: str | None = None
    devices: str | None = None
    precision: str | None = None
    batch_size: int | str | None = None
    """Images; `search`: the fastest one is looked for."""
    batches_per_step: int | None = None
    """Batches handed to a device at a time, and per iteration; None: as many as take about two
    seconds.
    """
    num_workers: int | None = None
    iterations: int = 3
    limit: int | None = None
    """Images of the sources per iteration, the first ones; None: as many as take about ten
    seconds.
    """


class Rates(Struct, frozen=True):
    """One kind of measurement, images/s over the iterations."""

    median: float
    min: float
    max: float
    iterations: tuple[float, ...]
    """In the order they were measured."""
    devices: Mapping[str, float]
    """Device → its own median. They need not add up to the median of all, which waits for the
    slowest.
    """


class DeviceFigures(Struct, frozen=True):
    """What devices other than the CPU tell of themselves, all together; None if they do not."""

    busy: float | None = None
    """Share of the time end to end in which they computed."""
    memory_limit: float | None = None
    """images/s that their memory allows."""
    bytes_per_image: float | None = None
    """Memory traffic that an image needs at least."""
    bytes_per_s: float | None = None
    """At which they copy within their memory, reads plus writes."""
    cores_needed: int | None = None
    """So many cores like this machine's would decode as fast as the devices compute."""


class BenchReport(Struct, frozen=True, kw_only=True):
    """All that one bench measured and concluded."""

    model: str
    precision: str
    batch_size: int
    images_per_iteration: Mapping[str, int]
    """Name of a rate below → images, all devices together."""
    compute_only: Rates
    decode_only: Rates | None = None
    """None without a source, as the next ones."""
    end_to_end: Rates | None = None
    bound: str | None = None
    """`compute`, `decode`, `read` or `write`, of the median iteration; None if it was too short."""
    advice: str | None = None
    """What to change, or why nothing is known to bound a job."""
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    settings: BenchSettings
    batch_sizes: Mapping[str, float] = {}
    """After `--batch-size search`: batch size → images/s, compute only."""
    transfer_only: Rates | None = None
    """Copies between host and device; None if no device tells."""
    device: DeviceFigures | None = None
    """None on CPUs."""
