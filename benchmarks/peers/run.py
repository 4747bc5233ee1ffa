"""imagemill and its peers side by side: same images, same cores, one after the other, interleaved
over rounds; medians and ratios.

    python benchmarks/peers/run.py --images DIR --model-dir MODELS/resnext101_32x4d [--rounds 3]
    [--only imagemill,timm] [--json FILE]

Two environments are usual: `--python`, an interpreter with what requirements.txt says, and
`--imagemill-python`, one with imagemill; each defaults to the one this runs in. --work-dir keeps
the images and the peers' int8 models for the next time. The bundle's own int8 variant must be there
(`imagemill quantize`), else what needs it is left out, with a note.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from limit import Limit  # noqa: E402
from make_images import make  # noqa: E402

BASE = "imagemill int8"


@dataclass
class Peer:
    """One line of the table."""

    name: str
    script: str
    options: list[str] = field(default_factory=list)
    decodes: bool = True
    """Whether it reads images; else it computes for --seconds."""
    lines: list[dict[str, Any]] = field(default_factory=list)


def peers(asked: argparse.Namespace, work: Path, int8: Path | None) -> list[Peer]:
    """All of them, in the order of a round."""
    mill = ["--python", asked.imagemill_python]
    plain, qdq = work / "nncf-plain.xml", work / "onnxruntime-qdq.onnx"
    found = []
    for precision in ("fp32", "bf16", "int8"):
        found.append(
            Peer(f"imagemill {precision}", "imagemill_run.py", [*mill, "--precision", precision])
        )
        found.append(
            Peer(
                f"imagemill session {precision}",
                "imagemill_run.py",
                [*mill, "--precision", precision],
                decodes=False,
            )
        )
        found.append(Peer(f"limit {precision}", ""))
    found += [
        Peer("limit bf16-amx", ""),
        Peer("limit int8-amx", ""),
    ]  # where the processor has them
    batch = ["--batch-size", str(asked.timm_batch_size)]
    for precision in ("fp32", "bf16"):
        found.append(
            Peer(f"timm {precision}", "timm_inference.py", [*batch, "--precision", precision])
        )
        found.append(
            Peer(
                f"timm {precision} channels-last",
                "timm_inference.py",
                [*batch, "--precision", precision, "--channels-last"],
            )
        )
    found += [
        Peer("onnxruntime fp32", "onnxruntime_session.py", decodes=False),
        Peer("onnxruntime fp32 with pillow", "onnxruntime_session.py"),
        Peer("onnxruntime int8", "onnxruntime_session.py", ["--file", str(qdq)], decodes=False),
        Peer("ray data 1 x 1", "ray_data.py", ["--concurrency", "1", "--threads", "1"]),
        Peer("ray data 1 x all", "ray_data.py", ["--concurrency", "1"]),
        Peer("ray data 2 x 1", "ray_data.py", ["--concurrency", "2", "--threads", "1"]),
        Peer("benchmark_app fp32", "openvino_benchmark_app.py", decodes=False),
        Peer(
            "benchmark_app bf16",
            "openvino_benchmark_app.py",
            ["--precision", "bf16"],
            decodes=False,
        ),
        Peer(
            "benchmark_app nncf int8",
            "openvino_benchmark_app.py",
            ["--file", str(plain)],
            decodes=False,
        ),
    ]
    if int8 is not None:
        found.append(
            Peer(
                "benchmark_app our int8",
                "openvino_benchmark_app.py",
                ["--file", str(int8)],
                decodes=False,
            )
        )
    else:
        found = [
            peer
            for peer in found
            if not (peer.name.startswith("imagemill") and peer.name.endswith("int8"))
        ]
        print(
            "note: the bundle has no int8 variant (`imagemill quantize MODEL --images DIR`):"
            " left out",
            file=sys.stderr,
        )
    if asked.only:
        found = [
            peer
            for peer in found
            if any(peer.name.startswith(name.strip()) for name in asked.only.split(","))
        ]
    if asked.without:
        found = [
            peer
            for peer in found
            if not any(peer.name.endswith(name.strip()) for name in asked.without.split(","))
        ]
    return found


def measure(
    peer: Peer, asked: argparse.Namespace, images: Path, limit: Limit
) -> dict[str, Any] | None:
    if not peer.script:
        gop = limit.measure(peer.name.split()[1], 1.0)
        rate = None if gop is None else gop / asked.gop_per_image
        return (
            None
            if rate is None
            else {
                "images_per_second": None,
                "steady_images_per_second": rate,
                "gop_per_second": gop,
            }
        )
    command = [
        asked.python,
        str(HERE / peer.script),
        "--model-dir",
        str(asked.model_dir),
        *peer.options,
    ]
    command += (
        ["--images", str(images), "--limit", str(asked.count)]
        if peer.decodes
        else ["--seconds", str(asked.seconds)]
    )
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{peer.name} failed:\n{done.stderr[-1500:]}", file=sys.stderr)
        return None
    line: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if not peer.decodes:
        line["images_per_second"] = None  # a fixed time with start-up in it says nothing
    return line | {"process_s": time.monotonic() - begun}


def middle(peer: Peer, key: str) -> float | None:
    found = [line[key] for line in peer.lines if line.get(key) is not None]
    return median(found) if found else None


def table(found: list[Peer]) -> str:
    """Medians; `ratio` is int8 imagemill's steady rate over the peer's, or where int8 is not there,
    fp32's.
    """
    base = next(
        (
            peer
            for name in (BASE, "imagemill fp32")
            for peer in found
            if peer.name == name and peer.lines
        ),
        None,
    )
    rows = [
        f"{'':<32} {'whole process':>14} {'steady':>9} {'ratio':>7}   images/s, medians; ratio:"
        f" {base.name if base else '-'} over this"
    ]
    for peer in found:
        whole, steady = middle(peer, "images_per_second"), middle(peer, "steady_images_per_second")
        top = middle(base, "steady_images_per_second") if base else None
        ratio = top / steady if top and steady else None
        cells = ["-" if value is None else f"{value:,.2f}" for value in (whole, steady, ratio)]
        rows.append(f"{peer.name:<32} {cells[0]:>14} {cells[1]:>9} {cells[2]:>7}")
    return "\n".join(rows)


def int8_file(model_dir: Path) -> Path | None:
    try:
        name = json.loads((model_dir / "accuracy.json").read_text())["int8"]["file"]
    except (FileNotFoundError, KeyError, TypeError):
        return None
    return model_dir / name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        help="folder of JPEG files, from which --count images are made",
    )
    parser.add_argument("--model-dir", type=Path, required=True, help="bundle")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of what decodes nothing")
    parser.add_argument("--only", metavar="NAME,…", help="peers whose names begin so")
    parser.add_argument("--without", metavar="NAME,…", help="leave out peers whose names end so")
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--imagemill-python", default=sys.executable)
    parser.add_argument("--timm-batch-size", type=int, default=256)
    parser.add_argument(
        "--gop-per-image", type=float, default=16.0, help="operations of one image, for the limit"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="every single measurement; rounds are added to those that it holds",
    )
    asked = parser.parse_args()
    asked.model_dir = asked.model_dir.resolve()
    source = HERE.parents[1] / "src"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(source), os.environ.get("PYTHONPATH")])
    )
    with tempfile.TemporaryDirectory(prefix="imagemill-peers-") as temporary, Limit() as limit:
        work = (asked.work_dir or Path(temporary)).resolve()
        images = work / f"images-{asked.count}"
        make(asked.images, images, range(asked.count))
        found = peers(asked, work, int8_file(asked.model_dir))
        for tool, file in (("nncf", "nncf-plain.xml"), ("ort", "onnxruntime-qdq.onnx")):
            if (
                any(str(work / file) in peer.options for peer in found)
                and not (work / file).exists()
            ):
                print(f"making {file}", file=sys.stderr)
                command = [
                    asked.python,
                    str(HERE / "make_int8.py"),
                    tool,
                    "--model-dir",
                    str(asked.model_dir),
                    "--images",
                    str(images),
                ]
                subprocess.run(
                    [*command, "--output", str(work / file)], check=True, stdout=subprocess.DEVNULL
                )
        kept: dict[str, list[dict[str, Any]]] = (
            json.loads(asked.json.read_text()) if asked.json and asked.json.exists() else {}
        )
        for peer in found:
            peer.lines = kept.setdefault(peer.name, peer.lines)
        for number in range(1, asked.rounds + 1):
            for peer in found:
                line = measure(peer, asked, images, limit)
                if line is not None:
                    peer.lines.append(line)
                    if asked.json:
                        asked.json.write_text(json.dumps(kept, indent=1))
                    whole, steady = line["images_per_second"], line["steady_images_per_second"]
                    print(
                        f"round {number}: {peer.name}: whole {whole}, steady {steady}",
                        file=sys.stderr,
                        flush=True,
                    )
    print(table(found))


if __name__ == "__main__":
    main()
