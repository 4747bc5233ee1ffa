"""OpenVINO's own benchmark_app on a model file: throughput on made-up input, nothing decoded."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from common import arguments, begun, print_line


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--file", help="another file than the bundle's model.onnx: ONNX or OpenVINO IR"
    )
    parser.add_argument("--name", default="benchmark_app")
    parser.add_argument(
        "--precision", default="f32", choices=["f32", "bf16"], help="of what is not int8"
    )
    parser.add_argument("--batch-size", type=int, default=1)
    asked = parser.parse_args()
    start = begun()
    file = asked.file or str(Path(asked.model_dir) / "model.onnx")
    command = [
        str(Path(sys.executable).with_name("benchmark_app")),
        "-m",
        file,
        "-d",
        "CPU",
        "-hint",
        "throughput",
    ]
    command += [
        "-t",
        f"{asked.seconds:.0f}",
        "-infer_precision",
        asked.precision,
        "-shape",
        f"[{asked.batch_size},224,224,3]",
    ]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    found = {
        key: re.search(rf"{key}:\s+([0-9.]+)", done.stdout)
        for key in ("Throughput", "Duration", "Count")
    }
    if done.returncode or not all(found.values()):
        sys.exit(f"benchmark_app failed:\n{done.stdout[-2000:]}")
    throughput, _, count = (float(match[1]) for match in found.values() if match)
    print_line(asked.name, int(count) * asked.batch_size, time.monotonic() - start, throughput)


if __name__ == "__main__":
    main()
