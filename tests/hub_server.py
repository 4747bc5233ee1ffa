"""A stand-in for the Hugging Face Hub on 127.0.0.1, with the Hub's paths, headers and errors."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE",
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK",
    "DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET",
)  # fmt: skip


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repository with one commit, on the branch `main` and the tag `v1.0`."""

    files: dict[str, bytes]
    licence: str | None = "apache-2.0"
    gated: int | None = None
    """The status of every answer to those who have not accepted its conditions."""
    private: bool = False
    """It is hidden from callers without `TOKEN`."""
    commit: str = ""

    def __post_init__(self) -> None:
        if not self.commit:
            text = "".join(f"{name}{git_sha1(data)}" for name, data in sorted(self.files.items()))
            self.commit = hashlib.sha1(text.encode()).hexdigest()

    def is_large(self, name: str) -> bool:
        """Whether the Hub keeps a file outside Git (LFS), behind a redirect."""
        return name.endswith((".onnx", "_data", ".safetensors", ".bin"))


TOKEN = "hf_secretSecretSecret"


@dataclass
class Hub:
    """The server and what it serves. `requests` lists method and path of each request."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    damage: set[str] = field(default_factory=set)
    """Files of which the content is sent with one bit flipped."""
    cuts: list[int] = field(default_factory=list)
    """After how many bytes the next answers with a large file end."""
    stalls: bool = False
    """A large file's second half does not come."""
    locations: dict[str, str] = field(default_factory=dict)
    """Other addresses that requests for files are redirected to."""
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    cdn: str = ""
    home: Path = Path()

    def environment(self, **changes: str) -> dict[str, str]:
        """What a child process needs to use this Hub alone."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home)} | changes

    def stop(self) -> None:
        """Answer nobody any more, also on connections that are open."""
        if library := sys.modules.get("huggingface_hub"):
            library.close_session()
        self.released.set()
        self._httpd.shutdown()
        self._httpd.server_close()

    def start(self) -> None:
        class Bound(Handler):
            hub = self

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._httpd.daemon_threads = True
        self._httpd.handle_error = lambda *_: None  # type: ignore[method-assign]
        port = self._httpd.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}/cdn"  # another host: tokens must not be sent there
        threading.Thread(
            target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        path = urllib.parse.urlsplit(self.path).path
        hub.requests.append(f"{self.command} {path}")
        hub.headers.append(dict(self.headers))
        words = [urllib.parse.unquote(word) for word in path.strip("/").split("/")]
        if words[0] == "cdn":
            return self._send_content(words[1])
        is_api = words[:2] == ["api", "models"]
        owner_and_name = words[2:4] if is_api else words[:2]
        repo = hub.repos.get("/".join(owner_and_name))
        knows = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not knows):
            return self._refuse(401 if not knows else 404, "RepoNotFound")
        if repo.gated and (not is_api or repo.gated == 401):
            return self._refuse(repo.gated, "GatedRepo")
        revision = (words[5] if len(words) > 5 else "main") if is_api else words[3]
        if revision not in ("main", "v1.0", "refs/pr/1", repo.commit):
            return self._refuse(404, "RevisionNotFound")
        if is_api:
            return self._send(200, json.dumps(self._listing(owner_and_name, repo)).encode())
        return self._send_file(repo, "/".join(words[4:]))

    def _listing(self, name: list[str], repo: Repo) -> dict[str, Any]:
        siblings = []
        for file, data in repo.files.items():
            entry: dict[str, Any] = {
                "rfilename": file,
                "size": len(data),
                "blobId": git_sha1(data),
            }
            if repo.is_large(file):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        card = {"license": repo.licence} if repo.licence else {}
        return {
            "id": "/".join(name),
            "modelId": "/".join(name),
            "sha": repo.commit,
            "private": repo.private,
            "gated": bool(repo.gated),
            "cardData": card,
            "tags": [],
            "siblings": siblings,
        }

    def _send_file(self, repo: Repo, name: str) -> None:
        if name not in repo.files:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repo.commit})
        data = repo.files[name]
        headers = {"X-Repo-Commit": repo.commit}
        if name in self.hub.locations:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"'}
            headers |= {"X-Linked-Size": str(len(data)), "Location": self.hub.locations[name]}
            return self._send(302, b"", headers)
        if repo.is_large(name):
            digest = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            return self._send(302, b"", headers | {"Location": f"{self.hub.cdn}/{digest}"})
        body = flipped(data) if name in self.hub.damage else data
        return self._send(200, body, headers | {"ETag": f'"{git_sha1(data)}"'})

    def _send_content(self, digest: str) -> None:
        hub = self.hub
        found = (
            (name, data)
            for repo in hub.repos.values()
            for name, data in repo.files.items()
            if hashlib.sha256(data).hexdigest() == digest
        )
        name, data = next(found)
        body = flipped(data) if name in hub.damage else data
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        cut = hub.cuts.pop(0) if hub.cuts and self.command == "GET" else None
        if hub.stalls:
            cut = len(body) // 2
        self._send(206 if start else 200, body[start:], headers, cut)

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        text = json.dumps({"error": code}).encode()
        self._send(status, text, {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None and self.hub.stalls:
            self.hub.released.wait()
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub. This process and its children use it, with a cache of their own."""
    started = Hub(home=tmp_path / "hf")
    started.start()
    for name in (*VARIABLES, *PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)
    for name, value in started.environment().items():
        monkeypatch.setenv(name, value)
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    # Read from the environment when it was imported.
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", started.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        started.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(started.home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(started.home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield started
    started.stop()
