"""Images from the web: whatever a server does, each is an answer or a row that says why, in bounded
time and memory.
"""

from __future__ import annotations

import base64
import email.utils
import gc
import os
import socket
import ssl
import struct
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import trustme
from msgspec.structs import replace

import helpers
import sample_images
from imagemill.errors import SourceError, UsageError
from imagemill.pipeline.sources import check, http, resolve
from imagemill.pipeline.sources.base import Skipped
from imagemill.pipeline.sources.list import ListSource
from imagemill.pipeline.sources.locations import fetch
from imagemill.records import BadImage, Filters, Settings, Status
from imagemill.runner import run
from imagemill.system import storage
from imagemill.system.http import netrc_passwords
from imagemill.system.retry import RetryPolicy
from imagemill.version import __version__

sys.path.insert(0, str(Path(__file__).with_name("faults")))
import harness

CLI = Callable[..., helpers.Result]
Jobs = Callable[..., Settings]
HASTY = RetryPolicy(
    attempts=3, seconds=600.0, pause_s=0.01, longest_pause_s=0.3, connect_s=60.0, silence_s=60.0
)
"""Few attempts, and no limit that a busy machine could exceed."""
SILENCE_S = 2.0
"""Time limit where a server is silent first, and then answers."""
BODY = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def do_GET(self) -> None:
        state = self.server_state
        with state.lock:
            number = state.paths.count(self.path)
            state.paths.append(self.path)
            state.headers.append(self.headers)
            state.connections.add(self.client_address)
        state.rule(self, number)

    def log_message(self, *_: object) -> None:
        pass


Rule = Callable[[Handler, int], object]


class Server:
    """Serves `files` by their paths, unless `rule` does otherwise. A rule receives how often this
    path was requested before.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.rule: Rule = serve
        self.paths: list[str] = []
        self.headers: list[Message] = []
        self.connections: set[Any] = set()
        self.lock = threading.Lock()
        self.stop = threading.Event()
        bound = type("Bound", (Handler,), {"server_state": self})
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        self._httpd.daemon_threads = True
        self._httpd.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up on purpose
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}"
        self._thread = threading.Thread(
            target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self._thread.start()

    def wrap(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._httpd.socket = context.wrap_socket(self._httpd.socket, server_side=True)
        self.url = self.url.replace("http:", "https:").replace("127.0.0.1", "localhost")

    def close(self) -> None:
        self.stop.set()
        self._httpd.shutdown()
        self._thread.join()
        self._httpd.server_close()


def serve(handler: Handler, number: int) -> None:
    data = handler.server_state.files.get(unquote(handler.path.partition("?")[0][1:]))
    send(handler, 404 if data is None else 200, data or b"")


def send(
    handler: Handler, status: int, data: bytes = b"", cut: int | None = None, **headers: str
) -> None:
    handler.send_response_only(status)
    handler.send_header("Content-Length", str(len(data)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data[:cut])
    if cut is not None:
        handler.close_connection = True


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", "/nowhere")
    for cached in (http._client, netrc_passwords):
        cached.cache_clear()
    gc.freeze()  # or the collection at the end looks at everything that all tests have made
    serving = Server()
    serving.files["a.jpg"] = BODY
    yield serving
    serving.close()
    for cached in (http._client, netrc_passwords):
        cached.cache_clear()
    gc.collect()
    gc.unfreeze()


def bad(url: str, max_bytes: int = 100_000, policy: RetryPolicy = HASTY) -> BadImage:
    with pytest.raises(BadImage) as caught:
        http.fetch(url, max_bytes, policy)
    assert "\n" not in caught.value.error
    return caught.value


def test_the_same_images_have_the_same_answers_from_a_folder_and_from_the_web(
    server: Server, some_jpegs: dict[str, bytes], job: Jobs, tmp_path: Path
) -> None:
    """A list of URLs, one with relative lines at a URL itself, and single URLs give a folder's rows
    bit for bit, bad images included.
    """
    files = some_jpegs | {
        "a/half.jpg": sample_images.half(sample_images.jpeg(300, 200)),
        "b/empty.jpg": b"",
        "c/not.jpg": b"<html>no</html>",
    }
    server.files |= files | {"list.txt": "\n".join(files).encode()}
    folder = helpers.fill(tmp_path / "images", files)
    (tmp_path / "urls.txt").write_text(
        "".join(f"{server.url}/{name}?size=full\n" for name in files)
    )
    sources = {
        "folder": [folder],
        "urls": [f"@{tmp_path / 'urls.txt'}"],
        "list": [f"@{server.url}/list.txt"],
    }
    sources["single"] = [f"{server.url}/{name}" for name in files][:3]
    for name, given in sources.items():
        run.run(
            job(*given, output=str(tmp_path / name), shard_size=8, num_workers=4, save=("logits",))
        )
        harness.assert_complete(tmp_path / name)
    expected = helpers.by_path(tmp_path / "folder")
    urls = helpers.by_path(tmp_path / "urls")
    assert {path: row | {"path": path} for path, row in expected.items()} == helpers.by_path(
        tmp_path / "list"
    )
    assert urls == {
        f"{server.url}/{path}?size=full": row | {"path": f"{server.url}/{path}?size=full"}
        for path, row in expected.items()
    }
    single = helpers.rows(tmp_path / "single")
    assert [row["source"] for row in single] == sources["single"]
    assert [row["logits"] for row in single] == [
        expected[name]["logits"] for name in list(files)[:3]
    ]
    assert (tmp_path / "urls" / "failed.txt").read_text().split() == [
        f"{server.url}/{name}?size=full" for name in ("a/half.jpg", "b/empty.jpg", "c/not.jpg")
    ]


def stay_silent(handler: Handler) -> None:
    handler.server_state.stop.wait()


@pytest.mark.parametrize(
    "first",
    [
        lambda handler: send(handler, 503),
        lambda handler: send(handler, 500),
        lambda handler: send(handler, 429, Retry_After="0"),
        lambda handler: send(handler, 200, BODY, cut=1_000),
        reset,
    ],
    ids=["503", "500", "429", "cut", "reset"],
)
def test_what_passes_is_tried_again(server: Server, first: Callable[[Handler], object]) -> None:
    """Two bad answers of any kind, then the image: it is read."""
    server.rule = lambda handler, number: first(handler) if number < 2 else serve(handler, number)
    assert http.fetch(f"{server.url}/a.jpg", len(BODY), HASTY) == BODY
    assert len(server.paths) == 3


def test_a_silent_server_is_tried_again(server: Server) -> None:
    """The time limit of each attempt is for silence."""
    server.rule = lambda handler, number: serve(handler, number) if number else stay_silent(handler)
    policy = replace(HASTY, silence_s=SILENCE_S)
    assert http.fetch(f"{server.url}/a.jpg", len(BODY), policy) == BODY


@pytest.mark.parametrize(
    ("answer", "status", "error", "tries"),
    [
        (lambda handler: send(handler, 404), Status.MISSING, "cannot be read: the server answers 404 Not Found", 1),
        (lambda handler: send(handler, 410), Status.MISSING, "cannot be read: the server answers 410 Gone", 1),
        (lambda handler: send(handler, 401), Status.READ_ERROR, "cannot be read: the server answers 401 Unauthorized", 1),
        (lambda handler: send(handler, 403), Status.READ_ERROR, "cannot be read: the server answers 403 Forbidden", 1),
        (
            lambda handler: send(handler, 503),
            Status.READ_ERROR,
            "cannot be read: the server answers 503 Service Unavailable, after 3 tries",
            3,
        ),
        (
            lambda handler: send(handler, 200, BODY, cut=1_000),
            Status.TRUNCATED,
            "cannot be read: the connection was cut after 1000 of 10240 bytes, after 3 tries",
            3,
        ),
        (stay_silent, Status.READ_ERROR, "cannot be read: no answer in time, after 3 tries", 3),
        (
            lambda handler: send(handler, 302, Location="ftp://127.0.0.1/a.jpg"),
            Status.READ_ERROR,
            "cannot be read: redirected from http to ftp, which is not followed",
            1,
        ),
        (
            lambda handler: send(handler, 302, Location="file:///etc/passwd"),
            Status.READ_ERROR,
            "cannot be read: redirected from http to file, which is not followed",
            1,
        ),
        (
            lambda handler: send(handler, 302, Location="http://[::1/"),
            Status.READ_ERROR,
            "cannot be read: Invalid IPv6 URL",
            1,
        ),
        (lambda handler: send(handler, 301, Location="/a.jpg"), Status.READ_ERROR, "cannot be read: more than 5 redirects", 6),
        (lambda handler: send(handler, 304), Status.READ_ERROR, "cannot be read: the server answers 304 Not Modified", 1),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_a_row_that_says_why(
    server: Server, answer: Callable[[Handler], object], status: Status, error: str, tries: int
) -> None:
    """Each kind of refusal has its status and its words, after as many tries as make sense."""
    server.rule = lambda handler, number: answer(handler)
    policy = replace(HASTY, silence_s=0.2) if answer is stay_silent else HASTY
    found = bad(f"{server.url}/a.jpg", policy=policy)
    assert (found.status, found.error) == (status, error)
    helpers.until(lambda: len(server.paths) == tries)  # the last request may arrive late


def test_nobody_there_says_so() -> None:
    """A refused connection, and a host that nobody knows by an address nobody has."""
    assert (
        bad("http://127.0.0.1:1/a.jpg").error
        == "cannot be read: 127.0.0.1 cannot be reached: Connection refused, after 3 tries"
    )
    assert bad("http://[::1/a.jpg").status == Status.READ_ERROR
    assert bad("http://127.0.0.1:99999/a.jpg").status == Status.READ_ERROR


def test_retry_after_is_obeyed_within_bounds(server: Server) -> None:
    """A server that asks for a pause gets it, by number or by date, but no more than the longest
    pause.
    """
    moments: list[float] = []

    def rule(handler: Handler, number: int) -> None:
        moments.append(time.monotonic())
        later = email.utils.formatdate(time.time() + 3_600, usegmt=True)
        asked = {0: {"Retry_After": "3600"}, 1: {"Retry_After": later}}.get(number)
        send(handler, 429, **asked) if asked else serve(handler, number)

    server.rule = rule
    assert http.fetch(f"{server.url}/a.jpg", len(BODY), HASTY) == BODY
    assert [later - earlier >= HASTY.longest_pause_s for earlier, later in pairwise(moments)] == [
        True,
        True,
    ]
    impatient = RetryPolicy(attempts=9, seconds=0.2, longest_pause_s=60)
    server.paths.clear()
    assert bad(f"{server.url}/a.jpg", policy=impatient).error.endswith("after 1 try")


def test_redirects_are_followed_a_few(server: Server) -> None:
    """Relative and absolute, to the end."""
    goals = {"/1": "/2", "/2": f"{server.url}/3", "/3": "a.jpg"}
    server.rule = lambda handler, number: (
        send(handler, 302, b"moved", Location=goals[handler.path])
        if handler.path in goals
        else serve(handler, number)
    )
    assert http.fetch(f"{server.url}/1", len(BODY), HASTY) == BODY
    assert len(server.connections) == 1


@pytest.mark.parametrize(
    ("header", "value", "body"),
    [
        ("Content-Length", "²", b"abc"),
        ("Content-Length", "9" * 5_000, b"abc"),
        ("Transfer-Encoding", "chunked", b"-5\r\nabc\r\n0\r\n\r\n"),
        ("Transfer-Encoding", "chunked", b"zz\r\nabc\r\n0\r\n\r\n"),
    ],
)
def test_an_answer_that_makes_no_sense_ends_no_job(
    header: str, value: str, body: bytes, server: Server
) -> None:
    """Whatever a server says, no other exception leaves a fetch."""

    def rule(handler: Handler, number: int) -> None:
        handler.send_response_only(200)
        handler.send_header(header, value.encode().decode("latin-1"))
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True

    server.rule = rule
    if header == "Content-Length":  # as if there were none
        assert http.fetch(f"{server.url}/a.jpg", 100_000, HASTY) == body
    else:
        assert bad(f"{server.url}/a.jpg").status is Status.READ_ERROR


def test_threads_share_one_client(server: Server) -> None:
    """From the first request on."""
    http._client.cache_clear()
    start = threading.Barrier(32)

    def fetch(_: int) -> int:
        start.wait()
        assert http.fetch(f"{server.url}/a.jpg", len(BODY), HASTY) == BODY
        return id(http.client())

    with ThreadPoolExecutor(32) as pool:
        assert len(set(pool.map(fetch, range(32)))) == 1


def test_a_url_without_a_host_is_tried_once() -> None:
    assert bad("http:///a.jpg").error == "cannot be read: the URL names no host"


def test_no_more_is_read_than_an_image_may_have(server: Server) -> None:
    """An announced length is refused unread; ten gigabytes that come unannounced are cut off, in
    memory that stays bounded.
    """
    found = bad(f"{server.url}/a.jpg", 10_239)
    assert (found.status, found.error) == (
        Status.TOO_LARGE,
        "has 10240 bytes, more than --max-bytes 10239",
    )
    sent = 0

    def endless(handler: Handler, number: int) -> None:
        nonlocal sent
        handler.send_response_only(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        for _ in range(10 * 2**30 // 0x10000):
            handler.wfile.write(chunk)
            sent += 0x10000

    server.rule = endless
    tracemalloc.start()
    try:
        found = bad(f"{server.url}/endless", 4 * 2**20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.status, found.error) == (
        Status.TOO_LARGE,
        "has more bytes than --max-bytes 4194304",
    )
    assert sent < 64 * 2**20
    assert peak < 16 * 2**20


def test_connections_are_kept_and_bounded(server: Server) -> None:
    """One thread uses one connection for all its images; thirty-two threads have no more than eight
    to one host at a time.
    """
    for _ in range(5):
        http.fetch(f"{server.url}/a.jpg", len(BODY), HASTY)
    assert len(server.connections) == 1
    now, most = 0, 0

    def rule(handler: Handler, number: int) -> None:
        nonlocal now, most
        with server.lock:
            now += 1
            most = max(most, now)
        helpers.until(lambda: most > 1)
        with server.lock:
            now -= 1
        serve(handler, number)

    server.rule = rule
    patient = http.READING
    with ThreadPoolExecutor(32) as pool:
        assert (
            list(
                pool.map(lambda _: http.fetch(f"{server.url}/a.jpg", len(BODY), patient), range(64))
            )
            == [BODY] * 64
        )
    assert 2 <= most <= 32
    assert len(server.connections) <= 33, "each thread reuses its own"


@pytest.mark.parametrize(
    "worst",
    [lambda handler: send(handler, 404, b"no"), lambda handler: send(handler, 503, b"no"), reset],
)
def test_failures_use_up_no_connections(server: Server, worst: Callable[[Handler], object]) -> None:
    """After many failures, of images too large as well, the next image is had, without waiting."""
    patience = RetryPolicy(attempts=1, silence_s=60)
    for _ in range(16):
        server.rule = lambda handler, number: worst(handler)
        assert "Pool" not in bad(f"{server.url}/a.jpg", policy=patience).error
        server.rule = serve
        assert bad(f"{server.url}/a.jpg", 10, patience).status == Status.TOO_LARGE
    assert http.fetch(f"{server.url}/a.jpg", len(BODY), patience) == BODY


def test_certificates_are_verified(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An unknown authority is a row after one try; a known one is trusted; https is never left for
    http.
    """
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    plain = server.url
    server.wrap(context)
    found = bad(f"{server.url}/a.jpg")
    assert (found.status, found.error) == (
        Status.READ_ERROR,
        "cannot be read: no secure connection: unable to get local issuer certificate",
    )
    assert server.paths == []
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    http._client.cache_clear()
    assert http.fetch(f"{server.url}/a.jpg", len(BODY), HASTY) == BODY
    server.rule = lambda handler, number: send(handler, 302, Location=f"{plain}/a.jpg")
    assert (
        bad(f"{server.url}/a.jpg").error
        == "cannot be read: redirected from https to http, which is not followed"
    )


def test_proxies_are_taken_from_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP_PROXY is used, with its name and password, and NO_PROXY keeps out of it."""
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:s%20t@"))
    server.files["/elsewhere.invalid/a.jpg"] = BODY
    server.rule = lambda handler, number: send(handler, 200, handler.path.encode())
    assert (
        http.fetch("http://elsewhere.invalid/a.jpg", len(BODY), HASTY)
        == b"http://elsewhere.invalid/a.jpg"
    )
    assert (
        server.headers[-1]["Proxy-Authorization"] == "Basic " + base64.b64encode(b"me:s t").decode()
    )
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert http.fetch(f"{server.url}/a.jpg", len(BODY), HASTY) == b"/a.jpg"


def test_passwords_come_from_netrc_alone_and_go_to_their_host_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, imagemill: CLI
) -> None:
    """A URL with a password in it is refused wherever it is written, the password unspoken;
    `~/.netrc` serves, but no redirect's goal.
    """
    (tmp_path / "netrc").write_text(
        "machine 127.0.0.1 login me password secret\ndefault login all password everywhere\n"
    )
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    server.rule = lambda handler, number: (
        send(handler, 302, Location=f"{elsewhere}/a.jpg")
        if handler.path == "/move"
        else serve(handler, number)
    )
    assert http.fetch(f"{server.url}/move", len(BODY), HASTY) == BODY
    sent = [headers.get("Authorization") for headers in server.headers]
    assert sent == ["Basic " + base64.b64encode(b"me:secret").decode(), None]
    assert server.headers[0]["User-Agent"].startswith("imagemill/")
    for url in ("http://me:hush@127.0.0.1/a.jpg", "s3://me:hush@bucket/a.jpg"):
        with pytest.raises(UsageError, match=r"holds a user name or password") as refused:
            resolve([url])
        assert "hush" not in str(refused.value)
        (tmp_path / "list.txt").write_text(f"a.jpg\n{url}\n")
        with pytest.raises(
            SourceError, match=r"list.txt, line 2: the URL holds a user name or password"
        ) as in_list:
            list(ListSource(0, os.fsencode(tmp_path / "list.txt")).entries(Filters(), Skipped()))
        assert "hush" not in str(in_list.value)
        with pytest.raises(BadImage, match="holds a user name or password"):
            fetch(url.encode(), 9)
    assert not storage.names_password("http://h/a@b.jpg")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "http://h/images/",
            (
                "only single images are read over http. Download it, or list its images' URLs in a"
                " file: @FILE."
            ),
        ),
        ("https://h/all.TAR.gz", "only single images are read over https."),
        ("https://h/table.parquet?x=1", "only single images are read over https."),
        ("http://h", "only single images are read over http."),
        ("ftp://h/a.jpg", "ftp is none of http, https, s3, gs, az."),
        (
            "file://elsewhere/a.jpg",
            "file://elsewhere is another machine. Mount its disk and give the path.",
        ),
        ("https://", "names no host or bucket."),
    ],
)
def test_what_cannot_be_a_source_is_refused_in_words(source: str, text: str) -> None:
    """Folders, archives and tables over http, and other protocols: the message says what to do
    instead.
    """
    with pytest.raises(UsageError) as caught:
        resolve([source])
    assert text in str(caught.value)


def test_a_source_that_is_not_there_ends_the_job_before_it_begins(
    server: Server, imagemill: CLI, tmp_path: Path
) -> None:
    """A single URL and a list that the server does not have: exit 2, one line, nothing written."""
    for source in (f"{server.url}/none.jpg", f"@{server.url}/none.txt"):
        result = imagemill(
            "run", source, "--output", tmp_path / "out", "--model", "tiny", "--devices", "null"
        )
        assert (result.code, len(result.err.splitlines())) == (2, 1)
        assert "cannot be read: the server answers 404 Not Found. Check the address." in result.err
        assert not (tmp_path / "out").exists()
    check([f"{server.url}/a.jpg"])


def test_a_killed_job_is_resumed_and_an_outage_is_healed(
    server: Server,
    some_jpegs: dict[str, bytes],
    models_dir: Path,
    imagemill: CLI,
    start: Callable[..., Any],
    job: Jobs,
    tmp_path: Path,
) -> None:
    """SIGKILL of the launcher in the middle, then a server that fails for the rest, then a healthy
    one: as if nothing had been.
    """
    server.files |= some_jpegs
    (tmp_path / "urls.txt").write_text("".join(f"{server.url}/{name}\n" for name in some_jpegs))
    hook = """
    def hasty(module):
        module.READING = module.RetryPolicy(attempts=2, pause_s=0.01)
    after_import("imagemill.pipeline.sources.http", hasty)
    """
    hold = harness.Hold(tmp_path, 24, hook, IMAGEMILL_MODELS=str(models_dir))
    env = hold.environment
    tiny = (
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
    arguments = ("run", f"@{tmp_path / 'urls.txt'}", "--output", tmp_path / "out", *tiny)

    process = start(*arguments, env=env)
    helpers.until(lambda: len(helpers.parts(tmp_path / "out")) >= 2, process=process)
    process.kill()
    process.wait()
    helpers.until(lambda: not any(map(helpers.running, helpers.worker_pids(tmp_path / "out"))))
    hold.release()
    before = helpers.parts(tmp_path / "out")
    assert 2 <= len(before) < 5
    server.rule = lambda handler, number: send(handler, 503)
    outage = imagemill(*arguments, "--json", env=env)
    assert (outage.code, outage.json["failed_by_status"]) == (
        0,
        {"read_error": 40 - 8 * len(before)},
    ), outage.err
    assert helpers.parts(tmp_path / "out").items() >= before.items()
    server.rule = serve
    server.paths.clear()
    healed = imagemill(*arguments, "--retry-failed", "--json", env=env)
    assert (healed.code, healed.json["ok"]) == (0, 40), healed.err
    assert len(server.paths) == 40 - 8 * len(before)
    harness.assert_complete(tmp_path / "out")
    folder = helpers.fill(tmp_path / "images", some_jpegs)
    run.run(job(folder, output=str(tmp_path / "folder"), save=("logits",)))
    expected = helpers.by_path(tmp_path / "folder")
    assert helpers.by_path(tmp_path / "out") == {
        f"{server.url}/{path}": row | {"path": f"{server.url}/{path}"}
        for path, row in expected.items()
    }


def test_a_retry_reads_failed_images_only(server: Server, job: Jobs, tmp_path: Path) -> None:
    """Not all images of their shards. A part that is gone meanwhile is made again, whole."""
    names = [f"{number}.jpg" for number in range(9)]
    (tmp_path / "list.txt").write_text("".join(f"{server.url}/{name}\n" for name in names))
    given = (f"@{tmp_path / 'list.txt'}",)
    server.files = {name: sample_images.jpeg(40, 30) for name in names if name not in "3.jpg 7.jpg"}
    assert run.run(job(*given, shard_size=5)).failed_by_status == {"missing": 2}
    before = helpers.rows(tmp_path / "out")
    server.files |= {"3.jpg": sample_images.jpeg(40, 30)}
    server.paths.clear()
    assert run.run(job(*given, shard_size=5, retry_failed=())).failed_by_status == {"missing": 1}
    assert sorted(server.paths) == ["/3.jpg", "/7.jpg"]
    after = helpers.rows(tmp_path / "out")
    assert [row["status"] for row in after] == ["ok"] * 7 + ["missing", "ok"]
    assert [row for row in after if row["index"] != 3] == [r for r in before if r["index"] != 3]
    server.files |= {"7.jpg": sample_images.jpeg(40, 30)}
    (tmp_path / "out" / "predictions" / "part-000000.parquet").unlink()
    server.paths.clear()
    assert run.run(job(*given, shard_size=5, retry_failed=())).ok == 9
    assert len(server.paths) == 5 + 1


def test_requests_name_the_user_agent_that_was_asked_for(
    server: Server, job: Jobs, tmp_path: Path
) -> None:
    """Of sources, their check, lists on the web, and images of lists and tables, redirects
    included. It may change on resume.
    """
    image = sample_images.jpeg(40, 30)
    names = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")
    server.files = dict.fromkeys(names, image) | {"list.txt": b"b.jpg\n"}
    server.rule = lambda handler, number: (
        send(handler, 302, Location="/a.jpg")
        if handler.path == "/moved.jpg"
        else serve(handler, number)
    )
    (tmp_path / "list.txt").write_text(f"{server.url}/c.jpg\n")
    (tmp_path / "table.csv").write_text(f"url\n{server.url}/d.jpg\n")
    given = (
        f"{server.url}/moved.jpg",
        f"@{server.url}/list.txt",
        f"@{tmp_path / 'list.txt'}",
        f"@{tmp_path / 'table.csv'}",
    )
    assert run.run(job(*given, user_agent="Mozilla/5.0 (me@example.com)")).ok == 4
    assert {f"/{name}" for name in (*names, "moved.jpg", "list.txt")} == set(server.paths)
    assert {headers["User-Agent"] for headers in server.headers} == {"Mozilla/5.0 (me@example.com)"}
    rows = helpers.rows(tmp_path / "out")
    server.headers.clear()
    for part in (tmp_path / "out" / "predictions").iterdir():
        part.unlink()
    run.run(job(*given))
    assert {headers["User-Agent"] for headers in server.headers} == {f"imagemill/{__version__}"}
    assert helpers.rows(tmp_path / "out") == rows


@pytest.mark.parametrize("agent", ["", "  ", "a\r\nCookie: b", "a\nb", "tab\t", "ü"])
def test_a_user_agent_that_no_header_can_hold_is_refused(
    agent: str, job: Jobs, tmp_path: Path
) -> None:
    """Line breaks and other control characters would forge headers: wrong usage, before anything is
    read or written.
    """
    with pytest.raises(UsageError, match=r"--user-agent .* must be printable ASCII") as caught:
        run.run(job(tmp_path, user_agent=agent))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
