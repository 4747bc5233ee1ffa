"""`benchmarks/gpu`: the script that proves the GPU path on a card, rehearsed on the CPU.

What it shows on a card, only a card shows. Here: that every stage runs to its end, that no failure
is silent, and that the table says what it should.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import helpers
from faults import harness

SCRIPTS = helpers.PROJECT / "benchmarks" / "gpu"
OURS = (*(file.stem for file in SCRIPTS.glob("*.py")), "make_images")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import one of the script's modules; later tests do not find them."""
    for folder in (helpers.PROJECT / "tests" / "faults", SCRIPTS.parent / "peers", SCRIPTS):
        monkeypatch.syspath_prepend(str(folder))
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name: str) -> ModuleType:
        return __import__(name)

    yield load
    for name in OURS:
        sys.modules.pop(name, None)


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=helpers.environment(), check=False
    )


@pytest.mark.ecosystem
@pytest.mark.timeout(900)
@pytest.mark.large
def test_every_stage_runs_on_the_cpu(tmp_path: Path, script: Any) -> None:
    """Nothing of what a card is lent for fails for a misspelt name. The time limit is no part of
    the test: `--deadline 60` is for machines on which nothing else runs.
    """
    pytest.importorskip("torch", reason="needs torch")
    out = tmp_path / "out"
    options = ("--device", "cpu", "--tiny", "--work", tmp_path / "work", "--out", out)
    done = start(SCRIPTS / "device.py", *options, "--deadline", 800)
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, (done.stdout, done.stderr, log)
    results = json.loads((out / "results.json").read_text())
    device = script("device")
    assert set(results["stages"]) == {plan.name for plan in device.STAGES}
    assert {found["status"] for found in results["stages"].values()} == {"ok"}
    made = {path.name for path in out.iterdir()}
    files = "results.json log.txt layers.csv kernels.csv agreement.parquet trace.json.gz"
    assert made == set(files.split())
    assert not list((tmp_path / "work").iterdir()), "nothing is left behind"
    verdicts = {line["target"]: line["verdict"] for line in results["targets"]}
    for name in ("T13a", "T13b", "T15a", "T15b", "T15c"):  # they do not depend on speed
        assert verdicts[name] == "ok", results["targets"]
    peers = {"T1", "T2", "T3", "T11"}  # which need timm
    unknown = {name for name, verdict in verdicts.items() if verdict == "not run"} - peers
    assert unknown == {"T16"}, "only a card can be without memory"
    for line in results["targets"]:
        assert line["what"] in done.stdout
    page = script("report").report(results)
    assert all(line["what"] in page for line in results["targets"])
    assert "| bf16, 4 |" in page
    assert "the figures mean nothing" in page


FAKE = """
import sys, time, types
sys.path.insert(0, {scripts!r})
import device
fake = types.ModuleType("fake")
def works(stage):
    stage.put(value=stage.figure("S0", "value") or 41)
def fails(stage):
    stage.put(half=True)
    stage.attempt("the first part", lambda: 1 / 0)
    raise RuntimeError("on request")
def hangs(stage):
    while True:
        time.sleep(1)
def dies(stage):
    import os
    os._exit(3)
fake.works, fake.fails, fake.hangs, fake.dies = works, fails, hangs, dies
sys.modules["fake"] = fake
device._LIBRARIES = ()
device._LEAST = float("-inf")
device.STAGES = tuple(device.Plan(f"S{{n}}", f"fake.{{f}}", 9) for n, f in enumerate({stages!r}))
sys.exit(device.main())
"""


def run_fake(folder: Path, *stages: str, deadline: float = 500) -> tuple[int, str, Any]:
    """Run the script with stages of its own."""
    program = FAKE.format(scripts=str(SCRIPTS), stages=stages)
    options = ("--device", "cpu", "--tiny", "--work", folder / "work", "--out", folder / "out")
    done = start("-c", program, *options, "--deadline", deadline)
    assert (folder / "out" / "results.json").exists(), done.stderr
    results = json.loads((folder / "out" / "results.json").read_text())
    return done.returncode, done.stdout, results["stages"]


@pytest.mark.process
def test_a_stage_that_fails_is_named_with_its_traceback_and_the_others_run(tmp_path: Path) -> None:
    """In the log, in the results and on the screen, for every part of it; the exit code is 1."""
    code, text, stages = run_fake(tmp_path, "works", "fails", "dies", "works")
    assert code == 1
    assert [found["status"] for found in stages.values()] == ["ok", "FAILED", "FAILED", "ok"]
    first, second = stages["S1"]["errors"]
    log = (tmp_path / "out" / "log.txt").read_text()
    for place in (first, log, text):
        assert "ZeroDivisionError" in place
        assert "the first part: Traceback" in place
    for place in (second, log, text):
        assert "RuntimeError: on request" in place
        assert "in fails" in place
    assert stages["S1"]["figures"] == {"half": True}, "figures before the failure are kept"
    assert "exit code 3" in stages["S2"]["errors"][0]
    assert stages["S3"]["figures"] == {"value": 41}, "a stage finds the figures of earlier ones"


@pytest.mark.process
def test_a_stage_that_hangs_is_stopped_at_its_limit(tmp_path: Path) -> None:
    """It is no failure of the script, but no success either."""
    code, text, stages = run_fake(tmp_path, "hangs", deadline=3)
    assert code == 0
    assert stages["S0"]["status"].startswith("stopped at its limit")
    assert "stopped at its limit" in text


@pytest.mark.process
def test_without_the_device_nothing_else_is_tried(tmp_path: Path) -> None:
    """A machine without a card gets one error, not twelve."""
    code, _, stages = run_fake(tmp_path, "fails", "works")
    assert code == 1
    assert set(stages) == {"S0"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cpu"), "--device cpu needs --tiny"),
        (("--only", "S6,S99"), "--only S99: the stages are S0, "),
        ((), "--images is needed"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    """Before anything runs."""
    program = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import device; device.main()"
    done = start("-c", program, "--work", tmp_path, "--out", tmp_path, *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_targets_are_judged(script: Any) -> None:
    """At least, at most, not measured, not built."""
    targets = script("targets")
    figures = {"S6": {"to_timm_amp": 1.5, "to_compile": 0.99}, "S10": {"first_part_s": 8.01}}
    verdicts = {line["target"]: line["verdict"] for line in targets.table(figures)}
    assert verdicts["T1"] == "ok", "the goal itself is enough"
    assert verdicts["T2"] == verdicts["T12"] == "MISSED"
    assert verdicts["T3"] == "not run"
    assert verdicts["T8"] == verdicts["T9"] == verdicts["T10"] == "not built"
    zero = targets.table({"S11": {"different_parts": 0, "different_rows": 1}})
    verdicts = {line["target"]: line["verdict"] for line in zero}
    assert (verdicts["T15b"], verdicts["T15c"]) == ("ok", "MISSED")
    assert len(targets.format_table(zero).splitlines()) == len(targets.TARGETS)


@pytest.mark.process
def test_the_limit_counts_every_number_once(script: Any, tmp_path: Path) -> None:
    """Bytes and operations of the rehearsal's network, counted by hand for one image in fp16."""
    pytest.importorskip("torch", reason="needs torch")
    script("rehearsal").write_model(tmp_path)
    limits = script("limits")
    from imagemill.models import bundle
    from imagemill.records import Precision, SessionSpec

    found = bundle.load(tmp_path / "tiny")
    spec = SessionSpec(str(found.dir / bundle.MODEL), found.card, Precision.FP16, 1)
    rows = list(limits.layers(limits.program_of(spec), itemsize=2))
    convolutions = [row for row in rows if row.step.kind == "Conv"]
    plane = 16 * 16 * 16  # channels, height, width behind the stem
    weights = [3 * 9 * 16 + 16, 16 * 16 + 16, 4 * 9 * 16 + 16, 16 * 16 + 16]
    moved = [
        4 * 3 * 32 * 32 + 2 * (weights[0] + plane),  # the stem reads what was normalised in fp32
        2 * (2 * plane + weights[1]),
        2 * (2 * plane + weights[2]),
        2 * (3 * plane + weights[3]),  # and the other side of the sum
    ]
    assert [row.bytes for row in convolutions] == moved
    assert [row.flops for row in convolutions] == [2 * plane * n for n in (27, 16, 36, 16)]
    (gemm,) = (row for row in rows if row.step.kind == "Gemm")
    assert gemm.flops == 2 * 16 * 10


def test_merged_groups_compute_the_same(script: Any) -> None:
    """Zeros between groups change no product."""
    torch = pytest.importorskip("torch", reason="needs torch")
    convolutions = script("convolutions")
    x, weight = torch.randn(2, 16, 5, 5), torch.randn(32, 2, 3, 3)
    expected = torch.conv2d(x, weight, padding=1, groups=8)
    for width in (4, 8, 16):
        merged = convolutions._merge(weight, 8, width)
        assert merged.shape == (32, width, 3, 3)
        found = torch.conv2d(x, merged, padding=1, groups=16 // width)
        torch.testing.assert_close(found, expected)


def test_the_pack_never_exceeds_its_limit(script: Any, tmp_path: Path) -> None:
    """imagemill's own wheel first, then small ones, and what does not fit is returned."""
    pack = script("pack")
    sizes = {
        "imagemill-1-py3.whl": 50,
        "pytest-1-py3.whl": 5,
        "pyarrow-1-py3.whl": 90,
        "msgspec-1-py3.whl": 10,
    }
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    wheels = sorted(tmp_path.iterdir(), key=pack.order)
    assert [one.name.split("-")[0] for one in wheels] == [
        "imagemill",
        "msgspec",
        "pyarrow",
        "pytest",
    ]
    taken, left = pack.choose(wheels, 70)
    assert [one.name.split("-")[0] for one in taken] == ["imagemill", "msgspec", "pytest"]
    assert [one.name.split("-")[0] for one in left] == ["pyarrow"]


def test_the_pack_wants_what_the_base_install_needs(script: Any) -> None:
    """Except OpenVINO and NNCF, which jobs on a GPU do not import."""
    pack = script("pack")
    wanted = pack.wanted()
    assert {"simplejpeg", "indexed-gzip", "msgspec", "pyarrow", "pytest"} <= set(wanted)
    assert not {"openvino", "nncf", "torch"} & set(wanted)
    assert pack.canonical("indexed_gzip>=1.10") == "indexed-gzip"
    assert wanted["pillow"].startswith("pillow>=")


def test_the_faults_are_programs(script: Any) -> None:
    """The one for a card is run only there."""
    pytest.importorskip("torch", reason="needs torch")
    jobs = script("jobs")
    for place in jobs._PLACES.values():
        compile(jobs._LOST.format(number=1, marker="m", **place), "sitecustomize.py", "exec")


@pytest.mark.process
def test_jobs_on_torch_import_neither_openvino_nor_nncf(
    jpegs: Callable[..., Path], models_dir: Path, tmp_path: Path
) -> None:
    """So the pack can leave out the largest wheels of the base install."""
    pytest.importorskip("torch", reason="needs torch")
    blocked = "sys.modules['openvino'] = sys.modules['nncf'] = None"
    hooks = harness.hooks(tmp_path / "hooks", blocked, IMAGEMILL_MODELS=str(models_dir))
    options = ("--model", "tiny", "--devices", "cpu@torch", "--output", tmp_path / "out")
    done = helpers.imagemill_cli("run", jpegs(3), *options, env=hooks, before=helpers.FRESH)
    assert done.code == 0, done.err
    assert len(helpers.rows(tmp_path / "out")) == 3


def test_what_the_script_breaks_on_a_card_has_its_name(script: Any) -> None:
    """The rehearsal on a CPU breaks something else, so it would not notice."""
    pytest.importorskip("torch", reason="needs torch")
    from imagemill.pipeline.backends.torch import cuda

    jobs = script("jobs")
    names = re.findall(r"module\.(\w+)", jobs._ASSERT)
    assert names and all(hasattr(cuda, name) for name in names)
    owner, _, method = jobs._PLACES["cuda"]["method"].partition(".")
    assert hasattr(getattr(cuda, owner), method)
