"""The page: one HTML file made of figures and thumbnails, which loads nothing.

Names, labels and errors from outside are shown as text. Jinja escapes every value, and the script
is the same for every job and holds no value. The page's content security policy runs only that
script, by its hash, and loads nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from imagemill.errors import ImagemillError, counted
from imagemill.job.documents import Frozen
from imagemill.job.open_job import OpenJob
from imagemill.models import bundle, variants
from imagemill.records import Recipe, Summary
from imagemill.report import charts, thumbnails
from imagemill.report.figures import BINS, CLASSES, UNCERTAIN_FROM, Accuracy, Figures
from imagemill.version import __version__

_HERE = Path(__file__).parent
_LONGEST = 400
"""Characters of any one value. Without a limit a hostile job could make the page very large."""
_SOURCES, _ADDITIONS = 20, 10
_STRIP = 8
"""Images directly under the figures of a large job."""
_FILTERED = 8
"""From so many images on, the gallery has a filter."""
_LONG_NAME, _NAME_END = 48, 24
"""Characters of a name below an image from which on it is shortened in its middle, and of the end
that stays.
"""
_NAME_BREAKS = re.compile(r"[/_\- ]+(?=[^/_\- ])")
"""Separators in a name, between which a line is not broken if it is long enough."""
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\xa0\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\uffff]"
)
"""Invisible characters, and those that change the direction of the text around them."""


def render(
    job: OpenJob,
    summary: Summary | None,
    figures: Figures,
    scored: Accuracy,
    thumbnails_made: Mapping[int, thumbnails.Thumbnail],
) -> bytes:
    """Return the page as UTF-8.

    Args:
        job: the job.
        summary: None if the job is not finished.
        figures: the figures of the parts.
        scored: the accuracy, if the job was scored.
        thumbnails_made: those of all images in the gallery, by index.
    """
    frozen = job.frozen
    style, script = (
        Markup((_HERE / name).read_text(encoding="utf-8"))  # noqa: S704 - our own files
        for name in ("page.css", "page.js")
    )
    devices = (
        [
            (device, charts.shares(device, summary.seconds))
            for device in summary.devices
            if device.clock
        ]
        if summary
        else []
    )
    galleries = [
        (key, title, images)
        for key, title, images in (
            ("most", "Most certain", figures.most_certain),
            ("least", "Least certain", figures.least_certain),
            ("sample", "Random sample" if figures.most_certain else "All images", figures.sample),
        )
        if images
    ]
    shown = sum(len(images) for _, _, images in galleries)
    gallery_classes = _classes(figures) if shown >= _FILTERED else []
    text = _template().render(
        style=style,
        script=script,
        policy=_policy(style, script),
        job=frozen.job,
        card=frozen.job.session.card,
        frozen=frozen,
        summary=summary,
        figures=figures,
        output=job.paths.output,
        scored=scored,
        score=scored.score,
        bins=BINS,
        is_sample=shown < figures.ok,
        has_filter=shown >= _FILTERED,
        galleries=galleries,
        shown=shown,
        strip=figures.sample[:: max(1, len(figures.sample) // _STRIP)][:_STRIP]
        if figures.most_certain
        else (),
        gallery_classes=gallery_classes,
        picks={class_id for class_id, _, _ in gallery_classes},
        table_classes=CLASSES,
        uncertain_from=UNCERTAIN_FROM,
        thumbnails=thumbnails_made,
        images={
            index: _data_uri(made.webp) for index, made in thumbnails_made.items() if made.webp
        },
        rates=charts.rates(summary.throughput, summary.seconds)
        if summary and summary.throughput
        else None,
        devices=devices,
        pieces=charts.PIECES,
        accuracy=_accuracy(frozen),
        provenance=_provenance(job, summary, figures),
    )
    return text.encode("utf-8")


def visible(value: Any) -> Any:
    """Return a value as the page shows it: of bounded length, with invisible characters escaped."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return "" if value is None else value
    if len(value) > _LONGEST:
        value = f"{value[: _LONGEST * 2 // 3]} … {value[-_LONGEST // 3 :]}"
    return _UNSEEN.sub(
        lambda match: match[0].encode("unicode_escape").decode() if match[0] != "\xa0" else " ",
        value,
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": "{:,}".format,
        "counted": counted,
        "halves": _halves,
        "moment": _moment,
        "percent": _percent,
        "rate": _rate,
        "ticks": _ticks,
        "seconds": _seconds,
        "times": _times,
    }
    return environment.get_template("page.html.j2")


def _halves(name: str) -> tuple[Markup, Markup]:
    """Return the beginning of a long name, which the page shortens, and its end, which it does not:
    the name of the file or the last words of it. A name that fits is an end alone.
    """
    text = visible(name)
    cut = 0
    if len(text) > _LONG_NAME:
        cut = max(len(text) - _NAME_END, text.rfind("/") + 1)
        words = (found.end() for found in _NAME_BREAKS.finditer(text, cut - 1, text.rfind(".")))
        cut = next(words, cut)
    return _breakable(text[:cut]), _breakable(text[cut:])


def _breakable(name: str) -> Markup:
    """Return a name whose lines end at its separators."""
    return Markup(_NAME_BREAKS.sub(r"\g<0><wbr>", str(escape(name))))  # noqa: S704 - escaped before


def _moment(when: str) -> str:
    """Return a moment in UTC for people."""
    return f"{when[:16].replace('T', ' ')} UTC"


def _percent(share: float, digits: int = 1) -> str:
    """Return a share for people. Only all of it is 100.0 %, and only nothing is 0.0 %."""
    least = 10.0**-digits
    per_cent = 100 * share
    if share < 1 and per_cent > 100 - least / 2:
        return f"> {100 - least:.{digits}f} %"
    if 0 < per_cent < least / 2:
        return f"< {least:.{digits}f} %"
    return f"{per_cent:.{digits}f} %"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}" if value < 10_000 else f"{value:,.0f}"


def _seconds(value: float) -> str:
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _times(values: Iterable[float]) -> list[str]:
    """Return seconds for people, all in one unit and with as many decimals."""
    seconds = list(values)
    longest = max(seconds, default=0)
    if longest < 120:
        digits = any(f"{value:.1f}"[-1] != "0" for value in seconds)
        return [f"{value:.{digits:d}f} s" for value in seconds]
    size, unit = (1, "min") if longest < 7200 else (60, "h")
    parts = [divmod(round(value / size), 60) for value in seconds]
    return [f"{whole}:{rest:02d} {unit}" for whole, rest in parts]


def _ticks(values: Sequence[float]) -> list[str]:
    """Return numbers at an axis, all with as many decimals."""
    digits = max(len(f"{value:.6f}".rstrip("0").partition(".")[2]) for value in values)
    return [f"{value:,.{digits}f}" for value in values]


def _policy(style: str, script: str) -> str:
    """Return a content security policy that allows the page's own images, style and script, and
    neither loads nor sends anything.
    """
    return Markup(
        "default-src 'none'; img-src data:; style-src '{}'; script-src '{}'; base-uri 'none';"
        " form-action 'none'"
    ).format(_hash(style), _hash(script))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data_uri(webp: bytes) -> str:
    """Return a thumbnail as a data URI, as markup so that it is not shortened."""
    return Markup("data:image/webp;base64,") + base64.b64encode(webp).decode()


def _classes(figures: Figures) -> list[tuple[int, str, int]]:
    """Return the classes in the gallery, sorted by label: id, label, number of images."""
    shown = (*figures.most_certain, *figures.least_certain, *figures.sample)
    found = Counter((one.class_id, str(one.label)) for one in shown if one.class_id is not None)
    return sorted(
        ((*named, images) for named, images in found.items()),
        key=lambda item: (item[1].casefold(), item[0]),
    )


def _accuracy(frozen: Frozen) -> list[dict[str, Any]]:
    """Return the results on faster precisions in the model's bundle: of the precision that the job
    used, and of others if there were enough images to decide. None if the bundle is gone or holds
    another model.
    """
    session = frozen.job.session
    file = Path(session.model_file)
    try:
        if bundle.load(file.parent).card.sha256 != session.card.sha256:
            return []
        records = variants.read(file.parent)
    except (ImagemillError, OSError):
        return []
    device = frozen.fixed.get("device")
    used = f"{session.precision} on {device}" if device else session.precision.value
    found = []
    for precision, record in records.items():
        is_used = precision == used and record.file in (None, file.name)
        if is_used or record.comparison.is_verdict:
            found.append(
                {
                    "comparison": record.comparison,
                    "precision": precision,
                    "speedup": record.speedup,
                    "used": is_used,
                }
            )
    return found


def _additions(opened: OpenJob) -> Iterator[str]:
    """Yield what the last `--append` commands added to a job."""
    earlier = opened.appended[:-_ADDITIONS]
    if earlier:
        images = sum(generation.images for generation in earlier)
        yield f"{counted(len(earlier), 'earlier time')}: {counted(images, 'image')}"
    for generation in opened.appended[-_ADDITIONS:]:
        yield f"{_moment(generation.created)}: {counted(generation.images, 'image')}"


def _resize(recipe: Recipe) -> str:
    """Return how images are resized, in words."""
    if recipe.resize is None:
        return "none"
    if isinstance(recipe.resize, int):
        return f"{recipe.resize} (short side)"
    how = "fitted into" if recipe.pad else "squashed to"
    return f"{how} {recipe.resize[0]} × {recipe.resize[1]}"


def _provenance(
    opened: OpenJob, summary: Summary | None, figures: Figures
) -> dict[str, dict[str, Any]]:
    """Return headings with their names and values; a value is one text or several."""
    frozen = opened.frozen
    job, card, recipe = frozen.job, frozen.job.session.card, frozen.job.session.card.recipe
    skipped = {
        "of another type": sum(frozen.skipped_by_suffix.values()),
        "hidden": frozen.skipped_hidden,
        "by filters": frozen.skipped_by_filter,
        "broken links": frozen.skipped_broken_links,
    }
    named = [
        os.fsencode(source).decode("utf-8", "backslashreplace") for source in job.sources[:_SOURCES]
    ]
    if len(job.sources) > _SOURCES:
        named.append(f"and {len(job.sources) - _SOURCES:,} more")
    filters = [
        f"--{name} {pattern}"
        for name in ("include", "exclude")
        for pattern in getattr(frozen.filters, name)
    ]
    if frozen.filters.all_files:
        filters.append("--all-files")
    if frozen.limit:
        filters.append(f"--limit {frozen.limit}")
    least = job.min_probability
    return {
        "Job": {
            "output": opened.paths.output,
            "started": _moment(frozen.created),
            **({"appended": list(_additions(opened))} if opened.appended else {}),
            "sources": named,
            "filters": filters or ["none"],
            "skipped": [f"{n:,} {why}" for why, n in skipped.items() if n] or ["nothing"],
            "page made": f"{_moment(datetime.now(UTC).isoformat())} by imagemill {__version__}",
        },
        "Model": {
            "name": card.name,
            "architecture": card.architecture,
            "sha256": card.sha256,
            "licence": card.licence,
            "origin": [
                f"{name}: {value if isinstance(value, str) else json.dumps(value)}"
                for name, value in card.origin.items()
            ],
            "parameters": f"{card.parameters:,}" if card.parameters else "not known",
            "published top-1": f"{card.top1:g} %" if card.top1 is not None else "not known",
            "classes": f"{len(card.labels):,}",
            "input": f"{recipe.width} × {recipe.height} pixels, RGB",
            "resize": _resize(recipe),
            "border": recipe.fill,
            "interpolation": recipe.interpolation.value,
            "EXIF orientation applied": "yes" if recipe.exif else "no",
            "background of transparent images": recipe.background or "none: alpha is dropped",
            "scores": card.scores.value,
        },
        "Settings": {
            "precision": job.session.precision.value,
            "variant": job.variant,
            "variant sha256": frozen.variant_sha256 or "that of the model",
            "devices": frozen.devices,
            "batch size": str(job.session.batch_size),
            "batches per step": str(job.session.batches_per_step or "auto"),
            "decoding threads": str(job.num_workers or "auto"),
            "shard size": f"{frozen.shard_size:,}",
            "top-k": str(job.top_k) if card.has_head else "the model has no classes",
            "minimum probability": "none"
            if least is None
            else f"{least:g}"
            if isinstance(least, float)
            else f"{counted(len(least), 'threshold')}, {min(least):g} to {max(least):g}",
            "also saved": ", ".join(job.session.save) or "nothing",
            "columns kept": ", ".join(map(str, job.keep)) or "none",
            "limits of an image": [
                f"{job.limits.max_pixels:,} pixels",
                f"{job.limits.max_bytes:,} bytes",
                f"{job.limits.max_seconds:g} s",
            ],
        },
        "Software and machine": {
            "backend": figures.backend or frozen.backend,
            "versions": [
                f"{name} {version}"
                for name, version in {**frozen.versions, **figures.versions}.items()
            ],
            **(summary.machine if summary else {"machine": "not known: the job is not finished"}),
        },
    }
