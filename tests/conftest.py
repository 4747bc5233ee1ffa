"""Fixtures that test modules share: models, folders of images, and one run over the photographs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from msgspec.structs import replace

import forked
import helpers
import sample_images
from hub_server import hub  # noqa: F401 - a fixture
from imagemill.models import bundle, get
from imagemill.records import Bundle, Scores, Settings
from imagemill.system import processes
from imagemill.system.openvino_library import load_openvino
from s3 import s3, s3_endpoint, s3_faults  # noqa: F401 - fixtures
from tiers import pytest_collection_modifyitems, pytest_runtest_protocol  # noqa: F401 - hooks
from tiny import HEADLESS_CARD, SIZE, TINY_CARD, WIDE_CARD, Finished, tiny_model

load_openvino()  # before a test imports it, or NNCF, which would send events over the network

settings.register_profile(
    "imagemill",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("imagemill")

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # so shells start what runs in the background, and children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _forked_children() -> Iterator[None]:
    """Command lines and the children of this process are forked, which saves their imports."""
    with contextlib.closing(forked.Server()) as server, forked_by(server):
        yield


@pytest.fixture(scope="session")
def _torch_server() -> Iterator[forked.Server]:
    installed = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    with contextlib.closing(forked.Server(*(forked.TORCH if installed else ()))) as server:
        yield server


@pytest.fixture(scope="module")
def torch_is_preloaded(_torch_server: forked.Server) -> Iterator[None]:
    """They have PyTorch and transformers too: importing these takes seconds."""
    with forked_by(_torch_server):
        yield


@contextlib.contextmanager
def forked_by(server: forked.Server) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        stands_in = SimpleNamespace(**vars(subprocess) | {"Popen": server.popen})
        patch.setattr(processes, "subprocess", stands_in)
        patch.setattr(forked, "SERVER", server)
        yield


PHOTOGRAPHS_VARIABLE = "IMAGEMILL_PHOTOGRAPHS"


@pytest.fixture(autouse=True)
def _children_can_be_forked() -> Iterator[None]:
    """No test leaves an environment behind in which real processes would be started instead."""
    before = forked.of_start(os.environ)
    yield
    assert forked.of_start(os.environ) == before
    assert "TEST_HOOKS" not in os.environ


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, models_dir: Path) -> None:
    """No test reads or fills the user's own models folder."""
    monkeypatch.setenv("IMAGEMILL_MODELS", str(models_dir))


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with `tiny`, a random classifier of ten classes, `tiny2`, the same with
    other weights, `wide`, whose images are twice as wide as high, `headless`, which has only an
    embedding, and `tags`, whose classes have a probability each.
    """
    folder = tmp_path_factory.mktemp("models")
    bundle.write(folder / "tiny", TINY_CARD, tiny_model())
    bundle.write(folder / "tiny2", replace(TINY_CARD, name="tiny2"), tiny_model(seed=1))
    bundle.write(folder / "spoilt", replace(TINY_CARD, name="spoilt"), tiny_model(spoil="white"))
    bundle.write(folder / "wide", WIDE_CARD, tiny_model(width=2 * SIZE))
    bundle.write(folder / "headless", HEADLESS_CARD, tiny_model(has_head=False))
    tags = replace(TINY_CARD, name="tags", scores=Scores.SIGMOID)
    bundle.write(folder / "tags", tags, tiny_model(seed=2))
    return folder


@pytest.fixture(scope="session")
def tiny(models_dir: Path) -> Bundle:
    return bundle.load(models_dir / "tiny")


@pytest.fixture(scope="session")
def lite0(models_dir: Path) -> Bundle:
    """EfficientNet-Lite0 with its trained weights, from the installed package."""
    return get.get("efficientnet_lite0", models_dir)


@pytest.fixture(scope="session")
def photographs() -> Path:
    """The folder of photographs that are not part of the project: `imagenet-sample/`,
    `coco-sample/` and `labels.csv`.
    """
    folder = os.environ.get(PHOTOGRAPHS_VARIABLE)
    if not folder:
        pytest.skip(f"{PHOTOGRAPHS_VARIABLE} does not name the folder of photographs")
    return Path(folder)


@pytest.fixture(scope="session")
def photographs_run(
    photographs: Path, lite0: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """`imagemill run PHOTOGRAPHS --output out --model efficientnet_lite0 --devices cpu:2
    --json`.
    """
    output = tmp_path_factory.mktemp("photographs") / "out"
    environment = helpers.environment(IMAGEMILL_MODELS=str(lite0.dir.parent))
    arguments = (
        "--output",
        output,
        "--model",
        "efficientnet_lite0",
        "--devices",
        "cpu:2",
        "--json",
    )
    return Finished(helpers.imagemill_cli("run", photographs, *arguments, env=environment), output)


@pytest.fixture(scope="session")
def some_jpegs() -> dict[str, bytes]:
    """Forty small JPEGs of different content, some in sub-folders, by name."""
    return {
        f"{'abc'[seed % 3]}/{seed:02d}.jpg": sample_images.jpeg(
            40 + seed, 50, seed=seed, quality=80
        )
        for seed in range(40)
    }


@pytest.fixture
def jpegs(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of `count` small JPEGs of different content."""

    def make(count: int = 12, name: str = "images", **files: bytes) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return helpers.fill(
            folder,
            {
                f"{seed:03d}.jpg": sample_images.jpeg(48, 40, seed=seed, quality=80)
                for seed in range(count)
            }
            | files,
        )

    return make


@pytest.fixture(scope="session")
def small_jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images, all different."""
    folder = tmp_path_factory.mktemp("small")
    return helpers.fill(
        folder,
        {
            f"{seed:03d}.jpg": sample_images.jpeg(40, 36, seed=seed, quality=80)
            for seed in range(48)
        },
    )


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Settings]:
    """Makes settings for `running.run`: the tiny model on the null device, into `tmp_path/out`."""

    def make(*sources: Path, **changes: Any) -> Settings:
        values: dict[str, Any] = {
            "output": str(tmp_path / "out"),
            "model": "tiny",
            "devices": "null",
            "batch_size": 4,
            "report": False,
        }
        return Settings(sources=tuple(map(str, sources)), **(values | changes))

    return make


@pytest.fixture
def imagemill() -> Callable[..., helpers.Result]:
    """Runs the command line; returns its exit code, outputs and JSON. It runs in this process,
    unless the environment holds what only the start of a process reads, or hooks.
    """

    def call(
        *arguments: object, env: Mapping[str, str] | None = None, **options: Any
    ) -> helpers.Result:
        as_here = env is None or forked.of_start(env) == forked.of_start(helpers.environment())
        if options.keys() <= {"cwd"} and as_here and "TEST_HOOKS" not in (env or {}):
            return helpers.imagemill_here(*arguments, env=env, **options)
        return helpers.imagemill_cli(*arguments, env=env or helpers.environment(), **options)

    return call


@pytest.fixture
def start(models_dir: Path) -> Iterator[Callable[..., Any]]:
    """Starts the command line; whatever still runs at the end of the test is killed."""
    started = []

    def call(*arguments: object, **options: Any) -> Any:
        options.setdefault("env", helpers.environment(IMAGEMILL_MODELS=str(models_dir)))
        started.append(helpers.start(*arguments, **options))
        return started[-1]

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a finished output, to be damaged."""

    def copy(output: Path) -> Path:
        goal = tmp_path / f"copy-of-{output.name}"
        shutil.copytree(output, goal)
        return goal

    return copy
