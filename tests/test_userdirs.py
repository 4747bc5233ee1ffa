"""Users without a home directory: containers with `--user 12345`, services, `env -i`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import helpers
from imagemill.errors import UsageError
from imagemill.models import bundle
from imagemill.system import http, userdirs

sys.path.insert(0, str(helpers.PROJECT / "tests" / "faults"))

import harness

NO_ENTRY = """
import pwd
def refuse(name):
    raise KeyError(name)
pwd.getpwuid = pwd.getpwnam = refuse
"""


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No HOME, no passwd entry, no cache folder; returns the folder that the cache then has, not
    made yet.
    """

    def refuse(name: object) -> Any:
        raise KeyError(name)

    monkeypatch.setattr("pwd.getpwuid", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME", "IMAGEMILL_MODELS", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / f"imagemill-{os.geteuid()}"


@pytest.mark.process
def test_commands_work_without_a_home_directory(tmp_path: Path) -> None:
    """`demo` makes its model and classifies; the model is in a private folder below the temporary
    directory.
    """
    environment = harness.hooks(tmp_path / "hooks", NO_ENTRY, TMPDIR=str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME", "IMAGEMILL_MODELS"):
        environment.pop(name, None)
    arguments = ("demo", "--output", tmp_path / "demo")
    result = helpers.imagemill_cli(*arguments, env=environment, before=helpers.FRESH)
    assert (result.code, "Traceback" in result.err) == (0, False), result.err
    folder = tmp_path / f"imagemill-{os.geteuid()}"
    assert (folder / "models" / "efficientnet_lite0" / "model.onnx").is_file()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_home_that_cannot_be_written_to_is_none(
    homeless: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Such as HOME=/, which Docker sets for a user without an entry, or another user's home; models
    that are there are used.
    """
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert userdirs.cache() == tmp_path / "home/.cache/imagemill"  # it can be made
    writable = os.access
    monkeypatch.setattr("os.access", lambda path, mode: mode == os.F_OK and writable(path, mode))
    assert userdirs.cache() == homeless
    (tmp_path / "home/.cache/imagemill").mkdir(parents=True)
    assert userdirs.cache() == tmp_path / "home/.cache/imagemill"


@pytest.mark.parametrize("kind", ["link", "file", "others may write", "of another user"])
def test_a_folder_that_another_user_may_have_filled_is_refused(
    kind: str, homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can make a folder of that name first; the message names the variables to set."""
    if kind == "link":
        (homeless.parent / "elsewhere").mkdir(mode=0o700)
        homeless.symlink_to(homeless.parent / "elsewhere")
    elif kind == "file":
        homeless.write_bytes(b"")
    else:
        homeless.mkdir(mode=0o700)
        homeless.chmod(0o777 if kind == "others may write" else 0o700)
    if kind == "of another user":
        other = os.geteuid() + 1
        homeless.rename(homeless.with_name(f"imagemill-{other}"))
        monkeypatch.setattr("os.geteuid", lambda: other)
    with pytest.raises(
        UsageError,
        match=(
            r"imagemill-\d+ is not a private folder of this user. Set XDG_CACHE_HOME or"
            r" IMAGEMILL_MODELS"
        ),
    ):
        bundle.default_models_dir()


def test_nothing_else_needs_a_home_directory(
    homeless: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A path with `~` is refused in one line; there is no `.netrc`; no temporary folder is one
    error too.
    """
    with pytest.raises(UsageError, match=r"~/models: cannot find the home directory. Set HOME"):
        userdirs.expand("~/models")
    http.netrc_passwords.cache_clear()
    assert http.netrc_passwords() == {}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(
        UsageError, match=r"no temporary folder can be used either \(No such file or directory\)"
    ):
        userdirs.cache()
