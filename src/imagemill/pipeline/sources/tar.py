"""A tar archive, read in place, plain or compressed with gzip: ustar, GNU and PAX headers. A
WebDataset shard is one.

One pass over the headers lists it, and an image is then read from its position. Nothing is ever
extracted: names with `..` or a leading slash are only names. The standard library reads the
headers, and `_Member` makes an error of every header that it would pass over in silence, so that a
damaged archive is never a short one.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import struct
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from imagemill.errors import OutputError, SourceError, counted
from imagemill.pipeline.sources import gz, samples
from imagemill.pipeline.sources.archive import GET_IT_AGAIN, LazyBlob, cannot_read
from imagemill.pipeline.sources.base import Skipped, chooser, shown, too_large
from imagemill.pipeline.sources.kept import NOTHING, Keeper
from imagemill.records import BadImage, Entry, Filters, Status
from imagemill.system.storage import Blob, BlobFile, open_blob

SUFFIXES = re.compile(r"\.(tar|tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
"""Of the sources that are tar archives, or that an error says cannot be read as one."""

_OTHER_PACKERS = {b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
_END_BLOCKS = 2
"""Empty blocks that end an archive. A single one may be a header that was lost."""
_READ_BYTES = 2**20
_MAX_LONG_HEADER = 2**24
"""Bytes of a PAX header or a long name; names have a few KiB, the rest is extended attributes."""
_MAX_MEMBER = 2**60
"""Bytes of a member: a header can name more than any file system holds."""
_MAX_TEXT = 2**16
"""Bytes of a member that `texts` reads."""
_LINK_WINDOW = 16_384
_KEPT_TEXTS = 16 * 2**20
_LOCATOR = struct.Struct("<BQQLL")
"""_PLAIN or _PACKED, offset and length of the data, the CRC-32 of the header before them and, if
packed, of the data.
"""
_PLAIN, _PACKED, _READ_ERROR, _UNSUPPORTED = range(4)
"""First byte of a locator. After the last two comes the error of the row."""
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_LONG_HEADERS = (*_LONG_NAMES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_IGNORED = (tarfile.DIRTYPE, b"D", b"V")
"""Folders, GNU's folder listings and volume labels."""
_NO_FILES = {
    tarfile.LNKTYPE: (
        "is a hard link to {!r}, which is not among the {:,} members before it. Pack with"
        " --hard-dereference"
    ),
    tarfile.SYMTYPE: (
        "is a symbolic link to {!r}: such links are not followed in an archive. Pack with"
        " --dereference"
    ),
    tarfile.CHRTYPE: "is a device, not a file",
    tarfile.BLKTYPE: "is a device, not a file",
    tarfile.FIFOTYPE: "is a FIFO, not a file",
    b"M": "continues a file of another volume. Join the volumes first",
}
"""Members that have no bytes to read, and the error of their rows."""
_DECIMAL = re.compile(r"[0-9]{1,20}")
_DOT_SLASH = re.compile(rb"^(?:\./+)+(?=.)", re.DOTALL)
_PAX_RECORD = re.compile(rb"([0-9]{1,9}) ")


class _Texts:
    """The last texts of an archive, for hard links to them: at most `_KEPT_TEXTS` bytes."""

    def __init__(self) -> None:
        self._by_name = OrderedDict[bytes, bytes]()
        self._bytes = 0

    def add(self, name: bytes, data: bytes) -> None:
        """Keep a text."""
        self._bytes += len(data) - len(self._by_name.pop(name, b""))
        self._by_name[name] = data
        while self._bytes > _KEPT_TEXTS:
            self._bytes -= len(self._by_name.popitem(last=False)[1])

    def of(self, name: bytes, shown_as: str) -> bytes:
        """Return the text of a member. Raises: SourceError."""
        if name not in self._by_name:
            raise SourceError(
                f"{shown_as} is a hard link to {shown(name)!r}, which is not among the last texts"
                " before it. Pack with --hard-dereference."
            )
        return self._by_name[name]


class TarSource:
    """A tar archive at a path or URL; the index of a packed one is kept in `index_dir`."""

    def __init__(
        self,
        position: int,
        location: bytes,
        index_dir: Path | None = None,
        keeper: Keeper = NOTHING,
    ) -> None:
        self.name = shown(location)
        self._position = position
        self._location = location
        self._index = index_dir / f"source-{position:05d}.gzidx" if index_dir else None
        self._keeper = keeper
        self._blob = LazyBlob(self._open)

    def _open(self) -> Blob:
        blob = open_blob(self._location)
        return gz.GzipBlob(blob, self._index) if blob.read_at(0, 2) == gz.MAGIC else blob

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """Yield the members in the order of the archive. A compressed one is decompressed
        for that, and its index is kept if there is a folder for it.
        """
        try:
            blob, stream = self._stream()
            try:
                members = self._entries(stream, filters, skipped)
                if self._keeper.columns:
                    yield from samples.with_kept(self.name, members, self._keeper)
                else:
                    yield from (member.entry for member in members if member.entry)
            except GeneratorExit:  # --limit: the rest is not wanted, and nobody hears of an error
                with contextlib.suppress(OutputError):
                    self._keep_index(blob, stream)
                raise
            self._keep_index(blob, stream)
            if stream.garbage:
                skipped.archive_notes.append(
                    f"note: source {self.name}: trailing garbage after {stream.garbage} was"
                    " ignored."
                )
        except OSError as error:
            raise cannot_read(self.name, error, "a tar archive") from error

    def texts(self, suffix: str) -> Iterator[tuple[str, str]]:
        """Yield the name and the content of each member with a suffix, in the order of the
        archive. Raises: SourceError.
        """
        try:
            _, stream = self._stream()
            texts = _Texts()
            for member in _members(stream):
                if not member.name.endswith(suffix):
                    continue
                name = shown(_bare(member.name))
                if member.type == tarfile.LNKTYPE:
                    link = _bare(member.linkname)
                    yield name, shown(texts.of(link, f"source {self.name}: member {name}"))
                elif member.isreg():
                    if member.size > _MAX_TEXT:
                        raise SourceError(
                            f"source {self.name}: member {name} has {member.size:,} bytes, more"
                            f" than the {_MAX_TEXT:,} of a text that is read."
                        )
                    data = stream.read(member.size)
                    texts.add(_bare(member.name), data)
                    yield name, shown(data)
        except OSError as error:
            raise cannot_read(self.name, error, "a tar archive") from error

    def _stream(self) -> tuple[Blob, _Stream]:
        """Open the archive for one pass. Raises: SourceError, OSError."""
        blob = open_blob(self._location)
        magic = blob.read_at(0, 6)
        for other, name in _OTHER_PACKERS.items():
            if magic.startswith(other):
                raise SourceError(
                    f"source {self.name} is packed by {name}, which has no random access."
                    " Unpack it to .tar, or pack it by gzip."
                )
        return blob, _Stream(self.name, blob, magic.startswith(gz.MAGIC))

    def _keep_index(self, blob: Blob, stream: _Stream) -> None:
        if stream.is_packed and self._index is not None:
            gz.keep_index(blob, stream.at, self._index)

    def _entries(
        self, stream: _Stream, filters: Filters, skipped: Skipped
    ) -> Iterator[samples.Member]:
        chosen = chooser(filters, skipped)
        earlier = OrderedDict[bytes, tuple[int, bytes]]()
        """Name → size and locator of the last members that are files, for hard links."""
        texts = _Texts()
        for member in _members(stream):
            name, link = _bare(member.name), _bare(member.linkname)
            if member.type in _IGNORED or name.endswith(b"/"):
                continue
            size, locator, data = -1, b"", None
            if member.issparse():
                error = b"is stored as a sparse file. Pack without --sparse"
                locator = bytes([_UNSUPPORTED]) + error
            elif member.type == tarfile.LNKTYPE and link in earlier:
                size, locator = earlier[link]
                if samples.is_wanted(self.name, name, size, self._keeper):
                    data = texts.of(link, f"source {self.name}: member {shown(name)}")
            elif member.type in _NO_FILES:
                error = _NO_FILES[member.type].format(shown(link), _LINK_WINDOW).encode()
                locator = bytes([_READ_ERROR]) + error
            else:
                size, start = member.size, member.offset_data
                kind, crc = _PLAIN, 0
                if samples.is_wanted(self.name, name, size, self._keeper):
                    data = stream.read(size)
                    if stream.is_short:
                        raise stream.cut(f"member {shown(name)}")
                    texts.add(name, data)
                if stream.is_packed:  # it has to be unpacked anyway
                    kind, crc = _PACKED, stream.checksum(start + size, member)
                    crc = crc if data is None else zlib.crc32(data)
                locator = _LOCATOR.pack(kind, start, size, member.header_crc, crc)
            if size >= 0:
                earlier[name] = (size, locator)
                if len(earlier) > _LINK_WINDOW:
                    earlier.popitem(last=False)
            entry = Entry(self._position, name, size, locator=locator) if chosen(name) else None
            yield samples.Member(name, entry, data)

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:  # noqa: ARG002 - the locator says it
        """Return a member's bytes, by one read. The header before them must still be the one that
        was listed.
        """
        if locator[0] in (_READ_ERROR, _UNSUPPORTED):
            raise BadImage(
                Status.READ_ERROR if locator[0] == _READ_ERROR else Status.UNSUPPORTED,
                locator[1:].decode(),
            )
        kind, start, size, header_crc, crc = _LOCATOR.unpack(locator)
        if size > max_bytes:
            raise too_large(size, max_bytes)
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
                f"the archive ends {counted(_BLOCK + size - len(data), 'byte')} before it does",
            )
        data = data[_BLOCK:]
        if kind == _PACKED and zlib.crc32(data) != crc:
            raise BadImage(
                Status.CORRUPT,
                "its checksum is not the one that was found when the archive was listed",
            )
        return data


class _Stream:
    """The bytes of an archive in one pass forwards, as `tarfile` reads them; and what is wrong with
    them. Raises: SourceError, OSError.
    """

    def __init__(self, name: str, blob: Blob, is_packed: bool) -> None:
        self._name = name
        self._size = blob.size
        self.is_packed = is_packed
        file = io.BufferedReader(BlobFile(blob), _READ_BYTES)
        self._file = cast("BinaryIO", gzip.GzipFile(fileobj=file)) if is_packed else file
        self._ahead = b""
        self._crc = 0
        self.at = 0
        self.is_short = False
        """Whether the last read met the end."""
        self.empty_blocks = 0
        """Since the last header."""
        self.garbage = ""
        """What garbage follows: the gzip data, or the end of the archive. Empty: there is none."""

    def tell(self) -> int:
        return self.at

    def read(self, size: int) -> bytes:
        """Read `size` bytes; fewer only at the end."""
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
        else:
            data = self._read(size)
        self._crc = zlib.crc32(data, self._crc) if self.is_packed else 0
        self.at += len(data)
        self.is_short = len(data) < size
        return data

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except EOFError as error:
            raise SourceError(
                f"source {self._name} is cut short: its gzip data have no end. {GET_IT_AGAIN}"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            # Garbage after gzip data is ignored, as by gzip and tar, but only after the end of the
            # tar. Elsewhere it may hide members.
            if self.empty_blocks >= _END_BLOCKS and str(error).startswith("Not a gzipped file"):
                self.garbage = "its gzip data"
                return b""
            raise self.damaged(f"its gzip data cannot be unpacked: {error}") from error

    def unread(self, data: bytes) -> None:
        """Give bytes back that were just read."""
        self._ahead = data
        self.at -= len(data)

    def go_to(self, position: int, member: _Member) -> None:
        """Go forwards to a position inside a member or at its end."""
        if self.is_packed:
            while self.at < position and self.read(min(position - self.at, _READ_BYTES)):
                pass
        else:
            self.at = min(position, self._size)
            self._file.seek(self.at)
        if self.at < position:
            raise self.cut(f"member {shown(_bare(member.name))}")

    def checksum(self, end: int, member: _Member) -> int:
        """Read a member's data, and return their CRC-32."""
        self._crc = 0
        self.go_to(end, member)
        return self._crc

    def pass_over_garbage(self) -> None:
        """Read what follows the end and is not a header. A header after it shows that the archive
        is damaged there.
        """
        start = self.at - _BLOCK
        while block := self.read(_BLOCK):
            if block[257:262] == b"ustar" and _is_header(block):
                raise self.damaged(
                    f"at byte {start:,} there should be a header, and the next one is at byte"
                    f" {self.at - _BLOCK:,}"
                )
        self.garbage = self.garbage or f"the end of the archive, at byte {start:,},"

    def no_header(self) -> SourceError:
        """Return the error for the block just read, which should be a header."""
        if self.at == 0:
            return SourceError(f"source {self._name} is empty, and no tar archive. Get it again.")
        if self.at <= _BLOCK:
            return SourceError(
                f"source {self._name} is no tar archive: it does not begin with a header. Give one,"
                " or its folder."
            )
        if self.is_short:
            return self.cut("a header")
        return self.damaged(f"at byte {self.at - _BLOCK:,} there should be a header, and is none")

    def damaged(self, why: str) -> SourceError:
        return SourceError(f"source {self._name} is damaged: {why}. {GET_IT_AGAIN}")

    def cut(self, what: str) -> SourceError:
        return SourceError(
            f"source {self._name} is cut short: it ends at byte {self.at:,}, inside {what}."
            f" {GET_IT_AGAIN}"
        )


class _Member(tarfile.TarInfo):
    """A member of an archive. Damage that `tarfile` passes over raises SourceError."""

    header_crc: int

    @classmethod
    def fromtarfile(cls, archive: Any) -> Self:
        stream: _Stream = archive.fileobj
        block = stream.read(_BLOCK)
        if not block:
            if stream.at == 0:
                raise stream.no_header()
            raise tarfile.EmptyHeaderError  # type: ignore[attr-defined]
        if not block.strip(b"\0"):
            stream.empty_blocks += 1
            raise tarfile.EOFHeaderError  # type: ignore[attr-defined]
        try:
            member = cls.frombuf(block, archive.encoding, archive.errors)
        except tarfile.HeaderError as error:
            if stream.empty_blocks < _END_BLOCKS:
                raise stream.no_header() from error
            stream.pass_over_garbage()
            raise tarfile.EmptyHeaderError from error  # type: ignore[attr-defined]
        stream.empty_blocks = 0
        if block[257:263] != b"ustar\0":  # GNU tar has times where ustar has the start of a name
            name = block[:100].partition(b"\0")[0]
            member.name = name.decode(archive.encoding, archive.errors)
        member.offset = stream.at - _BLOCK
        member.header_crc = zlib.crc32(block)
        if not 0 <= member.size <= _MAX_MEMBER:
            raise stream.damaged(f"at byte {member.offset:,} a header has no sensible size")
        if member.type in _LONG_HEADERS:
            member._check_long_header(stream)
        return cast("Self", member._proc_member(archive))  # type: ignore[attr-defined]

    def _check_long_header(self, stream: _Stream) -> None:
        if self.size > _MAX_LONG_HEADER:
            raise stream.damaged(
                f"at byte {self.offset:,} a header says that it has {self.size:,} bytes"
            )
        start = stream.at
        blocks = stream.read(-(-self.size // _BLOCK) * _BLOCK)
        if stream.is_short:
            raise stream.cut("a long header")
        stream.unread(blocks)
        data, at = blocks[: self.size], 0
        while self.type not in _LONG_NAMES and at < len(data) and data[at] != 0:
            record = _PAX_RECORD.match(data, at)
            length = int(record[1]) if record else 0
            if record is None or not record.end() - at < length <= len(data) - at:
                raise stream.damaged(f"at byte {start + at:,} a PAX header has no sensible record")
            at += length


def _members(stream: _Stream) -> Iterator[_Member]:
    """Yield the members of an archive, holding one at a time in memory."""
    try:
        archive = tarfile.TarFile(
            fileobj=cast("BinaryIO", stream),
            tarinfo=_Member,
            ignore_zeros=True,  # archives that were appended to each other
            encoding="utf-8",
            errors="surrogateescape",
        )
        while (member := cast("_Member | None", archive.next())) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            if not _DECIMAL.fullmatch(member.pax_headers.get("size", "0")):
                raise stream.damaged(
                    f"at byte {member.offset_data - _BLOCK:,} a header has no sensible size"
                )
            end = archive.offset
            yield member
            stream.go_to(end, member)
    except (tarfile.TarError, ValueError, LookupError, RecursionError) as error:
        if stream.is_short:
            raise stream.cut("a header") from error
        raise stream.damaged(f"before byte {stream.at:,} a header makes no sense") from error


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _bare(name: str) -> bytes:
    """Return a name without the `./` that `tar -c .` puts before it."""
    return _DOT_SLASH.sub(b"", name.encode("utf-8", "surrogateescape"))
