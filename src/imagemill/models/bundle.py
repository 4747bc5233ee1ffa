"""Bundles: a model on disk.

    DIR/model.onnx         the graph and, up to 2 GiB, its weights
    DIR/model.onnx.data    the weights of larger models
    DIR/card.json          everything else that is known about it; written last, so a folder
                           without it is not a bundle yet
    DIR/model_6.onnx       a copy whose batch is frozen to 6

The hash in the card covers the model. An ONNX file may name other files to read weights from: the
models made here name `model.onnx.data` only, and `custom.wrap` checks the files of users.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from imagemill.errors import ModelError, OutputError, counted, printable, quoted
from imagemill.records import Bundle, Card, Recipe, Scores
from imagemill.system import files, serialization, userdirs

if TYPE_CHECKING:
    import onnx

MODEL: Final = "model.onnx"
CARD: Final = "card.json"
DATA: Final = "model.onnx.data"
DATA_SHA256: Final = "model.onnx.data.sha256"
"""Key in the ONNX file's metadata, so that the hash of `model.onnx` covers the weights beside
it.
"""
_DATA_HASH: Final = re.compile(DATA_SHA256.encode() + rb"\x12\x40([0-9a-f]{64})")
"""That key and its value as protobuf writes them, near the end of the file: metadata follow the
graph.
"""
_COLOUR: Final = re.compile("#[0-9a-fA-F]{6}")
_TAIL_BYTES: Final = 4_096
EXTERNAL_FROM: Final = 2**31 - 2**24
"""Bytes of weights from which they go into a file of their own: a protobuf message ends at 2
GiB.
"""


def default_models_dir(given: str | None = None) -> Path:
    """Return the folder given, else `$IMAGEMILL_MODELS`, else `imagemill/models` in the user's
    cache folder.
    """
    if given:
        return Path(given)
    if chosen := os.environ.get("IMAGEMILL_MODELS"):
        return userdirs.expand(chosen)
    return userdirs.cache() / "models"


def cropped_beyond(recipe: Recipe) -> str | None:
    """Return what is wrong with a recipe that crops more than its resized image has, and so would
    always add black borders; else None.
    """
    resize = recipe.resize
    width, height = recipe.width, recipe.height
    if resize is None or recipe.pad:
        return None
    if isinstance(resize, int):
        if resize >= min(width, height):
            return None
    elif resize[0] >= width and resize[1] >= height:
        return None
    shown = resize if isinstance(resize, int) else f"{resize[0]}x{resize[1]}"
    return (
        f"resize {shown} is smaller than the model's input of {width}x{height}, so every image"
        " would get black borders"
    )


def is_bundle(folder: Path) -> bool:
    """Tell whether the folder holds a finished bundle."""
    return (folder / CARD).is_file()


def unnamed_folder(name: str, key: str) -> str:
    """Return what the folder of a bundle is called that the user gave no name: the name of what it
    is made from, and the start of the hash of all that decides it.
    """
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100].lstrip(".-") or "model"
    return f"{stem}-{key[:12]}"


def another_name(folder: Path) -> str:
    """Return a name that no model in the models folder has: `birds.2` if there is `birds`."""
    number = 2
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    return f"{folder.name}.{number}"


def is_free(folder: Path) -> bool:
    """Return whether a bundle can be made here: there is nothing, or an empty folder. The current
    folder would be replaced by another one of its name, so it is never free.
    """
    if not folder.exists():
        return True
    return folder.is_dir() and not any(folder.iterdir()) and not folder.samefile(os.curdir)


def made_from(card: Card) -> str | None:
    """Return the ONNX file, the folder or the repository that a bundle was made from; None if it is
    a published model, or weights of the user's own.
    """
    origin = card.origin
    match origin.get("source"):
        case "onnx":
            return str(origin.get("file"))
        case "folder":
            return str(origin.get("folder"))
        case "hub":
            return f"hf:{origin.get('repository')}@{origin.get('commit')}"
    return None


def made_again(card: Card, folder: Path) -> str:
    """Return what to type to make a bundle again that was in this folder."""
    origin, name = card.origin, quoted(card.name)
    here = folder.absolute().parent
    where = "" if here == default_models_dir().absolute() else f" --models-dir {quoted(here)}"
    command = f"`imagemill get-model {name}"
    source = None if (made := made_from(card)) is None else quoted(made)
    match origin.get("source"):
        case "words":
            return f"`imagemill classes {origin.get('model')}`, with the same labels"
        case "onnx" | "folder" | "hub" if is_unnamed(Bundle(folder, card)):
            return f"run the command again with --model {source}"
        case "onnx":
            return f"`imagemill wrap {source} --output {quoted(folder)}`, with the same values"
        case "folder" | "hub":
            return f"{command} --from {source}{where}`"
        case "file" if not origin.get("published"):
            file = f"FILE is your {printable(origin.get('file'))}"
            return f"{command} --from FILE{where}`, with the same values; {file}"
        case "url" if not origin.get("published"):
            return f"{command} --url {quoted(origin.get('url'))}{where}`, with the same values"
        case "random":
            return f"{command} --random-weights {origin.get('seed')}{where}`"
    return f"{command}{where}`"


def is_unnamed(found: Bundle) -> bool:
    """Return whether `run --model` made a bundle, and the user gave it no name."""
    key = found.card.origin.get("wrapped")
    return key is not None and found.dir.name.endswith(f"-{str(key)[:12]}")


def typed_source(found: Bundle) -> str | None:
    """Return what to type as `--model` for a bundle without a name: the ONNX file, folder or
    repository that it was made from. None if it has a name, or these are not there any more.
    """
    source = made_from(found.card)
    if source is None or not is_unnamed(found):
        return None
    if source.startswith("hf:"):
        return source
    if not Path(source).exists():
        return None
    below = os.path.relpath(source)
    return source if below.startswith("..") else below


def typed(found: Bundle) -> str:
    """Return what to type as `--model` for a bundle, as a shell takes it: what it was made from,
    else its name in the models folder, else its folder.
    """
    folder = found.dir.absolute()
    is_here = folder.parent == default_models_dir().absolute()
    return quoted(typed_source(found) or (folder.name if is_here else folder))


def describe_origin(card: Card) -> str:
    """Return in words what a bundle was made from. The hash of a file of the user's own is nothing
    to verify.
    """
    origin = card.origin
    match origin.get("source"):
        case "random":
            return f"random weights, seed {origin.get('seed')}: its predictions mean nothing"
        case "file" | "onnx":
            text = f"from your file {origin.get('file')}"
        case "url":
            text = f"from {origin.get('url')}"
        case "hub":
            commit = str(origin.get("commit"))[:12]
            text = f"from hf:{origin.get('repository')}@{commit}"
        case "folder":
            return f"from your folder {origin.get('folder')}"
        case "words":
            return f"classes in words, from {origin.get('model')}"
        case "package":
            text = f"from the package {origin.get('package')}"
        case other:
            text = f"from {other}"
    if origin.get("verified"):
        return f"{text}, hash verified"
    return text if origin.get("source") in ("file", "onnx") else f"{text}, no published hash"


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def load(folder: Path) -> Bundle:
    """Open a bundle; its weights are not read, see `verify_hash`.

    Raises:
        ModelError: the model is missing, the card is missing or damaged, or its values make no
        sense together.
    """
    remedy = f"Remove {folder} and get the model again with imagemill get-model."
    try:
        data = (folder / CARD).read_bytes()
    except FileNotFoundError:
        raise ModelError(
            f"{folder} is not a model that imagemill made: it has no {CARD}. Make one with"
            " imagemill get-model."
        ) from None
    except OSError as error:
        raise ModelError(f"{folder / CARD} cannot be read: {error}. {remedy}") from error
    card = serialization.decode(data, Card, str(folder / CARD), ModelError, remedy)
    recipe, resize = card.recipe, card.recipe.resize
    sides = resize if isinstance(resize, tuple) else (resize,)
    if any(side is not None and side < 1 for side in (recipe.height, recipe.width, *sides)):
        raise ModelError(
            f"{folder / CARD}: recipe says height {recipe.height}, width {recipe.width}, resize"
            f" {resize}. {remedy}"
        )
    if not _COLOUR.fullmatch(recipe.fill):
        raise ModelError(f"{folder / CARD}: recipe.fill is {recipe.fill!r}. Write #rrggbb there.")
    if recipe.pad and not isinstance(resize, tuple):
        raise ModelError(
            f"{folder / CARD}: recipe.pad needs a width and a height to fit images into, and"
            f" recipe.resize is {resize}. Write [width, height] there."
        )
    if problem := cropped_beyond(recipe):
        raise ModelError(f"{folder / CARD}: {problem}. Correct recipe.resize there.")
    if card.has_head != bool(card.labels):
        raise ModelError(
            f"{folder / CARD} has {counted(len(card.labels), 'label')}, and its outputs are"
            f" {', '.join(card.outputs) or 'none'}: a model with `logits` has labels, and one"
            f" without has none. {remedy}"
        )
    if len(card.labels) == 1 and card.scores is Scores.LOGITS:
        raise ModelError(
            f"{folder / CARD} has one label and the scores are logits: a softmax over one class is"
            ' 1.0 for every image. Change scores to "sigmoid".'
        )
    if not (folder / MODEL).is_file():
        raise ModelError(f"{folder / MODEL} is missing, though {CARD} describes it. {remedy}")
    return Bundle(folder, card)


def verify_hash(bundle: Bundle) -> None:
    """Read the whole model and compare it with its card.

    Raises:
        ModelError: names both sums; the model changed on disk since it was made.
    """
    _compare(bundle.dir / MODEL, bundle.card.sha256)
    with (bundle.dir / MODEL).open("rb") as file:
        file.seek(max(0, (bundle.dir / MODEL).stat().st_size - _TAIL_BYTES))
        data_hash = _DATA_HASH.search(file.read())
    if data_hash:
        _compare(bundle.dir / DATA, data_hash[1].decode())


def _compare(file: Path, expected: str) -> None:
    try:
        found = sha256(file)
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read: {error.strerror}. Get the model again with imagemill"
            " get-model."
        ) from error
    if found != expected:
        raise ModelError(
            f"{file} has the sha256 {found}, its card says {expected}. Remove {file.parent} and get"
            " the model again."
        )


def sha256(file: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def key_of(paths: Iterable[Path], *facts: object) -> str:
    """Return a hash of files, and of facts that JSON can hold: all that decides a bundle."""
    state = [[sha256(file) for file in paths], *facts]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# ── writing ───────────────────────────────────────────────────────────────────────────────────────


def write(folder: Path, card: Card, model: onnx.ModelProto) -> Bundle:
    """Write a bundle; the files appear whole, the card last. The model is consumed where its
    weights go into a file of their own.

    Args:
        folder: made where it is missing; an older bundle in it is replaced, its frozen copies
        removed.
        card: its `sha256` is filled in here.
        model: with all weights inside.

    Raises:
        ModelError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (folder / CARD, folder / "accuracy.json", *folder.glob("model_*.onnx")):
            stale.unlink(missing_ok=True)
        if sum(len(tensor.raw_data) for tensor in model.graph.initializer) >= EXTERNAL_FROM:
            files.write_whole(folder / DATA, _move_weights_out(model))
        files.write_whole(folder / MODEL, model.SerializeToString())
        card = replace(card, sha256=sha256(folder / MODEL))
        files.write_whole(folder / CARD, serialization.encode(card))
    except (OSError, OutputError) as error:
        raise cannot_write(folder, error) from error
    return Bundle(folder, card)


def cannot_write(path: Path, error: OSError | OutputError) -> ModelError:
    """Return the error for a model's file or folder that cannot be written."""
    cause = error if isinstance(error, OSError) else error.__cause__
    assert isinstance(cause, OSError)
    return ModelError(
        f"{path} cannot be written: {files.reason(cause)}. Make room or rights there, or choose"
        " another folder with --models-dir."
    )


def _move_weights_out(model: onnx.ModelProto) -> Iterator[bytes]:
    """Yield the content of `model.onnx.data`, and let the model refer to it."""
    from onnx import TensorProto
    from onnx.external_data_helper import set_external_data

    digest = hashlib.sha256()
    position = 0
    for tensor in model.graph.initializer:
        padding = b"\0" * (-position % 4096)
        raw = tensor.raw_data
        for piece in (padding, raw):
            yield piece
            digest.update(piece)
        set_external_data(tensor, DATA, position + len(padding), len(raw))
        position += len(padding) + len(raw)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    entry = model.metadata_props.add()
    entry.key, entry.value = DATA_SHA256, digest.hexdigest()


def freeze(bundle: Bundle, batch_size: int) -> Path:
    """Write `model_N.onnx`, whose batch is always N, unless it is there; return its path.

    Raises:
        ModelError: the model cannot be read, or the copy cannot be written.
    """
    if batch_size < 1:
        raise ModelError(
            f"A batch of {batch_size} cannot be frozen. Give --batch-size a number from 1."
        )
    target = bundle.dir / f"model_{batch_size}.onnx"
    if target.is_file():
        return target
    import onnx

    model = onnx.load(str(bundle.dir / MODEL), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch_size
    try:
        files.write_whole(target, model.SerializeToString())
    except OutputError as error:
        raise cannot_write(target, error) from error
    return target
