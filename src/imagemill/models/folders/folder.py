"""A model folder becomes a bundle.

config.json, preprocessor_config.json ─► card, and where its values came from ─┐
model.onnx, else model.safetensors or pytorch_model.bin ───────────────────────┴─► bundle

Weights without ONNX are used if imagemill builds their network. Otherwise PyTorch exports it once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import asdict, replace

from imagemill.errors import CheckpointError, ModelError, printable
from imagemill.models import build
from imagemill.models import bundle as bundles
from imagemill.models.architectures import describe, is_known, recognise, resnet
from imagemill.models.card import ReadCard, dimensions, read_given
from imagemill.models.checkpoints import checkpoint
from imagemill.models.custom import wrap
from imagemill.models.folders import json_file, timm_config, transformers_config
from imagemill.models.folders.json_file import CONFIG, GRAPHS, INDEX, WEIGHTS, Document
from imagemill.models.folders.transformers_config import is_plain_resnet
from imagemill.records import Bundle
from imagemill.system.messages import Notify

_PICKLE: Final = "pytorch_model.bin"
_WEIGHTS: Final = (WEIGHTS, INDEX, _PICKLE)
_MAX_GRAPH_BYTES: Final = 2**31
"""Limit of protobuf. Larger models keep their weights in files beside the graph."""
_LISTED: Final = 5
_READER: Final = 1
"""Version of the reading: bundles of another version are built again."""


class Model(Struct, frozen=True):
    """What a folder holds."""

    folder: Path
    document: Document
    """`config.json`."""
    read: ReadCard
    architecture: str
    """As the folder calls it; empty if it does not."""
    is_timm: bool
    source: Path
    """The file with the network: ONNX, else safetensors, their index, or a pickle."""
    unused: tuple[str, ...]
    """Names of other files with a network."""


def bundle_for(
    folder: Path,
    models_dir: Path,
    notify: Notify,
    *,
    name: str | None = None,
    origin: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Bundle:
    """Return the bundle of a model folder, and build it in the models folder if it is missing.

    Without a name the bundle is called like the folder, followed by a hash over weights and card,
    so that a change of either builds another bundle.

    Args:
        folder: has `config.json`.
        models_dir: one folder per model.
        notify: takes one line at a time: each value that was read and where it came from.
        name: of the bundle, and of the model in results.
        origin: where the folder is from, for the card: `repository`, `commit`, `licence`, …
        given: fields of ModelCard by name, which replace what the folder says.

    Raises:
        UsageError: a given value makes no sense, or a package is missing. ClassCountError: the
        labels do not fit the network. CheckpointError: the weights are damaged. ModelError: a file
        is missing, damaged or says something impossible, or the bundle cannot be written.
    """
    model = look_into(folder, given or {}, origin or {})
    if name is not None:
        model = replace(model, read=replace(model.read, card=replace(model.read.card, name=name)))
    key = _key(model)
    home = models_dir / (name or bundles.unnamed_folder(model.read.card.name or "", key))
    if bundles.is_bundle(home):
        found = bundles.load(home)
        if found.card.origin.get("wrapped") != key:
            raise ModelError(
                f"{home} holds a model made from other files or values. Remove that folder, or use"
                f" another name, such as {bundles.another_name(home)}."
            )
        return found

    shown = name or printable(folder)

    def tell(line: str) -> None:
        notify(f"{shown}: {line}")

    tell(f"making a model of {printable(folder) if name else 'it'}, once, in {home}")
    tell(f"network: {_network(model)}")
    facts = {
        "source": "folder",
        "folder": str(folder.absolute()),
        "file": model.source.relative_to(folder).as_posix(),
        "sha256": bundles.sha256(model.source),
        "verified": False,
        **{item: value for item, value in (origin or {}).items() if item != "licence"},
    }
    return _build(model, home, models_dir, key, facts, tell)


def _network(model: Model) -> str:
    """Return which file of a folder has the network, and which others it has."""
    used, unused = printable(model.source.relative_to(model.folder)), model.unused
    if not unused:
        return used
    more = f" and {len(unused) - _LISTED} more" if len(unused) > _LISTED else ""
    names = ", ".join(printable(item) for item in unused[:_LISTED])
    return f"{used} ({names}{more} {'is' if len(unused) == 1 else 'are'} not used)"


def look_into(folder: Path, given: Mapping[str, Any], origin: Mapping[str, Any]) -> Model:
    """Return what a model folder holds. The weights are not read.

    Raises:
        ModelError, UsageError: as `bundle_for`.
    """
    shown = printable(folder)
    file = json_file.inside(folder, CONFIG)
    if file is None:
        raise ModelError(
            f"{shown} has no {CONFIG}, so it is no model folder of transformers, optimum or timm."
        )
    document = json_file.read(file)
    given = read_given(given)
    if is_timm := timm_config.is_timm(document):
        read, architecture = timm_config.read_timm(document), timm_config.architecture(document)
    elif "model_type" in document.values or "architectures" in document.values:
        read = transformers_config.read_transformers(folder, document, given)
        architecture = transformers_config.architecture(document)
    else:
        raise document.error(
            "it has neither model_type nor architectures (transformers), nor pretrained_cfg (timm)"
        )
    read = read.with_values(given)
    licence = origin.get("licence")
    if licence and licence != "unknown" and "licence" not in given:
        read = read.with_values({"licence": licence}, "the Hub")
    name = str(origin.get("repository") or folder.absolute().name)
    read = replace(read, card=replace(read.card, name=read.card.name or printable(name)))
    source, unused = _source(folder)
    return Model(folder, document, read, printable(architecture, 100), is_timm, source, unused)


def _source(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the file with the network, and the names of other files with one.

    Raises:
        ModelError: there is none, or it is not clear which one to use, or it is too large.
    """
    graphs = [
        file.relative_to(folder).as_posix()
        for file in (*sorted(folder.glob("*.onnx")), *sorted(folder.glob("onnx/*.onnx")))
    ]
    usual = [name for name in GRAPHS if name in graphs]
    listed = ", ".join(printable(name) for name in graphs[:_LISTED])
    weights = [item for item in _WEIGHTS if (folder / item).is_file()]
    safe = [item for item in weights if item != _PICKLE]
    # An ONNX file of another name may be a quantised one.
    for name in (*usual, *safe, *graphs, *weights):
        file = json_file.inside(folder, name)
        if file is None:
            continue
        if name in graphs and len(graphs) > 1 and not usual:
            raise ModelError(
                f"{printable(folder)} has {len(graphs)} ONNX files, none of which is called"
                f" model.onnx: {listed}. Rename the one to use."
            )
        size = file.stat().st_size
        if file.suffix == ".onnx" and size >= _MAX_GRAPH_BYTES:
            raise ModelError(
                f"{printable(file)} has {size:,} bytes; ONNX files are smaller than"
                f" {_MAX_GRAPH_BYTES:,}."
            )
        return file, tuple(item for item in (*graphs, *weights) if item != name)
    raise ModelError(
        f"{printable(folder)} has no weights that can be read: no model.onnx, onnx/model.onnx,"
        f" {', '.join(_WEIGHTS)}."
    )


def _key(model: Model) -> str:
    """Return a hash of what decides the bundle. Weights alone do not say what network they are for:
    that is all of `config.json`.
    """
    source, config = model.source, model.document.values
    files = [source]
    if source.suffix == ".onnx":
        files, config = wrap.files_of(source, wrap.parse(source)), {}
    elif source.name == INDEX:
        from imagemill.models.export import cached

        files += cached.weights_of(model.folder)
    return bundles.key_of(files, _READER, model.architecture, asdict(model.read.card), config)


# ── building ──────────────────────────────────────────────────────────────────────────────────────


def _build(
    model: Model, home: Path, models_dir: Path, key: str, origin: Mapping[str, Any], notify: Notify
) -> Bundle:
    """Build the bundle of a folder."""
    graph = model.source
    if graph.suffix != ".onnx":
        built = _build_weights(model, home, {**origin, "wrapped": key}, notify)
        if built is not None:
            return built
        from imagemill.models.export import cached

        size = model.read.card.size
        sides = dimensions(size)[::-1] if size is not None else None
        graph = cached.onnx_for(model.folder, models_dir, notify, sides)
    architecture = model.architecture or "onnx"
    source = wrap.Source(graph, wrap.parse(graph), model.read, key, origin, architecture)
    checked = wrap.build(source, home)
    for line in checked.lines:
        notify(line)
    return checked.bundle


def _build_weights(
    model: Model, home: Path, origin: Mapping[str, Any], notify: Notify
) -> Bundle | None:
    """Build the bundle from weights of a network that imagemill builds; None: it builds none like
    that.
    """
    wanted = timm_config.plain_architecture(model.document) if model.is_timm else ""
    is_built = is_known(wanted) if model.is_timm else is_plain_resnet(model.document)
    if not is_built or model.source.name == INDEX:
        return None
    arrays = checkpoint.read(model.source, notify)
    if not model.is_timm and not resnet.recognise(arrays):
        return None  # a ResNet of another depth or width
    try:
        architecture = recognise(arrays, wanted or None)
    except CheckpointError as error:
        raise CheckpointError(f"{printable(model.source)}: {error}") from error
    notify(describe(architecture))
    return build.build(home, architecture, arrays, model.read, origin, notify=notify)
