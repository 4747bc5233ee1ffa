"""Tar archives as sources, plain and packed by gzip; and what all archives have in common, end to
end.
"""

from __future__ import annotations

import gzip
import io
import os
import random
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import helpers
import sample_images
from archive_files import END, KINDS, fetched, listed, pack, read, tar, tar_member
from imagemill.errors import SourceError
from imagemill.pipeline.sources import open_all
from imagemill.pipeline.sources import tar as tar_module
from imagemill.pipeline.sources.base import Source
from imagemill.records import Filters, Settings
from imagemill.runner import run
from s3 import Bucket
from test_run import Listener, problems

Jobs = Callable[..., Settings]

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SOUND = b"the bytes of an image" * 9


def some_files(count: int = 12, size: int = 400) -> dict[str, bytes]:
    rng = random.Random(count)
    return {f"{'abc'[n % 3]}/{n:02d}.jpg": rng.randbytes(n * size) for n in range(count)}


def write(folder: Path, *pieces: bytes, name: str = "a.tar") -> Path:
    path = folder / name
    path.write_bytes(b"".join(pieces))
    return path


def unopened(path: Path, index_dir: Path | None = None) -> Source:
    """The source as a process has it that did not list it."""
    return open_all([str(path)], index_dir=index_dir)[0]


# ── what is in it ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("form", FORMS)
def test_members_are_those_that_the_standard_library_finds(
    form: str, packed: bool, tmp_path: Path
) -> None:
    """Same names, same order, same bytes: in each format, with long names in each of its ways,
    plain and packed.
    """
    names = ["a.jpg", "d/" * 60 + "b.jpg", "ü/" * 9 + "ö.png", "x" * 96 + ".jpg"]
    names += [] if form == "ustar" else ["l" * 300 + ".jpg", "f/" * 200 + "ñ.jpg"]
    data = tar({name: SOUND * number for number, name in enumerate(names)}, form=FORMS[form])
    path = write(
        tmp_path, gzip.compress(data) if packed else data, name="a.tgz" if packed else "a.TAR"
    )
    with tarfile.open(path) as archive:
        expected = [
            (member.name.encode(), archive.extractfile(member).read()) for member in archive
        ]  # type: ignore[union-attr]
    assert [name.decode() for name, _ in expected] == names
    assert read(path) == expected


@pytest.mark.process
def test_numbers_in_base_256_fields_of_pax_headers_and_old_headers_are_understood(
    tmp_path: Path,
) -> None:
    """A size beyond the octal field, or in a PAX header; a header of before POSIX, and one summed
    up as signed bytes.
    """
    member = tar_member("a.jpg", SOUND)
    binary = bytearray(member[:512])
    binary[124:136] = b"\x80" + len(SOUND).to_bytes(11, "big")
    pax = tar_member("pax", b"12 size=189\n", b"x") + tar_member("b.jpg", SOUND, size=0)
    old = bytearray(tar_member("c.jpg", SOUND))
    old[257:265], old[156] = bytes(8), 0
    signed = bytearray(
        tar_member("d\xff.jpg".encode("latin-1").decode("utf-8", "surrogateescape"), SOUND)
    )
    summed = [
        resum(bytes(binary)) + member[512:],
        pax,
        resum(bytes(old)),
        resum(bytes(signed), signed=True),
    ]
    assert read(write(tmp_path, *summed, END)) == [
        (b"a.jpg", SOUND),
        (b"b.jpg", SOUND),
        (b"c.jpg", SOUND),
        (b"d\xff.jpg", SOUND),
    ]


def resum(header: bytes, signed: bool = False) -> bytes:
    """A header with its checksum made right."""
    counted = header[:148] + b" " * 8 + header[156:512]
    total = sum(counted) - (256 * sum(byte > 127 for byte in counted) if signed else 0)
    return header[:148] + b"%06o\0 " % total + header[156:]


def test_names_are_names_and_nothing_else(tmp_path: Path) -> None:
    """Names that leave the folder, begin at the root, or hold line breaks or no UTF-8 are kept byte
    by byte; `./` before a name is not part of it; a name that is there twice is two images.
    """
    names = [
        "../../up.jpg",
        "/etc/root.jpg",
        ".\\windows.jpg",
        "line\nbreak.jpg",
        "not-\udcff-utf8.jpg",
        "twice.jpg",
        "twice.jpg",
        "./here/x.jpg",
    ]
    path = write(
        tmp_path, *(tar_member(name, bytes([number])) for number, name in enumerate(names)), END
    )
    expected = [*map(os.fsencode, names[:-1]), b"here/x.jpg"]
    assert read(path) == [(name, bytes([number])) for number, name in enumerate(expected)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_only_images_that_are_wanted_are_planned_and_the_rest_is_counted(tmp_path: Path) -> None:
    """As in a folder and in a zip; the texts of a WebDataset are counted by suffix. Folders and
    volume labels are nothing.
    """
    names = ["a/0.jpg", "a/0.txt", "a/0.json", "a/.x.jpg", "._y.jpg", "inner.tar", "thumbs/z.png"]
    label = tar_member("label", kind=b"V")
    path = write(
        tmp_path, label, tar_member("a", kind=b"5"), *(tar_member(name) for name in names), END
    )
    _, entries, skipped = listed(path, Filters(exclude=("thumbs",)))
    assert [entry.path for entry in entries] == [b"a/0.jpg"]
    assert (skipped.by_suffix, skipped.hidden, skipped.by_filter) == (
        Counter({".txt": 1, ".json": 1, ".tar": 1}),
        2,
        1,
    )
    assert [entry.path for entry in listed(path, Filters(all_files=True))[1]] == [
        name.encode() for name in names if not name.startswith(("._", "a/."))
    ]


def test_links_and_devices_are_rows_that_say_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hard link to a member before it, or to another such link, is that image; one that leads
    nowhere or far back, a symbolic link, a device, a FIFO and a sparse file each say what to do.
    """
    sparse = bytearray(tar_member("sparse.jpg", SOUND, b"S"))
    sparse[482] = 1  # its map goes on in two more blocks
    more = bytes(504) + b"\1" + bytes(7) + bytes(512)
    special = [
        ("device.jpg", b"3", ""),
        ("disk.jpg", b"4", ""),
        ("fifo.jpg", b"6", ""),
        ("volume.jpg", b"M", ""),
    ]
    pieces = [
        tar_member("./a.jpg", SOUND),
        tar_member("same.jpg", kind=b"1", link="./a.jpg"),
        tar_member("again.jpg", kind=b"1", link="same.jpg"),
        tar_member("nowhere.jpg", kind=b"1", link="later.jpg"),
        tar_member("symbolic.jpg", kind=b"2", link="a.jpg"),
        *(tar_member(name, kind=kind, link=link) for name, kind, link in special),
        resum(bytes(sparse[:512])) + more + sparse[512:],
        tar_member("later.jpg", SOUND[1:]),
        tar_member("end.jpg", kind=b"1", link="a.jpg"),
    ]
    far = (
        "read_error: is a hard link to '{}', which is not among the 16,384 members before it. Pack"
        " with --hard-dereference"
    )
    expected: dict[bytes, bytes | str] = {
        b"a.jpg": SOUND,
        b"same.jpg": SOUND,
        b"again.jpg": SOUND,
        b"nowhere.jpg": far.format("later.jpg"),
        b"symbolic.jpg": (
            "read_error: is a symbolic link to 'a.jpg': such links are not followed in an archive."
            " Pack with --dereference"
        ),
        b"device.jpg": "read_error: is a device, not a file",
        b"disk.jpg": "read_error: is a device, not a file",
        b"fifo.jpg": "read_error: is a FIFO, not a file",
        b"volume.jpg": "read_error: continues a file of another volume. Join the volumes first",
        b"sparse.jpg": "unsupported: is stored as a sparse file. Pack without --sparse",
        b"later.jpg": SOUND[1:],
        b"end.jpg": SOUND,
    }
    path = write(tmp_path, *pieces, END)
    assert dict(read(path)) == expected
    monkeypatch.setattr(tar_module, "_LINK_WINDOW", 3)
    assert dict(read(path))[b"end.jpg"] == far.format("a.jpg").replace("16,384", "3")


def test_archives_that_were_appended_to_each_other_are_read_to_the_end(tmp_path: Path) -> None:
    """`cat a.tar b.tar` holds the images of both; rubbish behind an end is none, nor is the filling
    of the last record.
    """
    one, two = tar({"a.jpg": SOUND}), tar({"b.jpg": SOUND[1:]})
    assert read(write(tmp_path, one, two)) == [(b"a.jpg", SOUND), (b"b.jpg", SOUND[1:])]
    path = write(tmp_path, one, b"rubbish" * 200)
    assert read(path) == [(b"a.jpg", SOUND)]
    assert listed(path)[2].notes() == [
        f"note: source {path}: trailing garbage after the end of the archive, at byte {len(one):,},"
        " was ignored."
    ]
    assert read(write(tmp_path, gzip.compress(one) + gzip.compress(two), name="b.tar.gz")) == [
        (b"a.jpg", SOUND),
        (b"b.jpg", SOUND[1:]),
    ]


def test_an_image_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    """Packed or not."""
    for kind in ("tar", "tar.gz"):
        path = pack(tmp_path, kind, {"a.jpg": bytes(5_000), "b.jpg": SOUND})
        assert [data for _, data in read(path, max_bytes=4_999)] == [
            "too_large: has 5000 bytes, more than --max-bytes 4999",
            SOUND,
        ]


def test_any_number_of_archives_takes_few_open_files(tmp_path: Path) -> None:
    """A WebDataset of many shards does not run into the limit of open files, read in order by
    several threads, nor when it starts over.
    """
    paths = [
        Path(pack(tmp_path, kind, {"a.jpg": SOUND}, f"{kind}-{number}"))
        for kind in ("zip", "tar", "tar.gz")
        for number in range(20)
    ]
    sources = open_all(map(str, paths))
    work = [
        (source, next(iter(listed(path)[1]))) for source, path in zip(sources, paths, strict=True)
    ]
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda item: fetched(*item), work * 2)) == {SOUND}
    assert len(os.listdir("/proc/self/fd")) <= before + 6


# ── damage ────────────────────────────────────────────────────────────────────────────────────────


def test_an_archive_cut_short_never_ends_in_silence(tmp_path: Path) -> None:
    """Cut anywhere: either nothing is lost, or one error says at which byte and inside what. Only
    between two members nobody can tell.
    """
    members = [tar_member("l" * 200 + f"{number}.jpg", SOUND * number, b"0") for number in range(3)]
    whole = b"".join(members)
    boundaries = [len(b"".join(members[:count])) for count in range(4)]
    for cut in sorted({*range(1, len(whole) + len(END), 171), *boundaries[1:]}):
        path = write(tmp_path, (whole + END)[:cut])
        complete = sum(cut >= boundary for boundary in boundaries[1:])
        if cut in boundaries or cut >= len(whole):
            assert len(read(path)) == complete
        else:
            with pytest.raises(
                SourceError,
                match=(
                    rf"a\.tar is cut short: it ends at byte {cut:,}, inside .*Get it again|is no"
                    r" tar archive"
                ),
            ):
                read(path)


def damages() -> dict[str, tuple[str, bytes, str]]:
    member = tar_member("a.jpg", SOUND)
    packed = gzip.compress(tar(some_files()))
    pax = tar_member("pax", b"99 path=b.jpg\n", b"x")
    endless = tar_member("pax", b"5011 size=" + b"9" * 5_000 + b"\n", b"x")
    return {
        "empty": ("a.tar", b"", "is empty, and no tar archive. Get it again."),
        "text": (
            "a.tar",
            b"<html>not found</html>" * 99,
            "is no tar archive: it does not begin with a header. Give one",
        ),
        "short text": (
            "a.tar",
            b"not found",
            "is no tar archive: it does not begin with a header. Give one",
        ),
        "empty header": (
            "a.tar",
            member + bytes(512) + SOUND.ljust(512) + member + END,
            "is damaged: at byte 1,536 there should be a header",
        ),
        "empty sector": (
            "a.tar",
            member + bytes(4_096) + SOUND.ljust(1_024) + member + END,
            (
                "is damaged: at byte 5,120 there should be a header, and the next one is at byte"
                " 6,144."
            ),
        ),
        "empty sector, packed": (
            "a.tgz",
            gzip.compress(member + bytes(4_096) + SOUND.ljust(1_024) + member + END),
            (
                "is damaged: at byte 5,120 there should be a header, and the next one is at byte"
                " 6,144."
            ),
        ),
        "second header": (
            "a.tar",
            member + b"\1" * 512 + member + END,
            "is damaged: at byte 1,024 there should be a header, and is none.",
        ),
        "size": (
            "a.tar",
            resum(member[:124] + b"-0000000001\0" + member[136:512]),
            "is damaged: at byte 0 a header has no sensible size.",
        ),
        "huge size": (
            "a.tar",
            resum(member[:124] + b"\x80" + b"\xff" * 11 + member[136:512]),
            "is damaged: at byte 0 a header has no",
        ),
        "endless size": (
            "a.tar",
            endless + member + END,
            "is damaged: at byte 5,632 a header has no sensible size.",
        ),
        "large size": (
            "a.tar",
            tar_member("a.jpg", SOUND, size=10**9) + END,
            "is cut short: it ends at byte 2,048, inside member a.jpg.",
        ),
        "pax": (
            "a.tar",
            pax + member + END,
            "is damaged: at byte 512 a PAX header has no sensible record.",
        ),
        "long name": (
            "a.tar",
            tar_member("x", kind=b"L", size=2**30),
            "is damaged: at byte 0 a header says that it has 1,073,741,824 bytes.",
        ),
        "gzip cut": ("a.tgz", packed[:-9], "is cut short: its gzip data have no end. Get it again"),
        "gzip cut early": (
            "a.tgz",
            packed[: len(packed) // 2],
            "is cut short: its gzip data have no end. Get it again",
        ),
        "gzip sum": (
            "a.tgz",
            packed[:-6] + b"\0\0" + packed[-4:],
            "is damaged: its gzip data cannot be unpacked: CRC check failed",
        ),
        "gzip flip": (
            "a.tgz",
            packed[:20] + b"\xff\xff" + packed[22:],
            "is damaged: its gzip data cannot be unpacked: ",
        ),
        "gzip with rubbish inside": (
            "a.tgz",
            gzip.compress(member) + b"rubbish" + gzip.compress(member + END),
            "is damaged: its gzip data cannot be unpacked: Not a gzipped file (b'ru').",
        ),
        "gzip of text": (
            "a.tgz",
            gzip.compress(b"text" * 999),
            "is no tar archive: it does not begin with a header.",
        ),
        "gzip of a cut tar": (
            "a.tgz",
            gzip.compress(member[:700]),
            "is cut short: it ends at byte 700, inside member a.jpg.",
        ),
        "bzip2": (
            "a.tar.bz2",
            b"BZh91AY",
            (
                "is packed by bzip2, which has no random access. Unpack it to .tar, or pack it by"
                " gzip."
            ),
        ),
        "xz": ("a.txz", b"\xfd7zXZ\x00\x00", "is packed by xz, which has no random access."),
        "zstd": (
            "a.tar.zst",
            b"\x28\xb5\x2f\xfd\x00",
            "is packed by zstd, which has no random access.",
        ),
    }


GARBAGE = {
    "zeros": bytes(5_000),
    "text": b"garbage" * 999,
    "one byte": b"x",
    "zeros and text": bytes(999) + b"garbage",
}


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_after_gzip_data_is_ignored_with_a_note(
    garbage: str, members: int, tmp_path: Path
) -> None:
    """The archive before it is read, with an index and without one, as gzip and tar do. Padding of
    zeros needs no note.
    """
    files = some_files(40, 3_000)
    data = tar(files)
    half = len(data) // 2 if members == 2 else 0
    packed = (
        gzip.compress(data[:half]) + gzip.compress(data[half:]) if half else gzip.compress(data)
    )
    path = write(tmp_path, packed + GARBAGE[garbage], name="a.tar.gz")
    for index_dir in (None, tmp_path):
        source, entries, skipped = listed(path, index_dir=index_dir)
        assert {entry.path.decode(): fetched(source, entry) for entry in entries} == files
        note = f"note: source {path}: trailing garbage after its gzip data was ignored."
        assert skipped.notes() == ([] if garbage == "zeros" else [note])


def test_garbage_after_gzip_data_is_noted_once(job: Jobs, tmp_path: Path) -> None:
    """The job that lists the archive says it. The same command again, on the finished job, does
    not.
    """
    path = write(
        tmp_path, gzip.compress(tar({"a.jpg": sample_images.jpeg()})) + b"garbage", name="a.tar.gz"
    )
    first, again = Listener(), Listener()
    assert run.run(job(path), first).ok == 1
    run.run(job(path), again)
    assert ["trailing garbage" in line for line in first.printed].count(True) == 1
    assert not any("trailing garbage" in line for line in again.printed)


@pytest.mark.parametrize("case", damages())
def test_a_damaged_archive_is_one_clear_error(case: str, tmp_path: Path) -> None:
    """It names the archive and says where and what to do; the standard library would end at a
    broken header without a word.
    """
    name, data, expected = damages()[case]
    path = write(tmp_path, data, name=name)
    with pytest.raises(SourceError) as caught:
        listed(path, index_dir=tmp_path)
    assert str(caught.value).startswith(f"source {path} {expected}"), caught.value
    assert not list(tmp_path.glob("*.gzidx"))


def test_any_damage_to_headers_ends_in_rows_or_one_clear_error(tmp_path: Path) -> None:
    """Four hundred archives with random bytes of their headers changed: no traceback, no hang, and
    no member lost in silence.
    """
    files = dict.fromkeys(("a.jpg", "ü" * 90 + ".jpg", "c" * 200 + ".jpg", "d.jpg"), SOUND)
    sound, rng, ends = tar(files), random.Random(3), Counter[str]()
    headers = [
        at
        for at in range(len(sound))
        if at < sound.rindex(SOUND) and b"the bytes" not in sound[at // 512 * 512 :][:512]
    ]
    for _ in range(400):
        data = bytearray(sound)
        for at in rng.choices(headers, k=rng.choice((1, 1, 2, 5))):
            data[at] = rng.choice((0, 0xFF, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        is_hidden = rng.random() < 0.5
        for block in {at // 512 * 512 for at in headers} if is_hidden else ():
            if data[block + 257 : block + 262] == b"ustar":
                data[block : block + 512] = resum(
                    bytes(data[block : block + 512])
                )  # damage that no checksum shows
        try:
            found = read(write(tmp_path, data), Filters(all_files=True))
            ends["rows"] += 1
            assert is_hidden or len(found) == len(files)
        except SourceError:
            ends["error"] += 1
    assert min(ends["rows"], ends["error"]) > 40, ends


def test_one_byte_that_is_missing_is_singular(tmp_path: Path) -> None:
    path = Path(pack(tmp_path, "tar", {"a.jpg": bytes(1024)}))
    _, entries, _ = listed(path, index_dir=tmp_path)
    path.write_bytes(path.read_bytes()[: 512 + 1024 - 1])
    found = fetched(unopened(path, tmp_path), entries[0])
    assert found == "truncated: the archive ends 1 byte before it does"


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_an_archive_that_changes_under_the_job_gives_rows_and_no_wrong_image(
    kind: str, tmp_path: Path
) -> None:
    """Gone, cut short or overwritten by another: each is a row; once back, images are read
    again.
    """
    files = some_files(size=20_000)
    path = Path(pack(tmp_path, kind, files))
    sound = path.read_bytes()
    _, entries, _ = listed(path, index_dir=tmp_path)

    def statuses() -> Counter[str]:
        source = unopened(path, tmp_path)
        found = [fetched(source, entry) for entry in entries]
        assert all(
            isinstance(data, str) or data == files[entry.path.decode()]
            for entry, data in zip(entries, found, strict=True)
        )
        return Counter(data.partition(":")[0] if isinstance(data, str) else "ok" for data in found)

    assert statuses() == {"ok": 12}
    path.write_bytes(sound[: len(sound) // 3])
    cut = statuses()
    assert cut["ok"] >= 5
    assert cut["truncated"] + cut["corrupt"] == 12 - cut["ok"] > 0
    if kind == "tar.gz":  # a plain tar has no checksum of its data, as little as a folder has
        path.write_bytes(
            sound[: len(sound) // 3] + random.Random(0).randbytes(len(sound) - len(sound) // 3)
        )
        assert statuses() == {"corrupt": 12}  # one block of the index holds them all
        pack(tmp_path, kind, {name: data[::-1] for name, data in files.items()})
        assert statuses() == {
            "ok": 1,
            "corrupt": 11,
        }  # the same headers at the same places; the empty one is what it was
    path.unlink()
    pack(tmp_path, kind, {f"{name}.jpg": data[::-1] for name, data in files.items()})
    assert statuses()["ok"] == 0
    path.unlink()
    assert statuses() == {"missing": 12}
    path.mkdir()
    assert tar_module.TarSource(0, os.fsencode(path)).name == str(path)
    path.rmdir()
    path.write_bytes(sound)
    assert statuses() == {"ok": 12}


# ── gzip ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Some 12 MB that hardly pack, in several members of gzip: an index of many places."""
    files = {f"{number:03d}.jpg": random.Random(number).randbytes(200_000) for number in range(60)}
    data = tar(files)
    path = tmp_path_factory.mktemp("packed") / "a.tar.gz"
    path.write_bytes(gzip.compress(data[:5_000_000], 1) + gzip.compress(data[5_000_000:], 1))
    return path, files


def test_the_index_is_kept_and_saves_unpacking_from_the_beginning(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """The last image is read by a process that did not list it from the last sixth of the file;
    without the index from all of it.
    """
    path, files = packed
    _, entries, _ = listed(path, index_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["source-00000.gzidx"]
    read = {}
    for index_dir in (tmp_path, None):
        before, source = read_bytes(), unopened(path, index_dir)
        assert source.fetch(entries[-1].path, entries[-1].locator, 2**20) == files["059.jpg"]
        read[index_dir] = read_bytes() - before
    assert read[tmp_path] < path.stat().st_size // 6
    assert read[None] > path.stat().st_size


def read_bytes() -> int:
    """Bytes that this process has read through system calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar:")))


def test_a_lost_or_damaged_index_changes_no_answer(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """It is made again as far as it is needed: when missing, empty, with a byte changed, or of
    another archive.
    """
    path, files = packed
    _, entries, _ = listed(path, index_dir=tmp_path)
    index = tmp_path / "source-00000.gzidx"
    sound = index.read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    listed(pack(tmp_path, "tar.gz", some_files()), index_dir=other)
    for damaged in (
        b"",
        sound[: len(sound) // 2],
        sound[:90_000] + b"\xff\xfe" + sound[90_002:],
        (other / index.name).read_bytes(),
    ):
        index.write_bytes(damaged)
        source = unopened(path, tmp_path)
        for entry in entries[-3:] + entries[:3]:
            assert source.fetch(entry.path, entry.locator, 2**20) == files[entry.path.decode()]


def test_a_limit_keeps_the_index_as_far_as_it_goes(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """A listing that is not wanted to its end leaves an index of what was."""
    entries = unopened(packed[0], tmp_path).entries(Filters(), listed(packed[0])[2])
    some = [next(entries) for _ in range(30)]
    entries.close()  # type: ignore[attr-defined]
    assert 0 < (tmp_path / "source-00000.gzidx").stat().st_size < 5 * 60_000
    source = unopened(packed[0], tmp_path)
    assert all(
        source.fetch(entry.path, entry.locator, 2**20) == packed[1][entry.path.decode()]
        for entry in some
    )


def test_a_limit_and_no_room_for_the_index_are_no_traceback(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """Python would print `Exception ignored in …`. Images are read without the index."""
    source = unopened(packed[0], tmp_path / "nowhere")
    entries = source.entries(Filters(), listed(packed[0])[2])
    first = next(entries)
    entries.close()  # type: ignore[attr-defined]
    assert source.fetch(first.path, first.locator, 2**20) == packed[1][first.path.decode()]


def test_damage_in_the_middle_of_a_packed_archive_costs_the_images_around_it(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """What is written over under the job is a few corrupt rows; from the next place of the index on
    all is well again.
    """
    path = tmp_path / "a.tar.gz"
    data = bytearray(packed[0].read_bytes())
    path.write_bytes(data)
    _, entries, _ = listed(path, index_dir=tmp_path)
    data[6_000_000:6_000_100] = random.Random(0).randbytes(100)
    path.write_bytes(data)
    source = unopened(path, tmp_path)
    found = [fetched(source, entry) for entry in entries]
    bad = [number for number, data in enumerate(found) if isinstance(data, str)]
    assert 29 - 12 < min(bad) <= 29 <= max(bad) < 29 + 12
    assert all(str(found[number]).startswith("corrupt: ") for number in bad)
    assert all(
        data == packed[1][entry.path.decode()]
        for entry, data in zip(entries, found, strict=True)
        if isinstance(data, bytes)
    )


@pytest.mark.parametrize("with_index", [True, False])
def test_many_threads_read_one_archive_at_once(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path, with_index: bool
) -> None:
    """Each gets its own image, in any order, from one source that nobody has opened before."""
    path, files = packed
    _, entries, _ = listed(path, index_dir=tmp_path)
    source = unopened(path, tmp_path if with_index else None)
    work = random.Random(0).choices(entries, k=120)
    with ThreadPoolExecutor(8) as pool:
        for entry, data in zip(
            work,
            pool.map(lambda entry: source.fetch(entry.path, entry.locator, 2**20), work),
            strict=True,
        ):
            assert data == files[entry.path.decode()]


# ── end to end, for every archive ─────────────────────────────────────────────────────────────────


def answers(output: Path) -> list[dict[str, object]]:
    """What does not say where an image came from, in plan order."""
    return [
        {name: value for name, value in row.items() if name not in ("index", "source")}
        for row in helpers.rows(output)
    ]


@pytest.fixture(scope="module")
def some_images(some_jpegs: dict[str, bytes]) -> dict[str, bytes]:
    """Forty images and two bad ones, in the order in which a folder is listed."""
    return dict(
        sorted(
            (
                some_jpegs
                | {
                    "b/bad.jpg": b"bad",
                    "a/half.png": sample_images.half(sample_images.jpeg()),
                }
            ).items()
        )
    )


@pytest.fixture(scope="module")
def folders_answers(
    some_images: dict[str, bytes], models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, object]]:
    """Of the same images in a folder."""
    folder = tmp_path_factory.mktemp("folder")
    helpers.fill(folder / "images", some_images)
    choices: dict[str, Any] = {
        "model": "tiny",
        "models_dir": str(models_dir),
        "devices": "cpu",
        "batch_size": 4,
        "save": ("logits",),
    }
    run.run(Settings((str(folder / "images"),), str(folder / "out"), **choices))
    return answers(folder / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_folder(
    kind: str,
    job: Jobs,
    some_images: dict[str, bytes],
    folders_answers: list[dict[str, object]],
    tmp_path: Path,
) -> None:
    """The same images, some of them bad, give the same rows, logits and all, bit for bit; `verify`
    finds nothing. A repeated job has nothing to do and finds nothing new.
    """
    settings = job(
        Path(pack(tmp_path, kind, some_images)), devices="cpu", save=("logits",), shard_size=9
    )
    summary = run.run(settings)
    assert (summary.images, summary.ok) == (42, 40)
    assert answers(tmp_path / "out") == folders_answers
    assert problems(tmp_path / "out") == []
    repeated = run.run(settings)
    assert (repeated.new_in_source, repeated.resumed_shards) == (0, summary.shards)


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "webdataset"])
def test_an_archive_in_an_object_store_gives_the_same_rows(
    kind: str, job: Jobs, s3: Bucket, some_images: dict[str, bytes], tmp_path: Path
) -> None:
    """It is read in place by the same code; braces name several there too. Replaced by another
    object, it gives rows and no wrong image; removed, it is one clear error.
    """
    local, place = pack(tmp_path, kind, dict(list(some_images.items())[::3])), s3.url
    archives = {path.name: path.read_bytes() for path in tmp_path.glob("images*.*")}
    s3.fill(archives)
    settings = replace(job(shard_size=5), sources=(f"{place}/{Path(local).name}",))
    assert run.run(settings).images == 14
    run.run(job(Path(local), output=str(tmp_path / "local"), shard_size=5))
    assert answers(tmp_path / "out") == answers(tmp_path / "local")
    other = pack(tmp_path, "zip" if kind == "zip" else "tar", {"other.jpg": SOUND}, "other")
    s3.fill(dict.fromkeys(archives, Path(other).read_bytes()))
    (tmp_path / "out" / "predictions" / "part-000002.parquet").unlink()
    run.run(settings)
    statuses = [row["status"] for row in helpers.rows(tmp_path / "out")]
    assert len(statuses) == 14
    assert set(statuses[10:]) <= {"corrupt", "truncated"}
    for name in archives:
        s3.remove(name)
    with pytest.raises(
        SourceError,
        match=re.escape(place) + r"/images.* cannot be read: .*Check the names of bucket and key",
    ):
        read(f"{place}/{next(iter(archives))}")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_new_images_of_an_archive_are_named(
    kind: str, job: Jobs, jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """What was appended since the plan was frozen is named when the finished job is repeated, and
    nothing else; also beside a folder that has grown. Members of an archive are in no order, and
    neither need what is appended be.
    """
    folder, path = (
        jpegs(3),
        Path(
            pack(
                tmp_path,
                kind,
                {f"{seed}.jpg": sample_images.jpeg(seed=seed) for seed in (2, 9, 0, 5)},
            )
        ),
    )
    run.run(job(folder, path))
    opener = zipfile.ZipFile if kind == "zip" else tarfile.open
    (folder / "001b.jpg").write_bytes(sample_images.jpeg())
    (folder / "late.jpg").write_bytes(sample_images.jpeg())
    with opener(path, "a") as archive:  # type: ignore[operator]
        (
            archive.write(folder / "late.jpg", "1.jpg")
            if kind == "zip"
            else archive.add(folder / "late.jpg", "1.jpg")
        )
    listener = Listener()
    assert run.run(job(folder, path), listener).new_in_source == 3
    assert (
        "3 images are new in the source since the plan was frozen: 001b.jpg, late.jpg, 1.jpg."
        in listener.printed[-1]
    )


def test_an_archive_in_an_archive_is_skipped_or_a_row(job: Jobs, tmp_path: Path) -> None:
    """It is counted by its suffix; with --all-files it is a row that is not an image."""
    inner = Path(pack(tmp_path, "zip", {"a.jpg": sample_images.jpeg()}, "inner")).read_bytes()
    path = Path(pack(tmp_path, "tar", {"inner.zip": inner, "b.jpg": sample_images.jpeg()}))
    summary = run.run(job(path))
    assert (summary.images, summary.skipped_by_suffix) == (1, {".zip": 1})
    run.run(job(path, output=str(tmp_path / "all"), all_files=True))
    assert [(row["path"], row["status"]) for row in helpers.rows(tmp_path / "all")] == [
        ("inner.zip", "not_an_image"),
        ("b.jpg", "ok"),
    ]


def test_a_job_over_a_packed_tar_resumes_without_its_index(
    job: Jobs, packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """The index is in the plan's folder; with half the parts and the index gone, the repeated
    command makes the same parts again.
    """
    settings = job(packed[0], shard_size=10)
    run.run(settings)
    rows = helpers.rows(tmp_path / "out")
    for part in sorted((tmp_path / "out" / "predictions").glob("part-*"))[3:]:
        part.unlink()
    (tmp_path / "out" / "plan" / "source-00000.gzidx").unlink()
    assert run.run(settings).resumed_shards == 3
    assert helpers.rows(tmp_path / "out") == rows


def test_standard_library_tars_in_memory_are_what_the_helpers_say() -> None:
    """The tests' own maker of members agrees with the standard library."""
    data = tar_member("a.jpg", SOUND) + END
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert [(member.name, member.size) for member in archive] == [("a.jpg", len(SOUND))]
