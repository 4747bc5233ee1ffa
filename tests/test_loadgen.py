"""`imagemill bench --loadgen`: MLPerf's own load generator drives a session and keeps its own logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import helpers
from batches import make_job
from imagemill import bench
from imagemill.bench import loadgen
from imagemill.errors import ModelError, UsageError
from imagemill.measuring import loadgen as driven
from imagemill.measuring.records import Offline
from imagemill.records import Batch, Bundle, DeviceSpec
from imagemill.sessions import open_session
from imagemill.stopwatch import Stopwatch

QUICK = ("bench", "--loadgen", "--model", "tiny", "--batch-size", 3, "--min-duration", 0.2, "--iterations", 2)


def settings(**changes: Any) -> bench.BenchSettings:
    return bench.BenchSettings(**({"synthetic": True, "model": "tiny", "devices": "null", "iterations": 1, "min_duration": 0.1} | changes))


def summary(folder: Path) -> str:
    return (folder / "mlperf_log_summary.txt").read_text()


@pytest.mark.parametrize("devices", ["cpu", "cpu@onnxruntime"])
def test_offline_is_run_in_both_modes_and_leaves_loadgens_own_logs(
    imagemill: Callable[..., helpers.Result], tmp_path: Path, devices: str
) -> None:
    """The summary in the logs is LoadGen's, says VALID, and is what is reported; samples do not fill the last batch."""
    logs = tmp_path / "logs"
    ended = imagemill(*QUICK, "--synthetic", "--devices", devices, "--limit", 20, "--log-dir", logs, "--json")
    assert ended.code == 0, ended.err
    report = ended.json
    for number in (1, 2):
        told = summary(logs / "performance" / f"run_{number}")
        assert "Scenario : Offline\nMode     : PerformanceOnly\n" in told
        assert "Result is : VALID" in told
        assert "Min duration satisfied : Yes" in told
        assert "min_duration (ms): 200" in told
        assert float(told.partition("Samples per second: ")[2].split()[0]) == report["runs"][number - 1]
    assert "No errors encountered during test." in summary(logs / "accuracy")
    assert '"value": "AccuracyOnly"' in (logs / "accuracy" / "mlperf_log_detail.txt").read_text()
    assert (report["valid"], report["pictures"], report["log_dir"]) == (True, 20, str(logs))
    assert report["backend"] == ("openvino" if devices == "cpu" else "onnxruntime")
    assert len(report["runs"]) == len(report["rounds"]) == 2
    assert report["share"] == pytest.approx(sum(run / one for run, one in zip(report["runs"], report["rounds"], strict=True)) / 2, rel=1e-3)


def test_the_accuracy_log_has_each_pictures_own_answer(
    imagemill: Callable[..., helpers.Result], jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """LoadGen shuffles; its log, by picture, is what `run` writes for the same pictures. What cannot be read is left out."""
    folder = jpegs(14, **{"broken.jpg": b"no picture"})
    ended = imagemill(*QUICK, folder, "--devices", "cpu", "--limit", 15, "--log-dir", tmp_path / "logs", "--json")
    assert ended.code == 0, ended.err
    assert (ended.json["pictures"], ended.json["answers"], ended.json["answers_as_alone"]) == (14, 14, 14)
    log = json.loads((tmp_path / "logs" / "accuracy" / "mlperf_log_accuracy.json").read_text())
    assert imagemill("run", folder, "--model", "tiny", "--devices", "cpu", "--output", tmp_path / "out").code == 0
    expected = [row["class_id"] for row in helpers.rows(tmp_path / "out") if row["status"] == "ok"]
    assert len(set(expected)) > 1
    assert {entry["qsl_idx"]: int.from_bytes(bytes.fromhex(entry["data"]), "little") for entry in log} == dict(enumerate(expected))


def test_people_get_loadgens_verdict_beside_our_own_rate(imagemill: Callable[..., helpers.Result], tmp_path: Path) -> None:
    """Both figures, the verdict, and where the logs are; progress goes to stderr."""
    ended = imagemill(*QUICK, "--synthetic", "--devices", "null", "--log-dir", tmp_path)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == "tiny in fp32 on null#0 (null), batches of 3, LoadGen Offline, 0.2 s at least, 64 pictures"
    assert lines[1].startswith("LoadGen ")
    assert lines[1].endswith("VALID")
    assert lines[2].startswith("compute only ")
    assert "64 of 64 answers" in lines[3]
    assert lines[4] == f"logs: {tmp_path}"
    assert ended.err.count("iteration ") == 2


class BrokenSession:
    """Gives two batches back, then fails, as a device that is lost does."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def stream(self, batches: Any) -> Any:
        for number, (batch, outputs) in enumerate(self._session.stream(batches)):
            if number == 2:
                raise ModelError("the device is lost")
            yield batch, outputs


def test_a_session_that_fails_ends_the_test_with_its_own_error(tiny: Bundle, tmp_path: Path) -> None:
    """LoadGen waits for every answer: what comes after a failure is answered with nothing, and the error is passed on."""
    job = make_job(tiny)
    session = open_session(job, DeviceSpec("null#0", "null", "null", (0,)), Stopwatch())
    order = Offline(str(tmp_path), 0.05, 100.0, 8, None, accuracy=False)
    with pytest.raises(ModelError, match="the device is lost"):
        driven.offline(BrokenSession(session), job, order)


def test_a_batch_is_its_samples_and_padding(tiny: Bundle) -> None:
    """LoadGen may ask for any samples in any order, and for too few to fill a batch."""
    library = [np.full((2, 2, 3), value, np.uint8) for value in range(5)]
    batch = driven._batch(library, [4, 1], 3)
    assert isinstance(batch, Batch)
    assert (batch.pixels[:, 0, 0, 0].tolist(), batch.filled) == ([4, 1, 0], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": "null:2"}, "--devices null:2: LoadGen drives one session at a time. Name one device."),
        ({"min_duration": 0}, "--min-duration 0: must be more than 0 seconds, and a day at most."),
        ({"min_duration": float("nan")}, "--min-duration nan: must be more than 0 seconds"),
        ({"synthetic": False}, "give a SOURCE"),
        ({"iterations": 0}, "--iterations 0: must be at least 1."),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    """Before anything is compiled."""
    with pytest.raises(UsageError) as raised:
        loadgen.run(settings(**change))
    assert message in str(raised.value)


def test_loadgens_settings_without_loadgen_are_refused() -> None:
    """They would do nothing."""
    with pytest.raises(UsageError, match="--min-duration and --log-dir are about LoadGen"):
        bench.run(settings())


def test_a_missing_loadgen_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(UsageError, match=r"not installed: pip install 'imagemill\[loadgen\]'\."):
        loadgen.run(settings())


def test_a_log_folder_that_cannot_be_made_is_one_clear_error(imagemill: Callable[..., helpers.Result], tmp_path: Path) -> None:
    """It is named, with the reason."""
    (tmp_path / "file").touch()
    ended = imagemill(*QUICK, "--synthetic", "--devices", "null", "--log-dir", tmp_path / "file")
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith(f"imagemill: --log-dir {tmp_path / 'file'}: ")
    assert ended.err.endswith("Give another folder.\n")
