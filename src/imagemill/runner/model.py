"""The model of a job: found or downloaded, with the labels and preprocessing of the settings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from imagemill.display.observer import Watcher
from imagemill.errors import ClassCountError, OutputError, UsageError, counted
from imagemill.job.documents import Frozen
from imagemill.models import bundle, mistaken, resolve
from imagemill.models.labels import read_labels
from imagemill.records import Bundle, Card, Saved, Settings
from imagemill.runner import thresholds
from imagemill.runner.settings import DEFAULT_MODEL, SETTINGS, parse_colour


def resolve_model(settings: Settings, watcher: Watcher) -> Bundle:
    """Return the bundle that the settings name, with their labels; download it if it is missing.

    Raises:
        UsageError: there is no such model, it has no output that is to be saved, it has no head
            and the settings ask for classes, or the file of thresholds does not fit.
        ClassCountError: the number of labels differs from the number of classes.
        ModelError: the model cannot be downloaded or read.
    """
    found = resolve.resolve(
        settings.model or DEFAULT_MODEL,
        bundle.default_models_dir(settings.models_dir),
        notify=watcher.notify,
        progress=watcher.download,
    )
    card = found.card
    if not card.has_head:
        refuse_classes(settings, card)
    for saved in settings.save or ():
        if saved not in card.outputs:
            raise UsageError(
                f"--save {saved}: {card.name} has no such output. Leave it out, or wrap the file"
                f" again with --{saved} TENSOR."
            )
    if settings.labels is not None:
        labels = read_labels(Path(settings.labels))
        if len(labels) != len(card.labels):
            numbers = tuple(str(number) for number in range(len(card.labels)))
            own = None if card.labels == numbers else card.labels
            raise ClassCountError(
                mistaken.label_count(
                    f"--labels {settings.labels}", labels, card.name, len(card.labels), own
                )
            )
        card = replace(card, labels=labels)
    thresholds.min_probability_of(settings, card)
    return replace(found, card=card)


def refuse_classes(settings: Settings, card: Card) -> None:
    """Raise UsageError if the settings ask for classes of a network without a head."""
    for name in ("top_k", "min_probability", "labels"):
        if (value := getattr(settings, name)) is not None:
            words = " `imagemill classes` makes classes from words, with CLIP and SigLIP models."
            raise UsageError(
                f"{SETTINGS[name].flag} {value}: {card.name} has no classes, its result is an"
                f" embedding. Leave it out.{words if name == 'labels' else ''}"
            )


def saved_outputs(settings: Settings, card: Card) -> tuple[Saved, ...]:
    """Return the outputs to keep: those of the settings, and the embedding of a network without a
    head.
    """
    saved = {Saved(item) for item in settings.save or ()}
    if not card.has_head:
        saved.add(Saved.EMBEDDING)
    return tuple(sorted(saved, reverse=True))


def classes_kept(settings: Settings, card: Card) -> int:
    """Return the number of classes kept per image; 0 for a network without a head."""
    return (settings.top_k or 5) if card.has_head else 0


def with_recipe(model: Bundle, settings: Settings) -> Bundle:
    """Return the bundle with the preprocessing of the settings."""
    recipe = model.card.recipe
    if settings.preprocess == "center-crop":
        recipe = replace(recipe, resize=None)
    if settings.background is not None:
        recipe = replace(recipe, background=parse_colour(settings.background))
    return replace(model, card=replace(model.card, recipe=recipe))


def identify(card: Card) -> str:
    """Return a text that identifies a model. It depends on the card of an ONNX file or a model
    folder, too.
    """
    return f"{card.name} ({str(card.origin.get('wrapped', card.sha256))[:12]})"


def describe_labels(labels: Sequence[str]) -> str:
    """Return a text that identifies a list of labels."""
    if not labels:
        return "without a label"
    digest = hashlib.sha256("\n".join(labels).encode()).hexdigest()[:12]
    return (
        f"of {counted(len(labels), 'label')} from {labels[0]!r} to {labels[-1]!r} (sha256 {digest})"
    )


def is_local(settings: Settings) -> bool:
    """Return whether the model can be found without downloading published weights."""
    return resolve.is_local(str(settings.model), bundle.default_models_dir(settings.models_dir))


def verify_model(frozen: Frozen) -> None:
    """Check that the model's files are those that the job was frozen with.

    Raises:
        OutputError: the model file is missing.
        ModelError: a file has changed.
    """
    file, card = Path(frozen.job.session.model_file), frozen.job.session.card
    if not file.is_file():
        remedy = bundle.made_again(card, file.parent)
        raise OutputError(f"the job's model {file} is missing. Bring it back: {remedy}.")
    bundle.verify_hash(Bundle(file.parent, card))
    if frozen.variant_sha256 is not None:
        from imagemill.tuning import precisions

        precisions.verify_variant(file, frozen.variant_sha256)
