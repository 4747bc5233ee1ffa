"""The walk of Graphcore's `resnext_inference` README, from its first line to its last, on our side
(docs/from-graphcore.md).
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

import helpers
import pth_files
import sample_images
from faults.harness import Hold
from golden import recipe

pytestmark = pytest.mark.process

IMAGES = 30
"""Not a multiple of eight: the example would drop six."""
DEVICES = 8
GOLDEN = Path(__file__).parent / "golden"
OLD_FLAGS = """
    --batch_size=48 --num_ipus=8 --data_dir=datasets/ --data_sub_dir=datasets/0 --num_workers=4 --device_iterations=1500
    --batches_per_step=1500 --model_name=resnext101_32x4d --report_hw_cycle_count --model_path=models --log_path=logs --hide_output
    --nohide_output --half_partials --micro_batch_size=6
""".split()
"""What resnext_inference_launch.py and resnext101.py of the example take, in its earlier and later
versions, and we spell otherwise.
"""


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Home:
    """Where the test's checkpoint is served from."""

    url: str
    requests: list[str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A server on 127.0.0.1 with a legacy .pth file of resnext101_32x4d, its parameters named as
    Cadene's pretrainedmodels names them.
    """
    folder = tmp_path_factory.mktemp("home")
    shapes: dict[str, list[int]] = json.loads(
        (GOLDEN / "cadene_resnext101_32x4d.keys.json").read_text()
    )
    arrays = {name: recipe.tensor(name, tuple(shape)) for name, shape in shapes.items()}
    pth_files.write_legacy(folder / "resnext101_32x4d-00000000.pth", arrays)
    requests: list[str] = []

    class Handler(_Silent):
        def do_GET(self) -> None:
            requests.append(self.path)
            super().do_GET()

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Home(f"http://127.0.0.1:{server.server_port}/resnext101_32x4d-00000000.pth", requests)
        server.shutdown()
        thread.join()


def coco(folder: Path, count: int = IMAGES) -> Path:
    """Images named and sized like COCO's val2014."""
    files = {
        f"COCO_val2014_{42 + 31 * seed:012d}.jpg": sample_images.jpeg(
            *((640, 480) if seed % 3 else (480, 640)), seed=seed
        )
        for seed in range(count)
    }
    return helpers.fill(folder, files)


def test_the_example_from_first_line_to_last(
    home: Home, tmp_path: Path, start: Callable[..., Any]
) -> None:
    """partition → get-model → run on eight devices: every image has a row, eight logs, one
    aggregate; the download happens once.
    """
    hold = Hold(
        tmp_path,
        0,
        IMAGEMILL_MODELS=str(tmp_path / "models"),
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
    )

    def imagemill(*arguments: object) -> helpers.Result:
        return finished(start(*arguments, env=hold.environment, cwd=tmp_path))

    def finished(process: Any) -> helpers.Result:
        result = helpers.finish(process)
        assert result.code == 0, result.err
        return result

    # 2. Get the images
    source = coco(tmp_path / "val2014")

    # 3. Partition them
    imagemill("partition", "--data-dir", "val2014", "--partitions", DEVICES, "--output", "datasets")
    shares = [os.listdir(tmp_path / "datasets" / str(number)) for number in range(DEVICES)]
    assert sorted(map(len, shares)) == [3, 3, 4, 4, 4, 4, 4, 4]

    # 4. Get the model
    imagemill("get-model", "resnext101_32x4d", "--url", home.url, "--batch-size", 6)
    models = tmp_path / "models" / "resnext101_32x4d"
    frozen = onnx.load(models / "model_6.onnx").graph.input[0].type.tensor_type.shape.dim[0]
    assert frozen.dim_value == 6
    imagemill("get-model", "resnext101_32x4d", "--url", home.url, "--batch-size", 8)
    assert (models / "model_8.onnx").is_file()
    assert len(home.requests) == 1
    assert json.loads((models / "card.json").read_text())["origin"]["verified"] is False

    # 5. Run
    command = ("run", "datasets/", "--output", "out", "--devices", f"null:{DEVICES}")
    process = start(*command, "--batch-size", 6, env=hold.environment, cwd=tmp_path)
    helpers.until(lambda: len(helpers.worker_pids(tmp_path / "out")) == DEVICES, process=process)
    hold.release()
    ran = finished(process)
    rows = helpers.rows(tmp_path / "out")
    assert sorted(Path(row["path"]).name for row in rows) == sorted(os.listdir(source))
    assert {row["status"] for row in rows} == {"ok"}
    logs = sorted(
        path.name for path in (tmp_path / "out" / "logs").iterdir() if path.name != "launcher.log"
    )
    assert logs == [f"null#{number}.log" for number in range(DEVICES)]
    assert "sub-folders" not in ran.err
    reported = [
        re.search(
            r"done: (\d+) images in [\d.]+ s, [\d.]+ images/s",
            (tmp_path / "out" / "logs" / log).read_text(),
        )
        for log in logs
    ]
    assert all(reported)
    assert sum(int(match[1]) for match in reported if match) == IMAGES
    assert len(re.findall(r"[\d.]+ images/s over", ran.out)) == 1
    assert imagemill("verify", "out").out == f"complete and sound: {IMAGES} images, one row each\n"


def test_another_number_of_sub_folders_costs_no_row(
    tmp_path: Path, imagemill: Callable[..., helpers.Result]
) -> None:
    """Four partitions on three devices: every image still has its row."""
    coco(tmp_path / "val2014", 9)
    imagemill(
        "partition",
        "--data-dir",
        tmp_path / "val2014",
        "--partitions",
        4,
        "--output",
        tmp_path / "datasets",
    )
    ran = imagemill(
        "run",
        tmp_path / "datasets",
        "--output",
        tmp_path / "out",
        "--model",
        "tiny",
        "--devices",
        "null:3",
    )
    assert ran.code == 0
    assert len(helpers.rows(tmp_path / "out")) == 9


def test_the_example_crop_is_there_beside_the_published_one(
    tmp_path: Path, imagemill: Callable[..., helpers.Result]
) -> None:
    """`--preprocess center-crop` takes the centre without resizing: other pixels, so other answers,
    under another answer id.
    """
    coco(tmp_path / "val2014", 4)
    answers = []
    for name in ("card", "center-crop"):
        output = tmp_path / name
        arguments = (
            "run",
            tmp_path / "val2014",
            "--output",
            output,
            "--model",
            "tiny",
            "--devices",
            "null",
            "--preprocess",
            name,
        )
        assert imagemill(*arguments).code == 0
        answers.append([(row["class_id"], row["probability"]) for row in helpers.rows(output)])
    assert answers[0] != answers[1]


@pytest.mark.parametrize("flag", OLD_FLAGS)
def test_old_spellings_name_the_new_ones(
    flag: str, imagemill: Callable[..., helpers.Result]
) -> None:
    """Every flag of the example's launcher that has another name here ends with exit code 2 and
    one line that says how.
    """
    refused = imagemill("run", "datasets/", "--output", "out", flag)
    assert refused.code == 2
    line = refused.err.strip()
    assert "\n" not in line
    assert f"unknown option {flag.partition('=')[0]}; " in line


@pytest.mark.parametrize(
    "flag",
    [
        "--micro-batch-size=6",
        "--model-name=resnext101_32x4d",
        "--model-path=models",
        "--pretrained-model-path=x",
    ],
)
def test_old_spellings_of_get_model_name_the_new_ones(
    flag: str, imagemill: Callable[..., helpers.Result]
) -> None:
    """The same for get_model.py."""
    refused = imagemill("get-model", "resnext101_32x4d", flag)
    assert refused.code == 2
    assert f"unknown option {flag.partition('=')[0]}; " in refused.err
