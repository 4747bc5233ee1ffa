"""The same images as folder, list, zip, tar, tar.gz, WebDataset, Parquet, HTTP and S3: same
answers, also when killed and resumed.

    python benchmarks/sources.py --images PHOTOGRAPHS --model efficientnet_lite0

Needs what the tests need (moto's S3 server; its own and a small web server run on 127.0.0.1 while
this runs). Of each form one job is run undisturbed into a folder; in a second one the launcher is
killed by SIGKILL when a third of the parts is there, and the command repeated.
Prints one line a form: rows, images/s of the undisturbed run, parts kept by the resumed one. Fails
where a row, its logits included, differs from the folder's, or where `verify` does not exit 0.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import helpers  # noqa: E402
import s3 as s3_server  # noqa: E402

_COLUMNS = [
    "status",
    "error",
    "class_id",
    "label",
    "probability",
    "top_k",
    "width",
    "height",
    "logits",
]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass


def make(folder: Path, images: Path) -> dict[str, list[str]]:
    """The forms below `folder`: name → source arguments. All list the images in the same order."""
    files = sorted(
        path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    files.sort(key=lambda path: path.relative_to(images).as_posix().encode().split(b"/"))
    names = [path.relative_to(images).as_posix() for path in files]
    plain = folder / "plain"
    for name, path in zip(names, files, strict=True):
        (plain / name).parent.mkdir(parents=True, exist_ok=True)
        (
            os.link(path, plain / name)
            if path.stat().st_dev == folder.stat().st_dev
            else (plain / name).write_bytes(path.read_bytes())
        )
    (folder / "list.txt").write_text("".join(f"plain/{name}\n" for name in names))
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        for name, path in zip(names, files, strict=True):
            archive.write(path, name)
    for suffix in (".tar", ".tar.gz"):
        packed = suffix == ".tar.gz"
        with tarfile.open(folder / f"all{suffix}", "w:gz" if packed else "w") as tar:
            for name, path in zip(names, files, strict=True):
                tar.add(path, name)
    for number in range(3):
        with tarfile.open(folder / f"shard-{number:03d}.tar", "w") as tar:
            for name, path in list(zip(names, files, strict=True))[
                number * len(files) // 3 : (number + 1) * len(files) // 3
            ]:
                tar.add(path, Path(name).name)
                label = tarfile.TarInfo(Path(name).stem + ".json")
                tar.addfile(label, io.BytesIO())
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": path.read_bytes(), "path": path.name} for path in files], kind)
    pq.write_table(pa.table({"image": column}), folder / "all.parquet", row_group_size=100)
    return {
        "folder": [str(plain)],
        "list": [f"@{folder}/list.txt"],
        "zip": [f"{folder}/all.zip"],
        "tar": [f"{folder}/all.tar"],
        "tar.gz": [f"{folder}/all.tar.gz"],
        "WebDataset": [f"{folder}/shard-{{000..002}}.tar"],
        "Parquet": [f"{folder}/all.parquet"],
    }


def publish(folder: Path, forms: dict[str, list[str]], bucket: s3_server.Bucket, port: int) -> None:
    """The forms that need a server."""
    lines = (folder / "list.txt").read_text().splitlines()
    (folder / "urls.txt").write_text(
        "".join(f"http://127.0.0.1:{port}/{quote(line)}\n" for line in lines)
    )
    forms["HTTP"] = [f"@{folder}/urls.txt"]
    bucket.fill({line: (folder / line).read_bytes() for line in lines})
    bucket.fill(
        {name: (folder / name).read_bytes() for name in ("all.zip", "all.tar.gz", "all.parquet")}
    )
    forms["S3"] = [f"{bucket.url}/plain"]
    forms["S3 zip"] = [f"{bucket.url}/all.zip"]
    forms["S3 tar.gz"] = [f"{bucket.url}/all.tar.gz"]
    forms["S3 Parquet"] = [f"{bucket.url}/all.parquet"]


def rows(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = helpers.table(output).select(_COLUMNS).to_pylist()
    return found


def killed_and_resumed(command: list[str], output: Path) -> tuple[int, int]:
    """Kill the launcher when a third of the parts is there, repeat the command. Returns parts kept,
    and all parts.
    """
    process = subprocess.Popen(
        [*command, "--output", str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    want = None
    while process.poll() is None:
        if want is None and (output / "job.json").exists():
            frozen = json.loads((output / "job.json").read_text())
            want = max(1, -(-frozen["images"] // frozen["shard_size"]) // 3)
        if want and len(helpers.parts(output)) >= want:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    before = helpers.parts(output)
    subprocess.run([*command, "--output", str(output)], check=True, capture_output=True)
    after = helpers.parts(output)
    kept = sum(after[name] == mark for name, mark in before.items())
    assert kept == len(before), "a finished part was computed again"
    return kept, len(after)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--models-dir")
    parser.add_argument("--only", help="names of forms, joined by commas")
    parsed = parser.parse_args()
    options = [
        "--model",
        parsed.model,
        "--precision",
        "fp32",
        "--save",
        "logits",
        "--shard-size",
        "32",
        "--devices",
        "cpu",
    ]
    options += ["--models-dir", parsed.models_dir] if parsed.models_dir else []
    with (
        tempfile.TemporaryDirectory(prefix="imagemill-sources-") as name,
        s3_server.serving() as endpoint,
    ):
        folder = Path(name)
        forms = make(folder, parsed.images)
        handler = functools.partial(_Quiet, directory=str(folder))
        web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        web.daemon_threads = True
        threading.Thread(target=web.serve_forever, daemon=True).start()
        os.environ |= s3_server.environment(endpoint)
        publish(folder, forms, s3_server.new_bucket(endpoint), web.server_address[1])
        wanted = parsed.only.split(",") if parsed.only else list(forms)
        expected: list[dict[str, Any]] | None = None
        print(f"{'form':<12} {'rows':>5} {'images/s':>9} {'parts kept after the kill':>26}")
        for form in dict.fromkeys(["folder", *wanted]):
            command = [sys.executable, "-m", "imagemill", "run", *forms[form], *options]
            outputs = [folder / f"{form}-{run}".replace(" ", "-") for run in ("calm", "killed")]
            done = subprocess.run(
                [*command, "--output", str(outputs[0]), "--json"],
                check=True,
                capture_output=True,
                text=True,
            )
            kept, parts = killed_and_resumed(command, outputs[1])
            expected = expected or rows(outputs[0])
            for output in outputs:
                assert rows(output) == expected, f"{form}: rows differ from the folder's"
                subprocess.run(
                    [sys.executable, "-m", "imagemill", "verify", str(output)],
                    check=True,
                    capture_output=True,
                )
            print(
                f"{form:<12} {len(expected):>5}"
                f" {json.loads(done.stdout)['images_per_second']:>9.1f} {kept:>19} of {parts:>3}",
                flush=True,
            )
        web.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
