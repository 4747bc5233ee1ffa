"""Repositories of the Hub, from a server on 127.0.0.1: fetched once, checked, and every trouble is
one clear line.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import helpers
from hub_server import TOKEN, Handler, Hub, Repo
from imagemill.errors import DownloadError, ModelError, UsageError
from imagemill.models import hub as hubs
from imagemill.models import hub_library
from imagemill.models.folders import json_file
from imagemill.system.retry import RetryPolicy

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")

CONFIG = b'{"model_type": "vit"}'
PROCESSOR = b'{"image_processor_type": "ViTImageProcessor"}'
ONNX = b"\x08\x08onnx" * 1000
WEIGHTS = b"safetensors" * 1000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither we nor the library pause between attempts."""
    monkeypatch.setattr(hub_library, "_RETRYING", RetryPolicy(attempts=3, pause_s=0.01))
    quick = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})
    for module in ("utils._http", "file_download"):
        library = importlib.import_module(f"huggingface_hub.{module}")
        monkeypatch.setattr(library, "time", quick, raising=False)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def vit(**changes: Any) -> Repo:
    files = {"config.json": CONFIG, "preprocessor_config.json": PROCESSOR}
    return Repo({**files, "onnx/model.onnx": ONNX, "model.safetensors": WEIGHTS}, **changes)


def fetch(models: Path, name: str = "hf:owner/vit", **options: Any) -> hubs.Snapshot:
    return hubs.snapshot(name, models, lambda _: None, **options)


def fill_cache(*names: str) -> None:
    """Download files as another program does."""
    import huggingface_hub

    for name in names:
        huggingface_hub.hf_hub_download(
            "owner/vit", name, tqdm_class=hub_library.make_bar(0, 0, None)
        )


def refused(models: Path, name: str = "hf:owner/vit", kind: type[Exception] = DownloadError) -> str:
    """The one line that an attempt to fetch ends with."""
    with pytest.raises(kind) as caught:
        fetch(models, name)
    line = str(caught.value)
    assert line.isprintable(), line
    assert TOKEN not in line
    return line


# ── fetched once ──────────────────────────────────────────────────────────────────────────────────


def test_what_is_needed_is_fetched_once_and_the_second_time_offline(hub: Hub, models: Path) -> None:
    """ONNX with its two configurations, and nothing else; then the server may be gone."""
    repo = hub.repos["owner/vit"] = vit(licence="cc-by-nc-4.0")
    repo.files["modeling_vit.py"] = b"raise SystemExit"
    lines: list[str] = []
    counts: list[tuple[int, int | None]] = []
    found = hubs.snapshot("hf:owner/vit", models, lines.append, lambda *count: counts.append(count))
    assert (found.repo, found.revision, found.commit) == ("owner/vit", "main", repo.commit)
    assert found.folder.name == repo.commit
    files = {
        path.relative_to(found.folder).as_posix(): path.read_bytes()
        for path in found.folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    assert files == {
        "config.json": CONFIG,
        "preprocessor_config.json": PROCESSOR,
        "onnx/model.onnx": ONNX,
    }
    total = sum(map(len, files.values()))
    assert counts[-1] == (total, total)
    assert lines[0] == (
        f"hf:owner/vit: commit {repo.commit[:12]} of main, licence cc-by-nc-4.0: not for commercial"
        " use"
    )
    assert lines[1].startswith("hf:owner/vit: downloading config.json, preprocessor_config.json,")
    assert not [line for line in hub.requests if ".py" in line or "safetensors" in line]
    hub.stop()
    count = len(hub.requests)
    assert fetch(models) == found
    assert len(hub.requests) == count


def test_its_origin_names_repository_commit_and_hash(hub: Hub, models: Path) -> None:
    """These go into the card."""
    repo = hub.repos["owner/vit"] = vit()
    assert fetch(models, "hf:owner/vit@v1.0").origin == {
        "source": "hub",
        "repository": "owner/vit",
        "revision": "v1.0",
        "commit": repo.commit,
        "file": "onnx/model.onnx",
        "sha256": hashlib.sha256(ONNX).hexdigest(),
        "verified": True,
    }
    assert fetch(models).name == f"hf:owner/vit@{repo.commit}"


def test_the_commit_of_the_first_time_stays_until_a_newer_one_is_asked_for(
    hub: Hub, models: Path
) -> None:
    """A branch that moves changes no model that is in use."""
    old = hub.repos["owner/vit"] = vit()
    fetch(models)
    new = hub.repos["owner/vit"] = vit(commit="5" * 40)
    assert fetch(models).commit == old.commit
    assert fetch(models, refresh=True).commit == new.commit
    assert fetch(models).commit == new.commit


def test_without_a_connection_a_refresh_goes_on_with_what_is_there(hub: Hub, models: Path) -> None:
    """And says so."""
    fetched = hub.repos["owner/vit"] = vit()
    fetch(models)
    hub.stop()
    lines: list[str] = []
    found = hubs.snapshot("hf:owner/vit", models, lines.append, refresh=True)
    assert found.commit == fetched.commit
    assert "cannot be downloaded from http://127.0.0.1" in lines[0]
    assert lines[0].endswith("Going on with the commit that is on disk.")


def test_a_cache_that_another_program_filled_serves_without_a_connection(
    hub: Hub, models: Path
) -> None:
    """As `hf download` on a machine with a connection does."""
    repo = hub.repos["owner/vit"] = vit()
    fill_cache(*hub.repos["owner/vit"].files)
    hub.stop()
    assert fetch(models).commit == repo.commit
    assert not list((models / ".hub" / "owner--vit").glob("*.json"))  # asks when it can


def test_files_of_the_cache_are_not_fetched_again(hub: Hub, models: Path) -> None:
    """The Hub is asked for the commit alone."""
    hub.repos["owner/vit"] = vit()
    fill_cache(*hub.repos["owner/vit"].files)
    hub.requests.clear()
    fetch(models)
    assert hub.requests == ["GET /api/models/owner/vit/revision/main"]


def test_a_folder_of_the_cache_is_the_repository(hub: Hub, models: Path) -> None:
    """As `huggingface_hub.snapshot_download` returns it: full of links."""
    repo = hub.repos["owner/vit"] = vit()
    repo.files["README.md"] = b"---\ntags:\n- timm\nlicense: mit\n---\n# vit\n"
    fill_cache(*repo.files)
    hub.stop()
    folder = hub.home / "hub" / "models--owner--vit" / "snapshots" / repo.commit
    lines: list[str] = []
    found = hubs.cached_snapshot(folder, models, lines.append)
    assert found is not None
    assert (found.repo, found.commit, found.licence) == ("owner/vit", repo.commit, "mit")
    assert (found.folder / "onnx" / "model.onnx").read_bytes() == ONNX
    assert not (found.folder / "onnx" / "model.onnx").is_symlink()
    assert lines == [f"hf:owner/vit: commit {repo.commit[:12]}, licence mit"]
    assert hubs.cached_snapshot(models, models, lines.append) is None
    assert hubs.cached_snapshot(folder / "onnx", models, lines.append) is None


def test_a_half_filled_cache_is_no_model(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, where another program fetched the configuration alone."""
    import huggingface_hub

    hub.repos["owner/vit"] = vit()
    fill_cache("config.json")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "is not in the cache, and HF_HUB_OFFLINE is set" in refused(models)


def test_a_model_in_several_files_is_complete(hub: Hub, models: Path) -> None:
    """Weights beside an ONNX file, under the names that exporters give them, as regular files."""
    extra = {"onnx/model.onnx_data": b"d" * 2000, "onnx/model.onnx_data_1": b"e" * 1000}
    repo = hub.repos["owner/vit"] = vit()
    repo.files |= extra | {"onnx/other.onnx_data": b"f"}
    folder = fetch(models).folder / "onnx"
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    assert names == {"model.onnx", "model.onnx_data", "model.onnx_data_1"}


def test_a_truncated_download_resumes(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest alone is asked for again."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.repos["owner/vit"] = vit()
    hub.cuts = [2000, 1000]
    fetch(models)
    ranges = [headers.get("Range") for headers in hub.headers if "localhost" in headers["Host"]]
    assert len(ranges) == 3
    assert ranges == [None, "bytes=2000-", "bytes=3000-"]


def test_progress_counts_the_bytes_of_files_not_those_on_the_network() -> None:
    """The Hub's other protocol (Xet) reports both, and asks bars for what tqdm has."""
    counts: list[tuple[int, int | None]] = []
    bar = hub_library.make_bar(10, 200, lambda *count: counts.append(count))(total=100, unit="B")
    bar.update(30)
    bar.update_transfer(20)
    bar.set_postfix_str(bar.format_dict.get("rate"), refresh=False)
    bar.update(70)
    assert counts == [(40, 200), (110, 200)]


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_download_and_leaves_no_partial_file(
    hub: Hub, models: Path, number: signal.Signals
) -> None:
    """The server is silent, and the library would wait for it for an hour."""
    hub.repos["owner/vit"] = vit()
    hub.stalls = True
    program = (
        "import signal, sys, pathlib; from imagemill.models import hub;"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        f"hub.snapshot('hf:owner/vit', pathlib.Path({str(models)!r}), print)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        env=helpers.environment(HF_HUB_DOWNLOAD_TIMEOUT="3600"),
        stderr=subprocess.PIPE,
    )
    helpers.until(lambda: any(" /cdn/" in line for line in hub.requests))
    helpers.until(lambda: list(hub.home.rglob("*.incomplete")))
    child.send_signal(number)
    child.communicate(timeout=300)
    assert child.returncode in (143, -signal.SIGINT)
    assert not list(hub.home.rglob("*.incomplete"))


def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the host that large files are redirected to, and into no file."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repos["owner/vit"] = vit(private=True)
    lines: list[str] = []
    hubs.snapshot("hf:owner/vit", models, lines.append)
    for headers in hub.headers:
        sent = headers.get("authorization", headers.get("Authorization"))
        assert sent == (None if "localhost" in headers["Host"] else f"Bearer {TOKEN}")
    assert TOKEN not in "".join(lines)
    for folder in (models, hub.home):
        for path in folder.rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_a_login_serves_as_the_token(hub: Hub, models: Path) -> None:
    """That of `hf auth login`, which keeps it in a file of its own."""
    hub.home.mkdir()
    (hub.home / "token").write_text(TOKEN)
    hub.repos["owner/vit"] = vit(private=True)
    assert fetch(models).repo == "owner/vit"


def test_nothing_is_sent_about_the_user(hub: Hub, models: Path) -> None:
    """Telemetry is off: neither its own requests, nor what is installed."""
    hub.repos["owner/vit"] = vit()
    fetch(models)
    assert all("/owner/vit/" in line or "/cdn/" in line for line in hub.requests)
    for headers in hub.headers:
        agent = headers.get("user-agent", headers.get("User-Agent", ""))
        assert {part.partition("/")[0].strip() for part in agent.split(";")} <= {
            "imagemill",
            "hf_hub",
            "python",
        }


# ── every trouble is one line ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_says_what_to_do(hub: Hub, models: Path, status: int) -> None:
    hub.repos["owner/vit"] = vit(gated=status)
    line = refused(models)
    assert line == (
        "hf:owner/vit is gated: its owner wants you to accept conditions. Accept them at"
        f" {hub.url}/owner/vit, then log in with `hf auth login`, or set HF_TOKEN."
    )


def test_a_missing_or_private_repository(hub: Hub, models: Path) -> None:
    """The Hub does not tell one from the other."""
    hub.repos["owner/vit"] = vit(private=True)
    for name in ("hf:owner/vit", "hf:owner/none"):
        line = refused(models, name)
        assert f"{name} does not exist or is private (401). Check the name at" in line


def test_a_wrong_token_is_not_shown(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongWrongWrong")
    hub.repos["owner/vit"] = vit(private=True)
    assert "hf_wrong" not in refused(models)


def test_a_missing_revision(hub: Hub, models: Path) -> None:
    hub.repos["owner/vit"] = vit()
    line = refused(models, "hf:owner/vit@v2.0")
    assert line == (
        f"hf:owner/vit has no revision v2.0. {hub.url}/owner/vit lists its branches and tags."
    )


@pytest.mark.parametrize("name", ["onnx/model.onnx", "config.json"])
def test_a_damaged_file_is_removed_and_fetched_again(hub: Hub, models: Path, name: str) -> None:
    """Kept by the Hub with a sha256, or in Git with Git's hash."""
    hub.repos["owner/vit"] = vit()
    hub.damage.add(name)
    line = refused(models)
    assert line.startswith(f"hf:owner/vit: {name} is damaged: it has the hash ")
    assert line.endswith("It was removed from the cache. Run the command again to download it.")
    hub.damage.clear()
    folder = fetch(models).folder
    assert (folder / name).read_bytes() == hub.repos["owner/vit"].files[name]


def test_a_cached_file_that_was_cut_is_found(hub: Hub, models: Path) -> None:
    """By its size, before anything reads it."""
    hub.repos["owner/vit"] = vit()
    fill_cache(*hub.repos["owner/vit"].files)
    (blob,) = (path for path in hub.home.rglob(hashlib.sha256(ONNX).hexdigest()) if path.is_file())
    blob.write_bytes(ONNX[:-5])
    assert "is damaged: it has 5,995 bytes instead of 6,000" in refused(models)
    assert (fetch(models).folder / "onnx" / "model.onnx").read_bytes() == ONNX


def test_a_hub_that_cannot_be_reached(hub: Hub, models: Path) -> None:
    hub.stop()
    line = refused(models)
    assert line.startswith(f"hf:owner/vit cannot be downloaded from {hub.url}: ")
    assert line.endswith("Check the connection; HF_ENDPOINT names a mirror.")


def test_offline_mode_without_the_files(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = refused(models)
    assert "HF_HUB_OFFLINE is set. Unset it, or fill the cache" in line
    assert hub.requests == []


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "http://127.0.0.1:1/x", "ftp://localhost/x", "//[", "\x7f"]
)
def test_a_hostile_redirect_is_refused(hub: Hub, models: Path, target: str) -> None:
    """To a file, to nobody, to another protocol, to no address at all."""
    hub.repos["owner/vit"] = vit()
    hub.locations["onnx/model.onnx"] = target
    line = refused(models)
    assert line.startswith("hf:owner/vit cannot be downloaded")
    assert not list(models.rglob("model.onnx"))


@pytest.mark.parametrize("name", ["../../evil.onnx", "/tmp/evil.onnx", "onnx/../../evil.onnx"])
def test_a_hostile_file_name_is_not_used(hub: Hub, models: Path, name: str) -> None:
    hub.repos["owner/vit"] = Repo({"config.json": CONFIG, name: ONNX})
    assert "has no model.onnx, model.safetensors or pytorch_model.bin" in refused(
        models, kind=ModelError
    )
    assert hub.requests == ["GET /api/models/owner/vit/revision/main"]


def test_a_hostile_commit_is_refused(hub: Hub, models: Path) -> None:
    hub.repos["owner/vit"] = vit(commit="../../../evil")
    assert "it names the commit '../../../evil'" in refused(models)


def test_a_huge_configuration_is_not_fetched(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is known before."""
    monkeypatch.setattr(json_file, "MAX_BYTES", 40)
    hub.repos["owner/vit"] = vit()
    line = refused(models, kind=ModelError)
    assert "preprocessor_config.json has 45 bytes, at most 40 are read" in line
    assert hub.requests == ["GET /api/models/owner/vit/revision/main"]


def test_an_answer_that_is_no_listing(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is no Hub, such as the login page of a network."""
    monkeypatch.setattr(Handler, "_listing", lambda *_: ["<html>"])
    hub.repos["owner/vit"] = vit()
    assert refused(models).startswith("hf:owner/vit cannot be downloaded from http://127.0.0.1")


def test_a_server_error_is_tried_again(hub: Hub, models: Path) -> None:
    """Three times in all."""
    hub.repos["owner/vit"] = vit()
    left = [503, 503]
    listing = Handler._listing

    def busy(handler: Handler, *arguments: Any) -> Any:
        if left:
            handler.hub.repos["owner/vit"].gated = None
            handler._send(left.pop(), b"")
            raise ConnectionAbortedError
        return listing(handler, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "_listing", busy)
        assert fetch(models).repo == "owner/vit"
    assert not left


def test_a_read_only_models_folder(hub: Hub, models: Path) -> None:
    models.write_text("a file, so that nothing can be written below it")
    hub.repos["owner/vit"] = vit()
    assert "cannot be written" in refused(models, kind=ModelError)


def test_its_own_code_is_neither_fetched_nor_run(hub: Hub, models: Path) -> None:
    """One line says so, whatever becomes of the model."""
    repo = hub.repos["owner/vit"] = vit()
    repo.files["config.json"] = json.dumps({"auto_map": {"AutoModel": "modeling.Net"}}).encode()
    repo.files["modeling.py"] = b"raise SystemExit"
    lines: list[str] = []
    hubs.snapshot("hf:owner/vit", models, lines.append)
    assert lines[-1] == (
        "hf:owner/vit: its own Python code (auto_map in config.json) is not downloaded and not run"
    )
    assert not [line for line in hub.requests if ".py" in line]


def test_the_package_that_is_needed_is_named(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = refused(models, kind=UsageError)
    assert line.endswith("Type: pip install 'imagemill[hub]'")
    assert "HF_HUB_DISABLE_TELEMETRY" not in os.environ


# ── names and files ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:name", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:a/b@", "hf:a/b@x y", "hf:a/b@../../x",
     "hf:a/b\n", "hf:a/b@c@d", "hf:/b", "hf:a--b/c", f"hf:a/{'b' * 100}", "hf:datasets/a/b"],
)  # fmt: skip
def test_what_names_no_repository_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="does not name a repository") as caught:
        hubs.parse_name(name)
    assert str(caught.value).isprintable()


def test_a_revision_may_be_a_branch_tag_pull_request_or_commit() -> None:
    assert hubs.parse_name("hf:a/b") == ("a/b", "main")
    assert hubs.parse_name("hf:timm/x.y_z@refs/pr/1") == ("timm/x.y_z", "refs/pr/1")
    assert hubs.parse_name(f"hf:a/b@{'0' * 40}") == ("a/b", "0" * 40)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("config.json onnx/model.onnx model.onnx", "config.json onnx/model.onnx"),
        ("model.onnx pytorch_model.bin", "model.onnx"),
        (
            "preprocessor_config.json model.onnx model.safetensors",
            "preprocessor_config.json model.onnx",
        ),
        ("config.json model.onnx model.safetensors", "config.json model.safetensors"),
        ("onnx/model.onnx onnx/vision_model.onnx onnx/text_model.onnx", "onnx/vision_model.onnx"),
        ("onnx/model_quantized.onnx model.safetensors", "model.safetensors"),
        (
            "processor_config.json model.safetensors onnx/model.onnx",
            "processor_config.json onnx/model.onnx",
        ),
        ("resnet18.onnx resnet18.onnx.data", "resnet18.onnx.data resnet18.onnx"),
        ("pytorch_model.bin tf_model.h5 flax_model.msgpack", "pytorch_model.bin"),
        (
            "model-00002-of-00002.safetensors model-00001-of-00002.safetensors"
            " model.safetensors.index.json",
            "model.safetensors.index.json model-00001-of-00002.safetensors"
            " model-00002-of-00002.safetensors",
        ),
    ],
)  # fmt: skip
def test_the_best_weights_are_chosen(names: str, chosen: str) -> None:
    """ONNX, then safetensors, then pickles."""
    listed = dict.fromkeys(names.split(), hubs.HubFile(1))
    assert hubs.classifier_files("a/b", listed) == chosen.split()


def test_a_repository_without_usable_weights_lists_what_it_has() -> None:
    listed = dict.fromkeys(["tf_model.h5", "evil\x1b[2J"], hubs.HubFile(1))
    with pytest.raises(ModelError, match=r"hf:a/b has no model\.onnx.* It holds: ") as caught:
        hubs.classifier_files("a/b", listed)
    assert str(caught.value).isprintable()
    several = dict.fromkeys(["a.onnx", "b.onnx"], hubs.HubFile(1))
    with pytest.raises(ModelError, match=r"none is called model\.onnx: a\.onnx, b\.onnx"):
        hubs.classifier_files("a/b", several)


def test_a_file_that_is_read_does_not_vanish_while_it_is_linked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes may use a repository for the first time at once, also where its cache is on
    another file system.
    """
    (tmp_path / "source").write_bytes(b"weights")
    target = tmp_path / "model.onnx"
    target.write_bytes(b"weights")

    def elsewhere(*_: object) -> None:
        assert target.exists()
        raise OSError

    hubs._link(tmp_path / "source", target)
    assert target.samefile(tmp_path / "source")
    monkeypatch.setattr(os, "link", elsewhere)
    hubs._link(tmp_path / "source", target)
    assert not target.samefile(tmp_path / "source")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "source"]
