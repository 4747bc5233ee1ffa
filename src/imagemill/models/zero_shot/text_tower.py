"""Run the text tower of a CLIP or SigLIP folder, once per model.

prompts ─► tokenizer.json ─► ids ─► onnx/text_model.onnx ─► embeddings
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import ImagemillError, ModelError, UsageError, printable
from imagemill.models.custom import wrap
from imagemill.models.zero_shot.family import Family
from imagemill.system.openvino_library import new_core

Ids = NDArray[np.int64]

_TOKENIZER_BYTES: Final = 64 * 2**20
"""Of tokenizer.json. That of SigLIP 2, with 256,000 tokens, takes 34 MB."""
_BATCH: Final = 32
"""Texts at a time. More do not make a CPU faster."""
_FILLED: Final = ("input_ids", "attention_mask", "token_type_ids")


class Tokens(Struct, frozen=True):
    """Texts as numbers."""

    ids: list[list[int]]
    """Of each text, without padding."""
    padding: int
    """The number that fills the rest of a row."""
    cut: tuple[int, ...]
    """Places of the texts that are longer than the model can read."""


def load_library() -> Any:
    """Return the package `tokenizers`.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            "classes in words need the package tokenizers. Install it: pip install"
            " 'imagemill[words]'."
        ) from error
    return tokenizers


def tokenize(folder: Path, family: Family, prompts: Sequence[str]) -> Tokens:
    """Return the token ids of texts.

    Raises:
        UsageError: the package `tokenizers` is not installed.
        ModelError: `tokenizer.json` is missing, too large or damaged, does not fit the text tower,
            or has no padding token.
    """
    library = load_library()
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(
            f"{printable(file)} is missing, which turns texts into tokens. Get a model folder that"
            " has it."
        )
    if file.stat().st_size > _TOKENIZER_BYTES:
        raise ModelError(
            f"{printable(file)} is larger than {_TOKENIZER_BYTES:,} bytes, too large for a"
            " tokenizer."
        )
    try:
        tokenizer = library.Tokenizer.from_str(file.read_text("utf-8"))
        token = family.padding_token
        padding = (
            (tokenizer.padding or {}).get("pad_id")
            if token is None
            else tokenizer.token_to_id(token)
        )
        tokenizer.no_padding()
        tokenizer.enable_truncation(family.length)
        texts = [prompt.lower() if family.lowercase else prompt for prompt in prompts]
        encoded = tokenizer.encode_batch(texts)
    except (KeyboardInterrupt, SystemExit, ImagemillError):
        raise
    except BaseException as error:  # the library's own, which may not be an Exception
        raise ModelError(
            f"{printable(file)} cannot be used: {printable(error)}. Get it again."
        ) from error
    if padding is None:
        raise ModelError(
            f"{printable(file)} does not say which token fills up short texts, and"
            " tokenizer_config.json has no pad_token that is in it. Get both files again."
        )
    ids = [item.ids for item in encoded]
    if not all(ids):
        empty = prompts[next(place for place, row in enumerate(ids) if not row)]
        raise ModelError(
            f'{printable(file)} makes no token of the text "{printable(empty, 60)}". Get it again.'
        )
    largest = max(padding, *(max(row) for row in ids))
    if family.vocabulary is not None and largest >= family.vocabulary:
        raise ModelError(
            f"{printable(file)} makes the token {largest}, config.json allows"
            f" {family.vocabulary} tokens (vocab_size). They belong to different models: get both"
            " again."
        )
    return Tokens(
        ids, padding, tuple(place for place, item in enumerate(encoded) if item.overflowing)
    )


class TextTower:
    """The ONNX file of a text tower, compiled."""

    def __init__(self, file: Path, family: Family) -> None:
        """Read and compile the file.

        Raises:
            ModelError: it cannot be read, reads weights from outside its folder, or is not the text
                tower of such a model.
        """
        self._file = file
        self._family = family
        self._inputs, outputs = _inputs_and_outputs(file)
        name = family.kind.text_output
        if "input_ids" not in self._inputs or name not in outputs:
            raise ModelError(
                f"{printable(file)} reads {printable(', '.join(self._inputs))} and returns"
                f" {printable(', '.join(outputs))}; a text tower reads input_ids and returns"
                f" {name}. Export it again, with its projection."
            )
        if unknown := self._inputs.keys() - _FILLED:
            raise ModelError(
                f"{printable(file)} needs the input {printable(min(unknown))}; only"
                f" {', '.join(_FILLED)} can be filled."
            )
        self._model = self._compile()

    def _compile(self) -> Any:
        core = new_core()
        try:
            return core.compile_model(str(self._file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as error:  # OpenVINO's own
            raise ModelError(
                f"{printable(self._file)} cannot be compiled: {_reason(error)}. Export it again."
            ) from error

    def embed(self, tokens: Tokens) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
        """Yield places of texts, and the normalised embeddings (texts, features) of these.

        Raises:
            ModelError: the tower cannot be run, or returns something else than embeddings.
        """
        rows, columns = (
            size if isinstance(size, int) else None for size in self._inputs["input_ids"]
        )
        order = sorted(range(len(tokens.ids)), key=lambda place: len(tokens.ids[place]))
        for first in range(0, len(order), rows or _BATCH):
            places = np.array(order[first : first + (rows or _BATCH)])
            texts = [tokens.ids[place] for place in places]
            length = columns or (self._family.length if self._family.padded else len(texts[-1]))
            if len(texts[-1]) > length:
                raise ModelError(
                    f"{printable(self._file)} reads {length} tokens, config.json says"
                    f" {self._family.length}. Export it with an open length."
                )
            texts += texts[:1] * ((rows or 0) - len(texts))
            feed = self.feed(texts, length, tokens.padding)
            found = self._answer(feed)[: len(places)]
            sizes = np.linalg.norm(found, axis=1, keepdims=True)
            if not np.isfinite(sizes).all() or not sizes.all():
                raise ModelError(
                    f"{printable(self._file)} returns NaN, infinity or only zeros for a text."
                    " Export it again."
                )
            yield places, found / sizes

    def feed(self, texts: list[list[int]], length: int, padding: int) -> dict[str, Ids]:
        """Fill the tower's inputs (texts, length)."""
        ids = np.full((len(texts), length), padding, np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            part = slice(-len(text), None) if self._family.padding_left else slice(len(text))
            ids[row, part] = text
            mask[row, part] = 1
        if self._family.padded:
            mask[:] = 1
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return {name: values[name] for name in self._inputs}

    def _answer(self, feed: dict[str, Ids]) -> NDArray[np.float32]:
        name = self._family.kind.text_output
        try:
            answer = np.array(self._model(feed)[self._model.output(name)], np.float32)
        except RuntimeError as error:
            raise ModelError(
                f"{printable(self._file)} cannot be run: {_reason(error)}. Export it again."
            ) from error
        if answer.ndim != 2 or len(answer) != len(feed["input_ids"]):
            raise ModelError(
                f"{printable(self._file)} returns {name} of shape {answer.shape} for"
                f" {len(feed['input_ids'])} texts; (texts, features) is needed."
            )
        return answer


def _inputs_and_outputs(file: Path) -> tuple[dict[str, list[int | None]], list[str]]:
    """Return the inputs' dimensions by name, None where they are open, and the outputs' names."""
    model = wrap.parse(file)
    wrap.files_of(file, model)  # which checks their places
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = {
        value.name: [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in weights
    }
    for name, dims in inputs.items():
        if len(dims) != 2:
            raise ModelError(
                f"{printable(file)}: the input {printable(name)} must have the shape (texts,"
                " length)."
            )
    return inputs, [value.name for value in model.graph.output]


def _reason(error: RuntimeError) -> str:
    return printable(str(error).strip().splitlines()[-1].rstrip("."))
