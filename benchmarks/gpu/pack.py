"""Collects what a GPU machine without a network lacks, in one ignored folder: .gpu/.

    python benchmarks/gpu/pack.py --images DIR --limit 60 [--python 3.12] [--have pyarrow,rich,…]

.gpu/wheels gets imagemill's own wheel, with its C extension, and the packages that it needs there;
.gpu/images as many of the photographs as the limit leaves room for. It prints what it left out, and
the two commands to type on the machine. Needs pip with a network, and a C compiler; both machines
must have processors of one kind.

The machine must have PyTorch, NumPy, onnx and Pillow. `--have` names what else it has: run
`python3 -m pip list` there. OpenVINO and NNCF are never taken: jobs on a GPU do not import them.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".gpu"
NEVER = ("openvino", "nncf")
ALWAYS_THERE = ("torch", "numpy", "onnx", "pillow")
FOR_THE_SCRIPT = ("pytest", "pytest-timeout", "hypothesis", "onnxruntime")
"""What some stages compare or test with. timm and torchvision must fit the machine's PyTorch, so
they are not taken; without them, stages leave out what needs them.
"""
_GLIBC = ("2_17", "2_24", "2_26", "2_27", "2_28", "2_31", "2_34", "2_35")
"""Of wheels for Linux; pip takes the names as they are written."""
_MB = 10**6


def wanted() -> dict[str, str]:
    """Return name → requirement: the base install, then what the script's stages need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *FOR_THE_SCRIPT]
    return {name: text for text in texts if (name := canonical(text)) not in NEVER}


def canonical(requirement: str) -> str:
    """Return a package's name, as wheels' names are compared."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()  # type: ignore[index]


def download(goal: Path, python: str, have: set[str]) -> list[str]:
    """Download wheels for a version of Python and return the names of what could not be had."""
    failed = []
    for name, requirement in wanted().items():
        if name in have:
            continue
        machine = platform.machine()
        platforms = [f"manylinux_{version}_{machine}" for version in _GLIBC]
        command = ["download", "--quiet", "--disable-pip-version-check", "--dest", str(goal)]
        command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        command += [f"--platform={one}" for one in (*platforms, f"manylinux2014_{machine}")]
        if subprocess.run(
            [sys.executable, "-m", "pip", *command, requirement], check=False
        ).returncode:
            failed.append(name)
    return failed


def build(goal: Path) -> bool:
    """Build imagemill's own wheel, which fits every Python from 3.11 on. Return whether its C
    extension is in it.
    """
    with tempfile.TemporaryDirectory() as name:  # so that nothing is left in the checkout
        source = Path(name) / "imagemill"
        kept = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / "src", source / "src", ignore=kept)
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, source)
        options = ["--config-settings=--build-option=--py-limited-api=cp311", "--no-deps"]
        command = ["wheel", "--quiet", "--disable-pip-version-check", *options]
        subprocess.run(
            [sys.executable, "-m", "pip", *command, "--wheel-dir", str(goal), str(source)],
            check=True,
        )
    (wheel,) = goal.glob("imagemill-*.whl")
    return any("_resample" in name and ".so" in name for name in zipfile.ZipFile(wheel).namelist())


def choose(files: list[Path], room: int) -> tuple[list[Path], list[Path]]:
    """Return the files that fit into so many bytes, in their order, and the others."""
    taken, left = [], []
    for file in files:
        size = file.stat().st_size
        if size <= room:
            taken.append(file)
            room -= size
        else:
            left.append(file)
    return taken, left


def order(wheel: Path) -> tuple[int, int]:
    """Sort wheels: imagemill's own, what it needs, what only the script needs; small ones first."""
    name = canonical(wheel.name.split("-")[0])
    own = 0 if name == "imagemill" else 2 if name in map(canonical, FOR_THE_SCRIPT) else 1
    return own, wheel.stat().st_size


def main() -> None:
    """Fill the folder and print what to type."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, metavar="DIR", required=True)
    parser.add_argument("--limit", type=float, metavar="MB", default=60, help="of all files")
    parser.add_argument("--photographs", type=int, metavar="N", default=200, help="at most")
    parser.add_argument("--python", default="3.12", help="version on the machine")
    parser.add_argument("--have", default="", help="packages on the machine, joined by commas")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    asked = parser.parse_args()
    have = {canonical(name) for name in (*ALWAYS_THERE, *asked.have.split(",")) if name}
    if asked.folder.exists():
        shutil.rmtree(asked.folder)
    (asked.folder / "images").mkdir(parents=True)
    (asked.folder / "wheels").mkdir()
    with tempfile.TemporaryDirectory() as name:
        found = Path(name)
        is_compiled = build(found)
        failed = download(found, asked.python, have)
        wheels = sorted(found.iterdir(), key=order)
        needed = [wheel for wheel in wheels if canonical(wheel.name.split("-")[0]) not in have]
        taken, left = choose(needed, int(asked.limit * _MB))
        for wheel in taken:
            shutil.copy(wheel, asked.folder / "wheels")
        missing = [f"{wheel.name} ({wheel.stat().st_size / _MB:.1f} MB)" for wheel in left]
        room = int(asked.limit * _MB) - sum(wheel.stat().st_size for wheel in taken)
    photographs = sorted(
        path for path in asked.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
    )
    images, others = choose(photographs[: asked.photographs], room)
    for image in images:
        shutil.copy(image, asked.folder / "images" / f"{image.parent.name}-{image.name}")
    total = sum(file.stat().st_size for file in asked.folder.rglob("*") if file.is_file())
    print(f"{asked.folder}: {total / _MB:.1f} MB, {len(taken)} wheels, {len(images)} photographs")
    if not is_compiled:
        missing.append("imagemill's C extension: there is no C compiler here")
    for text in [*(f"{name}: no wheel to be had" for name in failed), *missing]:
        print(f"left out: {text}")
    if others or len(photographs) > asked.photographs:
        print(f"left out: {len(photographs) - len(images)} photographs")
    print(
        "On the machine, in the checkout:\n"
        "  python3 -m pip install --no-index --no-deps --target /tmp/site .gpu/wheels/*.whl\n"
        "  PYTHONPATH=/tmp/site python3 benchmarks/gpu/device.py --images .gpu/images"
        " --work /dev/shm --out OUT --deadline 440"
    )


if __name__ == "__main__":
    main()
