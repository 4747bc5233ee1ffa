"""What the tags of a TIFF say: how the samples of its first image are stored."""

from __future__ import annotations

import struct
from itertools import chain, repeat

from msgspec import Struct

from imagemill.records import BadImage, Status

_MAX_VALUES = 1 << 22
"""Strips or tiles of an image: a Python number takes 36 bytes."""

FAX = {2, 3, 4, 32771}
BYTE_CODECS = {1, 5, 8, 32773, 32946, 34925, 50000}
CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
KINDS = {1: "u", 2: "i", 3: "f"}

_TYPES = {1: "B", 3: "H", 4: "I", 5: "II", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I"}
_TYPES |= {16: "Q", 17: "q", 18: "Q"}  # BigTIFF's
"""The types of tags that hold integers or pairs of them, as `struct` spells them."""

_ARRAYS = {258, 273, 279, 320, 324, 325, 338, 339}
"""Of these tags, those values are read that a cut file still has."""
_USED = _ARRAYS | {256, 257, 259, 262, 266, 274, 277, 278, 284, 317, 322, 323, 330, 332}
_USED |= {529, 530, 532, 32997, 50706}
"""The tags that are looked at; others may be large."""


def truncated(why: str) -> BadImage:
    """Return the refusal of a file that ends too early."""
    return BadImage(Status.TRUNCATED, f"truncated TIFF file: {why}")


def broken(why: str) -> BadImage:
    """Return the refusal of a file whose tags make no sense."""
    return BadImage(Status.CORRUPT, f"broken TIFF header: {why}")


class Tags(Struct, frozen=True):
    """The integer tags of one directory."""

    data: bytes
    order: str
    big: bool
    values: dict[int, tuple[int, ...]]
    following: int
    """Where the next directory begins; 0 if there is none."""

    @classmethod
    def first(cls, data: bytes) -> Tags:
        """Return the tags of a file's first image. Raises: BadImage."""
        order = "<" if data[:1] == b"I" else ">"
        big = 43 in data[2:4]
        if len(data) < (16 if big else 8):
            raise truncated(f"it ends in its header, after {len(data)} bytes")
        (offset,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        return cls.at(data, order, big, offset)

    @classmethod
    def at(cls, data: bytes, order: str, big: bool, offset: int) -> Tags:
        """Return the tags of the directory at an offset; `big`: of a BigTIFF. Raises: BadImage."""
        count_format, entry, offset_format = (
            order + letters for letters in (("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I"))
        )
        start = offset + struct.calcsize(count_format)
        count = struct.unpack_from(count_format, data, offset)[0] if start <= len(data) else 0
        end = start + count * struct.calcsize(entry)
        if not 0 < offset < start <= len(data) or end > len(data):
            raise truncated(
                f"its directory at byte {offset} lies beyond the end, {len(data)} bytes"
            )
        values: dict[int, tuple[int, ...]] = {}
        for tag, kind, length, field in struct.iter_unpack(entry, memoryview(data)[start:end]):
            if tag not in _USED or tag in values or (letter := _TYPES.get(kind)) is None:
                continue
            size = length * struct.calcsize("=" + letter)
            at = struct.unpack(offset_format, field)[0]
            if size > len(field) and at + size > len(data):
                length = max(0, len(data) - at) * length // size if tag in _ARRAYS else 0  # noqa: PLW2901 - libtiff ignores the others
            if not length:
                continue
            if length > _MAX_VALUES:
                raise BadImage(
                    Status.TOO_LARGE, f"TIFF tag {tag} has {length} values, more than {_MAX_VALUES}"
                )
            source, begin = (field, 0) if size <= len(field) else (data, at)
            values[tag] = struct.unpack_from(
                f"{order}{length * len(letter)}{letter[0]}", source, begin
            )
        following = 0
        if end + struct.calcsize(offset_format) <= len(data):
            (following,) = struct.unpack_from(offset_format, data, end)
        return cls(data, order, big, values, following)

    def one(self, tag: int, default: int | None = None) -> int:
        """Return the first value of a tag."""
        found = self.values.get(tag)
        if found:
            return found[0]
        if default is None:
            raise truncated(f"tag {tag} is missing")
        return default


class Layout(Struct, frozen=True):
    """How the samples of a TIFF are stored."""

    width: int
    height: int
    bits: tuple[int, ...]
    formats: tuple[int, ...]
    samples: int
    extra: tuple[int, ...]
    photometric: int
    compression: int
    predictor: int
    fill_order: int
    planar: bool
    tiled: bool
    segment_width: int
    segment_height: int
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    tags: Tags

    @classmethod
    def of(cls, tags: Tags) -> Layout:
        """Return the layout of an image. Raises: BadImage."""
        width, height = tags.one(256), tags.one(257)
        compression, photometric = tags.one(259, 1), tags.one(262, 0)
        if 262 not in tags.values and compression not in FAX:
            # Black and white would be a guess.
            raise BadImage(
                Status.UNSUPPORTED, "TIFF without a photometric interpretation is not supported"
            )
        samples = tags.one(277, 3 if compression == 6 and photometric in {2, 6} else 1)
        if samples < 1:
            raise broken(f"{samples} samples per pixel")
        if compression not in {6, *FAX}:  # the defaults, one sample of one bit, are black and white
            if photometric not in {0, 1} or samples > 1:
                tags.one(258)  # raises if it is missing
            if 338 in tags.values:  # extra samples
                tags.one(277)
        tiled = 324 in tags.values or 322 in tags.values
        rows = tags.one(278, height)
        return cls(
            width=width,
            height=height,
            bits=tags.values.get(258, (1,))[:samples],
            formats=tags.values.get(339, (1,))[:samples],
            samples=samples,
            extra=tags.values.get(338, ()),
            photometric=photometric,
            compression=compression,
            predictor=tags.one(317, 1) if compression in BYTE_CODECS else 1,
            fill_order=tags.one(266, 1),
            planar=tags.one(284, 1) == 2 and samples > 1,
            tiled=tiled,
            segment_width=tags.one(322) if tiled else width,
            segment_height=tags.one(323) if tiled else min(rows, height) if rows > 0 else height,
            offsets=tags.values.get(324, ()) or tags.values.get(273, ()),
            counts=tags.values.get(325, ()) or tags.values.get(279, ()),
            tags=tags,
        )

    @property
    def across(self) -> int:
        """Strips or tiles beside each other."""
        return -(-self.width // self.segment_width)

    @property
    def per_plane(self) -> int:
        """Strips or tiles of each plane."""
        return self.across * -(-self.height // self.segment_height)

    @property
    def planes(self) -> int:
        """Planes of samples that are stored apart."""
        return self.samples if self.planar else 1

    @property
    def channels(self) -> int:
        """Colour channels; the samples behind them are extra."""
        return CHANNELS[self.photometric]

    @property
    def kind(self) -> str:
        """Unsigned, signed or float, as NumPy spells it. Raises: KeyError for any other."""
        return KINDS[self.formats[0]]

    @property
    def segment_row_bytes(self) -> int:
        """Bytes of a row of a strip or tile."""
        return -(-self.segment_width * (1 if self.planar else self.samples) * self.bits[0] // 8)

    def is_cut(self, size: int) -> bool:
        """Return whether a strip or tile reaches beyond the end of a file."""
        spans = zip(self.offsets, chain(self.counts, repeat(1)), strict=False)
        return any(offset + count > size for offset, count in spans)
