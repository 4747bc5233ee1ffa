"""A download ends as one whole, checked file or as one clear error, and never leaves a bad file
behind.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
from msgspec.structs import replace

from imagemill.errors import DownloadError, UsageError
from imagemill.models.checkpoints import download
from imagemill.system.retry import RetryPolicy

BODY = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(BODY).hexdigest()
QUICK = RetryPolicy(silence_s=60.0, attempts=4, pause_s=0.01)


class Server:
    """Answers each request with the next behaviour of a script; the last one repeats."""

    def __init__(self) -> None:
        self.script: list[Callable[[Handler], None]] = [serve()]
        self.requests: list[dict[str, str]] = []
        self.release = threading.Event()
        self.authority: trustme.CA
        outer = self

        class Bound(Handler):
            server_state = outer

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._httpd.daemon_threads = True
        self._httpd.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up on purpose
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}/weights.bin"
        self._thread = threading.Thread(
            target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self._thread.start()

    def wrap(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._httpd.socket = context.wrap_socket(self._httpd.socket, server_side=True)
        self.url = self.url.replace("http:", "https:")

    def close(self) -> None:
        self.release.set()
        self._httpd.shutdown()
        self._thread.join()
        self._httpd.server_close()


class Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_GET(self) -> None:
        state = self.server_state
        state.requests.append(dict(self.headers))
        behave = state.script.pop(0) if len(state.script) > 1 else state.script[0]
        behave(self)

    def log_message(self, *_: object) -> None:
        pass


def serve(
    body: bytes = BODY,
    *,
    cut: int | None = None,
    stall: int | None = None,
    ranges: bool = True,
    etag: str | None = '"v1"',
    length: bool = True,
) -> Callable[[Handler], None]:
    """Send the body, or what of it the request's range asks for; hang up or go silent after so many
    bytes.
    """

    def behave(handler: Handler) -> None:
        asked, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        start = (
            int(asked.removeprefix("bytes=").rstrip("-"))
            if ranges and asked and condition in (None, etag)
            else 0
        )
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if etag:
            handler.send_header("ETag", etag)
        if length:
            handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        rest = body[start:]
        for limit in (cut, stall):
            rest = rest if limit is None else rest[:limit]
        handler.wfile.write(rest)
        handler.wfile.flush()
        if stall is not None:
            handler.server_state.release.wait()

    return behave


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    def behave(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return behave


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    started = Server()
    yield started
    started.close()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_download_is_whole_checked_and_counted(server: Server, tmp_path: Path) -> None:
    """The file alone is left; progress ends at the size; the sum is returned."""
    seen: list[tuple[int, int | None]] = []
    target = tmp_path / "new" / "w"
    digest = download.fetch(
        server.url,
        target,
        sha256_prefix=DIGEST[:8],
        progress=lambda *at: seen.append(at),
        policy=QUICK,
    )
    assert digest == DIGEST
    assert target.read_bytes() == BODY
    assert names(target.parent) == ["w"]
    assert seen[-1] == (len(BODY), len(BODY))
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    "fault", [{"cut": 300_000}, {"stall": 300_000}, {"cut": 0}, {"cut": 300_000, "etag": None}]
)
def test_a_cut_or_stalled_connection_is_continued(
    server: Server, tmp_path: Path, fault: dict
) -> None:
    """The next attempt asks only for what is missing."""
    server.script = [
        serve(**fault),
        serve(**{key: value for key, value in fault.items() if key == "etag"}),
    ]
    policy = replace(QUICK, silence_s=2.0) if "stall" in fault else QUICK
    assert (
        download.fetch(server.url, tmp_path / "w", sha256_prefix=DIGEST[:8], policy=policy)
        == DIGEST
    )
    assert (tmp_path / "w").read_bytes() == BODY
    assert len(server.requests) == 2
    received = next(iter(fault.values()))
    assert server.requests[1].get("Range") == (f"bytes={received}-" if received else None)
    assert names(tmp_path) == ["w"]


def test_a_download_that_gave_up_is_continued_by_the_next_call(
    server: Server, tmp_path: Path
) -> None:
    """What came is kept under another name, and the message says so."""
    server.script = [serve(cut=200_000), status(503)]
    with pytest.raises(
        DownloadError, match="200000 bytes are kept; the same command continues there"
    ):
        download.fetch(server.url, tmp_path / "w", policy=QUICK)
    assert names(tmp_path) == ["w.partial", "w.partial.json"]
    server.script = [serve()]
    assert download.fetch(server.url, tmp_path / "w", policy=QUICK) == DIGEST
    assert server.requests[-1]["Range"] == "bytes=200000-"
    assert names(tmp_path) == ["w"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_meanwhile_is_not_glued_together(
    server: Server, tmp_path: Path, ranges: bool
) -> None:
    """Another ETag, or a server that knows no ranges: the download starts again from its first
    byte.
    """
    old = bytes(len(BODY))
    server.script = [serve(old, cut=200_000, etag='"old"', ranges=ranges), serve(ranges=ranges)]
    assert download.fetch(server.url, tmp_path / "w", policy=QUICK) == DIGEST


def test_a_file_glued_from_two_versions_gets_another_chance(server: Server, tmp_path: Path) -> None:
    """A server without ETags that changed the file: the sum is wrong once, then right."""
    server.script = [serve(bytes(len(BODY)), cut=200_000, etag=None), serve(etag=None)]
    assert (
        download.fetch(server.url, tmp_path / "w", sha256_prefix=DIGEST[:8], policy=QUICK) == DIGEST
    )
    assert [request.get("Range") for request in server.requests] == [None, "bytes=200000-", None]


def test_another_url_does_not_continue_a_part(server: Server, tmp_path: Path) -> None:
    """A part belongs to the URL it came from."""
    server.script = [serve(bytes(len(BODY)), cut=1000, etag=None), status(404)]
    with pytest.raises(DownloadError):
        download.fetch(server.url, tmp_path / "w", policy=QUICK)
    server.script = [serve()]
    assert download.fetch(server.url + "?2", tmp_path / "w", policy=QUICK) == DIGEST


def test_a_wrong_body_is_removed_and_named(server: Server, tmp_path: Path) -> None:
    """Both sums are in the message, and what to do; nothing stays."""
    server.script = [serve(b"<html>Please log in</html>")]
    with pytest.raises(DownloadError) as caught:
        download.fetch(server.url, tmp_path / "w", sha256_prefix="29e315fa", policy=QUICK)
    text = str(caught.value)
    assert "sent the wrong file: its sha256 is " in text
    assert "it should begin with 29e315fa" in text
    assert "--from FILE" in text
    assert "with --url" in text
    assert "IMAGEMILL_MIRROR" in text
    assert names(tmp_path) == []
    assert len(server.requests) == 1


def test_a_file_beyond_the_limit_is_refused_before_it_is_loaded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the announced length, or, where none is announced, where the limit is passed."""
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    with pytest.raises(DownloadError, match=f"announces {len(BODY)} bytes instead of at most 1000"):
        download.fetch(server.url, tmp_path / "w", policy=QUICK)
    server.script = [serve(length=False)]
    with pytest.raises(DownloadError, match=r"sent [0-9]+ bytes instead of at most 1000"):
        download.fetch(server.url, tmp_path / "w", policy=QUICK)
    assert names(tmp_path) == []


def test_404_is_final(server: Server, tmp_path: Path) -> None:
    """One request, one clear error, nothing left."""
    server.script = [status(404)]
    with pytest.raises(DownloadError, match=r"answers 404 Not Found\. Get .* some other way"):
        download.fetch(server.url, tmp_path / "w", policy=QUICK)
    assert len(server.requests) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [500, 503, 429])
def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path, code: int) -> None:
    """503, then 200: a whole file."""
    server.script = [status(code), status(code), serve()]
    assert download.fetch(server.url, tmp_path / "w", policy=QUICK) == DIGEST
    assert len(server.requests) == 3


def test_waits_double_and_the_server_may_ask_for_longer(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backoff is exponential and bounded; Retry-After is honoured up to that bound."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(random, "uniform", lambda _, high: high)
    server.script = [
        status(503),
        status(503),
        status(503),
        status(503, Retry_After="7"),
        status(503, Retry_After="7000"),
        serve(),
    ]
    download.fetch(
        server.url,
        tmp_path / "w",
        policy=RetryPolicy(silence_s=5, attempts=6, pause_s=1, longest_pause_s=30),
    )
    assert waits == [1, 2, 4, 8, 30]


def test_a_home_that_never_answers_is_one_clear_error(server: Server, tmp_path: Path) -> None:
    """Attempts are counted and named."""
    server.script = [serve(stall=0)]
    with pytest.raises(DownloadError, match=r"\(2 attempts\)"):
        download.fetch(
            server.url,
            tmp_path / "w",
            policy=RetryPolicy(silence_s=0.2, attempts=2, pause_s=0.01),
        )
    assert "w" not in names(tmp_path)


@pytest.fixture
def offline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of the environment, and no second attempt: waiting for one would fail the test."""

    def wait(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s for another attempt")

    monkeypatch.setattr(time, "sleep", wait)


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """An address that refuses connections: nobody listens, and nobody else can get the port."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def unreachable(url: str, folder: Path, connect_s: float = 60.0) -> str:
    """The error of a download from a server that cannot be reached."""
    with pytest.raises(DownloadError, match="cannot be downloaded: ") as caught:
        download.fetch(url, folder / "w", policy=RetryPolicy(connect_s=connect_s, silence_s=60))
    assert "imagemill get-model NAME --from FILE" in str(caught.value)
    assert names(folder) == []
    return str(caught.value)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_refuses_is_asked_once(scheme: str, tmp_path: Path) -> None:
    """Nobody listens at the address."""
    with refusing() as address:
        assert "127.0.0.1 cannot be reached: Connection refused." in unreachable(
            f"{scheme}://{address}/w", tmp_path
        )


@pytest.mark.usefixtures("offline")
def test_a_name_that_cannot_be_resolved_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without a network. The time limit ends the wait for a resolver that does not
    answer.
    """

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    text = unreachable("https://weights.invalid/w", tmp_path)
    assert "weights.invalid cannot be reached: Temporary failure in name resolution." in text
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait() or [])
    assert "weights.invalid cannot be reached: no connection within 0.3 s." in unreachable(
        "https://weights.invalid/w", tmp_path, 0.3
    )
    released.set()


@pytest.mark.usefixtures("offline")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full queue refuses")
def test_a_network_that_drops_packets_is_given_up(tmp_path: Path) -> None:
    """A queue of connections that is full drops them, as a firewall does."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as held:
        for _ in range(4):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/w"
        assert "127.0.0.1 cannot be reached: no connection within 0.3 s." in unreachable(
            url, tmp_path, 0.3
        )


@pytest.mark.usefixtures("offline")
def test_a_server_that_does_not_speak_tls_is_given_up(tmp_path: Path) -> None:
    """It takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/w"
        assert "127.0.0.1 cannot be reached: no connection within 0.3 s." in unreachable(
            url, tmp_path, 0.3
        )


@pytest.mark.usefixtures("offline")
def test_a_proxy_that_refuses_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it refuses the connection to the server or cannot be reached itself."""
    monkeypatch.setenv("https_proxy", server.url.rsplit("/", 1)[0])
    assert "127.0.0.1 cannot be reached: Tunnel connection failed: 501" in unreachable(
        "https://weights.invalid/w", tmp_path
    )
    with refusing() as address:
        monkeypatch.setenv("https_proxy", f"http://{address}")
        assert "127.0.0.1 cannot be reached: Connection refused." in unreachable(
            "https://weights.invalid/w", tmp_path
        )


@pytest.mark.parametrize("before", [serve(cut=300_000), status(503)])
def test_a_server_that_was_reached_is_asked_again(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[Handler], None],
) -> None:
    """An outage after the first answer is waited for, though the server cannot be reached in it."""
    connect, connections = socket.create_connection, iter([True, False, False])

    def sometimes(*arguments: Any, **options: Any) -> socket.socket:
        if next(connections, True):
            return connect(*arguments, **options)
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", sometimes)
    server.script = [before, serve()]
    assert download.fetch(server.url, tmp_path / "w", policy=QUICK) == DIGEST


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1/w", "file:///etc/passwd", "weights.pth", "http:///w"]
)
def test_only_http_and_https_are_fetched(url: str, tmp_path: Path) -> None:
    """Anything else is a mistake in the command."""
    with pytest.raises(UsageError, match=r"begins with http:// or https://"):
        download.fetch(url, tmp_path / "w")


def test_a_redirect_to_a_file_is_not_followed(server: Server, tmp_path: Path) -> None:
    """Redirects stay within http and https."""
    server.script = [status(302, Location="file:///etc/passwd")]
    with pytest.raises(DownloadError):
        download.fetch(server.url, tmp_path / "w", policy=RetryPolicy(silence_s=1, attempts=1))
    assert names(tmp_path) == []


def test_proxies_come_from_the_environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With http_proxy set the request goes there, whatever the host."""
    monkeypatch.setenv("http_proxy", server.url.rsplit("/", 1)[0])
    assert download.fetch("http://weights.invalid/w", tmp_path / "w", policy=QUICK) == DIGEST
    assert server.requests[0]["Host"] == "weights.invalid"


def test_a_mirror_has_the_layout_of_its_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    """$IMAGEMILL_MIRROR/HOST/PATH."""
    assert download.mirrored("https://a.b/c/d.pth") == "https://a.b/c/d.pth"
    monkeypatch.setenv("IMAGEMILL_MIRROR", "http://mirror.local/models/")
    assert download.mirrored("https://a.b/c/d.pth") == "http://mirror.local/models/a.b/c/d.pth"


def test_a_full_disk_is_named_as_such(server: Server, tmp_path: Path) -> None:
    """An error of the disk is not taken for one of the network."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be written: "):
        download.fetch(server.url, tmp_path / "file" / "w", policy=QUICK)


@pytest.fixture
def tls_server(server: Server) -> Server:
    """The same server speaking TLS, its certificate signed by an authority made for this test."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.authority = trustme.CA()
    server.authority.issue_cert("127.0.0.1").configure_cert(context)
    server.wrap(context)
    return server


def test_an_unknown_certificate_is_refused(tls_server: Server, tmp_path: Path) -> None:
    """TLS certificates are checked: a server nobody vouches for sends nothing that is kept."""
    with pytest.raises(DownloadError, match="certificate"):
        download.fetch(tls_server.url, tmp_path / "weights.bin", policy=QUICK)
    assert tls_server.requests == []
    assert list(tmp_path.iterdir()) == []


def test_a_trusted_certificate_is_accepted(
    tls_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side of the check above: with its authority trusted, the same server is downloaded
    from.
    """
    with tls_server.authority.cert_pem.tempfile() as trusted:
        monkeypatch.setenv("SSL_CERT_FILE", trusted)
        assert download.fetch(tls_server.url, tmp_path / "weights.bin", policy=QUICK) == DIGEST


def test_a_redirect_from_https_to_http_is_refused(
    tls_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that began under TLS does not go on without it."""

    def redirect(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", "http://127.0.0.1:9/weights.bin")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    tls_server.script = [redirect]
    with tls_server.authority.cert_pem.tempfile() as trusted:
        monkeypatch.setenv("SSL_CERT_FILE", trusted)
        with pytest.raises(DownloadError, match="from https to http"):
            download.fetch(tls_server.url, tmp_path / "weights.bin", policy=QUICK)
    assert not (tmp_path / "weights.bin").exists()
