"""Fixtures of the tests by fault. The long forms of two of them are scripts in `benchmarks/`, which
are tested from here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest

import helpers

sys.path.insert(0, str(helpers.PROJECT / "benchmarks"))


@pytest.fixture(scope="session")
def null_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.null_bundle(tmp_path_factory.mktemp("null-models"))


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, null_models: Path, small_jpegs: Path) -> Path:
    """The output of an undisturbed job over `small_jpegs`."""
    output = tmp_path_factory.mktemp("calm") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGEMILL_MODELS", str(null_models))
        result = helpers.imagemill_here(*job_arguments(small_jpegs, "--output", output))
    assert result.code == 0, result
    return output


@pytest.fixture
def null_run(null_models: Path, start: Callable[..., Any]) -> Callable[..., helpers.Result]:
    """`imagemill run ARGUMENTS --model null`, on the null device by default, to its end. It runs in
    this process, unless it needs an environment or a working directory of its own.
    """

    def call(
        *arguments: object, env: dict[str, str] | None = None, **options: Any
    ) -> helpers.Result:
        if env is None and not options:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("IMAGEMILL_MODELS", str(null_models))
                return helpers.imagemill_here(*job_arguments(*arguments))
        return helpers.finish(
            start(*job_arguments(*arguments), env=with_models(env, null_models), **options)
        )

    return call


@pytest.fixture
def null_start(null_models: Path, start: Callable[..., Any]) -> Callable[..., Any]:
    """The same, not waited for."""

    def call(*arguments: object, env: dict[str, str] | None = None, **options: Any) -> Any:
        return start(*job_arguments(*arguments), env=with_models(env, null_models), **options)

    return call


def job_arguments(*arguments: object) -> tuple[object, ...]:
    given = set(map(str, arguments))
    defaults: list[object] = []
    for flag, value in (
        ("--model", "null"),
        ("--devices", "null:1"),
        ("--shard-size", "8"),
        ("--num-workers", "1"),
    ):
        defaults += [] if flag in given else [flag, value]
    return ("run", *arguments, *defaults, "--no-report")


def with_models(env: dict[str, str] | None, models: Path) -> dict[str, str]:
    return (env or helpers.environment()) | {"IMAGEMILL_MODELS": str(models)}
