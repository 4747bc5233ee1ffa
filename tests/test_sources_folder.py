"""The folder source: which entries are planned, in which order, and what comes of reading them."""

from __future__ import annotations

import errno
import inspect
import io
import os
import random
import shutil
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from helpers import Result, fill, without_root_powers
from imagemill.errors import OutputError, SourceError, UsageError
from imagemill.pipeline.sources import files, folder, open_all, resolve
from imagemill.pipeline.sources.base import MOST_SUFFIXES, Skipped, matcher
from imagemill.pipeline.sources.folder import FolderSource
from imagemill.records import BadImage, Entry, Filters, Status
from imagemill.system.retry import RetryPolicy


def entries(
    root: Path | bytes, skip: Path | None = None, **filters: Any
) -> tuple[list[Entry], Skipped]:
    skipped = Skipped()
    (source,) = open_all([os.fsdecode(root)], skip)
    return list(source.entries(Filters(**filters), skipped)), skipped


def paths(root: Path | bytes, **filters: Any) -> list[bytes]:
    return [entry.path for entry in entries(root, **filters)[0]]


def source(root: Path) -> FolderSource:
    return FolderSource(0, os.fsencode(root))


def problem(call: Callable[[], object]) -> tuple[Status, str]:
    with pytest.raises(BadImage) as caught:
        call()
    return caught.value.status, caught.value.error


NAMES = st.binary(min_size=1, max_size=6).filter(
    lambda name: not set(name) & {0, ord("/"), ord(".")}
)


@examples(max_examples=25)
@given(names=st.sets(st.tuples(NAMES, NAMES), min_size=1, max_size=8), seed=st.integers())
def test_order_is_stable_whatever_the_names_and_the_order_of_creation(
    tmp_path_factory: pytest.TempPathFactory, names: set[tuple[bytes, bytes]], seed: int
) -> None:
    """Entries come ordered by the components of their paths as bytes, never as the file system
    happens to list them.
    """
    root = os.fsencode(tmp_path_factory.mktemp("names"))
    order = sorted(names)
    random.Random(seed).shuffle(order)
    for directory, name in order:
        os.makedirs(os.path.join(root, directory), exist_ok=True)
        Path(os.fsdecode(os.path.join(root, directory, name + b".png"))).write_bytes(b"")
    assert paths(root) == [
        directory + b"/" + name + b".png"
        for directory, name in sorted((d, n + b".png") for d, n in names)
        for name in [name[:-4]]
    ]


def test_suffix_decides_what_is_an_image(tmp_path: Path) -> None:
    """Known suffixes in any case are planned, whatever type or content; the rest is counted by
    suffix.
    """
    files = dict.fromkeys(
        ("a.JPG", "b.Jpeg", "c.tiff", "d.txt", "e.TXT", "f", "g.csv", "h.jpg.part", "i.webp"), b"x"
    )
    found, skipped = entries(fill(tmp_path, files))
    assert [entry.path for entry in found] == [b"a.JPG", b"b.Jpeg", b"c.tiff", b"i.webp"]
    assert skipped.by_suffix == {".txt": 2, "": 1, ".csv": 1, ".part": 1}


def test_all_files_plans_every_file(tmp_path: Path) -> None:
    """With --all-files no suffix is skipped; folders are still no images."""
    fill(tmp_path, dict.fromkeys(("a", "b.txt", "c/d.jpg", "c/e.json"), b"x"))
    found, skipped = entries(tmp_path, all_files=True)
    assert [entry.path for entry in found] == [b"a", b"b.txt", b"c/d.jpg", b"c/e.json"]
    assert not skipped.by_suffix


def test_hidden_entries_are_counted_not_planned(tmp_path: Path) -> None:
    """A hidden file counts as one, and so does a hidden folder, which is not entered."""
    fill(tmp_path, dict.fromkeys((".a.jpg", ".git/b.jpg", ".git/c.jpg", "d.jpg", "e/.f.jpg"), b"x"))
    found, skipped = entries(tmp_path)
    assert [entry.path for entry in found] == [b"d.jpg"]
    assert skipped.hidden == 3


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"include": ("*.png",)}, ["a/1.png", "b/2.png"]),
        ({"include": ("a/*",)}, ["a/1.png", "a/c/3.jpg"]),
        ({"exclude": ("a",)}, ["b/2.png", "b/4.jpg"]),
        ({"exclude": ("a/",)}, ["b/2.png", "b/4.jpg"]),
        ({"exclude": ("a/c",)}, ["a/1.png", "b/2.png", "b/4.jpg"]),
        ({"exclude": ("*.jpg", "2*")}, ["a/1.png"]),
        ({"include": ("[13].*",), "exclude": ("*.png",)}, ["a/c/3.jpg"]),
        ({"include": ("nothing",)}, []),
    ],
)
def test_filters_choose_by_name_or_by_path(
    tmp_path: Path, filters: dict[str, Any], expected: list[str]
) -> None:
    """A pattern with a slash is held against the relative path, else against the name; an excluded
    folder is closed.
    """
    fill(tmp_path, dict.fromkeys(("a/1.png", "a/c/3.jpg", "b/2.png", "b/4.jpg"), b"x"))
    assert paths(tmp_path, **filters) == [os.fsencode(path) for path in expected]


@pytest.mark.parametrize(
    ("rule", "filters", "path", "is_wanted"),
    [
        ("`*` stands for any characters", {"include": ("a*.png",)}, b"abc.png", True),
        ("`?` for one", {"include": ("a?.png",)}, b"abc.png", False),
        ("`[abc]` for one of these", {"include": ("[abc].png",)}, b"d.png", False),
        ("`[!abc]` for any other one", {"include": ("[!abc].png",)}, b"d.png", True),
        ("`*.png` finds PNG files in every folder", {"include": ("*.png",)}, b"x/y/a.png", True),
        ("this finds `2024/may/a.png`", {"include": ("2024/*.png",)}, b"2024/may/a.png", True),
        ("the whole path below the source", {"include": ("may/*",)}, b"2024/may/a.png", False),
        ("`thumbs` or `thumbs/`", {"exclude": ("thumbs/",)}, b"a/thumbs/", False),
        ("with everything in them", {"exclude": ("thumbs/",)}, b"/a/thumbs/b/1.jpg", False),
        ("with everything in them", {"exclude": ("a/thumbs",)}, b"a/thumbs/b/1.jpg", False),
        ("with everything in them", {"exclude": ("thumbs",)}, b"a/thumbs2/1.jpg", True),
        ("with everything in them", {"exclude": ("*.com",)}, b"https://ex.com/1.jpg", True),
        ("with everything in them", {"exclude": ("b",)}, b"https://ex.com/b/1.jpg", False),
        (
            "with everything in them",
            {"exclude": ("https://*.com/",)},
            b"https://ex.com/1.jpg",
            False,
        ),
        ("Capital and small letters differ", {"include": ("*.png",)}, b"a.PNG", False),
        ("one of `--include`", {"include": ("*.png", "*.jpg")}, b"a.jpg", True),
        ("none of `--exclude`", {"include": ("*",), "exclude": ("b*", "a*")}, b"a.jpg", False),
    ],
)
def test_the_documented_rules_of_patterns_hold(
    rule: str, filters: dict[str, Any], path: bytes, is_wanted: bool
) -> None:
    page = Path(__file__).parents[1] / "docs" / "sources.md"
    assert rule in " ".join(page.read_text("utf-8").split())
    assert matcher(Filters(**filters))(path) is is_wanted


def test_filtered_images_are_counted(tmp_path: Path) -> None:
    """What --include and --exclude leave out is in the summary, apart from the skipped suffixes."""
    fill(tmp_path, dict.fromkeys(("1.png", "2.jpg", "3.jpg", "4.txt"), b"x"))
    skipped = entries(tmp_path, exclude=("*.jpg",))[1]
    assert (skipped.by_filter, skipped.by_suffix) == (2, {".txt": 1})


def test_links_are_followed_without_loops(tmp_path: Path) -> None:
    """Links to files and folders count as what they lead to; a link to a folder above is not
    entered again.
    """
    root = fill(tmp_path / "root", {"a/1.jpg": b"xyz"})
    fill(tmp_path / "elsewhere", {"2.jpg": b"x"})
    (root / "b").symlink_to("../elsewhere")
    (root / "c.jpg").symlink_to("a/1.jpg")
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "up.jpg").symlink_to("..")
    (root / "a" / "outside").symlink_to(tmp_path)  # would lead to the source's neighbours
    found = {entry.path: entry.size for entry in entries(root)[0]}
    assert found == {b"a/1.jpg": 3, b"a/up.jpg": -1, b"b/2.jpg": 1, b"c.jpg": 3}


def test_two_links_to_one_folder_are_two_folders(tmp_path: Path) -> None:
    """Only a loop is cut: what can be reached by two ways is planned by two names."""
    root = fill(tmp_path / "root", {"a/1.jpg": b"x"})
    (root / "b").symlink_to("a")
    assert paths(root) == [b"a/1.jpg", b"b/1.jpg"]


def test_a_folder_with_an_image_suffix_is_planned_and_entered(tmp_path: Path) -> None:
    """It has an image suffix, so it has a row; the images in it have theirs."""
    fill(tmp_path, {"x.jpg/1.png": b"x", "x.jpg-2.png": b"x"})
    assert paths(tmp_path) == [b"x.jpg", b"x.jpg/1.png", b"x.jpg-2.png"]
    assert problem(lambda: source(tmp_path).fetch(b"x.jpg", b"", 99)) == (
        Status.READ_ERROR,
        "is a folder, not a regular file",
    )


def test_names_are_bytes(tmp_path: Path) -> None:
    """Names that are not UTF-8, or hold line breaks and quotes, are listed and fetched as they
    are.
    """
    names = [
        b"\xff\xfe.jpg",
        b"new\nline 'and' \"quotes\".jpg",
        "ü.jpg".encode(),
        b" .jpg",
        b"-rf.jpg",
        b"$(x);`y`.jpg",
    ]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(name)
    found = paths(tmp_path)
    assert found == sorted(names)
    assert [source(tmp_path).fetch(path, b"", 99) for path in found] == found


def test_images_of_one_sub_folder_are_one_group(tmp_path: Path) -> None:
    """Groups count the folders right below the root, in order, however deep the images lie; empty
    ones do not count.
    """
    fill(
        tmp_path,
        dict.fromkeys(
            ("a/1.jpg", "a/deep/er/2.jpg", "b/none.txt", "c/3.jpg", "c/4.jpg", "d/x/5.jpg"), b"x"
        ),
    )
    assert [entry.group for entry in entries(tmp_path)[0]] == [0, 0, 1, 1, 2]


def test_many_names_are_merged_from_sorted_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More names than memory is meant for go to temporary files and come back in order, each
    once.
    """
    names = [b"%04d\xff\n.jpg" % number for number in random.Random(1).sample(range(10_000), 250)]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"")
    monkeypatch.setattr(folder, "_NAMES_IN_MEMORY", 7)
    assert paths(tmp_path) == sorted(names)


@pytest.mark.parametrize("count", [6, 7, 8, 14])
def test_no_name_is_lost_where_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Exactly as many names as fit into memory, one fewer, one more, twice as many."""
    monkeypatch.setattr(folder, "_NAMES_IN_MEMORY", 7)
    fill(tmp_path, {f"{number}.jpg": b"" for number in range(count)})
    assert len(paths(tmp_path)) == count


def test_names_longer_than_a_block_survive_the_merge(tmp_path: Path) -> None:
    """The merge reads its runs in blocks; a name may span several of them, and a run ends where the
    next begins.
    """
    names = [b"a" * 50, b"b" * 3, b"c" * 120]
    data = b"".join(name + b"/" for name in names)
    (tmp_path / "runs").write_bytes(data + data)
    with (tmp_path / "runs").open("rb") as file:
        assert list(folder._names_of(file, 0, len(data), block_bytes=16)) == names
        assert list(folder._names_of(file, len(data), 2 * len(data), block_bytes=16)) == names


def test_the_output_folder_is_not_listed(tmp_path: Path) -> None:
    """An output folder inside the source is left out, by identity and not by name."""
    fill(tmp_path, {"a.jpg": b"x", "out/b.jpg": b"x", "other/out/c.jpg": b"x"})
    (tmp_path / "link").symlink_to("out")
    assert [entry.path for entry in entries(tmp_path, tmp_path / "out")[0]] == [
        b"a.jpg",
        b"other/out/c.jpg",
    ]


def test_a_single_file_is_a_source(tmp_path: Path) -> None:
    """An image file named as the source is planned whatever its suffix."""
    fill(tmp_path, {"thing.data": b"abc"})
    (entry,) = entries(tmp_path / "thing.data")[0]
    assert (entry.path, entry.size) == (b"", 3)
    assert source(tmp_path / "thing.data").fetch(b"", b"", 9) == b"abc"


def test_a_source_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    """It names the source and the reason."""
    with pytest.raises(
        SourceError,
        match=(
            r"source .*/none cannot be read: No such file or directory\. Give a folder or an"
            r" image\."
        ),
    ):
        entries(tmp_path / "none")


def test_braces_name_many_sources(tmp_path: Path) -> None:
    """`{000..003}` and `{a,b}` as WebDataset writes them; a name that exists as it stands is taken
    as it stands.
    """
    (tmp_path / "x{1..3}").mkdir()
    root = str(tmp_path)
    assert resolve([f"{root}/x{{1..3}}"]) == (f"{root}/x{{1..3}}",)
    assert resolve([f"{root}/{{008..010}}.tar", f"{root}/{{b,a}}-{{2..1}}"]) == (
        *(f"{root}/{name}.tar" for name in ("008", "009", "010")),
        *(f"{root}/{name}" for name in ("b-2", "b-1", "a-2", "a-1")),
    )
    with pytest.raises(UsageError, match="means more than 100,000 sources"):
        resolve([f"{root}/{{0..999999}}.jpg"])


def test_odd_entries_are_rows_and_are_never_waited_for(tmp_path: Path) -> None:
    """FIFO, socket, self-link, dead link and a device: planned, and fetching them gives a status at
    once.
    """
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "dead.jpg").symlink_to("nowhere")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's path is short
        try:
            server.bind("socket.jpg")
        finally:
            os.chdir(here)
        assert {entry.path: entry.size for entry in entries(tmp_path)[0]} == {
            b"dead.jpg": -1,
            b"device.jpg": -1,
            b"fifo.jpg": -1,
            b"loop.jpg": -1,
            b"socket.jpg": -1,
        }
        found = {
            name: problem(lambda name=name: source(tmp_path).fetch(name, b"", 99))
            for name in paths(tmp_path)
        }
    assert found == {
        b"dead.jpg": (Status.MISSING, "the file was listed but is gone, or its link leads nowhere"),
        b"device.jpg": (Status.READ_ERROR, "is a device, not a regular file"),
        b"fifo.jpg": (Status.READ_ERROR, "is a FIFO, not a regular file"),
        b"loop.jpg": (Status.READ_ERROR, "cannot be read: Too many levels of symbolic links"),
        b"socket.jpg": (Status.READ_ERROR, "cannot be read: No such device or address"),
    }


def test_a_file_beyond_max_bytes_is_not_read(tmp_path: Path) -> None:
    """Its size decides, before a byte of it is read."""
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**40)
    assert problem(lambda: source(tmp_path).fetch(b"huge.jpg", b"", 2**20)) == (
        Status.TOO_LARGE,
        "has 1099511627776 bytes, more than --max-bytes 1048576",
    )


@pytest.mark.parametrize("listed", [0, 3, 5, 6, 9])
def test_a_file_whose_size_changes_is_read_to_its_end(
    listed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has six bytes when it is read, whatever it had when it was opened."""
    fill(tmp_path, {"a.jpg": b"abcdef"})
    found = os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, listed, 0, 0, 0))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", lambda _: found)
        patched.setattr(files, "_PIECE", 2)
        data = source(tmp_path).fetch(b"a.jpg", b"", 99)
    assert data == b"abcdef"


def test_errors_that_pass_are_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO twice and then the bytes: the image is read. EIO for ever: a row that says so. ENOENT is
    not retried.
    """
    fill(tmp_path, {"a.jpg": b"abc"})
    monkeypatch.setattr(files, "_READING", RetryPolicy(attempts=4, pause_s=0.0))
    calls: list[int] = []
    read = files._read

    def failing(times: int, code: int) -> None:
        calls.clear()

        def fail(path: bytes, max_bytes: int) -> bytes:
            calls.append(code)
            if len(calls) <= times:
                raise OSError(code, os.strerror(code))
            return read(path, max_bytes)

        monkeypatch.setattr(files, "_read", fail)

    failing(2, errno.EIO)
    assert source(tmp_path).fetch(b"a.jpg", b"", 9) == b"abc"
    failing(99, errno.EIO)
    assert problem(lambda: source(tmp_path).fetch(b"a.jpg", b"", 9)) == (
        Status.READ_ERROR,
        "cannot be read: Input/output error",
    )
    assert len(calls) == 4
    failing(99, errno.ENOENT)
    assert problem(lambda: source(tmp_path).fetch(b"a.jpg", b"", 9))[0] is Status.MISSING
    assert len(calls) == 1


def test_a_very_deep_folder_is_listed(tmp_path: Path) -> None:
    """Depth is bounded by the file system and not by the interpreter's stack."""
    deep = tmp_path.joinpath(*["d"] * 300)
    deep.mkdir(parents=True)
    (deep / "deep.jpg").write_bytes(b"x")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        assert paths(tmp_path) == [b"d/" * 300 + b"deep.jpg"]
    finally:
        sys.setrecursionlimit(limit)


def test_the_way_out_of_a_folder_that_cannot_be_listed_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pattern that the message names does leave it out; of the source itself there is none to
    name.
    """
    root = fill(tmp_path / "root", {"1.jpg": b"x", "a/locked/2.jpg": b"x"})
    closed = [os.fsencode(root / "a" / "locked")]
    sorted_names = folder._sorted_names

    def names(path: bytes) -> Any:
        if path in closed:
            raise PermissionError(13, "Permission denied")
        return sorted_names(path)

    monkeypatch.setattr(folder, "_sorted_names", names)
    with pytest.raises(SourceError) as caught:
        entries(root)
    assert str(caught.value).endswith(
        "Permission denied. Give it permission, or leave it out with --exclude 'a/locked/'."
    )
    assert [entry.path for entry in entries(root, exclude=("a/locked/",))[0]] == [b"1.jpg"]
    closed[:] = [os.fsencode(root)]
    with pytest.raises(SourceError, match=r"Permission denied\. Give it permission\.$"):
        entries(root)


UNREACHABLE = (
    errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN,
)  # fmt: skip


def failing(monkeypatch: pytest.MonkeyPatch, path: Path, code: int) -> None:
    """Have `os.stat` fail for one path."""
    real = os.stat

    def stat(name: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if isinstance(name, bytes) and name == os.fsencode(path):
            raise OSError(code, os.strerror(code))
        return real(name, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)


@pytest.mark.parametrize("code", UNREACHABLE)
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_folder_that_cannot_be_entered_ends_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    """As one that cannot be listed does: its images would be lost without a word. A link may lead
    to such a folder.
    """
    root = fill(tmp_path / "root", {"1.jpg": b"x", "z/2.jpg": b"x"})
    if kind == "folder":
        (root / "a [1]'s").mkdir()
    else:
        (root / "a [1]'s").symlink_to(tmp_path / "far")
    failing(monkeypatch, root / "a [1]'s", code)
    with pytest.raises(SourceError) as caught:
        entries(root)
    message = str(caught.value)
    assert message.startswith(f"{kind} {root}/a [1]'s")
    assert f": {os.strerror(code)}. " in message
    pattern = message.partition("--exclude '")[2].removesuffix("'.")
    assert [entry.path for entry in entries(root, exclude=(pattern,))[0]] == [b"1.jpg", b"z/2.jpg"]


@pytest.mark.parametrize("code", UNREACHABLE)
def test_a_file_that_cannot_be_looked_at_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A file, or a link with an image's name, costs its own row or count: nothing is hidden behind
    it.
    """
    root = fill(tmp_path / "root", {"1.jpg": b"x", "2.txt": b"x", "3.jpg": b"x"})
    (root / "4.jpg").symlink_to("1.jpg")
    for name in ("1.jpg", "2.txt", "4.jpg"):
        failing(monkeypatch, root / name, code)
    found, skipped = entries(root)
    assert {entry.path: entry.size for entry in found} == {b"1.jpg": -1, b"3.jpg": 1, b"4.jpg": -1}
    assert (dict(skipped.by_suffix), skipped.broken_links) == ({".txt": 1}, 0)


def test_a_folder_named_like_an_image_that_cannot_be_entered_ends_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row for the folder would not stand for the images in it."""
    root = fill(tmp_path / "root", {"album.jpg/1.jpg": b"x"})
    failing(monkeypatch, root / "album.jpg", errno.EACCES)
    with pytest.raises(
        SourceError, match=r"folder .*/album\.jpg cannot be listed: Permission denied"
    ):
        entries(root)


def test_a_folder_that_is_removed_meanwhile_ends_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been moved to a place that was listed already: the images are not gone."""
    root = fill(tmp_path / "root", {"a/1.jpg": b"x"})
    failing(monkeypatch, root / "a", errno.ENOENT)
    with pytest.raises(
        SourceError,
        match=(
            r"/a cannot be listed: No such file or directory\. It was removed .* run the command"
            r" again"
        ),
    ):
        entries(root)


def test_links_that_lead_nowhere_are_counted(tmp_path: Path) -> None:
    """They may have led to a folder on a disk that is not mounted. One with an image's name has a
    row instead, as all do by --all-files.
    """
    root = fill(tmp_path / "root", {"1.jpg": b"x", "notes": b"x"})
    (root / "archive").symlink_to("/mnt/not mounted/archive")
    (root / "loop").symlink_to("loop")
    (root / "below a file").symlink_to("notes/deeper")
    (root / "2.jpg").symlink_to("nowhere")
    found, skipped = entries(root)
    assert [entry.path for entry in found] == [b"1.jpg", b"2.jpg"]
    assert (skipped.broken_links, skipped.first_broken_link) == (3, f"{root}/archive")
    assert dict(skipped.by_suffix) == {"": 1}
    assert entries(root, exclude=("archive", "below*"))[1].broken_links == 1
    found, skipped = entries(root, all_files=True)
    assert [entry.path for entry in found] == [
        b"1.jpg",
        b"2.jpg",
        b"archive",
        b"below a file",
        b"loop",
        b"notes",
    ]
    assert skipped.broken_links == 0


@pytest.mark.parametrize("in_memory", [2, 10_000])
def test_an_error_in_the_middle_of_a_folder_ends_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    """The names that came before it are not taken for all."""
    root = fill(tmp_path / "root", {f"a/{number}.jpg": b"x" for number in range(9)})
    real = os.scandir

    class Scan:
        def __init__(self, path: Any) -> None:
            self._real = real(path)

        def __enter__(self) -> Scan:
            return self

        def __exit__(self, *_: object) -> None:
            self._real.close()

        def __iter__(self) -> Any:
            for number, entry in enumerate(self._real):
                if number == 5:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                yield entry

    monkeypatch.setattr(folder, "_NAMES_IN_MEMORY", in_memory)
    monkeypatch.setattr(os, "scandir", Scan)
    with pytest.raises(
        SourceError,
        match=(
            r"folder .*/root/a cannot be listed: Input/output error\. Check the disk or the"
            r" mount, or "
        ),
    ):
        entries(root)


def test_a_folder_whose_path_is_too_long_ends_the_listing(tmp_path: Path) -> None:
    """Folders may lie deeper than the longest path that the system takes. The error is one line of
    readable length.
    """
    here = Path.cwd()
    try:
        os.chdir(fill(tmp_path / "root", {"1.jpg": b"x"}))
        for _ in range(20):
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
        Path("lost.jpg").write_bytes(b"x")
    finally:
        os.chdir(here)
    with pytest.raises(
        SourceError,
        match=(
            r"^folder .*… cannot be listed: File name too long\. .* give a folder below it as a"
            r" source"
        ),
    ) as caught:
        entries(tmp_path / "root")
    assert len(str(caught.value)) < 800
    shutil.rmtree(tmp_path / "root")


def test_a_folder_without_the_right_to_enter_it_ends_the_command(
    tmp_path: Path, imagemill: Callable[..., Result]
) -> None:
    """With real permissions: it can be listed, but what is in it cannot be reached. No job is
    frozen.
    """
    root = fill(
        tmp_path / "root", {"1.jpg": b"x", "closed/sub/2.jpg": b"x", "closed/notes.txt": b"x"}
    )
    (root / "closed").chmod(0o444)
    arguments = (root, "--output", tmp_path / "out", "--model", "tiny", "--devices", "null")
    result = imagemill("run", *arguments, before=without_root_powers())
    (root / "closed").chmod(0o755)
    assert result.code == 2
    assert (
        f"folder {root}/closed/sub cannot be listed: Permission denied. Give it permission, or"
        " leave it out with --exclude" in result.err
    )
    assert not (tmp_path / "out" / "job.json").exists()


def test_two_dots_behind_a_link_lead_where_the_system_goes(tmp_path: Path) -> None:
    """`link/../photos` is what `ls` shows, not the `photos` beside the link."""
    fill(tmp_path / "here", {"photos/1.png": b"x"})
    fill(tmp_path / "there", {"photos/2.png": b"x", "in/3.png": b"x"})
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "in")
    (source,) = resolve([f"{tmp_path}/here/link/../photos"])
    assert [path.name for path in Path(source).iterdir()] == ["2.png"]
    assert resolve([f"{tmp_path}/here/../there/photos"]) == (f"{tmp_path}/there/photos",)


def test_names_that_find_no_room_to_be_sorted_blame_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, {f"{number}.png": b"x" for number in range(8)})
    monkeypatch.setattr(folder, "_NAMES_IN_MEMORY", 2)

    class Full(io.BytesIO):
        def writelines(self, _: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.tempfile, "TemporaryFile", Full)
    with pytest.raises(OutputError, match=r"cannot sort the names .*No space left.* set TMPDIR"):
        entries(tmp_path)


def test_suffixes_without_end_are_summed_up(tmp_path: Path) -> None:
    """scan.000001, scan.000002, …: the summary names the first ones."""
    odd = {f"scan.{number:06}": b"x" for number in range(100)}
    fill(tmp_path, odd | {"a.png": b"x", "z.zip": b"x"})
    found, skipped = entries(tmp_path)
    assert len(found) == 1
    assert len(skipped.by_suffix) == MOST_SUFFIXES + 2
    assert skipped.by_suffix["others"] == 100 - MOST_SUFFIXES
    assert skipped.by_suffix[".zip"] == 1, "there is a hint about these"
