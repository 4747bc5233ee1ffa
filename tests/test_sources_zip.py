"""Zip archives as sources: read in place, whatever is in them."""

from __future__ import annotations

import bz2
import lzma
import os
import random
import struct
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from archive_files import Member, deflated, fetched, listed, read, zip_by_hand
from imagemill.errors import SourceError
from imagemill.records import Filters
from s3 import Bucket

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def some_files(count: int = 12) -> dict[str, bytes]:
    rng = random.Random(count)
    return {
        f"{'abc'[n % 3]}/{n:02d}.jpg": rng.randbytes(n * 40) + bytes(n * 100) for n in range(count)
    }


def make(path: Path, files: dict[str, bytes], **options: object) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:  # type: ignore[call-overload]
        for number, (name, data) in enumerate(files.items()):
            archive.writestr(name, data, compress_type=METHODS[number % len(METHODS)])
    return path


def by_hand(folder: Path, *members: Member, **options: object) -> Path:
    path = folder / "by-hand.zip"
    path.write_bytes(zip_by_hand(members, **options))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    "shape",
    [
        "plain",
        "commented",
        "prefixed",
        "zip64 directory",
        "zip64 members",
        "zip64, prefixed",
        "streamed",
    ],
)
def test_members_are_those_that_the_standard_library_finds(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same names, same order, same bytes, by every method that it writes: also behind a program,
    with a comment, with 64-bit sizes and offsets, or written to a pipe.
    """
    files, path = some_files(), tmp_path / "a.ZIP"
    if "directory" in shape or "prefixed" in shape:
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3 if "zip64" in shape else 65_535)
    if "zip64" in shape and "directory" not in shape:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 300)
    make(path, files)
    monkeypatch.undo()
    if "prefixed" in shape:
        path.write_bytes(b"#!/bin/sh\nexit\n" * 99 + path.read_bytes())
    if shape == "streamed":
        with path.open("wb") as file:
            reader, writer = os.pipe()
            with os.fdopen(writer, "wb") as pipe, zipfile.ZipFile(pipe, "w") as archive:
                for name, data in files.items():
                    archive.writestr(name, data[:500], zipfile.ZIP_DEFLATED)
            with os.fdopen(reader, "rb") as pipe:
                file.write(pipe.read())
    assert (b"PK\6\6" in path.read_bytes()) == ("zip64" in shape)
    with zipfile.ZipFile(path) as archive:
        expected = [(info.filename.encode(), archive.read(info)) for info in archive.infolist()]
    if shape == "commented":  # which the standard library itself cannot read
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = b"a comment that holds PK\5\6 and then some" * 9
    assert len(expected) == len(files)
    assert read(path) == expected


def test_only_images_that_are_wanted_are_planned_and_the_rest_is_counted(tmp_path: Path) -> None:
    """Folders are nothing, other suffixes and archives in the archive are counted by suffix, hidden
    members and what macOS adds by number, and what the filters say by number; an excluded folder is
    closed. With --all-files everything is planned.
    """
    names = [
        "a/",
        "a/x.jpg",
        "a/.x.jpg",
        "__MACOSX/a/._x.jpg",
        ".git/y.png",
        "inner.zip",
        "a/b/thumbs/z.PNG",
        "notes.txt",
        "b/w.webp",
    ]
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    _, entries, skipped = listed(path, Filters(exclude=("thumbs",)))
    assert [entry.path for entry in entries] == [b"a/x.jpg", b"b/w.webp"]
    assert (skipped.by_suffix, skipped.hidden, skipped.by_filter) == (
        Counter({".zip": 1, ".txt": 1}),
        3,
        1,
    )
    _, entries, skipped = listed(path, Filters(include=("a/*",)))
    assert [entry.path for entry in entries] == [b"a/x.jpg", b"a/b/thumbs/z.PNG"]
    assert skipped.by_filter == 1
    _, entries, skipped = listed(path, Filters(all_files=True))
    assert [entry.path.decode() for entry in entries] == [
        "a/x.jpg",
        "inner.zip",
        "a/b/thumbs/z.PNG",
        "notes.txt",
        "b/w.webp",
    ]


def test_names_are_names_and_nothing_else(tmp_path: Path) -> None:
    """Names that leave the folder, begin at the root, hold backslashes, line breaks or no UTF-8 are
    kept byte by byte; a name that is there twice is two images.
    """
    names = [
        b"../../up.jpg",
        b"/etc/root.jpg",
        b"C:\\a\\b.jpg",
        b".\\a\\c.jpg",
        b"..\\d.jpg",
        b"not-\xff-utf8.jpg",
        b"line\nbreak.jpg",
        b"twice.jpg",
        b"twice.jpg",
    ]
    path = by_hand(tmp_path, *(Member(name, bytes([number])) for number, name in enumerate(names)))
    assert read(path) == [(name, bytes([number])) for number, name in enumerate(names)]
    assert [path.name for path in tmp_path.iterdir()] == ["by-hand.zip"]


SOUND = b"the bytes of an image" * 9
BAD: dict[str, tuple[Member, str]] = {
    "encrypted": (
        Member(b"a.jpg", SOUND, flags=1),
        "unsupported: is encrypted. Unpack the archive with its password and give the folder",
    ),
    "zstd": (
        Member(b"a.jpg", SOUND, method=93),
        "unsupported: is packed by method 93 (Zstandard); stored, Deflate, bzip2 and LZMA can be",
    ),
    "deflate64": (
        Member(b"a.jpg", SOUND, method=9),
        "unsupported: is packed by method 9 (Deflate64);",
    ),
    "other": (Member(b"a.jpg", SOUND, method=77), "unsupported: is packed by method 77 (unknown);"),
    "patch": (
        Member(b"a.jpg", SOUND, flags=0x20),
        "unsupported: is packed by method 0 (patch data);",
    ),
    "link": (
        Member(b"a.jpg", b"b.jpg", mode=0o120777),
        "read_error: is a symbolic link in the archive: such links are not followed",
    ),
    "crc": (
        Member(b"a.jpg", SOUND, crc=1),
        "corrupt: its checksum differs from the one in the archive's directory",
    ),
    "deflate crc": (Member(b"a.jpg", SOUND, method=8, crc=1), "corrupt: its checksum differs"),
    "rubbish": (
        Member(b"a.jpg", SOUND, method=8, packed=b"\xff" * 50),
        "corrupt: cannot be unpacked: ",
    ),
    "bzip2 rubbish": (
        Member(b"a.jpg", SOUND, method=12, packed=b"\xff" * 50),
        "corrupt: cannot be unpacked: ",
    ),
    "lzma rubbish": (
        Member(b"a.jpg", SOUND, method=14, packed=b"\xff" * 50),
        "corrupt: cannot be unpacked: ",
    ),
    "lzma short": (
        Member(b"a.jpg", SOUND, method=14, packed=b"\x09"),
        "truncated: unpacks to 0 bytes, the archive's directory says 189",
    ),
    "lzma memory": (
        Member(
            b"a.jpg", SOUND, method=14, packed=b"\x09\x14\x05\x00\x5d\xff\xff\xff\xff" + bytes(50)
        ),
        "too_large: cannot be unpacked: Memory usage limit exceeded",
    ),
    "cut": (
        Member(b"a.jpg", SOUND, method=8, packed=deflated(SOUND)[:-9]),
        "truncated: unpacks to ",
    ),
    "stored size": (
        Member(b"a.jpg", SOUND, size=5),
        "corrupt: is stored in 189 bytes, the archive's directory says 5",
    ),
    "said smaller": (
        Member(b"a.jpg", SOUND, method=8, size=5),
        "corrupt: unpacks to more than the 5 bytes that the archive's directory says",
    ),
    "said larger": (
        Member(b"a.jpg", SOUND, method=8, size=999),
        "corrupt: unpacks to 189 bytes, the archive's directory says 999",
    ),
    "one byte stored": (
        Member(b"a.jpg", b"x", size=1_000),
        "corrupt: is stored in 1 byte, the archive's directory says 1,000",
    ),
    "said one byte": (
        Member(b"a.jpg", SOUND, method=8, size=1),
        "corrupt: unpacks to more than the 1 byte that the archive's directory says",
    ),
    "one byte unpacked": (
        Member(b"a.jpg", b"x", method=8, size=9),
        "corrupt: unpacks to 1 byte, the archive's directory says 9",
    ),
    "bomb": (
        Member(b"a.jpg", bytes(2**24), method=8),
        "too_large: has 16777216 bytes, more than --max-bytes 1048576",
    ),
    "lying bomb": (
        Member(b"a.jpg", bytes(2**24), method=8, size=99),
        "corrupt: unpacks to more than the 99 bytes",
    ),
    "stored bomb": (
        Member(b"a.jpg", SOUND, size=9, packed_size=2**31),
        "too_large: has 2147483648 bytes, more than --max-bytes 1048576",
    ),
    "beyond": (
        Member(b"a.jpg", SOUND, size=99_999, packed_size=99_999),
        "truncated: the archive ends ",
    ),
    "elsewhere": (
        Member(b"a.jpg", SOUND, offset=7),
        "corrupt: it is not where the archive's directory says",
    ),
    "nowhere": (
        Member(b"a.jpg", SOUND, offset=0xFFFFFFF0),
        "truncated: the archive ends before it",
    ),
    "zip64 nowhere": (
        Member(b"a.jpg", SOUND, offset=0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 2**64 - 1)),
        "truncated: the archive ends before it",
    ),
    "zip64 huge": (
        Member(b"a.jpg", SOUND, size=0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 2**64 - 1)),
        "too_large: has 18446744073709551615 bytes",
    ),
    "shorter name": (
        Member(b"a.jpg", SOUND, local_name=b"a.j"),
        "corrupt: it is not where the archive's directory says",
    ),
    "other name": (
        Member(b"a.jpg", SOUND, local_name=b"b.jpg"),
        "corrupt: it is not where the archive's directory says",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_member_is_its_own_row_and_says_why(case: str, tmp_path: Path) -> None:
    """Encrypted, packed in other ways, damaged, lying about its size, a bomb: one clear row, and
    its neighbours are sound.
    """
    member, expected = BAD[case]
    before, after = (
        Member(b"0.jpg", SOUND[1:], method=8),
        Member(b"z.jpg", SOUND, local_extra=bytes(300)),
    )
    source, entries, _ = listed(by_hand(tmp_path, before, member, after))
    found = [fetched(source, entry) for entry in entries]
    assert (found[0], found[2]) == (SOUND[1:], SOUND)
    assert isinstance(found[1], str)
    assert found[1].startswith(expected), found[1]


@pytest.mark.process
def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """64 MiB of zeros behind a size of 99 bytes are not unpacked, by none of the methods."""
    zeros = bytes(2**26)
    packed = {8: deflated(zeros), 12: bz2.compress(zeros)}
    lzma_stream = lzma.compress(zeros, lzma.FORMAT_ALONE, preset=0)
    packed[14] = b"\x09\x14\x05\x00" + lzma_stream[:5] + lzma_stream[13:]
    members = [
        Member(b"%d.jpg" % method, b"", method, data, size=99, flags=2)
        for method, data in packed.items()
    ]
    source, entries, _ = listed(by_hand(tmp_path, *members))
    del zeros
    tracemalloc.start()
    try:
        found = [fetched(source, entry) for entry in entries]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [str(data).partition(" bytes")[0] for data in found] == [
        "corrupt: unpacks to more than the 99"
    ] * 3
    assert peak < 2**22


def test_overlapping_members_cost_no_more_than_each_for_itself(tmp_path: Path) -> None:
    """A thousand members that share the same bytes are a thousand rows; those whose names differ
    from the header's are damaged.
    """
    members = [Member(b"a.jpg", SOUND, offset=0) for _ in range(500)] + [
        Member(b"b.jpg", SOUND, offset=0) for _ in range(500)
    ]
    found = [
        data if isinstance(data, bytes) else data.partition(":")[0]
        for _, data in read(by_hand(tmp_path, *members))
    ]
    assert found == [SOUND] * 500 + ["corrupt"] * 500


@pytest.mark.process
def test_more_members_than_16_bits_count_are_all_listed(tmp_path: Path) -> None:
    """Old writers let the count run over: 65,540 members of which the end record says 4."""
    path = by_hand(tmp_path, *(Member(b"%d.jpg" % number, b"") for number in range(65_540)))
    _, entries, _ = listed(path)
    assert (len(entries), entries[-1].path) == (65_540, b"65539.jpg")


def finder_zip(path: Path, members: Iterable[tuple[str, bytes | int]]) -> Path:
    """Write a zip as the Finder of macOS does: no zip64, so larger offsets and sizes keep only
    their low 32 bits.

    A member given as a number has so many bytes, which are a hole in the file.
    """
    directory, count, low = bytearray(), 0, 0xFFFFFFFF
    with path.open("wb") as out:
        for name, content in members:
            count += 1
            start, data = out.tell(), content if isinstance(content, bytes) else b""
            size = len(content) if isinstance(content, bytes) else content
            out.write(
                struct.pack("<4s5H3L2H", b"PK\3\4", 20, 8, 0, 0, 0, 0, 0, 0, len(name), 0)
                + name.encode()
                + data
            )
            out.seek(size - len(data), os.SEEK_CUR)
            sizes = (zlib.crc32(data), size & low, size & low)
            out.write(struct.pack("<4s3L", b"PK\7\x08", *sizes))
            numbers = (
                0x0315,
                20,
                8,
                0,
                0,
                0,
                *sizes,
                len(name),
                0,
                0,
                0,
                0,
                0o100644 << 16,
                start & low,
            )
            directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *numbers) + name.encode()
        start = out.tell()
        counts = (count & 0xFFFF, count & 0xFFFF)
        out.write(
            directory
            + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *counts, len(directory), start & low, 0)
        )
    return path


def test_a_finder_zip_beyond_4_gib_is_read(tmp_path: Path) -> None:
    """The Finder of macOS writes offsets, sizes and counts modulo their fields' width. Every image
    is found, in any order.
    """
    images = {f"{number}.jpg": b"image %d" % number * 99 for number in range(5)}
    (one, two, three, four, five), whole = images, 2**32
    members: list[tuple[str, bytes | int]] = [
        (one, images[one]),
        ("too long.mov", whole + 1_000),
        (two, images[two]),
    ]
    members += [
        ("long.mov", whole - 5_000),
        (three, images[three]),
        ("huge.mov", 3 * whole + 7),
        (four, images[four]),
        (five, images[five]),
    ]
    path = finder_zip(tmp_path / "finder.zip", members)
    assert path.stat().st_size > 5 * whole > path.stat().st_blocks
    assert read(path) == [(name.encode(), data) for name, data in images.items()]
    source, entries, skipped = listed(path)
    assert skipped.by_suffix == {".mov": 3}
    backwards = [fetched(type(source)(0, os.fsencode(path)), entry) for entry in reversed(entries)]
    assert backwards == [*reversed(images.values())]
    with path.open("r+b") as file:  # whatever was put in its place is no image under this name
        file.seek(entries[0].size // 2)
        file.write(b"changed")
    assert str(fetched(source, entries[0])).startswith("corrupt: ")


@pytest.mark.process
def test_a_finder_zip_of_more_members_than_16_bits_is_read(tmp_path: Path) -> None:
    """Counts and offsets have both wrapped around."""
    names = [f"{number}.jpg" for number in range(65_540)]
    path = finder_zip(
        tmp_path / "finder.zip", [("long.mov", 2**32), *((name, b"") for name in names)]
    )
    source, entries, _ = listed(path)
    assert (len(entries), entries[-1].path) == (65_540, b"65539.jpg")
    assert [fetched(source, entry) for entry in (entries[0], entries[-1])] == [b"", b""]


SPELLINGS = {
    "backslashes in the header": ("a/b/c.jpg", b"a\\b\\c.jpg"),
    "backslashes in the directory": ("a\\b\\c.jpg", b"a/b/c.jpg"),
    "one backslash": ("a/b/c.jpg", b"a/b\\c.jpg"),
    "DOS code page in the header": ("Größe/ü.jpg", "Größe/ü.jpg".encode("cp437")),
    "Cyrillic code page": ("фото.jpg", "фото.jpg".encode("cp866")),
    "Shift JIS and backslashes": ("表/写真.jpg", "表\\写真.jpg".encode("cp932")),
    "GBK": ("照片.jpg", "照片.jpg".encode("gbk")),
    "decomposed": ("ü.jpg", "u\u0308.jpg".encode()),
}


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.parametrize("flags", [0, 0x800])
def test_two_spellings_of_one_name_are_read(case: str, flags: int, tmp_path: Path) -> None:
    """Windows tools write `\\` in one place and `/` in the other, or UTF-8 in one and their code
    page in the other.
    """
    central, local = SPELLINGS[case]
    path = by_hand(
        tmp_path,
        Member(central.encode(), SOUND, method=8, flags=flags, local_name=local),
        Member(b"z.jpg", SOUND),
    )
    assert read(path) == [(central.encode(), SOUND), (b"z.jpg", SOUND)]


def test_a_name_that_no_encoding_explains_is_damage(tmp_path: Path) -> None:
    """A changed byte in either name, also one that makes it no ASCII, is a `corrupt` row: it could
    be another image's name.
    """
    names = [
        (b"a0.jpg", b"a\xd7.jpg"),
        (b"a\xd7.jpg", b"a0.jpg"),
        ("ü.jpg".encode(), "ä.jpg".encode("cp437")),
        (b"a/b.jpg", b"a/b\\.jpg"),
    ]
    found = read(
        by_hand(tmp_path, *(Member(central, SOUND, local_name=local) for central, local in names))
    )
    assert [str(data).partition(":")[0] for _, data in found] == ["corrupt"] * 4


def test_a_program_that_unpacks_itself_may_be_signed(tmp_path: Path) -> None:
    """Bytes before the archive and behind it, as in a signed `.exe` renamed to `.zip`: `zipfile`,
    unzip and 7-Zip read it. The program knows how a member begins.
    """
    files = some_files()
    packed = make(tmp_path / "a.zip", files).read_bytes()
    path = tmp_path / "signed.zip"
    path.write_bytes(b"MZ the program, PK\3\4" * 99 + packed + b"signature" * 99)
    with zipfile.ZipFile(path) as archive:
        expected = [(info.filename.encode(), archive.read(info)) for info in archive.infolist()]
    assert read(path) == expected


def damages() -> dict[str, tuple[bytes, str]]:
    sound = zip_by_hand([Member(b"a.jpg", SOUND), Member(b"b.jpg", SOUND)])
    where = len(sound) - 22
    return {
        "empty": (
            b"",
            (
                "is no zip archive, or is cut short: its directory is missing. Get it again, or"
                " unpack what is whole of it"
            ),
        ),
        "text": (
            b"<html>not found</html>" * 99,
            "is no zip archive, or is cut short: its directory is missing.",
        ),
        "cut": (
            sound[: len(sound) // 2],
            "is no zip archive, or is cut short: its directory is missing.",
        ),
        "count": (
            zip_by_hand([Member(b"a.jpg", SOUND)], count=7),
            "is damaged: it holds 1 member and should hold 7.",
        ),
        "volume": (
            zip_by_hand([Member(b"a.jpg", SOUND)], disk=3),
            "is volume 4 of an archive in several. Join them first: `zip -s 0",
        ),
        "beginning cut off": (sound[300:], "is damaged: "),
        "size": (
            sound[: where + 12] + struct.pack("<L", 9999) + sound[where + 16 :],
            "is damaged: it should have 9,999 bytes, ",
        ),
        "no member": (
            sound.replace(b"PK\1\2", b"PK\0\0"),
            "is damaged: nothing of it lies at byte ",
        ),
        "second": (
            b"PK\0\0".join(sound.rsplit(b"PK\1\2", 1)),
            "is damaged: member 2 of it, at byte ",
        ),
        "zip64": (
            sound[:where] + struct.pack("<4sLQL", b"PK\6\7", 0, 5, 1) + sound[where:],
            "is damaged: its zip64 end record is missing.",
        ),
        "zip64 volume": (
            sound[:where] + struct.pack("<4sLQL", b"PK\6\7", 0, 5, 2) + sound[where:],
            "is one volume of an archive in 2.",
        ),
    }


@pytest.mark.parametrize("case", list(damages()))
def test_an_archive_without_a_sound_directory_is_one_clear_error(case: str, tmp_path: Path) -> None:
    """It names the archive and says what to do."""
    data, expected = damages()[case]
    path = tmp_path / "a.zip"
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        listed(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_regular_file_or_is_gone_is_one_clear_error(tmp_path: Path) -> None:
    """A FIFO is not waited for; a folder named like a zip is a folder."""
    os.mkfifo(tmp_path / "fifo.zip")
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "folder.zip" / "a.jpg").write_bytes(SOUND)
    for name, why in (
        ("fifo.zip", "is not a regular file"),
        ("gone.zip", "No such file or directory"),
    ):
        with pytest.raises(
            SourceError, match=f"{name} cannot be read: .*{why}.*Give a zip archive"
        ):
            listed(tmp_path / name)
    assert read(tmp_path / "folder.zip") == [(b"a.jpg", SOUND)]


@pytest.mark.process
def test_any_damage_to_the_directory_ends_in_rows_or_one_clear_error(tmp_path: Path) -> None:
    """Four hundred archives with random bytes changed in directory and end record: no traceback,
    and no wrong image under any name.
    """
    files = some_files(6)
    sound = make(tmp_path / "a.zip", files).read_bytes()
    start, path, rng = sound.index(b"PK\1\2"), tmp_path / "b.zip", random.Random(6)
    ends: Counter[str] = Counter()
    for _ in range(400):
        data = bytearray(sound)
        for at in rng.choices(range(start, len(sound)), k=rng.choice((1, 1, 2, 5))):
            data[at] = rng.choice((0, 0xFF, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        path.write_bytes(data)
        try:
            for name, found in read(path, Filters(all_files=True)):
                ends["row" if isinstance(found, str) else "image"] += 1
                assert isinstance(found, str) or found == files[name.decode()]
        except SourceError:
            ends["error"] += 1
    assert min(ends["row"], ends["image"], ends["error"]) > 20, ends


def test_an_archive_that_changes_under_the_job_gives_rows_and_no_wrong_image(
    tmp_path: Path,
) -> None:
    """Gone, cut short, overwritten by another, or unreadable: each is a row; once back, images are
    read again.
    """
    files = some_files()
    path = make(tmp_path / "a.zip", files)
    sound = path.read_bytes()
    _, entries, _ = listed(path)

    def statuses() -> Counter[str]:
        source, _, _ = listed(make(tmp_path / "empty.zip", {}))  # a process that did not list it
        source = type(source)(0, os.fsencode(path))
        found = [fetched(source, entry) for entry in entries]
        assert all(
            isinstance(data, str) or data == files[entry.path.decode()]
            for entry, data in zip(entries, found, strict=True)
        )
        return Counter(data.partition(":")[0] if isinstance(data, str) else "ok" for data in found)

    assert statuses() == {"ok": 12}
    path.write_bytes(sound[: len(sound) // 3])
    assert statuses().keys() == {"ok", "truncated"}
    make(path, {name: data[::-1] for name, data in files.items()})
    assert statuses() == {"ok": 1, "corrupt": 11}  # the empty one is what it was
    make(path, dict(reversed(files.items())))
    assert statuses() == {"corrupt": 12}
    path.unlink()
    assert statuses() == {"missing": 12}
    path.mkdir()
    assert statuses() == {"read_error": 12}
    path.rmdir()
    path.write_bytes(sound)
    assert statuses() == {"ok": 12}


def test_an_archive_that_was_put_into_its_store_again_is_opened_again(
    s3: Bucket, tmp_path: Path
) -> None:
    """A process that has it open notices, and goes on: where the images lie as they did they are
    read, where not they are damaged.
    """
    files = some_files()
    data = make(tmp_path / "a.zip", files).read_bytes()
    source, entries, _ = listed(s3.fill({"a.zip": data}) + "/a.zip")
    assert fetched(source, entries[-1]) == files["c/11.jpg"]
    s3.fill({"a.zip": data[:-2] + b"\2\0ok"})  # with a comment
    assert fetched(source, entries[-2]) == files["b/10.jpg"]
    s3.fill({"a.zip": make(tmp_path / "b.zip", dict(reversed(files.items()))).read_bytes()})
    assert str(fetched(source, entries[-1])).startswith("corrupt: ")
    s3.remove("a.zip")
    assert str(fetched(source, entries[-1])).startswith(
        "missing: the archive was listed but is gone"
    )


def test_many_threads_read_one_archive_at_once(tmp_path: Path) -> None:
    """Each gets its own image, in any order, from one source that nobody has opened before."""
    files = some_files(60)
    _, entries, _ = listed(make(tmp_path / "a.zip", files))
    source, _, _ = listed(make(tmp_path / "b.zip", {}))
    source = type(source)(0, os.fsencode(tmp_path / "a.zip"))
    work = random.Random(0).choices(entries, k=2_000)
    with ThreadPoolExecutor(8) as pool:
        for entry, data in zip(
            work,
            pool.map(lambda entry: source.fetch(entry.path, entry.locator, 2**20), work),
            strict=True,
        ):
            assert data == files[entry.path.decode()]


@pytest.mark.parametrize("program", [b"", b"MZ the program" * 99])
@pytest.mark.parametrize(
    "cut", ["within the directory", "behind the archive within", "within a member in front of it"]
)
def test_a_cut_archive_is_not_taken_for_one_within_it(
    cut: str, program: bytes, tmp_path: Path
) -> None:
    """Its own directory is gone, that of an archive stored in it is not: what that one holds is not
    what was asked for.
    """
    inner, whole = tmp_path / "inner.zip", tmp_path / "whole.zip"
    make(inner, {"inside.jpg": b"inside" * 50})
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a.jpg", b"a" * 5_000)
        archive.write(inner, "inner.zip")
        archive.writestr("b.jpg", b"b" * 5_000)
    data = program + whole.read_bytes()
    end = data.index(inner.read_bytes()) + inner.stat().st_size
    path = tmp_path / "cut.zip"
    path.write_bytes(
        data[
            : {"within the directory": len(data) - 30, "behind the archive within": end}.get(
                cut, end + 2_000
            )
        ]
    )
    with pytest.raises(
        SourceError,
        match=(
            r"cut\.zip is cut short: its directory is missing; the last one there is of an archive"
            r" within it"
        ),
    ):
        listed(path)
