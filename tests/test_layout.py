"""Files appear whole or not at all, paths are where they are promised, and locks keep a second
launcher out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import helpers
from imagemill.errors import OutputError
from imagemill.job import ledger, lock
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.system import files, userdirs


@pytest.mark.parametrize("set_to", [None, ""])
def test_the_cache_folder_is_below_home_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, set_to: str | None
) -> None:
    """With XDG_CACHE_HOME unset or empty, the usual case, an output in an object store has its
    folder in ~/.cache.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if set_to is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", set_to)
    assert userdirs.cache() == tmp_path / ".cache" / "imagemill"
    paths = JobPaths.of("s3://bucket/job/")
    assert paths.root.parent == tmp_path / ".cache" / "imagemill" / "jobs"
    assert (paths.output, paths.shown(paths.job)) == ("s3://bucket/job", "s3://bucket/job/job.json")


def test_the_cache_folder_is_where_the_variable_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """XDG_CACHE_HOME wins over HOME; each output in a store has a folder of its own, and the same
    one every time.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert userdirs.cache() == tmp_path / "cache" / "imagemill"
    roots = [JobPaths.of(url).root for url in ("s3://bucket/a", "s3://bucket/b", "s3://bucket/a/")]
    assert roots[0] == roots[2] != roots[1]


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
def test_every_byte_is_in_the_file_when_it_is_synced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pieces: bool
) -> None:
    """Power fails right after the sync: small files too, which fit into a buffer, are whole and get
    their name only then.
    """
    synced: list[bytes] = []
    fsync = os.fsync

    def watching(handle: int) -> None:
        if not os.path.isdir(f"/dev/fd/{handle}"):
            assert not (tmp_path / "job.json").exists()
            (temporary,) = tmp_path.iterdir()
            synced.append(temporary.read_bytes())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watching)
    data = os.urandom(3_000)
    files.write_whole(tmp_path / "job.json", iter([data[:1_000], data[1_000:]]) if pieces else data)
    assert synced == [data]
    assert (tmp_path / "job.json").read_bytes() == data


def test_pieces_that_fail_leave_nothing_behind(tmp_path: Path) -> None:
    """The maker of the pieces may raise anything: an older file stays as it was, and no temporary
    file is left.
    """
    (tmp_path / "failed.txt").write_bytes(b"old")

    def failing() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "failed.txt", failing())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"failed.txt": b"old"}


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path: Path) -> None:
    """Two nodes of a cluster may write one part, and have the same process id."""

    def pieces() -> Iterator[bytes]:
        yield b"one "
        files.write_whole(tmp_path / "part", b"two")
        yield b"more"

    files.write_whole(tmp_path / "part", pieces())
    assert (tmp_path / "part").read_bytes() == b"one more"
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


@pytest.mark.parametrize("name", ["file", "."])
def test_syncing_closes_what_it_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Also where the sync fails: a long job would run out of handles."""
    path = tmp_path / name
    (tmp_path / "file").touch()
    synced = []

    def failing(handle: int) -> None:
        synced.append(os.path.samestat(os.fstat(handle), path.stat()))
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(OSError, match="Input/output error"):
        files.sync(path)
    assert synced == [True]
    assert len(os.listdir("/dev/fd")) == before


def held(path: Path, kind: int) -> bool:
    """Whether another holder, who has a handle of their own, is refused this kind of lock."""
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def test_a_second_launcher_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    """The lock is exclusive, `status` sees it without taking it, and it is free again
    afterwards.
    """
    paths = JobPaths(tmp_path / "out")
    assert not lock.is_locked(paths)
    with lock.locked(paths):
        assert paths.lock.stat().st_mode & 0o600 == 0o600, (
            "its owner could not take it a second time"
        )
        assert lock.is_locked(paths)
        assert held(paths.lock, fcntl.LOCK_SH)
        with (
            pytest.raises(
                OutputError,
                match=r"out is in use by another imagemill run\. Wait for it or stop it",
            ),
            lock.locked(paths),
        ):
            pytest.fail("two launchers hold one output")
        assert lock.is_locked(paths), "the refused launcher has released the lock of the first"
    assert not lock.is_locked(paths)
    assert not held(paths.lock, fcntl.LOCK_EX)
    with lock.locked(paths):
        pass


@pytest.mark.process
def test_status_never_keeps_a_launcher_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`status` holds the lock for a moment: a launcher that meets it waits and starts. Two at once
    do not see each other as a run.
    """
    paths = JobPaths(tmp_path)
    paths.lock.touch()
    looking = os.open(paths.lock, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert not lock.is_locked(paths)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            os.close(looking)

    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=wait))
    with lock.locked(paths):
        assert lock.is_locked(paths)
    assert waits == [0.01, 0.05, 0.2]


def test_a_lock_that_the_file_system_refuses_is_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file system without locks is not called another run, which the user would wait for in
    vain.
    """

    def refuse(handle: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(OutputError, match=r"cannot write .*\.lock: No locks available"),
        lock.locked(JobPaths(tmp_path)),
    ):
        pytest.fail("ran without a lock")


def test_a_lock_file_that_a_refused_launcher_has_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waited for it has a lock that nobody else can have, too."""
    paths, acquire, handles = JobPaths(tmp_path / "out"), lock._acquire, []

    def removed_meanwhile(handle: int, paths: JobPaths) -> None:
        acquire(handle, paths)
        handles.append(handle)
        if len(handles) == 1:
            paths.discard([paths.lock, paths.root])
            assert not paths.root.exists()

    monkeypatch.setattr(lock, "_acquire", removed_meanwhile)
    with lock.locked(paths):
        assert len(handles) == 2
        assert lock.is_locked(paths)


@pytest.mark.parametrize("name", [".lock", ".fetching"])
def test_a_lock_file_that_cannot_be_opened_is_one_clear_error(tmp_path: Path, name: str) -> None:
    """It is named, with the reason and what to do."""
    (tmp_path / name).mkdir()
    paths = JobPaths(tmp_path)
    holding = lock.locked(paths) if name == ".lock" else files.in_turn(paths.fetching)
    with (
        pytest.raises(
            OutputError,
            match=rf"cannot write {tmp_path}/{name}: Is a directory\. Fix the cause and run the command again",
        ),
        holding,
    ):
        pytest.fail("ran without a lock")


def test_a_job_without_a_part_has_none(tmp_path: Path) -> None:
    """Before the first commit there may not even be a folder."""
    assert ledger.existing_parts(open_store(JobPaths(tmp_path))) == {}


def test_those_who_fetch_a_plan_take_turns(tmp_path: Path) -> None:
    """The second waits until the first is done, and then goes on."""
    path, order, waiting = JobPaths(tmp_path / "new").fetching, [], threading.Event()

    def second() -> None:
        waiting.set()
        with files.in_turn(path):
            order.append("second")

    thread = threading.Thread(target=second)
    with files.in_turn(path):
        assert held(path, fcntl.LOCK_SH)
        thread.start()
        waiting.wait()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not held(path, fcntl.LOCK_EX)


def test_a_sweep_removes_temporary_files_and_nothing_else(tmp_path: Path) -> None:
    """In the output, its plan and its predictions; other hidden files and folders of other people
    stay.
    """
    kept = {
        ".lock": b"",
        "job.json": b"{}",
        "predictions/part-000000.parquet": b"x",
        "predictions/.hidden": b"x",
        "mine/.a.tmp": b"x",
    }
    swept = {
        ".job.json.77.tmp": b"",
        "plan/.listing.arrow.tmp": b"x",
        "predictions/.part-000001.parquet.9.tmp": b"x",
    }
    helpers.fill(tmp_path, kept | swept)
    JobPaths(tmp_path).sweep()
    assert {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    } == set(kept)
    JobPaths(tmp_path / "none").sweep()


def test_a_start_that_was_cut_short_has_left_these_names_and_no_others(tmp_path: Path) -> None:
    """Only they may lie in an output folder that has no job.json."""
    helpers.fill(tmp_path, {".job.json.77.tmp": b"", ".other.tmp": b"", "thesis.tmp": b""})
    assert JobPaths(tmp_path).ours() == {".job.json.77.tmp", "plan", "predictions", "logs", ".lock"}


def test_clearing_a_folder_leaves_an_empty_one(tmp_path: Path) -> None:
    """Whether it was full or not there; what stands in the way is one clear error."""
    helpers.fill(tmp_path, {"plan/sub/old": b"x", "file": b"x"})
    for name in ("plan", "none"):
        files.clear_folder(tmp_path / name)
        assert list((tmp_path / name).iterdir()) == []
    with pytest.raises(OutputError, match=r"cannot write .*file is a file, not a folder"):
        files.clear_folder(tmp_path / "file")
    with pytest.raises(OutputError, match=r"cannot write .*below: .*file is a file, not a folder"):
        files.make_folder(tmp_path / "file" / "below")
    with pytest.raises(OutputError, match=r"cannot write .*plan: Is a directory"):
        files.appending(tmp_path / "plan")


def test_logs_are_in_the_output_unless_they_are_sent_elsewhere(tmp_path: Path) -> None:
    """--log-dir is taken from the current folder, as --output is."""
    assert JobPaths.of(str(tmp_path)).device_log("cpu#0") == tmp_path / "logs" / "cpu#0.log"
    paths = JobPaths.of("out", "elsewhere")
    assert (paths.root, paths.launcher_log) == (
        Path.cwd() / "out",
        Path.cwd() / "elsewhere" / "launcher.log",
    )
    assert paths.shown(paths.launcher_log) == str(Path.cwd() / "elsewhere" / "launcher.log")
