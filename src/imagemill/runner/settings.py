"""The settings of a job: flag, help, bounds and effect of each field of `records.Settings`.

The options of the command line, the check of values, and what may change on resume derive from
`SETTINGS`. The keywords of `api.run` and the comparison in `resume.py` are written out, and tests
hold them to it. Only light modules are imported here, so that `imagemill --help` stays fast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from imagemill.errors import UsageError

if TYPE_CHECKING:
    from imagemill.records import Limits, Settings

DEFAULT_MODEL = "resnext101_32x4d"
MAX_COUNT = 2**48
"""Upper bound for counts; keeps their products with byte sizes below 2**63."""
MAX_THREADS = 256


class Effect(Enum):
    """What a setting decides, and therefore how it may change when a job is resumed."""

    LISTING = "listing"
    """Which images are planned: must be repeated, because leaving it out selects other images."""
    ANSWERS = "answers"
    """Results, or how they are cut into parts: may be left out, but must not differ."""
    LIMITS = "limits"
    """Which images are readable: may change, for the remaining images, with a note."""
    NOTHING = "nothing"
    """Speed, display and the like: may change silently."""


class ValueKind(NamedTuple):
    """The kind of a setting's values."""

    parse: Callable[[str], object] | None = None
    """Converts the text of the command line; None keeps the text."""
    find_problem: Callable[[Any], str | None] = lambda _: None
    """Returns what is wrong with a value, or None."""
    is_list: bool = False


TEXT = ValueKind()


class Setting(NamedTuple):
    """The declaration of one field of `Settings`."""

    flag: str
    help: str
    metavar: str | None = None
    effect: Effect = Effect.NOTHING
    kind: ValueKind = TEXT
    options: Mapping[str, Any] = {}
    """Further arguments of `ArgumentParser.add_argument`."""


def number(text: str) -> int | None:
    """Return a number as an int, and `auto` as None."""
    return None if text == "auto" else int(text)


def _parse_moved(text: str) -> tuple[str, str]:
    from argparse import ArgumentTypeError

    old, equals, new = text.partition("=")
    if not equals:
        raise ArgumentTypeError(f"{text}: write OLD=NEW")
    return old, new


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(side, str) for side in value)
    )


def _find_problem_of_moved(pair: object) -> str | None:
    return None if _is_pair(pair) else "must be a mapping from old to new places, both of them str."


def _find_problem_of_keep(value: object) -> str | None:
    if isinstance(value, str) or _is_pair(value):
        return None
    return "must be a str, or a mapping from columns to their new names, both of them str."


def _parse_statuses(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _parse_min_probability(text: str) -> float | str:
    """Return a number as a float, and anything else, which is a file's path, as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def _find_problem_of_min_probability(value: object) -> str | None:
    if isinstance(value, str):
        return None  # a file, which is checked with the labels of the model
    return _between("from 0 to 1, or a CSV file", lambda number: 0 <= number <= 1)(value)


def _count(most: int = MAX_COUNT) -> Callable[[Any], str | None]:
    def find_problem(value: object) -> str | None:
        if not isinstance(value, int) or isinstance(value, bool):
            return f"must be a whole number, not {type(value).__name__}."
        if value < 1:
            return "must be at least 1."
        return f"must be at most {most}." if value > most else None

    return find_problem


def _between(bounds: str, is_inside: Callable[[Any], bool]) -> Callable[[Any], str | None]:
    def find_problem(value: object) -> str | None:
        if isinstance(value, bool):
            return "must be a number, not bool."
        try:
            return None if is_inside(value) else f"must be {bounds}."
        except TypeError:
            return f"must be a number, not {type(value).__name__}."

    return find_problem


def _one_of(*words: str, enum: str = "", hint: str = "") -> Callable[[Any], str | None]:
    """Return a check that a value is one of some words, or in an enumeration of `records`."""

    def find_problem(value: object) -> str | None:
        from imagemill import records

        known = [*words, *(getattr(records, enum) if enum else ())]
        if records.Status.OK in known:
            known.remove(records.Status.OK)  # is not a failure
        return None if value in known else f"not known. Known: {', '.join(known)}.{hint}"

    return find_problem


def _find_problem_of_user_agent(agent: str) -> str | None:
    if agent.strip() and agent.isascii() and agent.isprintable():
        return None
    return "must be printable ASCII characters on one line, not only spaces."


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


_TEXTS = ValueKind(is_list=True)
_COUNT = ValueKind(int, _count())
_AUTO = ValueKind(number, _count())
_THREADS = ValueKind(number, _count(MAX_THREADS))
_YES = {"action": "store_true"}
_NO = {"action": "store_false"}
_NO_STATUS = " Write --retry-failed=STATUS, with an equals sign, or alone and last."

SETTINGS: Mapping[str, Setting] = {
    "sources": Setting(
        "SOURCE",
        "folder (searched recursively), image, archive, table, URL, or @LIST with one path or URL"
        " per line; see docs/sources.md",
        effect=Effect.LISTING,
        kind=_TEXTS,
        options={"nargs": "+"},
    ),
    "output": Setting(
        "--output",
        "output folder or s3:// URL; new, or of the same job",
        "DIR",
        options={"required": True},
    ),
    "model": Setting(
        "--model",
        f"name, folder, file.onnx or hf:owner/name of a model (default: {DEFAULT_MODEL})",
        "NAME",
        Effect.ANSWERS,
    ),
    "models_dir": Setting(
        "--models-dir", "default: $IMAGEMILL_MODELS, else the user's cache folder", "DIR"
    ),
    "devices": Setting(
        "--devices",
        "auto, cpu, cpu:N (processes), cuda:I,J (ids), ipu:N; joined by + (default: auto)",
        "SPEC",
        Effect.ANSWERS,  # by its backend: any devices of the same backend may continue a job
    ),
    "precision": Setting(
        "--precision",
        "auto, fp32, fp16, bf16 or int8 (default: auto)",
        "P",
        Effect.ANSWERS,
        ValueKind(None, _one_of("auto", enum="Precision")),
    ),
    "batch_size": Setting(
        "--batch-size",
        "images per batch (default: auto)",
        "N",
        Effect.ANSWERS,  # on some backends: `resume.py` compares it on these
        _AUTO,
    ),
    "batches_per_step": Setting(
        "--batches-per-step", "batches in flight per device (default: auto)", "N", kind=_THREADS
    ),
    "num_workers": Setting(
        "--num-workers",
        "decoding threads per device (default: auto, one per core)",
        "N",
        kind=_THREADS,
    ),
    "top_k": Setting("--top-k", "classes kept per image (default: 5)", "K", Effect.ANSWERS, _COUNT),
    "min_probability": Setting(
        "--min-probability",
        "keep only classes at least this probable, up to --top-k: a number from 0 to 1, or a CSV"
        " file with the columns label and threshold (default: keep all)",
        "P|FILE",
        Effect.ANSWERS,
        ValueKind(_parse_min_probability, _find_problem_of_min_probability),
    ),
    "labels": Setting(
        "--labels",
        "file with one label per line, in the order of the classes (default: the model's own)",
        "FILE",
        Effect.ANSWERS,
    ),
    "save": Setting(
        "--save",
        "also keep `logits` or `embedding`; may be repeated",
        "WHAT",
        Effect.ANSWERS,
        ValueKind(None, _one_of(enum="Saved"), is_list=True),
    ),
    "keep": Setting(
        "--keep",
        "also write these columns of source tables or WebDataset archives; COLUMN=NEW renames one;"
        " may be repeated",
        "COLUMN,…",
        Effect.ANSWERS,
        ValueKind(str, _find_problem_of_keep, is_list=True),
    ),
    "shard_size": Setting(
        "--shard-size", "images per part file (default: auto)", "N", Effect.ANSWERS, _AUTO
    ),
    "include": Setting(
        "--include", "process only matching images; may be repeated", "GLOB", Effect.LISTING, _TEXTS
    ),
    "exclude": Setting(
        "--exclude",
        "skip matching images and folders; may be repeated",
        "GLOB",
        Effect.LISTING,
        _TEXTS,
    ),
    "all_files": Setting(
        "--all-files",
        "process every file, whatever its suffix",
        effect=Effect.LISTING,
        options={**_YES, "default": None},
    ),
    "limit": Setting("--limit", "process only the first N images", "N", Effect.LISTING, _COUNT),
    "preprocess": Setting(
        "--preprocess",
        "card: the model's own preprocessing (default), or center-crop: crop without resizing",
        "HOW",
        Effect.ANSWERS,
        ValueKind(None, _one_of("card", "center-crop")),
    ),
    "background": Setting(
        "--background",
        "blend transparent images onto this colour: white, #rrggbb, … (default: drop alpha, as"
        " published pipelines do)",
        "COLOR",
        Effect.ANSWERS,
        ValueKind(None, lambda text: parse_colour(text) and None),
    ),
    "max_pixels": Setting(
        "--max-pixels",
        "larger images are not decoded and become too_large rows (default: 180000000)",
        "N",
        Effect.LIMITS,
        _COUNT,
    ),
    "max_bytes": Setting(
        "--max-bytes",
        "larger files are not read and become too_large rows (default: 268435456, 256 MiB)",
        "N",
        Effect.LIMITS,
        _COUNT,
    ),
    "max_seconds": Setting(
        "--max-seconds",
        "images that take longer become timeout rows (default: 60)",
        "S",
        Effect.LIMITS,
        ValueKind(float, _between("more than 0", lambda value: value > 0)),
    ),
    "append": Setting(
        "--append",
        "add images that are new in the sources, and in sources that the job does not have yet,"
        " to a job",
        options=_YES,
    ),
    "dry_run": Setting("--dry-run", "list and count images, write nothing", options=_YES),
    "retry_failed": Setting(
        "--retry-failed",
        "compute the failed images of shards with such failures again (default: any status)",
        "STATUS,…",
        kind=ValueKind(_parse_statuses, _one_of(enum="Status", hint=_NO_STATUS), is_list=True),
        options={"nargs": "?", "const": ()},
    ),
    "max_bad_fraction": Setting(
        "--max-bad-fraction",
        "stop if more than this fraction of all images fails",
        "F",
        kind=ValueKind(float, _between("from 0 to 1", lambda value: 0 <= value <= 1)),
    ),
    "moved": Setting(
        "--moved",
        "read what was at OLD, a path or URL, at NEW; rows keep the old names; may be repeated",
        "OLD=NEW",
        kind=ValueKind(_parse_moved, _find_problem_of_moved, is_list=True),
    ),
    "user_agent": Setting(
        "--user-agent",
        "sent to web servers (default: imagemill and its version)",
        "TEXT",
        kind=ValueKind(None, _find_problem_of_user_agent),
    ),
    "grace_s": Setting(
        "--grace",
        "seconds to finish shards in progress when stopped (default: %(default)s)",
        "S",
        kind=ValueKind(float, _between("at least 0", lambda value: value >= 0)),
        options={"default": 20.0},
    ),
    "engine": Setting(
        "--engine",
        "where workers run: local, this machine (default), or ray, a Ray cluster",
        "NAME",
        kind=ValueKind(None, _one_of(enum="Engine")),
        options={"default": "local"},
    ),
    "allow_mixed": Setting(
        "--allow-mixed", "allow backends whose results differ in the last bits", options=_YES
    ),
    "allow_inexact": Setting(
        "--allow-inexact",
        "allow devices whose results depend on an image's place in a batch",
        options=_YES,
    ),
    "log_dir": Setting("--log-dir", "default: logs/ in the output folder", "DIR"),
    "preflight": Setting(
        "--no-preflight", "do not try a sample of a new job's images at the start", options=_NO
    ),
    "report": Setting("--no-report", "write no report.html at the end", options=_NO),
}
"""Field of `Settings` → its declaration."""

SHORT = {"output": "-o", "model": "-m"}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "": ("sources", "output", "model", "append", "dry_run"),
    "which images": ("include", "exclude", "all_files", "limit", "moved", "user_agent"),
    "model and preprocessing": ("models_dir", "labels", "preprocess", "background"),
    "results": ("top_k", "min_probability", "save", "keep", "shard_size", "report", "log_dir"),
    "devices and speed": (
        *("devices", "precision", "batch_size", "batches_per_step", "num_workers"),
        *("engine", "allow_mixed", "allow_inexact"),
    ),
    "bad images, stopping and resuming": (
        *("max_pixels", "max_bytes", "max_seconds", "retry_failed", "max_bad_fraction"),
        *("preflight", "grace_s"),
    ),
}
"""Group of options → its settings, in the order of `--help`."""


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Return the settings in a mapping of names to values, such as parsed arguments or keywords.

    Paths become strings, and for settings that are lists a single value becomes a list of one.
    Names that are not settings are ignored.
    """
    from imagemill.records import Settings

    return Settings(
        **{
            name: _as_plain(given[name], is_list=setting.kind.is_list)
            for name, setting in SETTINGS.items()
            if name in given
        }
    )


def _as_plain(value: Any, *, is_list: bool) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not is_list or value is None:
        return value
    if isinstance(value, Mapping):
        value = value.items()
    elif isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return (value,)
    return tuple(_as_plain(item, is_list=isinstance(item, tuple)) for item in value)


def check_settings(settings: Settings) -> Settings:
    """Check settings before anything is listed, downloaded or written, and return them with their
    sources as they are frozen (`sources.resolve`). Raises: UsageError.
    """
    from msgspec.structs import replace

    from imagemill.pipeline import sources
    from imagemill.pipeline.sources.kept import resolve_kept

    for name in SETTINGS:
        check_setting(name, getattr(settings, name))
    if settings.output is None:
        raise UsageError("give an output: a folder or the URL of one.")
    if not settings.sources:
        raise UsageError("give at least one SOURCE: a folder or an image.")
    sources.resolve_moved(settings.moved or ())
    resolve_kept(settings.keep or ())
    return replace(settings, sources=sources.resolve(settings.sources))


def check_setting(name: str, value: Any) -> None:
    """Check the value of one setting; None is always fine. Raises: UsageError."""
    setting = SETTINGS[name]
    is_text = setting.kind.parse is None and (setting.metavar or name == "sources")
    for item in () if value is None else value if setting.kind.is_list else (value,):
        problem = None
        if is_text and not isinstance(item, str):
            problem = f"must be a str, not {type(item).__name__}."
        elif "action" in setting.options and not isinstance(item, bool):
            problem = f"must be True or False, not {item!r}."
        problem = problem or setting.kind.find_problem(item)
        if is_text and not problem and not item.strip():
            problem = "is empty. If it comes from a variable of the shell, that is not set."
        if problem:
            shown = item if str(item).strip() and str(item).isprintable() else repr(item)
            raise UsageError(f"{setting.flag} {shown}: {problem}")


def limits_of(settings: Settings, otherwise: Limits) -> Limits:
    """Return the limits in the settings, completed with other ones."""
    from msgspec.structs import replace

    names = ("max_pixels", "max_bytes", "max_seconds")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    return replace(otherwise, **given)
