"""A job from S3 to S3 on Ray nodes that share no disk with the launcher or with each other. Needs
root and `unshare`.

    python benchmarks/ray_apart.py --models-dir DIR [--images DIR] [--model efficientnet_lite0]
    [--limit 328]

Each node is a raylet in a mount namespace of its own; empty file systems lie over the models, the
images and the cache there. The store is a server on 127.0.0.1. Rows must be those of a local run
over the same objects, bit for bit; the model must have come to each node.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import helpers  # noqa: E402
import s3  # noqa: E402
from ray_nodes import STORE_BYTES, cluster  # noqa: E402

_START = """
set -e
for folder in {hidden}; do mount -t tmpfs -o size=2g none "$folder"; done
exec {ray} start --address={address} --num-cpus=1 --node-ip-address={host} --node-name={name} --object-store-memory={store} \
  --dashboard-agent-listen-port={port} --disable-usage-stats --block
"""


def free_port() -> int:
    """Two nodes of one machine would both take the default one."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextlib.contextmanager
def node_apart(
    name: str, address: str, hidden: list[Path], env: dict[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A raylet that sees none of these folders' content; gives the process that shares its view."""
    script = _START.format(
        hidden=" ".join(f"'{folder}'" for folder in hidden),
        ray=Path(sys.executable).with_name("ray"),
        address=address,
        name=name,
        port=free_port(),
        host=f"127.0.1.{name.rpartition('-')[2]}",
        store=STORE_BYTES,
    )
    with (folder / f"{name}.log").open("wb") as log:
        command = ["unshare", "--mount", "sh", "-c", script]
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for_cpus(wanted: int, address: str) -> None:
    """Wait until so many nodes of one CPU have joined."""
    program = (
        "import ray, os; ray.init(address=os.environ['RAY_ADDRESS'], log_to_driver=False,"
        " logging_level='CRITICAL'); "
    )
    program += (
        "print(sum(node['Alive'] and node['Resources'].get('CPU', 0) for node in ray.nodes()))"
    )
    env = helpers.environment(RAY_ADDRESS=address)
    deadline = time.monotonic() + 60
    while (
        float(
            subprocess.run(
                [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
            ).stdout
        )
        < wanted
    ):
        assert time.monotonic() < deadline, "a node did not join"


def rows(bucket: s3.Bucket, job: str) -> dict[str, str]:
    """Name and sha256 of every part in the store."""
    every = bucket.keys()
    keys = [key for key in every if key.startswith(f"{job}/predictions/")]
    return {key.rpartition("/")[2]: hashlib.sha256(bucket.get(key)).hexdigest() for key in keys}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--limit", type=int, default=328)
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imagemill-apart-")))
        cache = folder / "cache"
        cache.mkdir()
        os.environ |= s3.environment(stack.enter_context(s3.serving()))
        bucket = s3.new_bucket(os.environ["AWS_ENDPOINT_URL"])
        found = sorted(
            path for path in asked.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
        )[: asked.limit]
        bucket.fill(
            {f"photos/{path.relative_to(asked.images)}": path.read_bytes() for path in found}
        )
        env = helpers.environment(IMAGEMILL_MODELS=str(asked.models_dir), XDG_CACHE_HOME=str(cache))
        options = [
            "--model",
            asked.model,
            "--precision",
            "fp32",
            "--shard-size",
            "16",
            "--no-report",
            "--no-preflight",
            "--json",
        ]
        local = helpers.imagemill_cli(
            "run",
            f"{bucket.url}/photos",
            "--output",
            f"{bucket.url}/local",
            "--devices",
            "cpu:2",
            *options,
            env=env,
        )
        assert local.code == 0, local
        nodes = stack.enter_context(cluster(num_cpus=0, env=env))
        hidden = [asked.models_dir.resolve(), asked.images.resolve(), cache]
        apart = []
        for number in (
            1,
            2,
        ):  # one after the other: Ray looks for free ports first and takes them later
            apart.append(
                stack.enter_context(
                    node_apart(f"apart-{number}", nodes.address, hidden, env, folder)
                )
            )
            wait_for_cpus(number, nodes.address)
        ray = helpers.imagemill_cli(
            *(
                "run",
                f"{bucket.url}/photos",
                "--output",
                f"{bucket.url}/job",
                "--devices",
                "cpu",
                "--engine",
                "ray",
                *options,
            ),
            env=env | {"RAY_ADDRESS": nodes.address},
        )
        assert ray.code == 0, ray
        assert rows(bucket, "job") == rows(bucket, "local"), "the rows differ"
        for one, process in enumerate(apart, 1):
            view = Path(f"/proc/{process.pid}/root")
            model = list(view.joinpath(*cache.parts[1:]).glob("imagemill/delivered/*/model.onnx"))
            here = list(view.joinpath(*asked.models_dir.resolve().parts[1:]).iterdir())
            device = ray.json["devices"][one - 1]
            print(
                f"node apart-{one}: the models folder holds {len(here)} files, {len(model)} model"
                f" was delivered; {device['images']} images"
            )
            assert (len(here), len(model)) == (0, 1)
            assert device["images"], "it did nothing"
        assert not list(cache.glob("imagemill/delivered/*")), "this machine has the model"
        print(f"{ray.json['images']} images from S3 to S3 on 2 nodes without a common disk: {len(rows(bucket, 'job'))} parts, "
              "byte for byte those of a local run")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
