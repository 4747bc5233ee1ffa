"""Random access to a gzip file, by an index of places where decompression can start.

indexed_gzip makes the index while the archive is listed; docs/sources.md says where it is kept. But
it ignores broken and missing ends of a file. So the standard library reads the file to list it, and
each fetch compares the checksum of the image with the one found then.
"""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

from imagemill.system import files
from imagemill.system.storage import Blob, BlobFile

MAGIC = b"\x1f\x8b"
_LEAST_SPACING_BYTES, _MOST_SPACING_BYTES, _POINTS = 2**20, 2**24, 256
_BLOCKS_KEPT = 4
_READ_BYTES = 2**18
_HEADER = struct.Struct("<8sQL")
_HEADER_MAGIC = b"imgzidx1"
"""Of a kept index: this, the size of its gzip file, the CRC-32 of what follows, which is
indexed_gzip's own format.
"""


class GzipBlob:
    """What a gzip file unpacks to, as a blob. Safe to read from many threads, one of which unpacks
    at a time.

    Unpacking (some 200 MB/s) is far faster than decoding what comes of it, so one handle and its
    lock serve all threads; a handle for each would hold its own copy of the index.

    Args:
        blob: the gzip file.
        index: where `keep_index` may have put the index.
    """

    size = 2**63 - 1
    """Not known; reads end where it does."""

    def __init__(self, blob: Blob, index: Path | None) -> None:
        import indexed_gzip

        self._lock = threading.Lock()
        self._file = _Remembering(blob)
        self._block_bytes = _spacing(blob)
        self._blocks = OrderedDict[int, bytes]()
        self._unpacker = indexed_gzip._IndexedGzipFile(
            fileobj=self._file, spacing=self._block_bytes, readbuf_size=_READ_BYTES
        )
        if index is not None and (kept := _read_index(index, blob)) is not None:
            self._unpacker.import_index(fileobj=io.BytesIO(kept))

    def read_at(self, offset: int, length: int) -> bytes:
        """Return unpacked bytes. Raises: OSError; zlib.error if they cannot be unpacked."""
        pieces = []
        while length > 0:
            number, start = divmod(offset, self._block_bytes)
            piece = self._block(number)[start : start + length]
            if not piece:
                break
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    def _block(self, number: int) -> bytes:
        """One block. It begins near a place of the index, and images that follow each other share
        it.
        """
        import indexed_gzip

        with self._lock:
            if number not in self._blocks:
                try:
                    self._unpacker.seek(number * self._block_bytes)
                    at_end = self._unpacker.tell() < number * self._block_bytes
                    block = b"" if at_end else self._unpacker.read(self._block_bytes)
                # Its own errors are OSErrors, too.
                except (OSError, indexed_gzip.NotCoveredError) as error:
                    if self._file.error is not None:
                        raise self._file.error from error
                    raise zlib.error("its gzip data are damaged") from error
                self._blocks[number] = block
                if len(self._blocks) > _BLOCKS_KEPT:
                    self._blocks.popitem(last=False)
            self._blocks.move_to_end(number)
            return self._blocks[number]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._unpacker.close()


class _Remembering(BlobFile):
    """A file that remembers why it could not be read: indexed_gzip forgets it."""

    error: OSError | None = None

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.error = error
            raise


def keep_index(blob: Blob, end: int, path: Path) -> None:
    """Make the index of a gzip file and write it to `path`, whole.

    Args:
        end: as far as the index must reach, in unpacked bytes.

    Raises:
        OutputError: it cannot be written. OSError: the gzip file cannot be read.
    """
    import indexed_gzip

    unpacker = indexed_gzip._IndexedGzipFile(
        fileobj=BlobFile(blob), spacing=_spacing(blob), readbuf_size=_READ_BYTES
    )
    unpacker.seek(end)
    index = io.BytesIO()
    unpacker.export_index(fileobj=index)
    unpacker.close()
    data = index.getvalue()
    files.write_whole(path, (_HEADER.pack(_HEADER_MAGIC, blob.size, zlib.crc32(data)), data))


def _read_index(path: Path, blob: Blob) -> bytes | None:
    """A kept index; None where it is not there, damaged, or of another file."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    index = data[_HEADER.size :]
    header = _HEADER.pack(_HEADER_MAGIC, blob.size, zlib.crc32(index))
    return index if data.startswith(header) else None


def _spacing(blob: Blob) -> int:
    return min(max(blob.size // _POINTS, _LEAST_SPACING_BYTES), _MOST_SPACING_BYTES)
