"""A file that is not an image, or a list that is not text, is refused with the way to give it."""

from __future__ import annotations

import gzip
import io
import os
import socket
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import archive_files
import helpers
import sample_images
from imagemill.errors import SourceError, UsageError
from imagemill.pipeline import sources
from imagemill.pipeline.sources import check_kinds, open_all, resolve
from imagemill.pipeline.sources.base import Skipped
from imagemill.records import Entry, Filters, Settings
from imagemill.runner import dry_run, run
from s3 import Bucket

Jobs = Callable[..., Settings]
CLI = Callable[..., helpers.Result]
Folders = Callable[..., Path]
CASES = Path(__file__).with_name("cases")


def check(*given: object, all_files: bool = False) -> None:
    check_kinds(resolve(map(str, given)), all_files=all_files)


def refusal(source: object) -> str:
    with pytest.raises(UsageError) as caught:
        check(source)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listed(source: object) -> list[Entry]:
    (opened,) = open_all(resolve([str(source)]))
    return list(opened.entries(Filters(), Skipped()))


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jpg", b"x")
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"path": ["a.jpg"]}), file)
    return file.getvalue()


def arrow(*, stream: bool = False) -> bytes:
    file = io.BytesIO()
    table = pa.table({"path": ["a.jpg"]})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (n)")
    return connection.serialize()


LIST = b"a.jpg\nb.jpg\n"
AS_IMAGE = "To try it as an image, add --all-files."
FILES: list[tuple[str, Callable[[], bytes], str]] = [
    ("paths.txt", lambda: LIST, "is a list, not an image. If it lists images, give @{file}."),
    (
        "t.csv",
        lambda: b"path\na.jpg\n",
        "is a table, not an image. If it lists images, give @{file}.",
    ),
    (
        "T.TSV",
        lambda: b"path\na.jpg\n",
        "is a table, not an image. If it lists images, give @{file}.",
    ),
    (
        "train.lst",
        lambda: b"0\t1\ta.jpg\n",
        "is a list, not an image. If it lists images, give @{file}.",
    ),
    ("paths", lambda: LIST, "is a text file, not an image. If it lists images, give @{file}."),
    (
        "utf16",
        lambda: "a.jpg\n".encode("utf-16"),
        "is a text file, not an image. If it lists images, give @{file}.",
    ),
    (
        "latin1.txt",
        lambda: b"\xe9.jpg\n",
        "is a list, not an image. If it lists images, give @{file}.",
    ),
    (
        "t.json",
        lambda: b'[{"path": "a.jpg"}]',
        "is a JSON file, not an image. Write its paths or URLs one a line",
    ),
    ("t.jsonl", lambda: b'{"path": "a.jpg"}\n', "is a JSON file, not an image."),
    ("t.xlsx", zipped, "is a spreadsheet, not an image. Save the sheet as CSV"),
    ("comic.cbz", zipped, "is a zip archive, not an image. Rename it to end in .zip."),
    ("photos", zipped, "is a zip archive, not an image. Rename it to end in .zip."),
    (
        "photos.dat",
        lambda: archive_files.tar({"a.jpg": b"x"}, "w"),
        "is a tar archive, not an image. Rename it to end in .tar.",
    ),
    (
        "t.csv.gz",
        lambda: gzip.compress(LIST),
        "is compressed by gzip, not an image. Decompress it (gunzip).",
    ),
    ("a.bz2", lambda: b"BZh91AY&SY", "is compressed by bzip2, not an image. Decompress it"),
    ("a.xz", lambda: b"\xfd7zXZ\0\0\4", "is compressed by xz, not an image. Decompress it"),
    (
        "a.zst",
        lambda: b"\x28\xb5\x2f\xfd\x24",
        "is compressed by zstd, not an image. Decompress it",
    ),
    (
        "a.7z",
        lambda: b"7z\xbc\xaf\x27\x1c\0\4",
        "is a 7z archive, not an image. Unpack it and give the folder",
    ),
    (
        "a.rar",
        lambda: b"Rar!\x1a\x07\x01\0",
        "is a RAR archive, not an image. Unpack it and give the folder",
    ),
    ("a.cbr", lambda: b"Rar!\x1a\x07\0", "is a RAR archive, not an image."),
    ("t.pq", parquet, "is a Parquet table, not an image. Rename it to end in .parquet."),
    ("t.arrow", arrow, "is an Arrow file, not an image. Convert it to Parquet"),
    (
        "data-00000-of-00001",
        lambda: arrow(stream=True),
        "is an Arrow file, not an image. Convert it to Parquet",
    ),
    ("t.feather", lambda: b"FEA1\0\0\0\0", "is an Arrow file, not an image. Convert it to Parquet"),
    (
        "t.tfrecord",
        lambda: b"\x10\0\0\0\0\0\0\0abcd",
        "is a TFRecord file, not an image. Convert it to Parquet",
    ),
    (
        "t.h5",
        lambda: b"\x89HDF\r\n\x1a\n\0",
        "is an HDF5 file, not an image. Convert it to Parquet",
    ),
    ("t.npz", zipped, "is a NumPy file, not an image. Convert it to Parquet"),
    ("t.npy", lambda: b"\x93NUMPY\x01\0", "is a NumPy file, not an image. Convert it to Parquet"),
    (
        "data.mdb",
        lambda: bytes(16) + b"\xde\xc0\xef\xbe" + bytes(9),
        "is an LMDB database, not an image. Convert it to Parquet",
    ),
    ("t.avro", lambda: b"Obj\x01\x04", "is an Avro file, not an image. Convert it to Parquet"),
    ("t.sqlite", database, "is an SQLite database, not an image. Convert it to Parquet"),
    ("a.pdf", lambda: b"%PDF-1.7\n", "is a document, not an image. Extract its images"),
    (
        "film.MP4",
        lambda: b"\0\0\0\x20ftypisom\0\0\2\0",
        "is a video, not an image. Extract its frames as images",
    ),
    (
        "page.html",
        lambda: b"<html>",
        "is a web page, not an image. List the URLs of its images in a file",
    ),
    (
        "noise",
        lambda: b"\x93\x01\xf7\0",
        "is not an image: its first bytes are 93 01 f7 00. Give a folder, an image or a list (@FILE).",
    ),
    (
        "nothing",
        lambda: b"",
        "is not an image: it is empty. Give a folder, an image or a list (@FILE).",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[name for name, _, _ in FILES])
def test_a_file_that_is_not_an_image_is_refused_with_the_way_to_give_it(
    tmp_path: Path, name: str, content: Callable[[], bytes], message: str
) -> None:
    """By its content, else by its suffix. With --all-files it is a row instead."""
    file = tmp_path / name
    file.write_bytes(content())
    text = refusal(file)
    assert text.startswith(f"source {file} {message.format(file=file)}")
    assert text.endswith(AS_IMAGE)
    check(file, all_files=True)


FORMATS = "JPEG PNG GIF BMP TIFF WEBP ICO PPM JPEG2000 DDS PCX SGI AVIF ICNS".split()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["image", "upload.tmp", "image.txt"])
def test_an_image_is_taken_whatever_its_suffix(tmp_path: Path, form: str, name: str) -> None:
    """Its first bytes say that it is one."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / name, form)
    check(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"Dear diary\n", zipped(), b"\0\0"])
def test_a_file_with_an_images_suffix_is_taken_whatever_it_holds(
    tmp_path: Path, content: bytes
) -> None:
    """It is a row that says what is wrong with it."""
    for name in ("a.jpg", "A.PNG", "b.heic"):
        (tmp_path / name).write_bytes(content)
        check(tmp_path / name)


def test_folders_archives_and_tables_are_left_to_their_readers(tmp_path: Path) -> None:
    """Also folders whose names end like files of another kind."""
    for name in ("photos", "t.csv", "a.zip", "b.tar.gz", "c.7z"):
        (tmp_path / name).mkdir()
    for name in ("d.zip", "d.tar", "d.tgz", "d.parquet", "d.tar.bz2"):
        (tmp_path / name).write_bytes(b"anything")
    check(*tmp_path.iterdir())


def test_a_source_that_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    """A FIFO, a socket, a device. Nothing waits for them."""
    os.mkfifo(tmp_path / "fifo")
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # a socket's path is short
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
        for source in (tmp_path / "fifo", tmp_path / "socket", "/dev/zero"):
            assert (
                refusal(source)
                == f"source {source} is not a regular file. Give a folder, an image file, or a"
                " list: @FILE."
            )


def test_a_source_of_another_kind_is_exit_2_and_costs_nothing(
    imagemill: CLI, job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """Whichever of the sources it is, of a run and of a dry run; no model is looked for, and no
    output folder is made.
    """
    (tmp_path / "list.csv").write_bytes(b"path\na.jpg\n")
    result = imagemill(
        "run", jpegs(2), tmp_path / "list.csv", "--output", tmp_path / "out", "--model", "none.such"
    )
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert (
        f"source {tmp_path}/list.csv is a table, not an image. If it lists images, give"
        f" @{tmp_path}/list.csv." in result.err
    )
    with pytest.raises(UsageError, match=r"list\.csv is a table, not an image"):
        dry_run.dry_run(job(jpegs(2), tmp_path / "list.csv"))
    assert not (tmp_path / "out").exists()


def test_objects_and_pages_of_another_kind_are_refused(s3: Bucket) -> None:
    """An object by its first bytes or its suffix, a page by its suffix alone; a prefix is a folder
    whatever its name ends in.
    """
    s3.fill(
        {
            "list.csv": b"path\na.jpg\n",
            "a": sample_images.jpeg(),
            "b": zipped(),
            "prefix.csv/a.jpg": b"x",
            "c.jpg": b"x",
            "d.7z": b"?",
        }
    )
    assert f"is a table, not an image. If it lists images, give @{s3.url}/list.csv." in refusal(
        f"{s3.url}/list.csv"
    )
    assert "is a zip archive" in refusal(f"{s3.url}/b")
    assert "is a 7z archive" in refusal(f"{s3.url}/d.7z")
    check(s3.url, f"{s3.url}/a", f"{s3.url}/prefix.csv", f"{s3.url}/c.jpg")
    check(f"{s3.url}/list.csv", all_files=True)
    s3.fill({"packed.txt": gzip.compress(LIST)})
    assert "is compressed by gzip, not a text file" in refusal(f"@{s3.url}/packed.txt")
    assert (
        "is a list, not an image. If it lists images, give @https://h/x/urls.txt?v=1."
        in refusal("https://h/x/urls.txt?v=1")
    )
    assert "is a table, not an image. If it lists images, give @https://h/t.csv." in refusal(
        "https://h/t.csv"
    )
    check("https://h/image.php?id=7", "https://h/a.jpg?name=x.txt")


# ── lists ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_list_is_read_in_every_unicode_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    """As PowerShell and Notepad write them: recognised by the byte order mark. Only line feeds end a
    line.
    """
    names = ["x.jpg", "sp ace.jpg", "ü\u2028ñ\x85.jpg", "last \r one.jpg"]
    (tmp_path / "list.txt").write_bytes(end.join([*names, ""]).encode(encoding))
    check(f"@{tmp_path}/list.txt")
    assert [entry.path for entry in listed(f"@{tmp_path}/list.txt")] == [
        name.encode() for name in names
    ]


def test_a_list_of_either_byte_order_is_read(tmp_path: Path) -> None:
    """Big-endian and little-endian."""
    for mark, encoding in (
        (b"\xfe\xff", "utf-16-be"),
        (b"\xff\xfe", "utf-16-le"),
        (b"\0\0\xfe\xff", "utf-32-be"),
    ):
        (tmp_path / "list.txt").write_bytes(mark + "ü.jpg\n".encode(encoding))
        assert [entry.path for entry in listed(f"@{tmp_path}/list.txt")] == ["ü.jpg".encode()]


def test_a_list_that_powershell_wrote_is_a_job(job: Jobs, tmp_path: Path) -> None:
    """Two lines are two images, found beside the list."""
    (tmp_path / "list.txt").write_bytes((CASES / "list_utf16.txt").read_bytes())
    helpers.fill(tmp_path, {"x.jpg": sample_images.jpeg(), "sp ace.jpg": sample_images.jpeg()})
    summary = run.run(job(Path(f"@{tmp_path}/list.txt")))
    assert (summary.images, summary.ok) == (2, 2)


def test_a_list_of_names_that_are_not_utf8_is_read_as_it_is(tmp_path: Path) -> None:
    """Byte by byte."""
    (tmp_path / "list.txt").write_bytes(b"\xe9.jpg\n\xff.jpg\n")
    check(f"@{tmp_path}/list.txt")
    assert [entry.path for entry in listed(f"@{tmp_path}/list.txt")] == [b"\xe9.jpg", b"\xff.jpg"]


LISTS: list[tuple[str, Callable[[], bytes], str]] = [
    (
        "l.txt",
        lambda: gzip.compress(LIST),
        (
            "is compressed by gzip, not a text file with one path or URL a line. Decompress it"
            " (gunzip)."
        ),
    ),
    ("l.txt.gz", lambda: gzip.compress(LIST), "is compressed by gzip, not a text file"),
    ("t.csv", lambda: gzip.compress(b"path\na.jpg\n"), "is compressed by gzip, not a text file"),
    ("t.csv", zipped, "is a zip archive, not a text file"),
    (
        "a.zip",
        zipped,
        "is a zip archive, not a text file with one path or URL a line. Leave out the @.",
    ),
    (
        "a.cbz",
        zipped,
        "is a zip archive, not a text file with one path or URL a line. Rename it to end in .zip.",
    ),
    (
        "a.tar",
        lambda: archive_files.tar({"a.jpg": b"x"}, "w"),
        "is a tar archive, not a text file with one path or URL a line. Leave out the @.",
    ),
    (
        "a.jpg",
        sample_images.jpeg,
        "is an image, not a text file with one path or URL a line. Leave out the @.",
    ),
    (
        "image",
        lambda: sample_images.encode(sample_images.photograph(9, 9), "PNG"),
        "is an image, not a text file with one path or URL a line. Leave",
    ),
    (
        "t.pq",
        parquet,
        (
            "is a Parquet table, not a text file with one path or URL a line. Rename it to end in"
            " .parquet."
        ),
    ),
    ("t.arrow", arrow, "is an Arrow file, not a text file"),
    (
        "t.xlsx",
        zipped,
        "is a spreadsheet, not a text file with one path or URL a line. Save the sheet as CSV",
    ),
    (
        "t.json",
        lambda: b'["a.jpg"]',
        "is a JSON file, not a text file with one path or URL a line. Write its paths",
    ),
    ("t.jsonl", lambda: b'{"path": "a.jpg"}\n', "is a JSON file, not a text file"),
    (
        "l.txt",
        lambda: b"a.jpg\0b.jpg\0",
        "is not a text file with one path or URL a line: it has NUL bytes.",
    ),
    (
        "l.txt",
        lambda: "a.jpg\n".encode("utf-16-le"),
        "is not a text file with one path or URL a line: it has NUL bytes. Write it as UTF-8",
    ),
    (
        "t.csv",
        lambda: "path\n".encode("utf-16-be"),
        "is not a text file with one path or URL a line: it has NUL bytes.",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), LISTS)
def test_a_list_that_is_not_text_is_refused(
    tmp_path: Path, name: str, content: Callable[[], bytes], message: str
) -> None:
    """Before the job begins, and by whatever reads it."""
    (tmp_path / name).write_bytes(content())
    source = f"@{tmp_path / name}"
    assert refusal(source).startswith(f"source {source} {message}")
    with pytest.raises(UsageError) as caught:
        listed(source)
    assert str(caught.value) == refusal(source)


def test_a_folder_given_as_a_list_is_refused(tmp_path: Path) -> None:
    """With the way to give it."""
    assert (
        refusal(f"@{tmp_path}") == f"source @{tmp_path} is a folder, not a list. Leave out the @."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.jpg\n" * 200 + b"b\0.jpg\n", "line 201: has a NUL byte, which no path can hold."),
        (b"a.jpg\rb.jpg\rc.jpg\r", "has carriage returns and no line feeds, so all of it is one"),
        ("a.jpg\rb.jpg".encode("utf-16"), "has carriage returns and no line feeds"),
        (
            "a.jpg\n".encode("utf-16") + b"x",
            "cannot be read: 'utf-16-le' codec can't decode byte 0x78",
        ),
    ],
)
def test_a_list_that_is_damaged_is_one_clear_error(
    tmp_path: Path, content: bytes, message: str
) -> None:
    """With the line or the place."""
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        listed(f"@{tmp_path}/list.txt")
    assert message in str(caught.value)


def test_a_failed_name_with_a_nul_byte_is_still_a_list(tmp_path: Path) -> None:
    """`failed.txt` quotes it, and it stays a row."""
    (tmp_path / "failed.txt").write_bytes(b'"/nul\\u0000.jpg"\n"/a\\rb.jpg"\r\n')
    listing = listed(f"@{tmp_path}/failed.txt")
    assert [entry.path for entry in listing] == [b"/nul\0.jpg", b"/a\rb.jpg"]


def test_a_source_that_cannot_be_reached_says_why(tmp_path: Path) -> None:
    """Not that it does not exist: the reason is the system's."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(
        SourceError, match=r"loop cannot be read: Too many levels of symbolic links\."
    ):
        sources.check([str(tmp_path / "loop")])
