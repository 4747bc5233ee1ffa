"""`imagemill partition`: what it promises of counts, names, links, repeats and refusals."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers
import sample_images
from imagemill.arrange import partition as module
from imagemill.arrange.links import Link
from imagemill.arrange.partition import partition
from imagemill.errors import OutputError, SourceError, UsageError


def names_in(folder: Path) -> list[str]:
    """Relative paths of all files and links below a folder, sorted as a listing is: by the bytes of
    each name.
    """
    found = [
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, names in os.walk(folder)
        for name in names
    ]
    return sorted(found, key=lambda name: os.fsencode(name).split(b"/"))


def shares_of(output: Path) -> list[list[str]]:
    """The images of each partition, in listing order."""
    return [
        names_in(output / str(number))
        for number in range(len([path for path in output.iterdir() if path.is_dir()]))
    ]


def make(folder: Path, *names: str) -> Path:
    return helpers.fill(folder, {name: name.encode() for name in names})


def numbered(folder: Path, count: int) -> Path:
    return make(folder, *(f"{number:03d}.jpg" for number in range(count)))


@pytest.mark.process
@given(count=st.integers(1, 40), partitions=st.integers(1, 12))
def test_sizes_differ_by_at_most_one_and_nothing_is_dropped(
    count: int, partitions: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any number of images in any number of partitions: every image is in exactly one, in listing
    order.
    """
    folder = tmp_path_factory.mktemp("any")
    made = partition(str(numbered(folder / "all", count)), partitions, str(folder / "out"))
    shares = shares_of(folder / "out")
    assert [name for share in shares for name in share] == names_in(folder / "all")
    assert len(shares) == partitions
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert made.partitions == tuple(map(len, shares))
    assert (made.images, made.made) == (count, count)


def test_an_image_is_what_the_folder_source_says(tmp_path: Path) -> None:
    """The same suffixes in any case, below any folder, are images; the rest is skipped and counted,
    hidden entries too.
    """
    source = make(
        tmp_path / "all",
        "a.jpg",
        "b.JPEG",
        "c.png",
        "d.webp",
        "deep/er/e.TIF",
        "notes.txt",
        "README",
        ".hidden.jpg",
        ".d/f.jpg",
    )
    made = partition(str(source), 2, str(tmp_path / "out"))
    assert sorted(name for share in shares_of(tmp_path / "out") for name in share) == [
        "a.jpg",
        "b.JPEG",
        "c.png",
        "d.webp",
        "deep/er/e.TIF",
    ]
    assert made.skipped_by_suffix == {".txt": 1, "": 1}
    assert made.skipped_hidden == 2


def test_same_names_in_different_folders_stay_apart(tmp_path: Path) -> None:
    """An image keeps its relative path inside its partition, so equal names cannot meet."""
    source = make(tmp_path / "all", "cats/1.jpg", "dogs/1.jpg", "1.jpg")
    partition(str(source), 1, str(tmp_path / "out"))
    assert names_in(tmp_path / "out" / "0") == ["1.jpg", "cats/1.jpg", "dogs/1.jpg"]
    assert (tmp_path / "out" / "0" / "dogs" / "1.jpg").read_bytes() == b"dogs/1.jpg"


def test_hostile_names_survive(tmp_path: Path) -> None:
    """Names with quotes, line breaks and bytes that are not UTF-8 are names like others."""
    source = tmp_path / "a'; echo foo"
    source.mkdir()
    names = [b"a'; echo foo.jpg", b"line\nbreak.jpg", b"\xff\xfe.jpg", b"-rf.jpg", b" .jpg"]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(source), name))).write_bytes(name)
    partition(str(source), 2, str(tmp_path / "out"))
    found = [os.fsencode(name) for share in shares_of(tmp_path / "out") for name in share]
    assert found == sorted(names)


@pytest.mark.parametrize("link", list(Link))
def test_each_kind_of_link_gives_the_same_bytes(tmp_path: Path, link: Link) -> None:
    """hard shares the file, symbolic names it, copy is a file of its own with the same time."""
    source = numbered(tmp_path / "all", 3)
    made = partition(str(source), 2, str(tmp_path / "out"), link)
    original, target = source / "000.jpg", tmp_path / "out" / "0" / "000.jpg"
    assert made.link is link
    assert target.read_bytes() == original.read_bytes()
    assert target.is_symlink() is (link is Link.SYMBOLIC)
    assert (target.lstat().st_ino == original.stat().st_ino) is (link is Link.HARD)
    assert target.stat().st_mtime_ns == original.stat().st_mtime_ns
    again = partition(str(source), 2, str(tmp_path / "out"), link)
    assert again.made == 0


def test_a_repeat_changes_nothing(tmp_path: Path) -> None:
    """Repeating the command makes nothing and touches nothing."""
    source = numbered(tmp_path / "all", 7)
    partition(str(source), 3, str(tmp_path / "out"), Link.COPY)
    before = {
        name: (tmp_path / "out" / name).lstat()
        for name in names_in(tmp_path / "out")
        if not name.startswith(".")
    }
    assert partition(str(source), 3, str(tmp_path / "out"), Link.COPY).made == 0
    after = {name: (tmp_path / "out" / name).lstat() for name in before}
    assert {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in before.items()} == {
        name: (stat.st_ino, stat.st_mtime_ns) for name, stat in after.items()
    }


def test_a_repeat_makes_what_is_missing_and_replaces_what_is_wrong(tmp_path: Path) -> None:
    """What an interrupted or damaged partition lacks is made; left temporary files go; another
    --link makes all of them again.
    """
    source = numbered(tmp_path / "all", 6)
    output = tmp_path / "out"
    partition(str(source), 2, str(output), Link.COPY)
    (output / "0" / "001.jpg").unlink()
    (output / "1" / "003.jpg").write_bytes(b"")
    (output / "1" / os.fsdecode(module._TEMPORARY)).write_bytes(b"half")
    assert partition(str(source), 2, str(output), Link.COPY).made == 2
    assert [name for share in shares_of(output) for name in share] == names_in(source)
    assert (output / "1" / "003.jpg").read_bytes() == b"003.jpg"
    for link in (Link.SYMBOLIC, Link.HARD, Link.COPY):
        assert partition(str(source), 2, str(output), link).made == 6
    assert [name for share in shares_of(output) for name in share] == names_in(source)


def test_another_number_of_partitions_is_refused(tmp_path: Path) -> None:
    """A finished partition is not mixed with another one; both are named, nothing is changed."""
    source = numbered(tmp_path / "all", 6)
    output = tmp_path / "out"
    partition(str(source), 2, str(output))
    before = names_in(output)
    with pytest.raises(OutputError) as caught:
        partition(str(source), 3, str(output))
    assert (
        str(caught.value)
        == f"--output {output} holds {source} in 2 partitions, now {source} in 3 is asked for."
        " Remove it, or give another folder."
    )
    assert names_in(output) == before


def test_files_that_systems_make_by_themselves_are_no_strangers(tmp_path: Path) -> None:
    """`.DS_Store` and the like make no output unacceptable, before or after partitioning."""
    source, output = (
        numbered(tmp_path / "all", 3),
        make(tmp_path / "out", ".DS_Store", "lost+found/x"),
    )
    partition(str(source), 2, str(output))
    make(output, "0/Thumbs.db", "desktop.ini")
    assert partition(str(source), 2, str(output)).partitions == (2, 1)
    assert (output / "0" / "Thumbs.db").exists()


def test_a_foreign_output_is_refused(tmp_path: Path) -> None:
    """A folder that holds anything else is left alone."""
    source = numbered(tmp_path / "all", 3)
    output = make(tmp_path / "out", "thesis.doc")
    with pytest.raises(UsageError) as caught:
        partition(str(source), 2, str(output))
    assert (
        str(caught.value)
        == f"--output {output} is not empty and not made by `imagemill partition` (it holds"
        " 'thesis.doc'). Give a new folder."
    )
    assert names_in(output) == ["thesis.doc"]


def test_what_somebody_put_beside_the_partitions_is_named(tmp_path: Path) -> None:
    """A repeat does not pass over a folder that it did not make: `run` would take it for a device's
    share.
    """
    source = numbered(tmp_path / "all", 3)
    partition(str(source), 2, str(tmp_path / "out"))
    make(tmp_path / "out", "2/extra.jpg")
    with pytest.raises(
        OutputError, match="also holds '2', which `imagemill partition` did not make"
    ):
        partition(str(source), 2, str(tmp_path / "out"))


def test_images_that_changed_since_are_refused_not_doubled(tmp_path: Path) -> None:
    """A new image moves others to the next partition; a repeat would leave them in both."""
    source = numbered(tmp_path / "all", 6)
    partition(str(source), 2, str(tmp_path / "out"))
    make(source, "000-new.jpg", "000-newer.jpg")
    before = names_in(tmp_path / "out")
    with pytest.raises(
        OutputError,
        match=r"holds 002\.jpg in partition 0, where it does not belong now: the images changed",
    ):
        partition(str(source), 2, str(tmp_path / "out"))
    assert names_in(tmp_path / "out") == before


def test_hard_links_that_are_impossible_become_symbolic_ones_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across file systems the default falls back and says so once; --link hard says what to do
    instead.
    """
    source = numbered(tmp_path / "all", 4)

    def no_link(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", no_link)
    messages: list[str] = []
    made = partition(str(source), 2, str(tmp_path / "out"), log=messages.append)
    assert made.link is Link.SYMBOLIC
    assert messages == [
        "note: hard links are impossible here (Invalid cross-device link): making symbolic links"
        " instead; --link copy makes copies"
    ]
    assert (tmp_path / "out" / "1" / "003.jpg").read_bytes() == b"003.jpg"
    with pytest.raises(OutputError) as caught:
        partition(str(source), 2, str(tmp_path / "other"), Link.HARD)
    assert (
        str(caught.value)
        == f"cannot make {tmp_path}/other/0/000.jpg a hard link to {source}/000.jpg: Invalid"
        " cross-device link. Use --link symbolic or --link copy."
    )


def test_a_full_disk_leaves_no_half_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that fails half-way is not there, and a repeat finishes the rest."""
    source = numbered(tmp_path / "all", 4)
    real = shutil.copy2

    def half(original: bytes, target: bytes) -> None:
        if original.endswith(b"002.jpg"):
            Path(os.fsdecode(target)).write_bytes(b"00")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(original, target)

    monkeypatch.setattr(shutil, "copy2", half)
    with pytest.raises(OutputError, match="The disk is full"):
        partition(str(source), 2, str(tmp_path / "out"), Link.COPY)
    assert shares_of(tmp_path / "out") == [["000.jpg", "001.jpg"], []]
    monkeypatch.undo()
    assert partition(str(source), 2, str(tmp_path / "out"), Link.COPY).made == 2


def test_what_is_no_regular_file_still_gets_its_row(tmp_path: Path) -> None:
    """Links that lead nowhere and FIFOs become symbolic links, with any --link, so that `run` can
    say what is wrong with them.
    """
    source = numbered(tmp_path / "all", 1)
    (source / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(source / "pipe.jpg")
    (source / "folder.jpg").mkdir()
    make(source, "folder.jpg/inside.jpg")
    made = partition(str(source), 1, str(tmp_path / "out"), Link.COPY)
    assert names_in(tmp_path / "out" / "0") == [
        "000.jpg",
        "folder.jpg/inside.jpg",
        "gone.jpg",
        "pipe.jpg",
    ]
    assert (tmp_path / "out" / "0" / "gone.jpg").readlink() == source / "gone.jpg"
    assert (tmp_path / "out" / "0" / "pipe.jpg").readlink() == source / "pipe.jpg"
    assert made.images == 4


def test_links_are_followed_to_the_image(tmp_path: Path) -> None:
    """A linked image, or one in a linked folder, is the image itself: the partition does not lead
    through the source.
    """
    elsewhere = make(tmp_path / "elsewhere", "1.jpg", "more/2.jpg")
    source = numbered(tmp_path / "all", 1)
    (source / "one.jpg").symlink_to(elsewhere / "1.jpg")
    (source / "sub").symlink_to(elsewhere / "more")
    partition(str(source), 1, str(tmp_path / "out"), Link.HARD)
    assert (tmp_path / "out" / "0" / "one.jpg").samefile(elsewhere / "1.jpg")
    assert not (tmp_path / "out" / "0" / "one.jpg").is_symlink()
    assert not (tmp_path / "out" / "0" / "sub").is_symlink()
    assert (tmp_path / "out" / "0" / "sub" / "2.jpg").samefile(elsewhere / "more" / "2.jpg")


def test_an_output_inside_the_data_folder_is_not_its_own_input(tmp_path: Path) -> None:
    """--output below --data-dir is never listed, however often the command is repeated."""
    source = numbered(tmp_path / "all", 5)
    for _ in range(2):
        assert partition(str(source), 2, str(source / "parts")).images == 5


def test_more_partitions_than_images_leaves_some_empty(tmp_path: Path) -> None:
    """Every partition's folder is there, also an empty one."""
    partition(str(numbered(tmp_path / "all", 2)), 4, str(tmp_path / "out"))
    assert shares_of(tmp_path / "out") == [["000.jpg"], ["001.jpg"], [], []]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"partitions": 0}, UsageError, "--partitions 0: must be from 1 to 512."),
        ({"partitions": 513}, UsageError, "--partitions 513: must be from 1 to 512."),
        (
            {"data_dir": "{all}/000.jpg"},
            UsageError,
            "--data-dir {all}/000.jpg is a file. Give a folder.",
        ),
        (
            {"data_dir": "{all}/none"},
            SourceError,
            (
                "source {all}/none cannot be read: No such file or directory. Give a folder or an"
                " image."
            ),
        ),
        (
            {"data_dir": "{all}/empty"},
            SourceError,
            "--data-dir {all}/empty holds no images. Give a folder that does.",
        ),
        (
            {"output": "{all}"},
            UsageError,
            "--output {all} is the data folder itself. Give another folder.",
        ),
        (
            {"output": "{all}/000.jpg"},
            OutputError,
            "--output {all}/000.jpg is a file. Give a folder.",
        ),
    ],
)
def test_mistakes_are_reported(
    tmp_path: Path, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """Each mistake has one clear message, and nothing is made."""
    source = numbered(tmp_path / "all", 3)
    (source / "empty").mkdir()
    values: dict[str, Any] = {
        "data_dir": str(source),
        "partitions": 2,
        "output": str(tmp_path / "out"),
    }
    values |= {
        name: value.format(all=source) if isinstance(value, str) else value
        for name, value in change.items()
    }
    with pytest.raises(kind) as caught:
        partition(**values)
    assert str(caught.value) == message.format(all=source)
    assert not (tmp_path / "out").exists()


def test_run_takes_the_partitions_as_the_shares_of_its_devices(
    tmp_path: Path, imagemill: Callable[..., helpers.Result]
) -> None:
    """`partition` then `run` with as many devices: every image is one row, and no warning about the
    number of sub-folders.
    """
    source = helpers.fill(
        tmp_path / "all",
        {f"{seed % 2}/{seed:02d}.jpg": sample_images.jpeg(seed=seed) for seed in range(11)},
    )
    made = imagemill(
        "partition",
        "--data-dir",
        source,
        "--partitions",
        3,
        "--output",
        tmp_path / "datasets",
        "--json",
    )
    assert made.code == 0
    assert made.json["partitions"] == [4, 4, 3]
    ran = imagemill(
        "run",
        f"{tmp_path / 'datasets'}/",
        "--output",
        tmp_path / "out",
        "--model",
        "tiny",
        "--devices",
        "null:3",
    )
    assert ran.code == 0
    assert "sub-folders" not in ran.err
    found = [row["path"].partition("/")[2] for row in helpers.rows(tmp_path / "out")]
    assert sorted(found) == names_in(source)


def test_the_command_line_tells_what_was_made(
    tmp_path: Path, imagemill: Callable[..., helpers.Result]
) -> None:
    """One line for people; a mistake is one line and exit code 1, without a traceback."""
    source = numbered(tmp_path / "all", 5)
    arguments = ("partition", "--data-dir", source, "--partitions", 2, "--output", tmp_path / "out")
    assert (
        imagemill(*arguments).out
        == f"5 images in 2 partitions of 2 or 3: {tmp_path}/out (5 hard links made)\n"
    )
    assert (
        imagemill(*arguments).out
        == f"5 images in 2 partitions of 2 or 3: {tmp_path}/out (0 hard links made)\n"
    )
    refused = imagemill(
        "partition", "--data-dir", source, "--partitions", 5, "--output", tmp_path / "out"
    )
    assert refused.code == 1
    assert refused.err.startswith("imagemill: --output ")
    assert "Traceback" not in refused.err


def test_broken_links_are_reported(tmp_path: Path) -> None:
    """They may have led to a folder of images, which is in no part then."""
    helpers.fill(tmp_path / "all", {"1.jpg": b"x", "2.jpg": b"x"})
    (tmp_path / "all" / "disk").symlink_to("/mnt/not mounted")
    messages: list[str] = []
    partition(str(tmp_path / "all"), 2, str(tmp_path / "parts"), log=messages.append)
    first = f"{tmp_path}/all/disk"
    assert messages == [
        f"note: 1 link leads nowhere, first: {first}. If its disk is not mounted, the images there"
        " are left out"
    ]
