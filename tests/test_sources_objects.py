"""Images in an object store give the rows that the same images in a folder give, whatever the store
does meanwhile.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import archive_files
import helpers
import s3 as faults
import sample_images
from imagemill.errors import OutputError, SourceError
from imagemill.pipeline.sources import check, resolve
from imagemill.pipeline.sources.base import Skipped
from imagemill.pipeline.sources.folder import FolderSource
from imagemill.pipeline.sources.locations import fetch
from imagemill.pipeline.sources.objects import ObjectSource
from imagemill.records import BadImage, Filters, Settings, Status
from imagemill.runner import run
from imagemill.system import storage
from imagemill.system.retry import RetryPolicy
from s3 import Bucket, FaultProxy

sys.path.insert(0, str(Path(__file__).with_name("faults")))
import harness

CLI = Callable[..., helpers.Result]
Jobs = Callable[..., Settings]
TINY = (
    "--model",
    "tiny",
    "--devices",
    "null",
    "--shard-size",
    "8",
    "--batch-size",
    "2",
    "--num-workers",
    "2",
    "--save",
    "logits",
    "--no-report",
)
HASTY = """
    def hasty(module):
        module.READING = module.RetryPolicy(attempts=3, pause_s=0.01, longest_pause_s=0.05, connect_s=60, silence_s=60, seconds=600)
        module.PROBING = module.READING
    after_import("imagemill.system.storage", hasty)
"""
PATIENT = HASTY.replace("=60", "=3600")
"""For tests in which a signal, and no time limit, ends a wait."""


@pytest.fixture
def hasty(tmp_path: Path, models_dir: Path) -> Mapping[str, str]:
    """An environment in which requests to object stores are tried three times."""
    return harness.hooks(tmp_path / "hooks", HASTY, IMAGEMILL_MODELS=str(models_dir))


def answers(output: Path, remove: str = "") -> dict[str, dict[str, Any]]:
    return {
        path.removeprefix(remove): row | {"path": path.removeprefix(remove)}
        for path, row in helpers.by_path(output).items()
    }


def test_the_same_images_have_the_same_answers_wherever_they_lie(
    s3: Bucket, some_jpegs: dict[str, bytes], job: Jobs, tmp_path: Path
) -> None:
    """Folder, prefix, list of URLs, list in the store with relative keys: the same rows bit for
    bit, bad images included.
    """
    files = some_jpegs | {
        "a/half.jpg": sample_images.half(sample_images.jpeg(300, 200)),
        "b/empty.jpg": b"",
        "ü 100%?.png": b"no image",
    }
    folder = helpers.fill(tmp_path / "images", files)
    url = s3.fill(files, "some/where/")
    s3.fill({"some/where/list.txt": "\n".join([*files, "a/not there.jpg"]).encode()})
    (tmp_path / "urls.txt").write_text("".join(f"{url}/{key}\n" for key in files), encoding="utf-8")
    summaries = {}
    for name, source in {
        "folder": folder,
        "prefix": f"{url}/",
        "urls": f"@{tmp_path / 'urls.txt'}",
        "list": f"@{url}/list.txt",
    }.items():
        summaries[name] = run.run(
            job(source, output=str(tmp_path / name), shard_size=8, num_workers=2, save=("logits",))
        )
        harness.assert_complete(tmp_path / name)
    expected = answers(tmp_path / "folder")
    assert len(expected) == 43
    assert answers(tmp_path / "prefix") == expected
    assert answers(tmp_path / "urls", f"{url}/") == expected
    found = answers(tmp_path / "list")
    assert found.pop("a/not there.jpg")["status"] == "missing"
    assert found == expected
    assert summaries["folder"].failed_by_status == summaries["prefix"].failed_by_status
    assert summaries["prefix"].skipped_by_suffix == {".txt": 1}
    assert {row["source"] for row in helpers.rows(tmp_path / "prefix")} == {url}


def test_failed_images_of_a_store_are_a_list_that_can_be_run(
    s3: Bucket, imagemill: CLI, tmp_path: Path
) -> None:
    """`failed.txt` names them by URL, of a prefix, of a single object and of a list alike."""
    s3.fill(
        {
            "p/bad.jpg": b"x",
            "p/good.jpg": sample_images.jpeg(40, 40),
            "q.jpg": b"x",
            "l/list.txt": b"bad.jpg\n",
            "l/bad.jpg": b"x",
        }
    )
    sources = (f"{s3.url}/p", f"{s3.url}/q.jpg", f"@{s3.url}/l/list.txt")
    assert imagemill("run", *sources, "--output", tmp_path / "out", *TINY).code == 0
    urls = [f"{s3.url}/{key}" for key in ("p/bad.jpg", "q.jpg", "l/bad.jpg")]
    assert (tmp_path / "out" / "failed.txt").read_text().split() == urls
    assert (
        imagemill(
            "run", f"@{tmp_path / 'out' / 'failed.txt'}", "--output", tmp_path / "again", *TINY
        ).code
        == 0
    )
    assert [(row["path"], row["status"]) for row in helpers.rows(tmp_path / "again")] == [
        (url, "not_an_image") for url in urls
    ]


TREE = {
    "a.jpg": b"1", "b/1.JPG": b"22", "b/2.png": b"", "b/notes.txt": b"3", "b/.hidden.jpg": b"4", ".git/x.jpg": b"5", "b.jpg": b"66",
    "b-c/3.jpg": b"7", "b/deep/er/4.jpg": b"8", "d/none": b"9", "d/x.jpg": b"10", "e f/ü%20.webp": b"11",
}  # fmt: skip


@pytest.mark.parametrize(
    "filters",
    [
        Filters(),
        Filters(all_files=True),
        Filters(include=("*.jpg",)),
        Filters(exclude=("deep", "b/2.*")),
        Filters(include=("b/*",), exclude=("b/deep/",)),
    ],
)
def test_a_prefix_is_listed_as_a_folder_is(s3: Bucket, tmp_path: Path, filters: Filters) -> None:
    """The same images with the same sizes, the same ones left out for the same reasons, and the
    same sub-folders kept together.
    """
    folder, url = helpers.fill(tmp_path, TREE), s3.fill(TREE, "p/")
    skipped, expected_skipped = Skipped(), Skipped()
    found = list(ObjectSource(3, url).entries(filters, skipped))
    expected = list(FolderSource(3, os.fsencode(folder)).entries(filters, expected_skipped))
    assert [entry.path for entry in found] == sorted(entry.path for entry in expected)
    assert {(entry.source, entry.path, entry.size) for entry in found} == {
        (e.source, e.path, e.size) for e in expected
    }
    assert skipped.by_suffix == expected_skipped.by_suffix
    in_closed_folders = 1 if filters.exclude else 0  # on a disk nobody looks into them
    assert skipped.by_filter == expected_skipped.by_filter + in_closed_folders

    def grouped(entries: list[Any]) -> set[frozenset[bytes]]:
        inside = [entry for entry in entries if b"/" in entry.path]
        return {frozenset(e.path for e in inside if e.group == entry.group) for entry in inside}

    assert grouped(found) == grouped(expected)


def test_an_object_is_a_source_by_itself(s3: Bucket) -> None:
    """Whatever its suffix, as a file is; an empty one as well; and a prefix is a folder though an
    empty object has its name.
    """
    s3.fill({"a.bin": b"123", "empty.jpg": b"", "f": b"", "f/x.jpg": b"1"})
    for key, entries in {
        "a.bin": [(b"", 3)],
        "empty.jpg": [(b"", 0)],
        "f": [(b"x.jpg", 1)],
    }.items():
        assert [
            (entry.path, entry.size)
            for entry in ObjectSource(0, f"{s3.url}/{key}").entries(Filters(), Skipped())
        ] == entries
    assert ObjectSource(0, f"{s3.url}/a.bin").fetch(b"", b"", 10) == b"123"


def test_an_image_that_cannot_be_had_says_why(s3: Bucket, s3_faults: FaultProxy) -> None:
    """Gone, forbidden, too large, a key that no object can have: each its status, in one line,
    after one request.
    """
    s3.fill({"a.jpg": b"12345", "secret.jpg": b"1"})
    s3_faults.rule = lambda request: (
        faults.answers(403, "AccessDenied") if "secret" in request.path else None
    )
    base = os.fsencode(s3.url)
    assert fetch(base + b"/a.jpg", 5) == b"12345"
    for location, max_bytes, status, error in (
        (b"/gone.jpg", 9, Status.MISSING, "the object is not there: 404 Not Found (NoSuchKey)"),
        (b"/a//gone.jpg", 9, Status.MISSING, "the object is not there: 404 Not Found (NoSuchKey)"),
        (b"/a//secret.jpg", 9, Status.READ_ERROR, "cannot be read: 403 Forbidden (AccessDenied)"),
        (b"/secret.jpg", 9, Status.READ_ERROR, "cannot be read: 403 Forbidden (AccessDenied)"),
        (b"/a.jpg", 4, Status.TOO_LARGE, "has 5 bytes, more than --max-bytes 4"),
    ):
        with pytest.raises(BadImage) as caught:
            fetch(base + location, max_bytes)
        assert (caught.value.status, caught.value.error) == (status, error)
    with pytest.raises(BadImage, match="cannot be read: ") as caught:
        fetch(base + b"/not-utf8-\xff.jpg", 9)
    assert caught.value.status == Status.READ_ERROR
    assert len(s3_faults.requests) == 6


@pytest.mark.parametrize(
    ("source", "rule", "text"),
    [
        (
            "s3://no-such-bucket/x",
            None,
            "cannot be read: 404 Not Found (NoSuchBucket). Check the names of bucket and key.",
        ),
        (
            "{}/nothing",
            None,
            (
                "cannot be read: there is no such object, and none below it. Check the names of"
                " bucket and key."
            ),
        ),
        (
            "@{}/list.txt",
            None,
            (
                "cannot be read: there is no such object, and none below it. Check the names of"
                " bucket and key."
            ),
        ),
        (
            "{}/p",
            faults.answers(403, "AccessDenied"),
            (
                "cannot be read: 403 Forbidden (AccessDenied). Give credentials that may list and"
                " read it."
            ),
        ),
        (
            "{}/p",
            faults.answers(503, "SlowDown"),
            "cannot be read: 503 Service Unavailable, after 3 tries. Check the network, ",
        ),
    ],
)
def test_a_source_that_cannot_be_listed_is_one_clear_error(
    s3: Bucket,
    s3_faults: FaultProxy,
    imagemill: CLI,
    hasty: Mapping[str, str],
    tmp_path: Path,
    source: str,
    rule: faults.Fault | None,
    text: str,
) -> None:
    """A wrong bucket or prefix, no permission, no service: exit 2, a line that says what to look
    at, nothing written.
    """
    s3.fill({"p/a.jpg": b"x"})
    s3_faults.rule = lambda _: rule
    result = imagemill("run", source.format(s3.url), "--output", tmp_path / "out", *TINY, env=hasty)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert text in result.err
    assert not (tmp_path / "out").exists()


def test_a_listing_that_breaks_off_is_no_short_listing(
    s3: Bucket, s3_faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the second page of a listing is refused, there is an error and not a plan with the
    first page alone.
    """
    monkeypatch.setattr(storage, "READING", RetryPolicy(attempts=2, seconds=1, pause_s=0.01))
    url = s3.fill({f"{number}.jpg": b"x" for number in range(5)}, "p/")

    def rule(request: faults.Request) -> faults.Fault | None:
        if "continuation-token" in request.path:
            return faults.answers(500, "InternalError")
        return lambda handler, request: setattr(handler, "path", handler.path + "&max-keys=3")

    s3_faults.rule = rule
    with pytest.raises(
        SourceError, match=r"500 Internal Server Error \(InternalError\), after 2 tries"
    ):
        list(ObjectSource(0, url).entries(Filters(), Skipped()))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("urls", "passed"), [(1, 0), (3, 0), (1, 1)], ids=["looking", "looking for three", "listing"]
)
def test_a_signal_ends_a_wait_for_a_store(
    s3: Bucket,
    s3_faults: FaultProxy,
    start: Callable[..., Any],
    models_dir: Path,
    tmp_path: Path,
    urls: int,
    passed: int,
    number: signal.Signals,
    code: int,
) -> None:
    """An answer never comes, and the library would wait for it for an hour."""
    url = s3.fill({f"{name}.jpg": b"x" for name in range(5)}, "p/")

    def second_pages() -> int:
        return s3_faults.count("GET", "continuation-token")

    def rule(request: faults.Request) -> faults.Fault | None:
        if "continuation-token" in request.path and second_pages() > passed:
            return faults.hangs()
        return lambda handler, request: setattr(handler, "path", handler.path + "&max-keys=3")

    s3_faults.rule = rule
    env = harness.hooks(tmp_path / "hooks", PATIENT, IMAGEMILL_MODELS=str(models_dir))
    process = start("run", *[url] * urls, "--output", tmp_path / "out", *TINY, env=env)
    helpers.until(lambda: second_pages() > passed, process=process)
    process.send_signal(number)
    result = helpers.finish(process)
    assert result.code == code
    assert "Traceback" not in result.err


ODD_KEYS = (
    "a//b.jpg",
    "x\x01y.jpg",
    "x\x7fy.jpg",
    "./b.jpg",
    "../b.jpg",
    "a/../b.jpg",
    "a/./b.jpg",
    "/b.jpg",
    "//b.jpg",
    "b\\.jpg",
)


@pytest.mark.parametrize("prefix", ["", "p/"])
def test_any_key_is_listed_and_read(s3: Bucket, prefix: str) -> None:
    """Keys with empty, `.` and `..` parts, control characters or a slash at the start are images
    like their neighbours, each with its own bytes, also where another key differs only by that.
    Empty objects that show a folder are not listed.
    """
    files = {key: key.encode() for key in ("a/b.jpg", "b.jpg", *ODD_KEYS, "xy.jpg", "z.jpg")}
    s3.fill({**files, "a/": b"", "empty.jpg/": b""}, prefix)
    source, skipped = ObjectSource(0, f"{s3.url}/{prefix}".rstrip("/")), Skipped()
    entries = list(source.entries(Filters(), skipped))
    assert [entry.path.decode() for entry in entries] == sorted(files)
    assert {entry.path.decode(): source.fetch(entry.path, b"", 99) for entry in entries} == files
    assert (skipped.by_suffix.total(), skipped.hidden) == (0, 0)
    with pytest.raises(BadImage) as caught:
        source.fetch(b"a//b.jpg", b"", 7)
    assert (caught.value.status, caught.value.error) == (
        Status.TOO_LARGE,
        "has 8 bytes, more than --max-bytes 7",
    )


def test_odd_keys_are_listed_page_by_page(
    s3: Bucket, s3_faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An odd key on the second page costs no key before or after it, also if the connection breaks
    at each page.
    """
    monkeypatch.setattr(storage, "READING", RetryPolicy(attempts=3, seconds=5, pause_s=0.01))
    keys = [
        "p/0.jpg",
        "p/1.jpg",
        "p/2.jpg",
        "p/3.jpg",
        "p/4//4.jpg",
        "p/5.jpg",
        "p/6.jpg",
        "p/7.jpg",
        "p/8.jpg",
    ]
    s3.fill(dict.fromkeys(keys, b""))

    def three_a_page(handler: Any, request: faults.Request) -> None:
        handler.path += "&max-keys=3"

    s3_faults.rule = lambda request: faults.resets() if request.number == 0 else three_a_page
    assert [
        f"p/{entry.path.decode()}"
        for entry in ObjectSource(0, f"{s3.url}/p").entries(Filters(), Skipped())
    ] == keys


def test_odd_keys_cost_a_job_nothing(
    s3: Bucket, some_jpegs: dict[str, bytes], job: Jobs, tmp_path: Path
) -> None:
    """A job over a prefix that holds some gives every image its answer, and `failed.txt` of those
    that are bad can be run.
    """
    some = dict(list(some_jpegs.items())[:4])
    files = {f"odd//{key}": data for key, data in some.items()} | {
        "odd//bad\x01.jpg": b"x",
        "plain.jpg": sample_images.jpeg(),
    }
    url = s3.fill(files, "p/")
    summary = run.run(job(url, num_workers=2))
    assert (summary.ok, dict(summary.failed_by_status)) == (5, {"not_an_image": 1})
    harness.assert_complete(tmp_path / "out")
    assert archive_files.read(f"@{tmp_path / 'out' / 'failed.txt'}") == [
        (f"{url}/odd//bad\x01.jpg".encode(), b"x")
    ]


def test_a_killed_job_is_resumed_where_it_was(
    s3: Bucket,
    s3_faults: FaultProxy,
    some_jpegs: dict[str, bytes],
    models_dir: Path,
    imagemill: CLI,
    start: Callable[..., Any],
    job: Jobs,
    tmp_path: Path,
) -> None:
    """The launcher dies by SIGKILL in the middle: the same command fetches only images of shards
    that were not committed.
    """
    url, folder = s3.fill(some_jpegs, "p/"), helpers.fill(tmp_path / "images", some_jpegs)
    hold = harness.Hold(tmp_path, 24, IMAGEMILL_MODELS=str(models_dir))
    process = start("run", url, "--output", tmp_path / "out", *TINY, env=hold.environment)
    helpers.until(lambda: len(helpers.parts(tmp_path / "out")) >= 2, process=process)
    workers = helpers.worker_pids(tmp_path / "out")
    process.kill()
    process.wait()
    helpers.until(lambda: not any(map(helpers.running, workers)))
    before = helpers.parts(tmp_path / "out")
    assert 2 <= len(before) < 5
    s3_faults.requests.clear()
    s3_faults.rule = lambda _: None
    result = imagemill("run", url, "--output", tmp_path / "out", *TINY, "--json")
    assert (result.code, result.json["resumed_shards"]) == (0, len(before))
    assert s3_faults.count("GET", ".jpg") == 40 - 8 * len(before)
    assert helpers.parts(tmp_path / "out").items() >= before.items()
    harness.assert_complete(tmp_path / "out")
    run.run(job(folder, output=str(tmp_path / "folder"), save=("logits",)))
    assert answers(tmp_path / "out") == answers(tmp_path / "folder")


def test_throttling_and_broken_connections_cost_no_row(
    s3: Bucket, s3_faults: FaultProxy, some_jpegs: dict[str, bytes], imagemill: CLI, tmp_path: Path
) -> None:
    """A store that answers each first request badly, in every way there is, is waited for: every
    image has its answer.
    """
    url = s3.fill(some_jpegs, "p/")
    ways = (
        faults.answers(503, "SlowDown"),
        faults.resets(),
        faults.cuts(100),
        faults.answers(500, "InternalError"),
        faults.delays(0.1),
    )
    s3_faults.rule = lambda request: (
        ways[len(s3_faults.requests) % len(ways)]
        if request.number == 0 and request.method == "GET"
        else None
    )
    result = imagemill("run", url, "--output", tmp_path / "out", *TINY, "--json")
    assert (result.code, result.json["ok"], result.json["failed"]) == (0, 40, 0), result.err


def test_retry_failed_heals_what_an_outage_left(
    s3: Bucket,
    s3_faults: FaultProxy,
    some_jpegs: dict[str, bytes],
    imagemill: CLI,
    hasty: Mapping[str, str],
    job: Jobs,
    tmp_path: Path,
) -> None:
    """The store goes away in the middle and for good: rows say so, the job ends well; once it is
    back, --retry-failed gives all of them an answer.
    """
    url, folder = s3.fill(some_jpegs, "p/"), helpers.fill(tmp_path / "images", some_jpegs)
    s3_faults.rule = lambda request: (
        faults.resets() if s3_faults.count("GET", ".jpg") > 15 else None
    )
    arguments = ("run", url, "--output", tmp_path / "out", *TINY, "--json")
    result = imagemill(*arguments, env=hasty)
    assert result.code == 0, result.err
    failed = result.json["failed_by_status"]
    assert failed.keys() == {"read_error"}
    assert 25 <= failed["read_error"] < 40
    errors = {
        row["error"] for row in helpers.rows(tmp_path / "out") if row["status"] == "read_error"
    }
    assert errors <= {
        f"cannot be read: the connection was {how}, after 3 tries" for how in ("cut", "reset")
    }
    refused = imagemill(*arguments, "--retry-failed", env=hasty)
    assert refused.code == 2
    assert "cannot be read: the connection was" in refused.err
    s3_faults.rule = lambda _: None
    healed = imagemill(*arguments, "--retry-failed")
    assert (healed.code, healed.json["ok"]) == (0, 40)
    harness.assert_complete(tmp_path / "out")
    run.run(job(folder, output=str(tmp_path / "folder"), save=("logits",)))
    assert answers(tmp_path / "out") == answers(tmp_path / "folder")


def test_a_finished_job_names_what_is_new_in_the_bucket(
    s3: Bucket, imagemill: CLI, tmp_path: Path
) -> None:
    """Repeated, it finds the objects that came since, between the old ones, by their names."""
    data = sample_images.jpeg(40, 40)
    url = s3.fill({"b/x.jpg": data, "b-/x.jpg": data, "c.jpg": data}, "p/")
    assert imagemill("run", url, "--output", tmp_path / "out", *TINY).code == 0
    s3.fill({"a.jpg": data, "b/a.jpg": data, "b.jpg": data}, "p/")
    result = imagemill("run", url, "--output", tmp_path / "out", *TINY, "--json")
    assert (result.code, result.json["new_in_source"]) == (0, 3)
    assert (
        "3 images are new in the source since the plan was frozen: a.jpg, b.jpg, b/a.jpg."
        in result.err
    )


def test_urls_are_frozen_as_they_were_given() -> None:
    """But for the slash at the end of a place in a store; braces mean what they mean in paths."""
    given = (
        "s3://b/x/",
        "s3://b/",
        "@s3://b/l.txt",
        "https://h/a.jpg?x=1/",
        "s3://b/{08..10}.jpg",
        "@https://h/list",
    )
    assert resolve(given) == (
        "s3://b/x", "s3://b", "@s3://b/l.txt", "https://h/a.jpg?x=1/", "s3://b/08.jpg", "s3://b/09.jpg", "s3://b/10.jpg", "@https://h/list",
    )  # fmt: skip


def test_many_sources_are_looked_for_together(s3: Bucket, s3_faults: FaultProxy) -> None:
    """Twelve requests wait at the same time. The missing object is named."""
    import threading

    s3.fill({f"{number}.jpg": b"x" for number in range(12)})
    together = threading.Barrier(12, timeout=300)
    s3_faults.rule = lambda request: (
        (lambda handler, request: together.wait() and None) if request.method == "HEAD" else None
    )
    check([f"{s3.url}/{number}.jpg" for number in range(12)])
    s3_faults.rule = lambda _: None
    with pytest.raises(SourceError, match=r"/12\.jpg cannot be read"):
        check([f"{s3.url}/{number}.jpg" for number in range(13)])


def test_what_a_file_manager_uploaded_makes_no_output_unacceptable(s3: Bucket, job: Jobs) -> None:
    """`.DS_Store` below an output's prefix is no stranger; anything else is."""
    s3.fill(
        {
            "in/a.jpg": sample_images.jpeg(),
            "out/.DS_Store": b"x",
            "other/.DS_Store": b"x",
            "other/thesis.doc": b"x",
        }
    )
    settings = job(f"{s3.url}/in", output=f"{s3.url}/out", preflight=False)
    assert run.run(settings).ok == 1
    assert s3.get("out/.DS_Store") == b"x"
    with pytest.raises(
        OutputError, match=r"is not empty and not an imagemill job \(it holds 'thesis\.doc'\)"
    ):
        run.run(replace(settings, output=f"{s3.url}/other"))
