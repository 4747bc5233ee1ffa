"""Images that crash, hang or exhaust their decoder, or hang their very reading, take only
themselves with them.
"""

from __future__ import annotations

from pathlib import Path

import harness
import pytest

import helpers
import sample_images

pytestmark = pytest.mark.process

HANGING_READ = """
if WORKER:
    def patch(module):
        mark_image = module.Heartbeat.mark_image
        def long_ago(self, slot, index, **options):
            mark_image(self, slot, index, **options)
            if options.get("timed", True) and index < int(os.environ["HANGING"]):
                self._words[2 * slot + 1] -= int(1e12)  # 1,000 s
                time.sleep(3600)
        module.Heartbeat.mark_image = long_ago
    after_import("imagemill.pipeline.heartbeat", patch)
"""
"""The first images have been read for longer than any limit allows as soon as they are read."""


def good(count: int = 40) -> dict[str, bytes]:
    return {
        f"{seed:03d}.jpg": sample_images.jpeg(40, 36, seed=seed, quality=80)
        for seed in range(count)
    }


def neighbours(output: Path) -> dict[str, object]:
    return {path: row for path, row in helpers.by_path(output).items() if path in good()}


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        (
            "crash",
            "crashed_decoder",
            "the decoder was killed by SIGSEGV, twice in a process of its own",
        ),
        ("hang", "timeout", "decoding took more than 2 s, twice in a process of its own"),
        ("oom", "too_large", "not enough memory to decode it"),
    ],
)
def test_a_deadly_image_is_a_row_and_its_neighbours_keep_their_answers(
    null_run, tmp_path: Path, fault, status, error
) -> None:
    """An image that crashes, hangs or exhausts its decoder has the row that says so; all others
    have what they have without it.
    """
    deadly = ("017x.jpg",) if fault == "hang" else ("017x.jpg", "017y.jpg", "030x.jpg")
    data = sample_images.jpeg(40, 36, seed=99) + f"imagemill-test-{fault}".encode()
    with_it = helpers.fill(tmp_path / "with", good() | dict.fromkeys(deadly, data))
    without = helpers.fill(tmp_path / "without", good())
    env = helpers.environment(**helpers.faulty_decoders())
    limit = ("--max-seconds", "2") if fault == "hang" else ()
    arguments = ("--output", tmp_path / "out", "--num-workers", "2", "--json", *limit)
    result = null_run(with_it, *arguments, env=env)
    assert result.code == 0, result
    assert null_run(without, "--output", tmp_path / "calm").code == 0
    harness.assert_complete(tmp_path / "out")
    assert neighbours(tmp_path / "out") == neighbours(tmp_path / "calm")
    rows = helpers.by_path(tmp_path / "out")
    for name in deadly:
        assert rows[name]["status"] == status, rows[name]
        assert rows[name]["error"].startswith(error)
    assert (result.json["devices"][0]["restarts"] > 0) == (fault != "oom")


def test_every_image_of_a_shard_may_be_deadly(null_run, tmp_path: Path) -> None:
    """A folder where nothing but decoder killers is left still comes to its end: a row each."""
    deadly = {
        f"{seed:03d}.jpg": sample_images.jpeg(seed=seed) + b"imagemill-test-crash"
        for seed in range(3)
    }
    source = helpers.fill(tmp_path / "source", deadly)
    env = helpers.environment(**helpers.faulty_decoders())
    result = null_run(
        source,
        "--output",
        tmp_path / "out",
        "--json",
        "--num-workers",
        "2",
        env=env,
    )
    assert result.code == 0, result
    assert (
        harness.assert_complete(tmp_path / "out")["status"].to_pylist() == ["crashed_decoder"] * 3
    )


def test_a_read_that_hangs_is_a_timeout_row_after_two_tries(null_run, tmp_path: Path) -> None:
    """Storage that never answers for some images costs each of them two tries of --max-seconds and
    a `timeout` row.
    """
    hanging = {f"+{number}.jpg": b"?" for number in range(2)}
    source = helpers.fill(tmp_path / "source", good() | hanging)
    without = helpers.fill(tmp_path / "without", good())
    env = harness.hooks(tmp_path / "hooks", HANGING_READ, HANGING="2")
    result = null_run(
        source, "--output", tmp_path / "out", "--max-seconds", "60", "--json", env=env
    )
    assert result.code == 0, result
    assert null_run(without, "--output", tmp_path / "calm").code == 0
    harness.assert_complete(tmp_path / "out")
    rows = helpers.by_path(tmp_path / "out")
    error = "reading or decoding it took more than --max-seconds 60, twice"
    assert {(rows[name]["status"], rows[name]["error"]) for name in hanging} == {("timeout", error)}
    assert neighbours(tmp_path / "out") == neighbours(tmp_path / "calm")
    assert result.json["devices"][0]["restarts"] == 4


def test_a_short_failure_of_storage_is_tried_again(null_run, tmp_path: Path) -> None:
    """EIO twice in a row is no row: the read is tried again, a little later each time."""
    source = helpers.fill(tmp_path / "source", good(3))
    hook = """
    if WORKER:
        import errno
        opened, failures = os.open, []
        def failing(path, *arguments, **options):
            if isinstance(path, bytes) and path.endswith(b"001.jpg") and len(failures) < 2:
                failures.append(path)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return opened(path, *arguments, **options)
        os.open = failing
        def count(module):
            import atexit
            atexit.register(lambda: open(os.environ["MARKER"], "w").write(str(len(failures))))
        after_import("imagemill.pipeline.sources.folder", count)
    """
    env = harness.hooks(tmp_path / "hooks", hook, MARKER=str(tmp_path / "failures"))
    assert null_run(source, "--output", tmp_path / "out", env=env).code == 0
    assert helpers.table(tmp_path / "out")["status"].to_pylist() == ["ok"] * 3
    assert (tmp_path / "failures").read_text() == "2"


@pytest.mark.parametrize("device", ["null:1", "cpu:1"])
def test_batches_without_one_good_image_are_rows_like_any_other(
    null_run, models_dir: Path, tmp_path: Path, device: str
) -> None:
    """A run of bad images longer than any batch, and a job of nothing else, come to their end."""
    source = helpers.fill(
        tmp_path / "source", {f"{number:03d}.jpg": b"bad" for number in range(100)}
    )
    helpers.fill(source, {"050.jpg": sample_images.jpeg(40, 36)})
    for sources, ok in (((source,), 1), ((source / "000.jpg",), 0)):
        output = tmp_path / f"out-{ok}"
        arguments = (
            "--output",
            output,
            "--devices",
            device,
            "--model",
            models_dir / "tiny",
            "--batch-size",
            "2",
            "--shard-size",
            "90",
        )
        result = null_run(*sources, *arguments)
        assert result.code == 0, result
        statuses = harness.assert_complete(output)["status"].to_pylist()
        assert statuses.count("ok") == ok
        assert statuses.count("not_an_image") == len(statuses) - ok
