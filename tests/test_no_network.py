"""Nothing phones home: no process of a run opens a socket to anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import helpers
from imagemill.records import Bundle

pytestmark = pytest.mark.process

HOOK = """
import json, os, sys

def _audit(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
        address = arguments[1] if len(arguments) > 1 else None
        family = getattr(arguments[0], "family", None)
        if getattr(family, "name", "") == "AF_UNIX":
            return
    elif event not in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "urllib.Request"):
        return
    _note(event, repr(arguments[-2:]))
    raise OSError("no network")

def _note(event, what):
    line = json.dumps({"pid": os.getpid(), "event": event, "what": what, "program": sys.orig_argv[1:5]}) + "\\n"
    handle = os.open(os.environ["SOCKET_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(handle, line.encode())
    os.close(handle)

_note("start", "")
sys.addaudithook(_audit)
"""


@pytest.fixture
def watched(tmp_path: Path, lite0: Bundle) -> dict[str, str]:
    """An environment in which every Python process, children included, writes its sockets down;
    with a fresh home, as a newcomer has.
    """
    helpers.fill(tmp_path / "hook", {"sitecustomize.py": HOOK.encode()})
    (tmp_path / "home").mkdir()
    environment = helpers.environment(
        SOCKET_LOG=str(tmp_path / "sockets"),
        HOME=str(tmp_path / "home"),
        IMAGEMILL_MODELS=str(lite0.dir.parent),
    )
    environment["PYTHONPATH"] = f"{tmp_path / 'hook'}:{environment['PYTHONPATH']}"
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "CI"):  # telemetry keeps still on CI servers
        environment.pop(name, None)
    return environment


def noted(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "sockets").read_text().splitlines()]


def test_no_socket_leaves_the_machine(
    watched: dict[str, str], jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """A whole run on two devices, its verification, the demo, models and devices: not one socket
    but between our processes. Trained model and images of the demo install with the package.
    """
    folder = jpegs(40, **{"bad.jpg": b"x"})
    commands = (
        (
            "run",
            folder,
            "--output",
            tmp_path / "out",
            "--model",
            "efficientnet_lite0",
            "--devices",
            "cpu:2",
        ),
        ("verify", tmp_path / "out"),
        ("demo", "--output", tmp_path / "demo", "--models-dir", tmp_path / "fresh", "--json"),
        ("models",),
        ("devices",),
    )
    for command in commands:
        result = helpers.imagemill_cli(*command, env=watched)
        assert result.code == 0, result.err
        if "demo" in command:
            demo = result.json
            assert (demo["images"], demo["failed_by_status"]) == (11, {"truncated": 1})
            assert demo["model"] == "efficientnet_lite0"
    found = noted(tmp_path)
    assert [note for note in found if note["event"] != "start"] == []
    known = ("imagemill.workers.worker", "imagemill.pipeline.decoding.isolated", "imagemill")
    programs = Counter(
        next((name for name in known if name in note["program"]), Path(note["program"][-1]).name)
        for note in found
    )
    started = {
        "imagemill": len(commands),
        "imagemill.workers.worker": 3,
        "imagemill.pipeline.decoding.isolated": 2,
        "program.py": 1,
    }
    assert programs == started


def test_a_socket_would_be_noticed(watched: dict[str, str], tmp_path: Path) -> None:
    """The test above can fail: a child of a child that asks for a name or connects is written down,
    a Unix socket is not.
    """
    inner = (
        "import socket, contextlib\nfor ask in (lambda: socket.socket().connect(('127.0.0.1', 9)), "
    )
    inner += (
        "lambda: socket.getaddrinfo('localhost', 80), lambda:"
        " socket.socket(socket.AF_UNIX).connect('/nowhere')):\n"
    )
    inner += "    with contextlib.suppress(OSError): ask()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    subprocess.run([sys.executable, "-c", outer], env=watched, check=True)
    events = Counter(note["event"] for note in noted(tmp_path))
    assert events == {"start": 2, "socket.connect": 1, "socket.getaddrinfo": 1}
