"""What a CLIP or SigLIP folder says about its two towers: `config.json`, `tokenizer_config.json`.

family   scores   texts are padded to         pooled outputs
CLIP     softmax  the longest text            image_embeds, text_embeds
SigLIP   sigmoid  the model's length, always  pooler_output, pooler_output
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

from msgspec import Meta, Struct, field

from imagemill.models.folders import json_file
from imagemill.records import Scores

_LONGEST: Final = 4_096
"""Tokens. Larger numbers in a config mean that the tokenizer has no limit of its own."""
Tokens = Annotated[int, Meta(ge=2)]


class TowerKind(Struct, frozen=True):
    """What `model_type` decides."""

    scores: Scores
    length: int
    """Tokens that a text has at most, if the files do not say it."""
    image_output: str
    """Name of the image tower's output with one embedding per image."""
    text_output: str
    """Name of the text tower's output with one embedding per text."""


_CLIP: Final = TowerKind(Scores.LOGITS, 77, "image_embeds", "text_embeds")
_SIGLIP: Final = TowerKind(Scores.SIGMOID, 64, "pooler_output", "pooler_output")
_KINDS: Final = {"clip": _CLIP, "siglip": _SIGLIP, "siglip2": _SIGLIP}
"""By `model_type`. The lengths are those of the published models."""


class Family(Struct, frozen=True):
    """How texts become tokens, and which outputs of the towers are compared."""

    kind: TowerKind
    length: int
    """Tokens that a text has at most."""
    vocabulary: int | None
    """Number of tokens that the text tower knows; None if the files do not say it."""
    padding_token: str | None
    """None: `tokenizer.json` says it."""
    padding_left: bool
    lowercase: bool
    """Texts are lower-cased, whether or not `tokenizer.json` says so."""

    @property
    def padded(self) -> bool:
        """Whether all texts have the full length: SigLIP was trained so, and has no mask."""
        return self.kind.scores is Scores.SIGMOID


class _TextConfig(Struct, frozen=True):
    max_position_embeddings: Tokens | None = None
    vocab_size: Tokens | None = None


class _Config(Struct, frozen=True):
    model_type: str
    text_config: _TextConfig = field(default_factory=_TextConfig)


class _Token(Struct, frozen=True):
    content: str


class _TokenizerConfig(Struct, frozen=True):
    model_max_length: Annotated[float, Meta(ge=2)] | None = None
    pad_token: str | _Token | None = None
    padding_side: str | None = None
    do_lower_case: bool | None = None


def read_family(folder: Path) -> Family:
    """Return what a folder's files say about its texts.

    Raises:
        ModelError: a file is missing or damaged, or the model is neither CLIP nor SigLIP.
    """
    config = json_file.read(folder / json_file.CONFIG)
    if "model_type" not in config.values:
        raise config.error(f"no model_type; known: {', '.join(_KINDS)}")
    read = config.record(_Config)
    if (kind := _KINDS.get(read.model_type)) is None:
        raise config.error(
            f"model_type is {read.model_type}; classes in words need one of: {', '.join(_KINDS)}"
        )
    said = _TokenizerConfig()
    if (file := folder / "tokenizer_config.json").is_file():
        said = json_file.read(file).record(_TokenizerConfig)
    token = said.pad_token.content if isinstance(said.pad_token, _Token) else said.pad_token
    if token is None and (file := folder / "special_tokens_map.json").is_file():
        named = json_file.read(file).record(_TokenizerConfig).pad_token
        token = named.content if isinstance(named, _Token) else named
    lengths = [
        int(length)
        for length in (said.model_max_length, read.text_config.max_position_embeddings)
        if length is not None and length <= _LONGEST
    ]
    return Family(
        kind,
        min(lengths, default=kind.length),
        read.text_config.vocab_size,
        token,
        said.padding_side == "left",
        # SigLIP 2 was trained on lower-cased texts, but its tokenizer.json does not do that.
        kind is _SIGLIP if said.do_lower_case is None else said.do_lower_case,
    )
