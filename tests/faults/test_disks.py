"""Outputs that cannot be written: full, read-only, not ours, too small. Needs root and `mount`;
without root, some of it needs none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest

import helpers
import sample_images

pytestmark = pytest.mark.process

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root may mount a file system and become another user"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of its own, in memory, of a given size; as root it is an error if that
    cannot be done.
    """
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True
        )
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def one_clear_error(result: helpers.Result, *texts: str) -> None:
    """Exit 1; stderr ends in one message that holds these texts, and has no traceback of
    anybody's.
    """
    assert result.code == 1, result
    messages = [
        line
        for line in result.err.splitlines()
        if line.startswith("imagemill: ") and not line.startswith("imagemill: resuming")
    ]
    assert len(messages) == 1, result.err
    for text in texts:
        assert text in messages[0]
    for sign in ("Traceback", "Error:", "Exception ignored", "--- Logging error"):
        assert sign not in result.err, result.err
    assert not result.out


@needs_root
@pytest.mark.parametrize("free_kib", [0, 24, 100])
def test_a_full_disk_is_one_clear_error_and_no_damage(
    null_run, small_jpegs: Path, tmp_path: Path, disk, free_kib: int
) -> None:
    """The disk runs full, at whatever point: one message, exit 1, every part there is whole; with
    space again the same command finishes.
    """
    root = disk("2m")
    ballast = root / "ballast"
    output = root / "out"
    arguments = (
        small_jpegs,
        "--output",
        output,
        "--save",
        "logits",
        "--shard-size",
        "4",
        "--devices",
        "null:2",
    )
    with ballast.open("wb") as file:
        file.write(bytes(_free(root) - 1024 * free_kib))
    result = null_run(*arguments)
    one_clear_error(
        result,
        "cannot write ",
        "The disk is full. Free some space, then repeat the command: finished parts are kept.",
    )
    if free_kib == 100:
        assert harness.assert_sound_so_far(output) > 0, "some parts were to fit"
        assert null_run(*arguments).code == 1, "it is as full as it was"
        harness.assert_sound_so_far(output)
    ballast.unlink()
    finished = null_run(*arguments)
    assert finished.code == 0, finished
    harness.assert_complete(output)
    if free_kib == 100:
        calm = (*arguments[:2], tmp_path / "calm", *arguments[3:])
        assert null_run(*calm).code == 0
        harness.assert_same(output, tmp_path / "calm")


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@needs_root
def test_a_disk_without_room_for_one_more_file_is_one_clear_error(
    null_run, small_jpegs: Path, disk
) -> None:
    """No inode is left, though there is space: the logs cannot be made either, and that is no
    traceback.
    """
    root = disk("4m,nr_inodes=10")
    output = root / "out"
    result = null_run(small_jpegs, "--output", output)
    one_clear_error(result, "cannot write ", "The disk is full.")
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(root)], check=True)
    assert null_run(small_jpegs, "--output", output).code == 0
    harness.assert_complete(output)


@needs_root
def test_a_read_only_output_is_one_clear_error(
    null_run, imagemill, small_jpegs: Path, disk
) -> None:
    """Read-only from the start, or since the job was begun: exit 1 with the remedy; looking at a
    finished job needs no writing.
    """
    root = disk("4m")
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    one_clear_error(
        null_run(small_jpegs, "--output", root / "out"), "The file system is read-only."
    )
    subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
    assert null_run(small_jpegs, "--output", root / "out").code == 0
    (root / "out" / "predictions" / "part-000002.parquet").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    one_clear_error(
        null_run(small_jpegs, "--output", root / "out"), "The file system is read-only."
    )
    assert imagemill("status", root / "out", "--json").json["shards_done"] == 5
    found = imagemill("verify", root / "out")
    assert found.code == 1
    assert "part-000002.parquet is missing" in found.out
    subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
    assert null_run(small_jpegs, "--output", root / "out").code == 0
    harness.assert_complete(root / "out")


@needs_root
@pytest.mark.parametrize("closed", ["predictions", "logs"])
def test_a_read_only_part_of_the_output_is_one_clear_error(
    null_run, small_jpegs: Path, tmp_path: Path, closed: str
) -> None:
    """A folder of the output that alone cannot be written to, parts or logs: exit 1 and which;
    later the same command finishes.
    """
    output = tmp_path / "out"
    (output / closed).mkdir(parents=True)
    subprocess.run(["mount", "--bind", str(output / closed), str(output / closed)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(output / closed)], check=True)
        result = null_run(small_jpegs, "--output", output)
    finally:
        subprocess.run(["umount", "-l", str(output / closed)], check=True)
    one_clear_error(result, f"cannot write {output / closed}/", "The file system is read-only.")
    assert null_run(small_jpegs, "--output", output).code == 0
    harness.assert_complete(output)


@needs_root
def test_a_folder_of_another_user_is_one_clear_error(
    null_run, small_jpegs: Path, tmp_path: Path
) -> None:
    """An output that belongs to somebody else, before the job is begun and after: exit 1, and the
    remedy.
    """
    base = Path("/tmp") / f"imagemill-test-{os.getpid()}"
    try:
        source = helpers.fill(
            base / "images", {f"{n}.jpg": sample_images.jpeg(seed=n) for n in range(12)}
        )
        arguments = (
            source,
            "--output",
            base / "out",
            "--models-dir",
            harness.null_bundle(base / "models"),
        )
        (base / "out").mkdir()
        for path in (base, *base.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.chown(base, 65534, 65534)
        os.chown(base / "out", 65534, 65534)
        nobody = tuple(helpers.without_root_powers())
        refused = (
            "The folder may not be written to. Give another --output, or change its permissions and"
            " repeat the command."
        )
        one_clear_error(
            null_run(*arguments, before=nobody),
            f"cannot write {base}/out/.lock: Permission denied. {refused}",
        )
        one_clear_error(
            null_run(source, "--output", base / "new", *arguments[3:], before=nobody),
            f"cannot write {base}/new: ",
            refused,
        )
        assert null_run(*arguments).code == 0
        harness.assert_complete(base / "out")
        for path in (base / "out").rglob("*"):
            os.chown(path, 65534, 65534)
        one_clear_error(
            null_run(*arguments, before=nobody),
            f"cannot write {base}/out/.lock: Permission denied. {refused}",
        )
    finally:
        shutil.rmtree(base)


def test_a_file_size_limit_is_one_clear_error(null_run, small_jpegs: Path, tmp_path: Path) -> None:
    """A part that a limit of the system forbids (RLIMIT_FSIZE, as batch systems set it) is a
    message like the others; needs no root.
    """
    hook = """
    if WORKER:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    """
    env = harness.hooks(tmp_path / "hooks", hook)
    result = null_run(small_jpegs, "--output", tmp_path / "out", env=env)
    one_clear_error(
        result,
        "cannot write ",
        "File too large. Fix the cause and run the command again: finished parts are kept.",
    )
    assert harness.assert_sound_so_far(tmp_path / "out") == 0
    assert null_run(small_jpegs, "--output", tmp_path / "out").code == 0
    harness.assert_complete(tmp_path / "out")


def test_logs_that_cannot_be_written_cost_no_row_and_no_noise(
    null_run, small_jpegs: Path, tmp_path: Path
) -> None:
    """A log is a courtesy: with no room for a line of it the job goes on, and stderr stays
    readable.
    """
    logs = tmp_path / "out" / "logs"
    logs.mkdir(parents=True)
    for name in ("launcher.log", "null#0.log"):
        (logs / name).symlink_to("/dev/full")
    result = null_run(small_jpegs, "--output", tmp_path / "out")
    assert result.code == 0, result
    assert "Traceback" not in result.err
    assert "Logging error" not in result.err
    harness.assert_complete(tmp_path / "out")
