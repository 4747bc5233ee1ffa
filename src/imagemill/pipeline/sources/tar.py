"""A tar archive, read in place, plain or packed by gzip: ustar, GNU and PAX headers; a WebDataset
shard is one.

One pass over the headers lists it; an image is then read from where it lies. Nothing is ever
extracted: names with `..` or a leading slash are names and nothing else. The standard library's
reader is not used: it ends without a word at a header it cannot read, so that a damaged archive
would be a short one, and holds every member in memory.
"""

from __future__ import annotations

import gzip
import io
import re
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from imagemill.errors import SourceError
from imagemill.pipeline.sources import gz
from imagemill.pipeline.sources.archive import GET_IT_AGAIN, LazyBlob, cannot_read, chooser
from imagemill.pipeline.sources.base import Skipped, shown
from imagemill.records import BadImage, Entry, Filters, Status
from imagemill.system.storage import Blob, BlobFile, open_blob

SUFFIXES = re.compile(r"\.(tar|tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
"""Of the sources that are tar archives, or are told that they cannot be read as one."""

_OTHER_PACKERS = {b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
_END_BLOCKS = 2
"""Empty blocks that end an archive. A single one may be a header that was lost."""
_READ_BYTES = 2**20
_LONGEST_HEADER = 2**24
"""Of a PAX header or a long name; names are a few KiB at most, the rest is extended attributes."""
_LARGEST = 2**60
"""Size of a member: a header can say more than any file system holds."""
_LINK_WINDOW = 16_384
_LOCATOR = struct.Struct("<BQQLL")
"""Ours: _PLAIN or _PACKED, where the data begin, their length, the CRC-32 of the header before them
and, if packed, of themselves.
"""
_PLAIN, _PACKED, _READ_ERROR, _UNSUPPORTED = range(4)
"""First byte of a locator; after the last two comes the error that the row is to have."""
_ABOUT_THE_NEXT = (b"L", b"K", b"x", b"X", b"g")
"""Type flags of headers that say something of the member after them: long names and PAX fields."""
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_KINDS = (*_ABOUT_THE_NEXT, *_WITHOUT_DATA, b"D", b"V", b"M")
"""Type flags that mean something here; the others are files."""


@dataclass(frozen=True, slots=True)
class _Member:
    """One member as its headers describe it."""

    name: bytes
    kind: bytes
    """The type flag; `0` for all that is a file."""
    start: int
    """Of its data."""
    size: int
    header_crc: int
    link: bytes
    """Where it links to."""
    is_sparse: bool = False


class TarSource:
    """See the module's docstring. `location` is a path or URL, `aside` a folder for the index of a
    packed one, see `sources.open_all`.
    """

    ordered = False

    def __init__(self, position: int, location: bytes, aside: Path | None = None) -> None:
        self.name = shown(location)
        self._position = position
        self._location = location
        self._index = aside / f"source-{position:05d}.gzidx" if aside else None
        self._blob = LazyBlob(self._open)

    def _open(self) -> Blob:
        blob = open_blob(self._location)
        return gz.GzipBlob(blob, self._index) if blob.read_at(0, 2) == gz.MAGIC else blob

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """See `Source.entries`. In the order of the archive. A packed one is unpacked for it, and
        where `aside` is given its index kept.
        """
        try:
            blob = open_blob(self._location)
            magic = blob.read_at(0, 6)
            for other, name in _OTHER_PACKERS.items():
                if magic.startswith(other):
                    raise SourceError(
                        f"source {self.name} is packed by {name}, which has no random access."
                        " Unpack it to .tar, or pack it by gzip."
                    )
            is_packed = magic.startswith(gz.MAGIC)
            headers = _Headers(self.name, blob, is_packed)
            try:
                yield from self._entries(headers, filters, skipped)
            except GeneratorExit:  # --limit: the rest is not wanted
                self._keep_index(blob, headers)
                raise
            self._keep_index(blob, headers)
            if headers.garbage:
                skipped.archive_notes.append(
                    f"note: source {self.name}: trailing garbage after {headers.garbage} was"
                    " ignored."
                )
        except EOFError as error:
            raise SourceError(
                f"source {self.name} is cut short: its gzip data have no end. {GET_IT_AGAIN}"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise SourceError(
                f"source {self.name} is damaged: its gzip data cannot be unpacked: {error}."
                f" {GET_IT_AGAIN}"
            ) from error
        except OSError as error:
            raise cannot_read(self.name, error, "a tar archive") from error

    def _keep_index(self, blob: Blob, headers: _Headers) -> None:
        if headers.is_packed and self._index is not None:
            gz.keep_index(blob, headers.at, self._index)

    def _entries(self, headers: _Headers, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        chosen = chooser(filters, skipped)
        earlier = OrderedDict[bytes, tuple[int, bytes]]()
        """Name → size and locator of the last members that are files, for hard links."""
        for member in headers:
            if member.kind in (b"5", b"D", b"V") or member.name.endswith(b"/"):
                continue
            size, locator = -1, self._refusal(member)
            if member.kind == b"1" and member.link in earlier:
                size, locator = earlier[member.link]
            elif not locator:
                crc = headers.checksum(member)
                size, locator = (
                    member.size,
                    _LOCATOR.pack(
                        _PACKED if headers.is_packed else _PLAIN, *(member.start, member.size), *crc
                    ),
                )
            if size >= 0:
                earlier[member.name] = (size, locator)
                if len(earlier) > _LINK_WINDOW:
                    earlier.popitem(last=False)
            if chosen(member.name):
                yield Entry(self._position, member.name, size, locator=locator)

    @staticmethod
    def _refusal(member: _Member) -> bytes:
        """The locator of a member that cannot be had; empty for one that can."""
        if member.is_sparse:
            return bytes([_UNSUPPORTED]) + b"is stored as a sparse file. Pack without --sparse"
        if member.kind == b"0":
            return b""
        to = repr(shown(member.link))
        why = {
            b"1": (
                f"is a hard link to {to}, which is not among the {_LINK_WINDOW:,} members before"
                " it. Pack with --hard-dereference"
            ),
            b"2": (
                f"is a symbolic link to {to}: such links are not followed in an archive. Pack with"
                " --dereference"
            ),
            b"3": "is a device, not a file",
            b"4": "is a device, not a file",
            b"6": "is a FIFO, not a file",
            b"M": "continues a file of another volume. Join the volumes first",
        }[member.kind]
        return bytes([_READ_ERROR]) + why.encode()

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:  # noqa: ARG002 - the locator says it
        """See `Source.fetch`. One read: the header lies before the data, and must still be the one
        that was listed.
        """
        if locator[0] in (_READ_ERROR, _UNSUPPORTED):
            raise BadImage(
                Status.READ_ERROR if locator[0] == _READ_ERROR else Status.UNSUPPORTED,
                locator[1:].decode(),
            )
        kind, start, size, header_crc, crc = _LOCATOR.unpack(locator)
        if size > max_bytes:
            raise BadImage(Status.TOO_LARGE, f"has {size} bytes, more than --max-bytes {max_bytes}")
        try:
            data = self._blob.read_at(start - _BLOCK, _BLOCK + size)
        except zlib.error as error:
            raise BadImage(Status.CORRUPT, f"the archive cannot be unpacked: {error}") from error
        if len(data) < _BLOCK:
            raise BadImage(Status.TRUNCATED, "the archive ends before it")
        if zlib.crc32(data[:_BLOCK]) != header_crc:
            raise BadImage(
                Status.CORRUPT,
                "its header is not where it was: the archive was changed since it was listed",
            )
        if len(data) < _BLOCK + size:
            raise BadImage(
                Status.TRUNCATED,
                f"the archive ends {_BLOCK + size - len(data)} bytes before it does",
            )
        data = data[_BLOCK:]
        if kind == _PACKED and zlib.crc32(data) != crc:
            raise BadImage(
                Status.CORRUPT,
                "its checksum is not the one that was found when the archive was listed",
            )
        return data


class _Headers:
    """The members of an archive, one after another, and where we are in it. Raises: SourceError,
    OSError.
    """

    def __init__(self, name: str, blob: Blob, is_packed: bool) -> None:
        self._name = name
        self._size = blob.size
        self.is_packed = is_packed
        file = io.BufferedReader(BlobFile(blob), _READ_BYTES)
        self._file = cast("BinaryIO", gzip.GzipFile(fileobj=file)) if is_packed else file
        self.at = 0
        self.garbage = ""
        """What garbage follows, known at the end: the gzip data, or the end of the archive. Empty:
        there is none.
        """

    def __iter__(self) -> Iterator[_Member]:
        common: dict[bytes, bytes] = {}
        own: dict[bytes, bytes] = {}
        ended = 0  # how many empty blocks there were; two are the end
        while block := self._block(ended):
            self.at += len(block)
            if not block.strip(b"\0"):
                ended += 1
                continue
            if not _is_header(block):
                if ended < _END_BLOCKS:
                    raise self._no_header(block)
                self._pass_over_garbage()
                return
            ended = 0
            member = self._member(block, common | own)
            if member.kind in _ABOUT_THE_NEXT:
                fields = self._fields(member)
                if member.kind == b"g":
                    common |= fields
                else:
                    own |= fields
                continue
            own = {}
            end = self.at + (
                0 if member.kind in _WITHOUT_DATA else -(-member.size // _BLOCK) * _BLOCK
            )
            yield member
            self._go_to(end, member)
        if self.at == 0:
            raise SourceError(f"source {self._name} is empty, and no tar archive. Get it again.")

    def _pass_over_garbage(self) -> None:
        """Read what follows the end and is no header. A header behind it shows that an archive is
        damaged there. Raises: SourceError.
        """
        start = self.at - _BLOCK
        while block := self._block(_END_BLOCKS):
            self.at += len(block)
            if block[257:262] == b"ustar" and _is_header(block):
                raise self._damaged(
                    f"at byte {start:,} there should be a header, and the next one is at byte"
                    f" {self.at - _BLOCK:,}"
                )
        self.garbage = self.garbage or f"the end of the archive, at byte {start:,},"

    def _block(self, ended: int) -> bytes:
        """Read the next block, `b""` at the end. Raises: OSError, EOFError, zlib.error.

        Garbage after gzip data is ignored, as by gzip and tar, but only after the end of the tar.
        Elsewhere it may hide members.
        """
        try:
            return self._file.read(_BLOCK)
        except gzip.BadGzipFile as error:
            if ended < _END_BLOCKS or not str(error).startswith(
                "Not a gzipped file"
            ):  # not a wrong checksum
                raise
            self.garbage = "its gzip data"
            return b""

    def checksum(self, member: _Member) -> tuple[int, int]:
        """CRC-32 of a member's header and, if the archive is packed, of its data: they have to be
        unpacked anyway.
        """
        crc = 0
        if self.is_packed:
            while self.at < member.start + member.size:
                piece = self._file.read(min(member.start + member.size - self.at, _READ_BYTES))
                if not piece:
                    raise self._cut(f"member {shown(member.name)}")
                crc = zlib.crc32(piece, crc)
                self.at += len(piece)
        return member.header_crc, crc

    def _member(self, block: bytes, fields: dict[bytes, bytes]) -> _Member:
        """What a header and the fields of the PAX headers and long names before it say."""
        name, kind, link = _until_nul(block[:100]), block[156:157], _until_nul(block[157:257])
        if block[257:263] == b"ustar\0" and block[345] != 0:
            name = _until_nul(block[345:500]) + b"/" + name
        if kind not in _ABOUT_THE_NEXT:
            name, link = (
                fields.get(b"GNU.sparse.name", fields.get(b"path", name)),
                fields.get(b"linkpath", link),
            )
        size = _number(block[124:136])
        if kind not in _ABOUT_THE_NEXT and b"size" in fields:
            size = int(fields[b"size"]) if _DECIMAL.fullmatch(fields[b"size"]) else -1
        if not 0 <= size <= _LARGEST:
            raise self._damaged(f"at byte {self.at - _BLOCK:,} a header has no sensible size")
        is_sparse = kind == b"S" or b"GNU.sparse.major" in fields or b"GNU.sparse.map" in fields
        if kind == b"S":
            self._pass_over_sparse_map(block)
        kind = kind if kind in _KINDS else b"0"
        return _Member(_bare(name), kind, self.at, size, zlib.crc32(block), _bare(link), is_sparse)

    def _pass_over_sparse_map(self, block: bytes) -> None:
        more = block[482]
        while more:
            block = self._exactly(_BLOCK, "a sparse file's map")
            more = block[504]

    def _fields(self, member: _Member) -> dict[bytes, bytes]:
        """The fields that a PAX header or a long name gives to what follows."""
        if member.size > _LONGEST_HEADER:
            raise self._damaged(
                f"at byte {member.start - _BLOCK:,} a header says that it has {member.size:,} bytes"
            )
        data = self._exactly(-(-member.size // _BLOCK) * _BLOCK, "a long header")[: member.size]
        if member.kind in (b"L", b"K"):
            return {b"path" if member.kind == b"L" else b"linkpath": _until_nul(data)}
        fields, at = {}, 0
        while at < len(data) and data[at] != 0:
            record = _PAX_RECORD.match(data, at)
            length = int(record[1]) if record else 0
            if record is None or not record.end() - at < length <= len(data) - at:
                raise self._damaged(
                    f"at byte {member.start + at:,} a PAX header has no sensible record"
                )
            name, _, value = data[record.end() : at + length - 1].partition(b"=")
            if name in (b"path", b"linkpath", b"size") or name.startswith(b"GNU.sparse."):
                fields[name] = value
            at += length
        return fields

    def _exactly(self, length: int, what: str) -> bytes:
        data = self._file.read(length)
        self.at += len(data)
        if len(data) < length:
            raise self._cut(what)
        return data

    def _go_to(self, end: int, member: _Member) -> None:
        """Pass over what is left of a member's data."""
        if self.is_packed:
            while self.at < end and (piece := self._file.read(min(end - self.at, _READ_BYTES))):
                self.at += len(piece)
        elif end <= self._size:
            self._file.seek(end)
            self.at = end
        else:
            self.at = self._size
        if self.at < end:
            raise self._cut(f"member {shown(member.name)}")

    def _no_header(self, block: bytes) -> SourceError:
        if self.at <= _BLOCK:
            return SourceError(
                f"source {self._name} is no tar archive: it does not begin with a header. Give one,"
                " or its folder."
            )
        if len(block) < _BLOCK:
            return self._cut("a header")
        return self._damaged(f"at byte {self.at - _BLOCK:,} there should be a header, and is none")

    def _damaged(self, why: str) -> SourceError:
        return SourceError(f"source {self._name} is damaged: {why}. {GET_IT_AGAIN}")

    def _cut(self, what: str) -> SourceError:
        return SourceError(
            f"source {self._name} is cut short: it ends at byte {self.at:,}, inside {what}."
            f" {GET_IT_AGAIN}"
        )


def _is_header(block: bytes) -> bool:
    """Whether a block's checksum is right, as signed or unsigned bytes: there were writers of
    both.
    """
    if len(block) < _BLOCK:
        return False
    told, counted = _number(block[148:156]), block[:148] + b" " * 8 + block[156:]
    return told == sum(counted) or told == sum(counted) - 256 * sum(byte > 127 for byte in counted)


def _number(field: bytes) -> int:
    """A number in octal digits, or in base 256 where its first bit is set; -1 for what is
    neither.
    """
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _until_nul(field).strip()
    return int(digits or b"0", 8) if _OCTAL.fullmatch(digits) else -1


def _until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _bare(name: bytes) -> bytes:
    """A name without the `./` that `tar -c .` puts before it."""
    return _HERE.sub(b"", name)


_OCTAL = re.compile(rb"[0-7]*")
_DECIMAL = re.compile(rb"[0-9]{1,20}")
_HERE = re.compile(rb"^(?:\./+)+(?=.)", re.DOTALL)
_PAX_RECORD = re.compile(rb"([0-9]{1,9}) ")
