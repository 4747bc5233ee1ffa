"""A real S3 server on 127.0.0.1, and a proxy in front of it that delays, resets, throttles and
cuts.

The server is moto's, a process of its own; boto3 is what tests look at it with, so that the library
under test is not its own witness.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

_numbers = itertools.count()
_SERVER = """
import threading
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

one_at_a_time, put = threading.Lock(), S3Response.put_object
def put_object(self):  # moto looks for an object, and makes it, in two steps
    with one_at_a_time:
        return put(self)
S3Response.put_object = put_object

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
threading.Event().wait()
"""


@dataclass(frozen=True)
class Bucket:
    """A bucket of one test's own."""

    client: Any
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def fill(self, files: Mapping[str, bytes], below: str = "") -> str:
        """Put objects there; returns the URL of `below`."""
        for key, data in files.items():
            self.client.put_object(Bucket=self.name, Key=below + key, Body=data)
        return f"{self.url}/{below}".rstrip("/")

    def get(self, key: str) -> bytes:
        body: bytes = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return body

    def keys(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """A server on a free port; gives its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().decode().strip()
        assert port, "the S3 server has ended"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def environment(endpoint: str) -> dict[str, str]:
    """The variables that say where the server is and how to get in."""
    known = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    return known | {"AWS_ENDPOINT_URL": endpoint}


def new_bucket(endpoint: str) -> Bucket:
    """A fresh bucket; `environment` must be set."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        region_name="us-east-1",
        endpoint_url=endpoint,
        config=Config(retries={"max_attempts": 1}),
    )
    bucket = Bucket(client, f"bucket-{os.getpid()}-{next(_numbers)}")
    client.create_bucket(Bucket=bucket.name)
    return bucket


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of the server, which lives as long as the tests."""
    with serving() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A fresh bucket; the environment of this process and its children says where it is and how to
    get in.
    """
    for name in [
        name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")
    ]:
        monkeypatch.delenv(name)
    for name, value in environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    return new_bucket(s3_endpoint)


@dataclass(frozen=True)
class Request:
    """One request as the proxy sees it."""

    number: int
    """From 0, of this method and path."""
    method: str
    path: str
    """With its query."""


Fault = Callable[["_Handler", Request], None]


@dataclass
class FaultProxy:
    """Passes requests on to the server, but for those to which `rule` gives a fault."""

    url: str
    rule: Callable[[Request], Fault | None] = lambda _: None
    requests: list[Request] = field(default_factory=list)

    def count(self, method: str, part: str = "") -> int:
        """How many requests of a method there were whose path holds `part`."""
        return sum(
            request.method == method and part in request.path for request in list(self.requests)
        )


@pytest.fixture
def s3_faults(
    s3: Bucket, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """The proxy; programs that read the environment from now on go through it. `Bucket` does not."""
    port = int(s3_endpoint.rpartition(":")[2])
    lock = threading.Lock()
    ended = threading.Event()

    class Bound(_Handler):
        upstream = port
        stop = ended

        def note(self) -> Request:
            with lock:
                number = sum(
                    seen.method == self.command and seen.path == self.path
                    for seen in proxy.requests
                )
                proxy.requests.append(Request(number, self.command, self.path))
                return proxy.requests[-1]

        def fault(self, request: Request) -> Fault | None:
            return proxy.rule(request)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up on purpose
    proxy = FaultProxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: int
    stop: threading.Event
    note: Callable[[Any], Request]
    fault: Callable[[Any, Request], Fault | None]

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = self.note()
        fault = self.fault(request)
        if fault is not None:
            fault(self, request)
            if self.close_connection:
                return
        status, headers, data = self.ask(body)
        self.answer(status, headers, data)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle  # noqa: N815

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body or None, dict(self.headers))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, cut: int | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        announced = next(
            (value for name, value in headers if name.lower() == "content-length"), None
        )
        self.send_header(
            "Content-Length", str(announced if self.command == "HEAD" and announced else len(data))
        )
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])

    def log_message(self, *_: object) -> None:
        pass


def delays(seconds: float) -> Fault:
    """The answer comes later."""
    return lambda handler, _: handler.stop.wait(seconds) and None


def answers(status: int, code: str) -> Fault:
    """S3 says no, in its own words."""

    def act(handler: _Handler, request: Request) -> None:
        data = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        )
        handler.close_connection = True
        handler.answer(status, [("Content-Type", "application/xml")], data)

    return act


def resets() -> Fault:
    """The connection breaks before a byte of the answer."""

    def act(handler: _Handler, request: Request) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.close_connection = True

    return act


def cuts(after: int) -> Fault:
    """The connection ends so many bytes into the body."""

    def act(handler: _Handler, request: Request) -> None:
        handler.answer(*handler.ask(b""), cut=after)
        handler.close_connection = True

    return act


def hangs() -> Fault:
    """Nothing ever comes, nor does the connection end."""

    def act(handler: _Handler, request: Request) -> None:
        handler.stop.wait()
        handler.close_connection = True

    return act
