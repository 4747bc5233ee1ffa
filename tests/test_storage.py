"""Object stores behind one Protocol, tried with a real S3 server and a proxy that makes trouble."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

import archive_files
import helpers
import s3 as faults
from imagemill.errors import SourceError, UsageError
from imagemill.pipeline.sources import open_all, resolve
from imagemill.pipeline.sources.base import Skipped
from imagemill.records import Filters
from imagemill.system import storage
from imagemill.system.retry import RetryPolicy
from s3 import Bucket, FaultProxy

HASTY = RetryPolicy(
    attempts=3, seconds=600.0, pause_s=0.01, longest_pause_s=0.05, connect_s=60.0, silence_s=60.0
)
"""Few attempts, and no limit that a busy machine could exceed."""
KEYS = (
    "a b.jpg",
    "a%20b.jpg",
    "a+b.jpg",
    "back\\slash.jpg",
    "q?x#y&z=.jpg",
    "sub!/x",
    "sub.jpg",
    "sub/x",
    "sub/y",
    "t~{}[]",
    "ü.jpg",
    "日本",
)


def store(bucket: Bucket, prefix: str = "", policy: RetryPolicy = HASTY) -> storage.Bucket:
    return storage.open_bucket(f"{bucket.url}/{prefix}", policy)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WRITING", HASTY)


def test_keys_come_in_the_order_of_their_bytes_whatever_their_letters(s3: Bucket) -> None:
    """Names with blanks, per cent signs, question marks and letters of any script are listed as
    they are, relative and sorted, and read.
    """
    s3.fill({key: key.encode() for key in reversed(KEYS)}, "p/")
    s3.fill({"q": b"", "pp/x": b""})
    place = store(s3, "p/")
    assert place.url == f"{s3.url}/p"
    assert list(place.list()) == sorted(
        ((key, len(key.encode())) for key in KEYS), key=lambda item: item[0].encode()
    )
    assert [place.read(key) for key in KEYS] == [key.encode() for key in KEYS]
    assert [key for key, _ in place.list("sub")] == ["sub!/x", "sub.jpg", "sub/x", "sub/y"]
    assert [key for key, _ in place.list("sub/")] == ["sub/x", "sub/y"]


def test_more_keys_than_one_page_holds_are_listed(s3: Bucket, s3_faults: FaultProxy) -> None:
    """A server that answers with three keys a page is asked for the next ones; each comes once."""
    names = [f"{number:02d}" for number in range(11)]
    s3.fill(dict.fromkeys(names, b"x"))
    s3_faults.rule = lambda _: (
        lambda handler, request: setattr(handler, "path", handler.path + "&max-keys=3")
    )
    assert [key for key, _ in store(s3).list()] == names
    assert s3_faults.count("GET", "list-type") == 4


def test_objects_that_only_show_a_folder_are_not_listed(s3: Bucket) -> None:
    """The empty object `a/`, as consoles make it, is left out where something lies below it; an
    empty object of another name is not.
    """
    s3.fill({"a/": b"", "a/x": b"1", "b": b"", "bb": b"2"})
    assert list(store(s3).list()) == [("a/x", 1), ("b", 0), ("bb", 1)]


def test_a_whole_object_is_one_request(s3: Bucket, s3_faults: FaultProxy) -> None:
    """Reading an object, an empty one too, asks once; one that is too long is refused by its head,
    its body unread.
    """
    s3.fill({"a": b"12345", "empty": b""})
    place = store(s3)
    assert (place.read("a"), place.read("empty"), place.read("a", 5)) == (b"12345", b"", b"12345")
    with pytest.raises(OSError, match="has 5 bytes, more than 4") as caught:
        place.read("a", 4)
    assert caught.value.errno == errno.EFBIG
    assert [request.method for request in s3_faults.requests] == ["GET"] * 4


def test_an_object_is_read_at_any_place_by_many_threads(s3: Bucket) -> None:
    """Ranges come out as of a file, also across the end, and behind it."""
    data = os.urandom(100_000)
    s3.fill({"a/b.bin": data})
    blob = storage.open_blob(os.fsencode(f"{s3.url}/a/b.bin"))
    assert blob.size == len(data)
    places = [
        (0, 0),
        (0, 10),
        (99_990, 100),
        (100_000, 1),
        (100_001, 5),
        *((at, 777) for at in range(0, 100_000, 3_001)),
    ]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda place: blob.read_at(*place), places)) == [
            data[at : at + length] for at, length in places
        ]
    reader = io.BufferedReader(storage.BlobFile(blob), 1_000)
    reader.seek(-5, io.SEEK_END)
    assert reader.read() == data[-5:]


def test_an_object_that_changes_while_it_is_read_is_an_error(s3: Bucket) -> None:
    """What is read of one opened object is never glued from two."""
    s3.fill({"a": b"old version"})
    blob = store(s3).open("a")
    s3.fill({"a": b"new version"})
    with pytest.raises(OSError, match="changed while it was being read"):
        blob.read_at(0, 3)


def test_writing_is_whole_and_can_refuse_to_replace(s3: Bucket) -> None:
    """An object is replaced, or made only where there is none; of many who try to make it, one
    does. Removing what is not there is fine.
    """
    place = store(s3, "out")
    place.put("part", b"one")
    place.put("part", memoryview(b"two"))
    assert s3.get("out/part") == b"two"
    with pytest.raises(FileExistsError):
        place.put("part", b"three", create=True)
    won: list[int] = []

    def race(number: int) -> None:
        try:
            place.put("lock", str(number).encode(), create=True)
            won.append(number)
        except FileExistsError:
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(race, range(8)))
    assert [s3.get("out/lock")] == [str(number).encode() for number in won]
    place.remove("part")
    place.remove("part")
    assert s3.keys() == ["out/lock"]


def test_a_large_object_is_written_by_one_request(
    s3: Bucket, s3_faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No upload in pieces, of which a killed process would leave some lying about."""
    monkeypatch.setattr(storage, "WRITING", replace(HASTY, silence_s=None))
    data = os.urandom(20 * 2**20)
    store(s3).put("large", data)
    assert s3.get("large") == data
    assert [request.method for request in s3_faults.requests] == ["PUT"]


@pytest.mark.parametrize(
    "fault",
    [
        faults.answers(503, "SlowDown"),
        faults.answers(500, "InternalError"),
        faults.resets(),
        faults.cuts(7),
    ],
)
def test_what_passes_is_tried_again(s3: Bucket, s3_faults: FaultProxy, fault: faults.Fault) -> None:
    """Throttling, server errors, broken and cut connections: two in a row cost time, no answer."""
    data = os.urandom(1_000)
    s3.fill({"a": data})
    s3_faults.rule = lambda request: fault if request.number < 2 else None
    place = store(s3)
    assert place.read("a") == data
    assert list(place.list()) == [("a", 1_000)]
    assert place.open("a").read_at(10, 500) == data[10:510]
    if "cuts" not in fault.__qualname__:
        place.put("b", data)
        assert s3.get("b") == data


def test_a_silent_store_is_tried_again(
    s3: Bucket, s3_faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading and writing."""
    policy = replace(HASTY, silence_s=2.0)
    monkeypatch.setattr(storage, "WRITING", policy)
    s3.fill({"a": b"data"})
    s3_faults.rule = lambda request: None if request.number else faults.hangs()
    place = store(s3, policy=policy)
    assert place.read("a") == b"data"
    place.put("b", b"more")
    assert s3.get("b") == b"more"


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (
            faults.answers(503, "SlowDown"),
            OSError,
            "503 Service Unavailable (SlowDown), after 3 tries",
        ),
        (faults.resets(), OSError, "the connection was (cut|reset), after 3 tries"),
        (faults.hangs(), OSError, "no answer in time, after 3 tries"),
        (faults.answers(403, "AccessDenied"), PermissionError, "403 Forbidden (AccessDenied)"),
        (
            faults.answers(403, "SignatureDoesNotMatch"),
            PermissionError,
            "403 Forbidden (SignatureDoesNotMatch)",
        ),
        (faults.answers(401, "Unauthorized"), PermissionError, "401 Unauthorized (Unauthorized)"),
        (faults.answers(404, "NoSuchBucket"), FileNotFoundError, "404 Not Found (NoSuchBucket)"),
    ],
)
def test_what_does_not_pass_is_the_systems_own_error_in_one_line(
    s3: Bucket,
    s3_faults: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    fault: faults.Fault,
    kind: type[OSError],
    text: str,
) -> None:
    """Reading, listing and writing raise the errors that files raise, with the server's answer and
    the number of tries.
    """
    s3_faults.rule = lambda _: fault
    policy = replace(HASTY, silence_s=0.2) if "no answer" in text else HASTY
    monkeypatch.setattr(storage, "WRITING", policy)
    place = store(s3, policy=policy)
    calls: tuple[Callable[[], object], ...] = (lambda: place.read("a"), lambda: list(place.list()))
    if kind is not FileNotFoundError:
        calls += (lambda: place.put("a", b"x"),)
    for call in calls:
        with pytest.raises(kind) as caught:
            call()
        assert type(caught.value) is kind
        assert caught.value.strerror is not None
        reported = caught.value.strerror or ""
    assert re.fullmatch(
        text if "|" in text else re.escape(text) + r"(, after \d tries)?", reported
    ), reported  # a connection may be lost by itself


def test_nobody_there_is_an_error_in_one_line(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection says so. The client notices that the environment has changed."""
    s3.fill({"a": b"x"})
    assert store(s3).read("a") == b"x"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(OSError, match="the connection was refused, after 3 tries"):
        store(s3).read("a")


def test_a_bucket_can_be_read_without_credentials(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS_SKIP_SIGNATURE=true sends none and looks for none: what is public is read, what is not is
    refused.
    """
    s3.fill({"a": b"x", "private": b"y"})
    s3.client.put_object_acl(Bucket=s3.name, Key="a", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert store(s3).read("a") == b"x"
    with pytest.raises(PermissionError, match="403 Forbidden"):
        store(s3).read("private")


def test_a_profile_gives_credentials_and_region(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With boto3 installed AWS_PROFILE is obeyed; a name that no file has is one clear line."""
    s3.fill({"a": b"x"})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    profile = b"[mine]\naws_access_key_id = k\naws_secret_access_key = s\nregion = eu-north-1\n"
    helpers.fill(tmp_path, {".aws/credentials": profile})
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / ".aws" / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert store(s3).read("a") == b"x"
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    with pytest.raises(
        UsageError, match=r"AWS_PROFILE nobodys: The config profile \(nobodys\) could not be found"
    ):
        store(s3)


def test_threads_share_one_client(s3: Bucket, s3_faults: FaultProxy) -> None:
    """Waiting for an object holds up no other thread: sixteen requests wait at the same time."""
    s3.fill({"a": b"x"})
    together = threading.Barrier(16, timeout=300)
    s3_faults.rule = lambda _: lambda handler, request: together.wait() and None
    place = store(s3, policy=replace(HASTY, silence_s=None))
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda _: place.read("a"), range(16))) == [b"x"] * 16


@pytest.mark.process
def test_a_missing_package_is_named_with_the_line_to_type(tmp_path: Path) -> None:
    """Without the extra everything else works, and a URL says what to install."""
    program = (
        "import sys; sys.modules['obstore'] = None\nfrom imagemill.__main__ import"
        " main\nsys.exit(main())"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "run",
        "s3://bucket/x",
        "--output",
        str(tmp_path / "out"),
        "--devices",
        "null",
    ]
    ended = subprocess.run(
        command, env=helpers.environment(), capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (
        2,
        (
            "imagemill: s3://bucket: object stores need a package that is not installed. Type: pip"
            " install 'imagemill[s3]'\n"
        ),
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "s3://b//x", "s3://b/x//y", "ftp://x/y", "/s3://x"]
)
def test_what_is_no_place_in_a_store_is_wrong_usage(url: str) -> None:
    """A URL without a bucket, or of another kind, is refused in words."""
    with pytest.raises(UsageError, match="Write it like s3://bucket/prefix"):
        storage.open_bucket(url)


@pytest.mark.parametrize(
    ("file", "path", "location"),
    [
        (b"/data/list.txt", b"a.jpg", b"/data/a.jpg"),
        (b"/data/list.txt", b"/b/a.jpg", b"/b/a.jpg"),
        (b"/data/list.txt", b"http://h/a.jpg", b"http://h/a.jpg"),
        (b"/data/list.txt", b"http:/h/a.jpg", b"/data/http:/h/a.jpg"),
        (b"s3://b/list.txt", b"x/\xff.jpg", b"s3://b/x/\xff.jpg"),
        (b"https://h/l/list.txt?a=/b", b"x.jpg", b"https://h/l/x.jpg"),
        (b"s3://b/l/m/list.txt", b"../x.jpg", b"s3://b/l/x.jpg"),
        (b"s3://b/l/m/list.txt", b"./n/.././x//y.jpg", b"s3://b/l/m/x//y.jpg"),
        (b"s3://b/l/list.txt", b"../x.jpg", b"s3://b/x.jpg"),
        (b"https://h/l/list.txt", b"../x.jpg", b"https://h/x.jpg"),
        (b"/data/list.txt", b"s3://b/a/../x.jpg", b"s3://b/a/../x.jpg"),
        (b"/data/list.txt", b"file:///a%20b/%FF.jpg", b"/a b/\xff.jpg"),
        (b"s3://b/list.txt", b"file://localhost/a.jpg", b"/a.jpg"),
        (b"/data/list.txt", b"FILE:/a.jpg", b"/a.jpg"),
    ],
)
def test_relative_paths_are_relative_to_the_file_they_are_written_in(
    file: bytes, path: bytes, location: bytes
) -> None:
    """In a folder, in a store and on the web alike; what is absolute or a URL stays as it is."""
    assert storage.beside(file, path) == location


@pytest.mark.parametrize(
    ("file", "path", "why"),
    [
        (b"s3://b/list.txt", b"../x.jpg", "it leads above s3://b"),
        (b"s3://b/a/list.txt", b"c/../../../x.jpg", "it leads above s3://b"),
        (
            b"/data/list.txt",
            b"file://nas/a.jpg",
            "file://nas is another machine. Mount its disk and give the path",
        ),
    ],
)
@pytest.mark.parametrize("kind", [".txt", ".csv"])
def test_what_no_path_can_mean_is_refused_while_listing(
    s3: Bucket, tmp_path: Path, kind: str, file: bytes, path: bytes, why: str
) -> None:
    """A line that leads above its bucket, or to another machine's disk, ends the command with its
    number. No row of it would be right.
    """
    data = (b"path\n" if kind == ".csv" else b"a.jpg\n") + b"b.jpg\n" + path + b"\n"
    place = file.decode().replace("s3://b", s3.url).replace("list.txt", f"list{kind}")
    if file.startswith(b"s3"):
        s3.fill({place.removeprefix(f"{s3.url}/"): data})
    else:
        place = str(tmp_path / f"list{kind}")
        Path(place).write_bytes(data)
    (source,) = open_all([f"@{place}"])
    number = "line 3" if kind == ".txt" else "row 2"
    why = re.escape(f"{number}: {path.decode()} cannot be read: {why.replace('s3://b', s3.url)}.")
    with pytest.raises(SourceError, match=why):
        list(source.entries(Filters(), Skipped()))


@pytest.mark.parametrize("kind", [".txt", ".csv", ".parquet"])
def test_file_urls_in_lists_and_tables_are_files(tmp_path: Path, kind: str) -> None:
    """As Java, Spark and file managers write them, percent-encoded. The row keeps the URL as its
    path.
    """
    images = helpers.fill(tmp_path / "a folder", {"ü 100%.jpg": b"1", "b.jpg": b"2"})
    cells = [
        (images / "ü 100%.jpg").as_uri(),
        f"file:{quote(str(images))}/b.jpg",
        f"file://localhost{quote(str(images))}/b.jpg",
    ]
    path = tmp_path / f"list{kind}"
    if kind == ".parquet":
        pq.write_table(pa.table({"path": cells}), path)
    else:
        path.write_text("\n".join(["path"] * (kind == ".csv") + cells))
    assert archive_files.read(f"@{path}") == list(
        zip(map(str.encode, cells), (b"1", b"2", b"2"), strict=True)
    )
    assert resolve([f"@{path.as_uri()}", images.as_uri()]) == (f"@{path}", str(images))
