"""Child processes: how they are started, and what they never execute."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import helpers
from imagemill.errors import ImagemillError, UsageError
from imagemill.system import processes

pytestmark = pytest.mark.process

TRAP = """
import os
with open(os.environ["SPRUNG"], "a") as file:
    file.write(__file__ + chr(10))
raise SystemExit("sprung: " + __file__)
"""
OTHERS = """PIL indexed_gzip jinja2 ml_dtypes nncf numpy obstore onnx onnxruntime openvino openvino_telemetry pandas psutil pyarrow rich safetensors
    simplejpeg torch urllib3 yaml""".split()
STARTERS = set(
    "Popen run call check_call check_output system popen fork posix_spawn Process Pool"
    " ProcessPoolExecutor".split()
)
"""Functions of these modules that start a process."""
MODULES = ("subprocess", "os", "multiprocessing", "futures", "concurrent.futures")


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    """A working directory with a file for every module that may be imported; each leaves a mark if
    it is executed.
    """
    return helpers.fill(
        tmp_path / "here",
        {f"{name}.py": TRAP.encode() for name in (*sys.stdlib_module_names, *OTHERS)},
    )


def test_no_command_executes_a_module_of_the_working_directory(
    trapped: Path, tmp_path: Path, jpegs: Callable[..., Path], models_dir: Path
) -> None:
    """`demo`, which is a `run`, `bench` and `quantize` work in a folder of files named like
    modules, and no process executes one.
    """
    models = tmp_path / "models"  # of its own, because `quantize` adds to a model
    shutil.copytree(models_dir / "tiny", models / "tiny")
    environment = helpers.environment(SPRUNG=str(tmp_path / "sprung"), IMAGEMILL_MODELS=str(models))
    script = (
        helpers.fill(
            tmp_path / "bin",
            {"imagemill": b"import sys; from imagemill.cli import main; sys.exit(main())"},
        )
        / "imagemill"
    )
    for command in (
        ("demo", "--output", tmp_path / "demo"),
        (
            "bench",
            "--synthetic",
            "--model",
            "tiny",
            "--devices",
            "cpu:1",
            "--iterations",
            1,
            "--batches-per-step",
            1,
            "--batch-size",
            2,
        ),
        ("quantize", "tiny", "--images", jpegs(8), "--calibration", 4, "--held-out", 4),
    ):
        process = subprocess.run(
            [sys.executable, script, *map(str, command)],
            env=environment,
            cwd=trapped,
            capture_output=True,
            check=False,
        )
        assert process.returncode == 0, (command, process.stderr)
    assert not (tmp_path / "sprung").exists(), (tmp_path / "sprung").read_text()


def test_python_m_imagemill_executes_none_either(tmp_path: Path) -> None:
    """`python -m` searches the working directory until our first line runs; later imports are not
    taken from it.
    """
    here = helpers.fill(
        tmp_path / "here",
        {
            f"{name}.py": TRAP.encode()
            for name in ("typing", "argparse", "json", "ctypes", "tempfile", *OTHERS)
        },
    )
    env = helpers.environment(SPRUNG=str(tmp_path / "sprung"))
    result = helpers.imagemill_cli("devices", env=env, cwd=here, before=helpers.FRESH)
    assert (result.code, (tmp_path / "sprung").exists()) == (0, False), result.err


@pytest.mark.parametrize(
    "module",
    [
        "workers.worker",
        "bench.worker",
        "tuning.check_process",
        "pipeline.decoding.isolated",
    ],
)
def test_no_child_executes_a_module_of_the_working_directory(
    module: str, trapped: Path, tmp_path: Path
) -> None:
    """Each kind of child process imports everything it is made of without looking into the working
    directory.
    """
    environment = processes.environment() | {"SPRUNG": str(tmp_path / "sprung")}
    done = subprocess.run(
        processes.command(f"imagemill.{module}", "x", "x", "x"),
        cwd=trapped,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert b"invalid literal for int()" in done.stderr  # it came as far as reading its arguments
    assert not (tmp_path / "sprung").exists(), (tmp_path / "sprung").read_text()


def test_a_module_of_the_working_directory_would_be_noticed(trapped: Path, tmp_path: Path) -> None:
    """The tests above can fail: a process that is started without `-P` executes the first such file
    that it imports.
    """
    environment = processes.environment() | {"SPRUNG": str(tmp_path / "sprung")}
    subprocess.run(
        [sys.executable, "-c", "import imagemill.workers.worker"],
        cwd=trapped,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert str(trapped) in (tmp_path / "sprung").read_text()


def test_the_user_s_pythonpath_reaches_every_child(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Folders that PYTHONPATH names are searched; an empty entry, which would mean the working
    directory, is not.
    """
    helpers.fill(
        tmp_path,
        {"wanted/wanted.py": b"def main(): return 7\n", "here/json.py": b"raise SystemExit(8)\n"},
    )
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path / 'wanted'}:")
    assert (
        subprocess.run(
            processes.command("wanted"),
            cwd=tmp_path / "here",
            env=processes.environment(),
            check=False,
        ).returncode
        == 7
    )


def test_children_find_the_package_and_nothing_inside_it() -> None:
    """A child's first PYTHONPATH entry is the folder of the package, not the package itself, whose
    `records.py` or `job` would then be top-level modules.
    """
    first = processes.environment()["PYTHONPATH"].split(os.pathsep)[0]
    assert Path(first) == helpers.SOURCE_ROOT


KID = b"""
import os, sys, time
from imagemill.errors import DeviceLostError, UsageError
from imagemill.system import processes

def work(connection):
    order = connection.recv()
    print("order:", order, file=sys.stderr, flush=True)
    exec(order)
    connection.send("done")

def main():
    return processes.run_child(work)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[processes.Child]:
    """A child that executes the order it is sent, and then answers."""
    helpers.fill(tmp_path, {"modules/kid.py": KID})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    with contextlib.closing(processes.Child("kid")) as child:
        yield child


def test_a_child_answers(child: processes.Child) -> None:
    child.send("pass")
    assert child.receive(60) == "done"


@pytest.mark.parametrize(
    ("order", "kind", "text"),
    [
        ("raise UsageError('wrong')", UsageError, "wrong"),
        ("raise ValueError('odd')", ImagemillError, "unexpected ValueError: odd"),
    ],
)
def test_an_error_of_a_child_is_raised_in_its_parent(
    child: processes.Child, order: str, kind: type[ImagemillError], text: str
) -> None:
    """With its class if it is one of ours; any other as an unexpected error, not as a traceback."""
    child.send(order)
    with pytest.raises(ImagemillError) as raised:
        child.receive(60)
    assert (type(raised.value), str(raised.value)) == (kind, text)


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("os._exit(3)", "ended with exit code 3"),
        ("raise MemoryError", "ended with exit code 1"),
        ("raise DeviceLostError('gone')", "ended with exit code 1"),
    ],
)
def test_the_death_of_a_child_says_how_with_the_end_of_its_log(
    child: processes.Child, order: str, reason: str
) -> None:
    """A lack of memory and a lost device are deaths, after which another child may succeed."""
    child.send(order)
    with pytest.raises(processes.ChildError) as raised:
        child.receive(60)
    assert str(raised.value) == reason
    assert f"order: {order}" in raised.value.log_tail


def test_a_silent_child_is_noticed_and_closed(child: processes.Child) -> None:
    """`receive` gives up, and `close` ends a child that does not answer."""
    child.send("time.sleep(600)")
    with pytest.raises(processes.ChildError, match=r"^sent no message for 0\.2 s$"):
        child.receive(0.2)
    child.close()
    assert not helpers.running(child.pid)


def test_every_process_is_started_by_child_command() -> None:
    """Only `processes.Child` starts child processes; PopART alone has another Python."""
    package = helpers.SOURCE_ROOT / "imagemill"
    found = []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            is_start = (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in STARTERS
            )
            if is_start and ast.unparse(node.func.value) in MODULES:
                found.append(
                    (str(file.relative_to(package)), ast.unparse(node.args[0]).partition("(")[0])
                )
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                assert not STARTERS & {alias.name for alias in node.names}, file
    assert set(found) <= {
        ("system/processes.py", "command"),
        ("runner/preflight.py", "processes.command"),
        ("pipeline/backends/popart/session.py", "command"),
    }
    assert ("system/processes.py", "command") in found
