"""What a source file is, judged by its first bytes and its suffix: an image, a list of images, or a
file that is neither.

    refuse_file    FILE: an error unless it is an image
    refuse_list    @FILE: an error unless it is text

Only the kinds that people give by mistake are named. A file of another kind gets the general error.
"""

from __future__ import annotations

import codecs
import re
from pathlib import PurePosixPath

from msgspec import Struct

from imagemill.errors import UsageError
from imagemill.pipeline.sources.base import IMAGE_SUFFIXES

HEAD_BYTES = 512
"""How much of a file is looked at: a tar archive is known by bytes 257 to 262."""

_IMAGE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|II[*+]\0|MM\0[*+]"
    rb"|RIFF.{4}WEBP|8BPS|\0\0\0\x0c(jP|JXL) "
    rb"|.{4}ftyp(avi[fs]|hei[cxms]|hev[cxms]|mif1|msf1)|\0\0[\x01\x02]\0|qoif|DDS"
    rb" |icns|P[1-7]\s+[#\d]|P[Ff]\s+\d|#\?R(ADIANCE|GBE)"
    rb"|\xff\x0a|\xff\x4f\xff\x51|\x76\x2f\x31\x01|SIMPLE  =|/\*"
    rb" XPM|\x0a[\0\x02\x03\x05]\x01|\x01\xda[\0\x01][\x01\x02]",
    re.DOTALL,
)
"""How the image formats begin that have a signature."""
_TEXT_CONTROLS = frozenset(b"\t\n\r\f\x1b")


class _Kind(Struct, frozen=True):
    """A kind of file that is not an image."""

    what: str
    remedy: str
    suffixes: tuple[str, ...]
    signature: bytes = rb"(?!)"
    """A regular expression; by default one that matches nothing."""
    is_list: bool = False
    """Whether `@FILE` is the right way to give it, so that `@` is refused by content alone."""


_AS_PATHS = (
    "Write its paths or URLs one a line into a .txt file, or as a column of a .csv or .parquet"
    " file, and give that as @LIST."
)
_AS_TABLE = "Convert it to Parquet, or write its images to files or a .tar archive."
# formats that are zip archives or text inside come first, for their content says something else
_BY_SUFFIX = (
    _Kind(
        "a spreadsheet",
        "Save the sheet as CSV and give that as @LIST.",
        (".xlsx", ".xls", ".ods", ".numbers"),
    ),
    _Kind("a NumPy file", _AS_TABLE, (".npy", ".npz"), rb"\x93NUMPY"),
    _Kind(
        "a document",
        "Extract its images and give their folder.",
        (".docx", ".pptx", ".odt", ".epub", ".pdf"),
        rb"%PDF-",
    ),
    _Kind(
        "a web page",
        "List the URLs of its images in a file and give that as @LIST.",
        (".html", ".htm"),
    ),
    _Kind(
        "a video",
        "Extract its frames as images and give their folder.",
        (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"),
    ),
    _Kind("a JSON file", _AS_PATHS, (".json", ".jsonl", ".ndjson")),
    _Kind("a table", "If it lists images, give @FILE.", (".csv", ".tsv"), is_list=True),
    _Kind("a list", "If it lists images, give @FILE.", (".txt", ".lst", ".list"), is_list=True),
)
_BY_CONTENT = (
    _Kind("a zip archive", "Rename it to end in .zip.", (".cbz",), rb"PK(\x03\x04|\x05\x06)"),
    _Kind("a tar archive", "Rename it to end in .tar.", (".cbt",), rb".{257}ustar"),
    _Kind(
        "compressed by gzip",
        "Decompress it (gunzip). If it is a tar archive, rename it to end in .tar.gz instead.",
        (".gz",),
        rb"\x1f\x8b",
    ),
    _Kind(
        "compressed by bzip2",
        "Decompress it (bunzip2).",
        (".bz2",),
        rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)",
    ),
    _Kind("compressed by xz", "Decompress it (unxz).", (".xz", ".lzma"), rb"\xfd7zXZ\0"),
    _Kind("compressed by zstd", "Decompress it (unzstd).", (".zst", ".zstd"), rb"\x28\xb5\x2f\xfd"),
    _Kind("compressed by lz4", "Decompress it (unlz4).", (".lz4",), rb"\x04\x22\x4d\x18"),
    _Kind(
        "a 7z archive",
        "Unpack it and give the folder, or pack its images as .zip.",
        (".7z", ".cb7"),
        rb"7z\xbc\xaf\x27\x1c",
    ),
    _Kind(
        "a RAR archive",
        "Unpack it and give the folder, or pack its images as .zip.",
        (".rar", ".cbr"),
        rb"Rar!\x1a\x07",
    ),
    _Kind("a Parquet table", "Rename it to end in .parquet.", (".pq", ".parq"), rb"PAR1"),
    _Kind(
        "an Arrow file",
        _AS_TABLE,
        (".arrow", ".feather", ".ipc"),
        rb"ARROW1|FEA1|\xff{4}.{3}\0.{4}",
    ),
    _Kind("a TFRecord file", _AS_TABLE, (".tfrecord", ".tfrecords", ".tfrec")),
    _Kind("an HDF5 file", _AS_TABLE, (".h5", ".hdf5", ".hdf"), rb"\x89HDF\r\n\x1a\n"),
    _Kind("an LMDB database", _AS_TABLE, (".lmdb", ".mdb"), rb".{16}\xde\xc0\xef\xbe"),
    _Kind("an Avro file", _AS_TABLE, (".avro",), rb"Obj\x01"),
    _Kind("an SQLite database", _AS_TABLE, (".db", ".sqlite", ".sqlite3"), rb"SQLite format 3\0"),
    _Kind("a RecordIO or pickle file", _AS_TABLE, (".rec", ".pkl", ".pickle", ".pt", ".pth")),
)
_KINDS = (*_BY_SUFFIX, *_BY_CONTENT)
_ANYWAY = "To try it as an image, add --all-files."
_TEXT = _Kind("a text file", "If it lists images, give @FILE.", (), is_list=True)


def encoding_of(head: bytes) -> str:
    """Return the encoding of a text by its byte order mark, as PowerShell and Excel write it; else
    UTF-8, of which bytes may be wrong.
    """
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


def refuse_file(source: str, head: bytes | None) -> None:
    """Refuse a source file that is not an image.

    Args:
        source: its path or URL.
        head: its first bytes; None: they are not known, so that only a known suffix is refused.

    Raises:
        UsageError: what it is and how to give it.
    """
    suffix = _suffix(source)
    if suffix in IMAGE_SUFFIXES or (head and _IMAGE.match(head)):
        return
    kind = _kind(suffix, head or b"")
    if kind is not None:
        raise UsageError(
            f"source {source} is {kind.what}, not an image. {kind.remedy.replace('FILE', source)}"
            f" {_ANYWAY}"
        )
    if head is not None:
        begins = f"its first bytes are {head[:8].hex(' ')}" if head else "it is empty"
        raise UsageError(
            f"source {source} is not an image: {begins}. Give a folder, an image or a list (@FILE)."
            f" {_ANYWAY}"
        )


def refuse_list(source: str, head: bytes) -> None:
    """Refuse a list, `@FILE`, that is not text.

    Args:
        source: its path or URL, with the `@`.
        head: its first bytes.

    Raises:
        UsageError: what it is and how to give it.
    """
    file = source.removeprefix("@")
    wanted = "not a text file with one path or URL a line"
    kind = next(
        (kind for kind in _BY_SUFFIX if _suffix(file) in kind.suffixes and not kind.is_list), None
    )
    if kind is None and (encoding_of(head) != "utf-8-sig" or _is_text(head)):
        return
    if kind is None and _IMAGE.match(head):
        raise UsageError(f"source {source} is an image, {wanted}. Leave out the @.")
    kind = kind or _by_signature(head)
    if kind is not None:
        is_source = file.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz"))
        remedy = "Leave out the @." if is_source else kind.remedy.replace("FILE", file)
        raise UsageError(f"source {source} is {kind.what}, {wanted}. {remedy}")
    if b"\0" in head:
        raise UsageError(
            f"source {source} is {wanted}: it has NUL bytes. Write it as UTF-8, with line breaks"
            " between the paths (no -print0)."
        )


def _kind(suffix: str, head: bytes) -> _Kind | None:
    """What a file that is not an image is; None: not known."""
    by_suffix = next((kind for kind in _KINDS if suffix in kind.suffixes), None)
    if by_suffix in _BY_SUFFIX and not (by_suffix and by_suffix.is_list):
        return by_suffix
    is_text = head and (_is_text(head) or encoding_of(head) != "utf-8-sig")
    return _by_signature(head) or by_suffix or (_TEXT if is_text else None)


def _by_signature(head: bytes) -> _Kind | None:
    return next((kind for kind in _KINDS if re.match(kind.signature, head, re.DOTALL)), None)


def _is_text(head: bytes) -> bool:
    """Whether bytes are UTF-8 without control characters; a character that is cut at the end does
    not matter.
    """
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(byte >= ord(" ") or byte in _TEXT_CONTROLS for byte in head)


def _suffix(name: str) -> str:
    if "://" in name:
        name = re.split(r"[?#]", name, maxsplit=1)[0]
    return PurePosixPath(name).suffix.lower()
