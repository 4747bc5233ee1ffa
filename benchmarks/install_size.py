"""How much disk an installation takes, by package, and how long the demo takes from nothing.

    python benchmarks/install_size.py [WHEEL or CHECKOUT] [--extras int8,heif] [--json]

Makes an empty virtual environment, installs imagemill into it and runs `imagemill demo` with an
empty cache, from an empty folder. Sizes are bytes of files without pip and setuptools, with the
compiled bytecode, in MB of 10⁶. What pip has downloaded before comes from its cache, so the time of
installing depends on the network only the first time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
WITH_PYTHON = {"pip", "setuptools"}


def sizes(site: Path) -> dict[str, int]:
    """Bytes of each distribution in a folder of packages, the largest first.

    Raises:
        SystemExit: there are files that belong to no distribution.
    """
    found: dict[str, int] = {}
    known: set[Path] = set()
    for distribution in distributions(path=[str(site)]):
        files = {Path(os.path.normpath(str(one.locate()))) for one in distribution.files or ()}
        files = {file for file in files if file.is_file()}
        known |= files
        found[distribution.name] = sum(file.stat().st_size for file in files)
    if lost := [file for file in site.rglob("*") if file.is_file() and file not in known]:
        sys.exit(f"{len(lost)} files belong to no package, such as {lost[0]}")
    found = {name: size for name, size in found.items() if name not in WITH_PYTHON}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def cpu_seconds() -> float:
    """CPU time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", type=Path, default=PROJECT)
    parser.add_argument("--extras", help="extras of imagemill, with commas between them")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-install-") as temporary:
        folder = Path(temporary)
        source = asked.source.resolve()
        if source.is_dir():  # pip builds in the folder that it is given
            names = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
            (folder / "source").mkdir()
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # older checkouts have fewer
                    shutil.copy(source / name, folder / "source")
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
            shutil.copytree(source / "src", folder / "source" / "src", ignore=ignored)
            source = folder / "source"
        target = f"{source}[{asked.extras}]" if asked.extras else str(source)
        environment = {
            name: text
            for name, text in os.environ.items()
            if name not in ("VIRTUAL_ENV", "PYTHONPATH") and not name.startswith("IMAGEMILL_")
        } | {"IMAGEMILL_MODELS": str(folder / "models")}
        seconds: dict[str, float] = {}

        def run(name: str, *command: object) -> None:
            begun, cpu = time.monotonic(), cpu_seconds()
            done = subprocess.run(
                list(map(str, command)),
                env=environment,
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            seconds[name] = round(time.monotonic() - begun, 1)
            seconds[f"{name}_cpu"] = round(cpu_seconds() - cpu, 1)

        venv = folder / "venv"
        run("environment", sys.executable, "-m", "venv", venv)
        run("install", venv / "bin" / "pip", "install", "--quiet", target)
        (site,) = venv.glob("lib/python*/site-packages")
        found = sizes(site)
        run("demo", venv / "bin" / "imagemill", "demo")
    total = sum(found.values())
    if asked.json:
        print(json.dumps({"bytes": found, "total": total, "seconds": seconds}))
        return
    for name, size in found.items():
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{total / 1e6:8.1f} MB  all {len(found)} packages")
    for name in ("environment", "install", "demo"):
        print(f"{name}: {seconds[name]} s, {seconds[f'{name}_cpu']} s of CPU time")


if __name__ == "__main__":
    main()
