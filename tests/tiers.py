"""The three tiers of tests: `unit` needs nothing but this process and takes no time, `process` starts
processes of imagemill, runs whole networks or takes more than half a second, and `ecosystem` needs
a server, a browser, a cluster or the packages of other projects to compare with.

A test has the tier that it or its module is marked with, else that of its fixtures, else `unit`.
"""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
from collections.abc import Generator

import pytest

import forked

TIERS = {"unit", "process", "ecosystem"}
ECOSYSTEM = {"s3_endpoint", "browser", "ray_start", "server", "hub"}
"""Fixtures that start something which is not ours, or that stands in for it."""
PROCESS = {"imagemill", "start", "null_run", "null_start", "job", "photographs_run", "reported"}
"""Fixtures that start imagemill in processes of its own, or lead to it."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test exactly one tier."""
    for item in items:
        named = TIERS & {mark.name for mark in item.iter_markers()}
        if len(named) > 1:
            raise pytest.UsageError(f"{item.nodeid} has two tiers: {' and '.join(sorted(named))}")
        if not named:
            fixtures = set(getattr(item, "fixturenames", ()))
            tier = "ecosystem" if fixtures & ECOSYSTEM else "unit"
            item.add_marker("process" if tier == "unit" and fixtures & PROCESS else tier)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a unit test that starts a process, in its fixtures too."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a unit test starts a process: mark it with pytest.mark.process")

    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("unit"):
            patch.setattr(subprocess.Popen, "__init__", refuse)
            patch.setattr(forked.Popen, "__init__", refuse)
            patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
            patch.setattr(os, "fork", refuse)
        return (yield)
