"""A zip archive, read in place: its directory is streamed once, and an image is found again by its
directory entry.

Nothing is ever extracted: names with `..`, backslashes or a leading slash are names and nothing
else. A name that is there twice is two images. The standard library's reader is not used, because
it holds every member of the directory in memory.
"""

from __future__ import annotations

import bz2
import contextlib
import io
import lzma
import re
import stat
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from itertools import count
from typing import Any

from msgspec import Struct

from imagemill.errors import SourceError, counted
from imagemill.pipeline.sources.archive import GET_IT_AGAIN, LazyBlob, cannot_read
from imagemill.pipeline.sources.base import Skipped, chooser, shown, too_large
from imagemill.records import BadImage, Entry, Filters, Status
from imagemill.system.storage import Blob, BlobFile, open_blob

_LOCAL = struct.Struct("<4s22x2H")
"""A member's own header: signature, lengths of name and extra fields."""
_CENTRAL = struct.Struct("<4sH2x2H4x3L3H4x2L")
"""A line of the central directory: signature, version and system that made it, flags, method,
CRC-32, compressed and uncompressed size, lengths of name, extra fields and comment, external
attributes, offset of the local header.
"""
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_END_64_LOCATOR = struct.Struct("<4sLQL")
_LOCATOR = struct.Struct("<QQQLHHB")
"""Ours: offset of the local header, compressed and uncompressed size, CRC-32, method, flags,
whether it is a symbolic link.
"""

_LONGEST_COMMENT = 65_535
_DIRECTORY_BLOCK_BYTES = 2**18
_LOCAL_EXTRA_BYTES = 64
"""Read along with a member's header: most writers put 0 to 36 bytes of extra fields there."""
_LZMA_MEMORY_BYTES = 2**28
_WRAP = 2**32
"""Writers without zip64, such as the Finder of macOS, keep only the low 32 bits of larger offsets
and sizes.
"""

_ENCRYPTED_FLAGS = 0x0001 | 0x0040 | 0x2000
_PATCH_FLAG = 0x0020
_END_MARKER_FLAG = 0x0002
_DEFLATE, _BZIP2, _LZMA = 8, 12, 14
_METHODS = {
    1: "Shrink",
    6: "Implode",
    9: "Deflate64",
    20: "Zstandard",
    93: "Zstandard",
    95: "xz",
    98: "PPMd",
    99: "AES encryption",
}
_UNIX, _DOS_FOLDER = 3, 0x10
_ENCODINGS = """utf-8 cp437 cp850 cp852 cp857 cp862 cp866 cp874 cp1250 cp1251 cp1252 cp1253
    cp1254 cp1255 cp1256 cp1258 cp932 cp949 gb18030 big5 mac_roman""".split()
"""Encodings of names: UTF-8, and the code pages that tools on Windows, DOS and macOS use by
default.
"""


class _Directory(Struct, frozen=True):
    """Where the central directory lies."""

    start: int
    bytes: int
    members: int
    modulo: int
    """Members are counted modulo this: old writers let the count of 16 bits run over."""
    prefix: int
    """Bytes before the archive, such as the program of one that unpacks itself; offsets do not
    count them.
    """


class _Member(Struct, frozen=True):
    """One line of the central directory."""

    name: bytes
    offset: int
    stored_bytes: int
    bytes: int
    crc: int
    method: int
    flags: int
    is_folder: bool
    is_link: bool


class ZipSource:
    """A zip archive at a path or URL."""

    def __init__(self, position: int, location: bytes) -> None:
        self.name = shown(location)
        self._position = position
        self._location = location
        self._blob = LazyBlob(lambda: open_blob(location))
        self._wraps = 0
        """How often the offset of the last member that was read had wrapped around 32 bits. Its
        neighbours are likely to be near it.
        """

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """Yield the members in the order of the directory."""
        chosen = chooser(filters, skipped)
        try:
            blob = open_blob(self._location)
            for member in self._members(blob, self._directory(blob)):
                if not member.is_folder and chosen(member.name):
                    sizes = (member.stored_bytes, member.bytes, member.crc)
                    locator = _LOCATOR.pack(
                        member.offset, *sizes, member.method, member.flags, member.is_link
                    )
                    yield Entry(
                        self._position,
                        member.name,
                        member.bytes if member.bytes < 2**63 else -1,
                        locator=locator,
                    )
        except OSError as error:
            raise cannot_read(self.name, error, "a zip archive") from error

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:
        """Return a member's bytes. It takes one read, or two if the member's header is longer than
        most; more if its offset has wrapped.
        """
        offset, stored_bytes, size, crc, method, flags, is_link = _LOCATOR.unpack(locator)
        _refuse(method, flags, is_link)
        # What cannot be made smaller grows by far less than an eighth.
        if max(size, stored_bytes - stored_bytes // 8) > max_bytes:
            raise too_large(max(size, stored_bytes), max_bytes)
        stored = self._stored(path, offset, stored_bytes)
        data = _unpacked(stored, size, method, flags)
        if zlib.crc32(data) != crc:
            raise BadImage(
                Status.CORRUPT, "its checksum differs from the one in the archive's directory"
            )
        return data

    def _stored(self, path: bytes, offset: int, stored_bytes: int) -> bytes:
        """Return the bytes of a member as they are stored, from the first place that its offset may
        mean. Raises: BadImage.
        """
        wraps = self._wraps
        stored = self._stored_at(path, offset + wraps * _WRAP, stored_bytes)
        if isinstance(stored, bytes):
            return stored
        first = BadImage(Status.TRUNCATED, "the archive ends before it")
        for turn in count():
            stored = self._stored_at(path, offset + turn * _WRAP, stored_bytes)
            if isinstance(stored, bytes):
                self._wraps = turn
                return stored
            if stored.status == Status.TRUNCATED:
                break
            first = stored if turn == 0 else first
        raise first

    def _stored_at(self, path: bytes, offset: int, stored_bytes: int) -> bytes | BadImage:
        """Return the bytes of the member whose header is at `offset`, or why there is no such
        header. Raises: BadImage.
        """
        guess = _LOCAL.size + len(path) + _LOCAL_EXTRA_BYTES + stored_bytes
        data = self._blob.read_at(offset, guess)
        if len(data) < _LOCAL.size:
            return BadImage(Status.TRUNCATED, "the archive ends before it")
        signature, name_bytes, extra_bytes = _LOCAL.unpack_from(data)
        start = _LOCAL.size + name_bytes + extra_bytes
        if signature != b"PK\3\4":
            return BadImage(Status.CORRUPT, _NOT_HERE)
        if start + stored_bytes > guess:
            data += self._blob.read_at(offset + guess, start + stored_bytes - guess)
        if len(data) < _LOCAL.size + name_bytes:
            return BadImage(Status.TRUNCATED, "the archive ends before it")
        if not _is_same_name(data[_LOCAL.size : _LOCAL.size + name_bytes], path):
            return BadImage(Status.CORRUPT, _NOT_HERE)
        if len(data) < start + stored_bytes:
            missing = counted(start + stored_bytes - len(data), "byte")
            raise BadImage(Status.TRUNCATED, f"the archive ends {missing} before it does")
        return data[start : start + stored_bytes]

    def _directory(self, blob: Blob) -> _Directory:
        """Find the central directory from the end of the archive. Raises: SourceError, OSError."""
        tail_at = max(0, blob.size - _END.size - _LONGEST_COMMENT)
        tail = blob.read_at(tail_at, blob.size - tail_at)
        ends = [
            match.start()
            for match in re.finditer(b"PK\5\6", tail)
            if match.start() + _END.size <= len(tail)
        ]
        if not ends:
            raise SourceError(
                f"source {self.name} is no zip archive, or is cut short: its directory is missing."
                f" {GET_IT_AGAIN}"
            )
        # The last one whose comment ends where the archive does; a comment may itself hold the
        # signature, and rubbish may follow.
        closed = [at for at in ends if at + _END.size + _END.unpack_from(tail, at)[-1] == len(tail)]
        at = closed[-1] if closed else ends[-1]
        _, disk, first_disk, _, members, size, start, _ = _END.unpack_from(tail, at)
        directory_end, modulo = tail_at + at, 2**16
        found = self._end_64(blob, directory_end) if directory_end >= _END_64_LOCATOR.size else None
        if found is not None:
            directory_end, (_, _, _, _, disk, first_disk, _, members, size, start) = found
            modulo = 2**64
        if disk or first_disk:
            raise SourceError(
                f"source {self.name} is volume {disk + 1} of an archive in several. Join them"
                " first: `zip -s 0 FIRST.zip --out WHOLE.zip`."
            )
        if size > directory_end:
            raise self._damaged(
                f"it should have {size:,} bytes, {directory_end:,} lie before its end"
            )
        if found is None and (directory_end - size - start) % _WRAP == 0:
            start = directory_end - size  # the offset of a directory beyond 4 GiB may have wrapped
        for prefix in (directory_end - size - start, 0):
            at = prefix + start
            if (
                prefix >= 0
                and at <= directory_end
                and (members == 0 or blob.read_at(at, 4) == b"PK\1\2")
            ):
                break
        else:
            raise self._damaged(f"nothing of it lies at byte {start:,}")
        if prefix and (blob.read_at(0, 4) == b"PK\3\4" or _ends_with_header(blob, prefix)):
            # A program may lie in front of an archive. If another archive does, that is the one
            # which was asked for.
            raise SourceError(
                f"source {self.name} is cut short: its directory is missing; the last one there is"
                f" of an archive within it. {GET_IT_AGAIN}"
            )
        return _Directory(at, size, members, modulo, prefix)

    def _end_64(self, blob: Blob, end: int) -> tuple[int, tuple[int, ...]] | None:
        """The zip64 end record that belongs to the end record at `end`: where it lies and its
        fields; None where there is none.
        """
        locator_at = end - _END_64_LOCATOR.size
        signature, disk, record_at, disks = _END_64_LOCATOR.unpack(
            blob.read_at(locator_at, _END_64_LOCATOR.size)
        )
        if signature != b"PK\6\7":
            return None
        if disk or disks > 1:
            raise SourceError(
                f"source {self.name} is one volume of an archive in {disks}. Join them first: `zip"
                " -s 0 FIRST.zip --out WHOLE.zip`."
            )
        # The latter where something was put in front of the archive.
        for at in (record_at, locator_at - _END_64.size):
            record = blob.read_at(at, _END_64.size) if 0 <= at <= locator_at - _END_64.size else b""
            if record[:4] == b"PK\6\6":
                return at, _END_64.unpack(record)
        raise self._damaged("its zip64 end record is missing")

    def _members(self, blob: Blob, directory: _Directory) -> Iterator[_Member]:
        """Stream the central directory. Raises: SourceError, OSError."""
        file = io.BufferedReader(BlobFile(blob), _DIRECTORY_BLOCK_BYTES)
        file.seek(directory.start)
        left, count = directory.bytes, 0
        while left > 0:
            head = file.read(min(left, _CENTRAL.size))
            if head[:4] == b"PK\5\5":
                break  # a digital signature ends the directory
            if len(head) < _CENTRAL.size or head[:4] != b"PK\1\2":
                raise self._damaged(
                    f"member {count + 1:,} of it, at byte {file.tell() - len(head):,}, is none"
                )
            _, made_by, flags, method, crc, packed, size, *lengths, outside, offset = (
                _CENTRAL.unpack(head)
            )
            names, extras, comments = lengths
            rest = file.read(names + extras + comments)
            left -= _CENTRAL.size + len(rest)
            if len(rest) < names + extras + comments or left < 0:
                raise self._damaged(f"member {count + 1:,} of it reaches beyond its end")
            name, extra = rest[:names], rest[names : names + extras]
            packed, size, offset = _widened(extra, packed, size, offset)
            is_link = made_by >> 8 == _UNIX and stat.S_ISLNK(outside >> 16)
            is_folder = name.endswith(b"/") or bool(outside & _DOS_FOLDER and not size)
            offset += directory.prefix
            yield _Member(name, offset, packed, size, crc, method, flags, is_folder, is_link)
            count += 1
        if count % directory.modulo != directory.members:
            raise self._damaged(
                f"it holds {counted(count, 'member')} and should hold {directory.members:,}"
            )

    def _damaged(self, why: str) -> SourceError:
        return SourceError(
            f"source {self.name}: the directory of the zip archive is damaged: {why}."
            f" {GET_IT_AGAIN}"
        )


def _widened(extra: bytes, packed: int, size: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset of a member; those that did not fit into 32 bits are in its zip64 field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = iter(
                struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4)
            )
            size, packed, offset = (
                next(field, value) if value == 0xFFFFFFFF else value
                for value in (size, packed, offset)
            )
            break
        at += 4 + length
    # Beyond the end of every archive, also when a prefix is added.
    return packed, size, min(offset, 2**63)


_NOT_HERE = (
    "it is not where the archive's directory says, or the archive was changed since it was listed"
)


def _is_same_name(local: bytes, central: bytes) -> bool:
    """Return whether the names in a member's header and in the directory are the same name.

    Some writers use `\\` in one and `/` in the other, or two encodings, such as UTF-8 and the code
    page of the machine.
    """
    return local == central or not _spellings(local).isdisjoint(_spellings(central))


def _spellings(name: bytes) -> set[str]:
    """Return the texts that a name can mean, with `/` between folders."""
    texts = set()
    for encoding in ("ascii",) if name.isascii() else _ENCODINGS:
        with contextlib.suppress(UnicodeDecodeError):
            texts.add(unicodedata.normalize("NFC", name.decode(encoding).replace("\\", "/")))
    return texts


def _ends_with_header(blob: Blob, end: int) -> bool:
    """Return whether a member's header ends at `end`, so that what follows is the data of that
    member.
    """
    data = blob.read_at(max(0, end - _LONGEST_COMMENT), min(end, _LONGEST_COMMENT))
    headers = (
        match.start()
        for match in re.finditer(b"PK\3\4", data)
        if match.start() + _LOCAL.size <= len(data)
    )
    return any(
        at + _LOCAL.size + sum(_LOCAL.unpack_from(data, at)[1:]) == len(data) for at in headers
    )


def _refuse(method: int, flags: int, is_link: bool) -> None:
    """Raises: BadImage for a member that cannot be had, whatever its bytes are."""
    if is_link:
        raise BadImage(
            Status.READ_ERROR, "is a symbolic link in the archive: such links are not followed"
        )
    if flags & _ENCRYPTED_FLAGS:
        raise BadImage(
            Status.UNSUPPORTED,
            "is encrypted. Unpack the archive with its password and give the folder",
        )
    if flags & _PATCH_FLAG or method not in (0, _DEFLATE, _BZIP2, _LZMA):
        name = "patch data" if flags & _PATCH_FLAG else _METHODS.get(method, "unknown")
        raise BadImage(
            Status.UNSUPPORTED,
            f"is packed by method {method} ({name}); stored, Deflate, bzip2 and LZMA can be read."
            " Unpack the archive and give the folder",
        )


def _unpacked(stored: bytes, size: int, method: int, flags: int) -> bytes:
    """Unpack a member; never more than its `size` and one byte, whatever it would become. Raises:
    BadImage.
    """
    if method == 0:
        if len(stored) != size:
            raise BadImage(
                Status.CORRUPT,
                f"is stored in {counted(len(stored), 'byte')}, the archive's directory says"
                f" {size:,}",
            )
        return stored
    try:
        if method == _LZMA:
            # The zip form has a version and the length of the properties where an .lzma file has
            # its sizes.
            declared = struct.pack("<Q", 2**64 - 1 if flags & _END_MARKER_FLAG else size)
            stored = stored[4:9] + declared + stored[9:]
            unpacker: Any = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY_BYTES)
        elif method == _BZIP2:
            unpacker = bz2.BZ2Decompressor()
        else:
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        data: bytes = unpacker.decompress(stored, size + 1)
    except (zlib.error, OSError, EOFError, lzma.LZMAError) as error:
        too_large = isinstance(error, lzma.LZMAError) and "emory" in str(error)
        raise BadImage(
            Status.TOO_LARGE if too_large else Status.CORRUPT, f"cannot be unpacked: {error}"
        ) from error
    if len(data) > size:
        raise BadImage(
            Status.CORRUPT,
            f"unpacks to more than the {counted(size, 'byte')} that the archive's directory says",
        )
    if len(data) < size:
        status = Status.CORRUPT if unpacker.eof else Status.TRUNCATED
        unpacked = counted(len(data), "byte")
        raise BadImage(status, f"unpacks to {unpacked}, the archive's directory says {size:,}")
    return data
