"""Check what the user asked for, before anything is listed, downloaded or written."""

from __future__ import annotations

from imagemill.errors import UsageError
from imagemill.pipeline import sources
from imagemill.records import (
    Engine,
    Precision,
    Saved,
    Settings,
    Status,
)
from imagemill.runner.listing import access_of

MAX_COUNT = 2**48
"""Of whatever is counted: beyond all images there are, and what a byte or an address takes of it
still fits into 64 bits.
"""


def check_settings(settings: Settings) -> None:
    """Settings that can be judged alone. Raises: UsageError."""
    for name in ("batch_size", "top_k", "shard_size", "limit", "max_pixels", "max_bytes"):
        value = getattr(settings, name)
        if value is not None and not isinstance(value, int):
            raise UsageError(f"{flag_of(name)} {value!r}: must be a whole number.")
        if value is not None and value < 1:
            raise UsageError(f"{flag_of(name)} {value}: must be at least 1.")
        if value is not None and value > MAX_COUNT:
            raise UsageError(f"{flag_of(name)} {value}: must be at most {MAX_COUNT}.")
    for name in ("num_workers", "batches_per_step"):
        value = getattr(settings, name)
        if value is not None and not 1 <= value <= 256:
            raise UsageError(f"{flag_of(name)} {value}: must be from 1 to 256.")
    if settings.max_bad_fraction is not None and not 0 <= settings.max_bad_fraction <= 1:
        raise UsageError(f"--max-bad-fraction {settings.max_bad_fraction}: must be from 0 to 1.")
    if not settings.grace_s >= 0:
        raise UsageError(f"--grace {settings.grace_s}: must be at least 0.")
    if settings.max_seconds is not None and not settings.max_seconds > 0:  # NaN neither
        raise UsageError(f"--max-seconds {settings.max_seconds}: must be more than 0.")
    for flag, values, known in (
        ("--save", settings.save, list(Saved)),
        ("--retry-failed", settings.retry_failed, list(Status)),
    ):
        for value in values or ():
            if value not in known or value == Status.OK:
                hint = (
                    " Write --retry-failed=STATUS, with an equals sign, or alone and last."
                    if flag == "--retry-failed"
                    else ""
                )
                raise UsageError(
                    f"{flag} {value}: not known. Known:"
                    f" {', '.join(item for item in known if item != Status.OK)}.{hint}"
                )
    if settings.precision not in (None, "auto", *Precision):
        raise UsageError(
            f"--precision {settings.precision}: not known. Known: auto, {', '.join(Precision)}."
        )
    if settings.engine not in list(Engine):
        raise UsageError(f"--engine {settings.engine}: not known. Known: {', '.join(Engine)}.")
    if settings.background is not None:
        parse_colour(settings.background)
    if not settings.sources:
        raise UsageError("give at least one SOURCE: a folder or an image.")
    sources.resolve(settings.sources)
    access_of(settings)


def flag_of(name: str) -> str:
    """Return the flag of the command line that sets a field of `Settings`."""
    return "--" + name.replace("_", "-")


def parse_colour(text: str) -> str:
    """Return a colour as `#rrggbb`. Raises: UsageError if it is not an opaque colour."""
    from PIL import ImageColor

    try:
        red, green, blue, *alpha = ImageColor.getrgb(text)
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f"--background {text}: not a colour. Give a name such as white, or #rrggbb."
        ) from error
    if alpha not in ([], [255]):
        raise UsageError(
            f"--background {text}: must be opaque. Give a name such as white, or #rrggbb."
        )
    return f"#{red:02x}{green:02x}{blue:02x}"
