"""What is frozen: the ids that keep answers and listings from being mixed, and what a resumed job
takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from imagemill.display.observer import Watcher
from imagemill.errors import JobMismatchError, OutputError, UsageError
from imagemill.job.open_job import OpenJob
from imagemill.pipeline import backends
from imagemill.pipeline.backends import devices, library_versions
from imagemill.pipeline.decoding import DECODER
from imagemill.records import (
    Card,
    Centre,
    DeviceSpec,
    Filters,
    Interpolation,
    Job,
    Kept,
    Limits,
    Precision,
    Recipe,
    Saved,
    Scores,
    SessionSpec,
    Settings,
)
from imagemill.runner import freeze, model, resume, run
from imagemill.runner.settings import SETTINGS, Effect
from made_jobs import frozen_job, settings_of, tiny
from tiny import LABELS, TINY_CARD


def answer_id(
    card: Card = TINY_CARD,
    *,
    session: dict[str, Any] | None = None,
    variant_sha256: str | None = None,
    backend: str = "null",
    fixed: dict[str, str] | None = None,
    **changes: Any,
) -> str:
    spec = SessionSpec("/models/tiny/model.onnx", card, Precision.FP32, 4)
    job = Job("/out", ("/data",), spec, "model", 0, 5, Limits(), "plan", "answer")
    job = replace(job, session=replace(spec, **(session or {})), **changes)
    return freeze.answer_id(job, variant_sha256, backend, fixed or {})


def other_recipes() -> list[Recipe]:
    recipe = TINY_CARD.recipe
    changed: dict[str, Any] = {
        "height": recipe.height + 1,
        "width": recipe.width + 1,
        "pad": True,
        "fill": "#ffffff",
        "centre": Centre.TRANSFORMERS,
        "resize": None,
        "interpolation": Interpolation.LANCZOS,
        "exif": not recipe.exif,
        "background": "#ff0000",
    }
    assert set(changed) == set(Recipe.__struct_fields__)
    return [replace(recipe, **{name: value}) for name, value in changed.items()]


@pytest.mark.process
def test_whatever_decides_an_answer_is_in_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, precision, variant, each part of the recipe, kind of scores, labels, decoder,
    backend, columns: parts that differ in one of them are never taken for the same job's.
    """
    ids = [
        answer_id(),
        answer_id(replace(TINY_CARD, sha256="0" * 64)),
        answer_id(session={"precision": Precision.BF16}),
        answer_id(variant="int8-x"),
        answer_id(variant_sha256="0" * 64),
        *(answer_id(replace(TINY_CARD, recipe=recipe)) for recipe in other_recipes()),
        answer_id(replace(TINY_CARD, scores=Scores.SIGMOID)),
        answer_id(replace(TINY_CARD, labels=(*LABELS[:-1], "other"))),
        answer_id(backend="openvino"),
        answer_id(top_k=4),
        answer_id(min_probability=0.5),
        answer_id(min_probability=(0.5,) * 10),
        answer_id(session={"save": (Saved.LOGITS,)}),
        answer_id(keep=(Kept("id", "id"),)),
        answer_id(session={"save": (Saved.LOGITS, Saved.EMBEDDING)}),
        answer_id(fixed={"batch size": "4"}),
        answer_id(fixed={"batch size": "8"}),
        answer_id(fixed={"batch size": "4", "torch": "2.13.0"}),
    ]
    monkeypatch.setattr(freeze, "DECODER", DECODER + "x")
    ids.append(answer_id())
    assert len(set(ids)) == len(ids)
    assert all(len(one) == 16 for one in ids)


CARDS = [DeviceSpec(f"cuda#{n}", "cuda", "torch", (0,), n, "A card (8 SMs)") for n in (0, 1)]
OTHER_CARD = DeviceSpec("cuda#2", "cuda", "torch", (0,), 2, "Another card (8 SMs)")


def test_devices_whose_answers_depend_on_them_fix_model_libraries_and_batch_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but CPUs with OpenVINO or ONNX Runtime, and the null device; `cpu@torch` too."""
    monkeypatch.setattr(devices, "library_versions", lambda backend: {backend: "1"})
    assert devices.fixed_facts(CARDS, 256) == {
        "batch size": "256",
        "device": "A card (8 SMs)",
        "torch": "1",
    }
    cpu = DeviceSpec("cpu#0", "cpu", "torch", (0,), 0, "A processor")
    assert devices.fixed_facts([cpu], 4) == {
        "batch size": "4",
        "device": "A processor",
        "torch": "1",
    }
    for kind, backend in [("cpu", "openvino"), ("cpu", "onnxruntime"), ("null", "null")]:
        assert devices.fixed_facts([replace(cpu, kind=kind, backend=backend)], 4) == {}
    for kind, backend in [("gpu", "openvino"), ("cuda", "onnxruntime"), ("ipu", "popart")]:
        found = devices.fixed_facts([replace(cpu, kind=kind, backend=backend)], 4)
        assert found == {"batch size": "4", "device": "A processor", backend: "1"}


def test_cards_of_two_models_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their answers differ in the last bits, so mixing them must be asked for."""
    assert devices.backend_of(CARDS, False) == "torch:cuda"
    with pytest.raises(
        UsageError, match=r"mixes A card \(8 SMs\) and Another card .*--allow-mixed"
    ):
        devices.backend_of([*CARDS, OTHER_CARD], False)
    assert devices.backend_of([*CARDS, OTHER_CARD], True) == "torch:cuda"


def test_the_installed_libraries_are_named_with_their_versions() -> None:
    """As far as they are installed."""
    assert library_versions("openvino") == {"openvino": metadata.version("openvino")}
    assert library_versions("null") == {}


def test_what_decides_no_answer_is_not_in_its_id() -> None:
    """A model that was moved or renamed gives the same answers."""
    card = replace(TINY_CARD, name="other", architecture="other", licence="other", top1=1.0)
    assert (
        answer_id(card, session={"model_file": "/elsewhere/model.onnx"}, output="/elsewhere")
        == answer_id()
    )


def test_whatever_decides_the_listing_is_in_its_id() -> None:
    """Sources and their order, each filter, the limit, the size of shards."""
    filters = Filters()
    ids = [
        freeze.plan_id(("/a", "/b"), filters, None, 32),
        freeze.plan_id(("/b", "/a"), filters, None, 32),
        freeze.plan_id(("/a",), filters, None, 32),
        freeze.plan_id(("/a", "/b"), Filters(("*.jpg",), (), False), None, 32),
        freeze.plan_id(("/a", "/b"), Filters((), ("*.jpg",), False), None, 32),
        freeze.plan_id(("/a", "/b"), Filters((), (), True), None, 32),
        freeze.plan_id(("/a", "/b"), filters, 7, 32),
        freeze.plan_id(("/a", "/b"), filters, None, 33),
    ]
    assert len(set(ids)) == len(ids)
    assert freeze.plan_id(("/a", "/b"), Filters(), None, 32) == ids[0]


@pytest.mark.parametrize(
    ("given", "frozen"),
    [
        ({}, {}),
        ({"batch_size": 7}, {"batch_size": 7}),
        ({"batches_per_step": 3}, {"batches_per_step": 3}),
        ({"num_workers": 2}, {"num_workers": 2}),
        ({"log_dir": "/logs"}, {"log_dir": "/logs"}),
        ({"max_pixels": 5}, {"limits": Limits(max_pixels=5)}),
        ({"max_bytes": 5}, {"limits": Limits(max_bytes=5)}),
        ({"max_seconds": 5.0}, {"limits": Limits(max_seconds=5.0)}),
    ],
)
def test_settings_given_on_resume_apply_and_all_others_stay(
    job: Callable[..., Settings],
    jpegs: Callable[..., Path],
    tmp_path: Path,
    given: dict[str, Any],
    frozen: dict[str, Any],
) -> None:
    """Each of what may change changes itself alone; what is not said comes from job.json."""
    settings = job(jpegs(1))
    run.run(settings)
    opened = OpenJob.open(tmp_path / "out")
    before = opened.frozen
    chosen = devices.resolve("null")
    resumed = resume.resume(
        Settings(sources=settings.sources, output=settings.output, **given),
        opened,
        chosen,
        Watcher(),
    ).frozen
    session = {
        name: frozen.pop(name) for name in ("batch_size", "batches_per_step") if name in frozen
    }
    expected = replace(before.job, session=replace(before.job.session, **session), **frozen)
    assert resumed == replace(before, job=expected)


def test_each_setting_that_decides_something_is_compared_on_resume(
    models_dir: Path, jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """With another value of any of them, a job is refused, or there is a note."""
    other_labels = tmp_path / "labels.txt"
    other_labels.write_text("\n".join(reversed(LABELS)))
    changes: dict[str, Any] = {
        "sources": (str(tmp_path),),
        "model": "tiny2",
        "devices": devices.resolve("null"),
        "precision": "bf16",
        "batch_size": 7,
        "top_k": 2,
        "min_probability": 0.5,
        "labels": str(other_labels),
        "save": ("logits",),
        "keep": ("id",),
        "shard_size": 2,
        "include": ("*.png",),
        "exclude": ("*.png",),
        "all_files": True,
        "limit": 1,
        "preprocess": "center-crop",
        "background": "white",
        "max_pixels": 5,
        "max_bytes": 5,
        "max_seconds": 5.0,
    }
    assert set(changes) == {
        name for name, setting in SETTINGS.items() if setting.effect is not Effect.NOTHING
    }
    settings = settings_of(jpegs(1), output=tmp_path / "out", models_dir=models_dir)
    opened = frozen_job(settings, tiny(models_dir))
    opened = replace(opened, first=replace(opened.first, backend="torch"))  # its batches decide
    chosen = (DeviceSpec("cpu#0", "cpu", "torch", (0,)),)

    def resume_with(changed: Settings, used: Sequence[DeviceSpec] = chosen) -> list[str]:
        notes: list[str] = []
        watcher = Watcher()
        watcher.notify = notes.append  # type: ignore[method-assign]
        try:
            resume.resume(changed, opened, used, watcher)
        except JobMismatchError as error:
            notes.append(str(error))
        return notes

    assert resume_with(settings) == []
    for name, value in changes.items():
        if name == "devices":
            (note,) = resume_with(settings, value)
            assert "backend null is asked for" in note
        else:
            (note,) = resume_with(replace(settings, **{name: value}))
            assert SETTINGS[name].flag in note
    opened = replace(opened, first=replace(opened.first, backend="null"))  # they decide nothing
    changed = replace(settings, batch_size=changes["batch_size"])
    assert resume_with(changed, changes["devices"]) == []


@pytest.mark.parametrize(
    ("folder", "origin", "remedy"),
    [
        (
            "tiny",
            {"source": "url", "published": "tiny"},
            "`imagemill get-model tiny --models-dir HERE`",
        ),
        (
            "tiny",
            {"source": "file", "file": "best.pth", "published": None},
            "`imagemill get-model tiny --from FILE --models-dir HERE`, with the same values; FILE is"
            " your best.pth",
        ),
        (
            "tiny",
            {"source": "random", "seed": 3},
            "`imagemill get-model tiny --random-weights 3 --models-dir HERE`",
        ),
        (
            "net-0123456789ab",
            {"source": "onnx", "file": "/nets/my net.onnx"},
            "run the command again with --model '/nets/my net.onnx'",
        ),
        (
            "net",
            {"source": "onnx", "file": "/nets/net.onnx"},
            "`imagemill wrap /nets/net.onnx --output FOLDER`, with the same values",
        ),
        (
            "vit",
            {"source": "hub", "repository": "owner/vit", "commit": "0f0f"},
            "`imagemill get-model tiny --from hf:owner/vit@0f0f --models-dir HERE`",
        ),
    ],
)
def test_a_model_that_is_gone_is_named_with_the_way_to_bring_it_back(
    job: Callable[..., Settings],
    jpegs: Callable[..., Path],
    tmp_path: Path,
    folder: str,
    origin: dict[str, Any],
    remedy: str,
) -> None:
    """Of a resumed job, before a worker is started."""
    run.run(job(jpegs(1)))
    frozen = OpenJob.open(tmp_path / "out").frozen
    model.verify_model(frozen)
    gone = replace(
        frozen.job,
        session=replace(
            frozen.job.session,
            model_file=str(tmp_path / folder / "model.onnx"),
            card=replace(frozen.job.session.card, origin=origin | {"wrapped": "0123456789abcdef"}),
        ),
    )
    with pytest.raises(OutputError) as caught:
        model.verify_model(replace(frozen, job=gone))
    assert str(caught.value) == (
        f"the job's model {tmp_path}/{folder}/model.onnx is missing. Bring it back:"
        f" {remedy.replace('FOLDER', f'{tmp_path}/{folder}').replace('HERE', str(tmp_path))}."
    )


def test_saved_outputs_may_be_named_twice(
    job: Callable[..., Settings], jpegs: Callable[..., Path]
) -> None:
    folder = jpegs(1)
    for save in (("logits", "logits"), ("logits",), ("logits", "logits")):
        assert run.run(job(folder, save=save)).ok == 1


def test_a_job_that_depends_on_its_batches_is_continued_with_the_same_ones(
    job: Callable[..., Settings],
    jpegs: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And with the same libraries on the same device; both values are named. The null device stands
    in for a GPU.
    """
    monkeypatch.setattr(backends, "INDEPENDENT", ())
    settings = job(jpegs(8), shard_size=4)
    run.run(settings)
    (tmp_path / "out" / "predictions" / "part-000001.parquet").unlink()
    with pytest.raises(
        JobMismatchError, match="started with --batch-size 4, now --batch-size 5 is asked for"
    ):
        run.run(replace(settings, batch_size=5))
    with monkeypatch.context() as patch:
        patch.setattr(devices, "library_versions", lambda _backend: {"a library": "2"})
        with pytest.raises(
            JobMismatchError,
            match="started with a library none, this is a library 2, whose answers differ",
        ):
            run.run(settings)
    assert run.run(replace(settings, batch_size=None)).complete
    with monkeypatch.context() as patch:  # nothing is left to be computed
        patch.setattr(devices, "library_versions", lambda _backend: {"a library": "2"})
        assert run.run(settings).complete
