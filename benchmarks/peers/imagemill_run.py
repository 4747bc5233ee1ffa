"""imagemill itself, as a user runs it: `imagemill run` into a temporary folder; or `imagemill bench
--synthetic`, without images.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import arguments, begun, print_line


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--python", default=sys.executable, help="an interpreter with imagemill")
    parser.add_argument("--devices", default="auto")
    asked = parser.parse_args()
    start = begun()
    mill = [asked.python, "-m", "imagemill"]
    same = [
        "--model",
        str(Path(asked.model_dir).resolve()),
        "--precision",
        asked.precision,
        "--devices",
        asked.devices,
        "--json",
    ]
    with tempfile.TemporaryDirectory() as folder:
        if asked.images is None:
            command = [*mill, "bench", "--synthetic", *same]
        else:
            command = [
                *mill,
                "run",
                asked.images,
                "--output",
                str(Path(folder) / "out"),
                "--no-preflight",
                "--no-report",
                *same,
            ]
            command += ["--limit", str(asked.limit)] if asked.limit else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - start
    report = json.loads(done.stdout)
    if asked.images is None:
        found, images = (
            report["compute_only"],
            report["images_per_iteration"]["compute_only"] * report["settings"]["iterations"],
        )
        print_line(f"imagemill session {asked.precision}", images, seconds, found["median"])
        return
    assert report["failed"] == 0, report["failed_by_status"]
    print_line(
        f"imagemill {asked.precision}", report["images"], seconds, report["images_per_second"]
    )


if __name__ == "__main__":
    main()
