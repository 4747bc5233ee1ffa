"""The image that `Dockerfile` describes, without Docker: its steps run in a throw-away root.

Needs root, `mmdebstrap` and a network, takes some minutes and 2 GB of disk:

    python -m pytest -m large tests/test_dockerfile.py
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import helpers
import sample_images

pytestmark = [pytest.mark.large, pytest.mark.ecosystem, pytest.mark.timeout(1800)]

README = (helpers.PROJECT / "README.md").read_text("utf-8")
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
STEPS = [
    tuple(step.split(maxsplit=1))
    for step in re.sub(
        r"\\\n\s*",
        "",
        re.sub(r"^#.*\n", "", (helpers.PROJECT / "Dockerfile").read_text(), flags=re.M),
    ).splitlines()
    if step
]


def value(name: str) -> str:
    return next(rest for word, rest in STEPS if word == name)


class Root:
    """A throw-away root, in which commands run as the image would run them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        suite = value("FROM").partition(":")[2].removesuffix("-slim")
        subprocess.run(["mmdebstrap", "--variant=minbase", suite, folder], check=True)
        for name in ("/etc/resolv.conf", "/etc/hosts"):
            shutil.copy(Path(name).resolve(), folder / name.lstrip("/"))
        # The authorities that this machine trusts, under a name that no package installs.
        if AUTHORITIES.is_file():
            shutil.copy(AUTHORITIES.resolve(), folder / "etc" / "authorities.pem")
            self.env |= dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE"), "/etc/authorities.pem")
        self.env |= {name: text for name, text in os.environ.items() if "proxy" in name.lower()}
        self.begun = self.size()
        for place in ("proc", "dev"):
            subprocess.run(["mount", "--rbind", f"/{place}", folder / place], check=True)

    def size(self) -> int:
        """Bytes of all files."""
        command = ["du", "--summarize", "--bytes", "--one-file-system", self.folder]
        return int(subprocess.check_output(command).split()[0])

    def run(self, command: str, user: str = "root", code: int = 0) -> str:
        env = [f"{name}={text}" for name, text in self.env.items()]
        done = subprocess.run(
            ["chroot", f"--userspec={user}", self.folder, "env", "-i", *env, "sh", "-ec", command],
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    def build(self) -> None:
        """Carry the steps out."""
        for word, rest in STEPS:
            if word == "ENV":
                for item in shlex.split(rest):
                    name, _, text = item.partition("=")
                    self.env[name] = text.replace("$PATH", self.env["PATH"])
            elif word == "COPY":
                *sources, target = rest.split()
                for source in sources:
                    place = self.folder / target.strip("/")
                    path = helpers.PROJECT / source
                    if path.is_dir():
                        ignore = shutil.ignore_patterns("__pycache__", "*.so")
                        shutil.copytree(path, place, ignore=ignore)
                    else:
                        place.mkdir(parents=True, exist_ok=True)
                        shutil.copy(path, place)
            elif word == "RUN":
                self.run(rest)

    def close(self) -> None:
        for place in ("proc", "dev"):
            subprocess.run(["umount", "--recursive", "--lazy", self.folder / place], check=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    made = Root(tmp_path_factory.mktemp("root"))
    try:
        made.build()
        yield made
    finally:
        made.close()


def test_the_image_runs_a_job_on_mounted_folders(root: Root) -> None:
    """As a user without rights, with the packaged model; and the demo, and bench."""
    helpers.fill(root.folder / "photos", {"a.jpg": sample_images.jpeg(60, 50), "b.jpg": b"no"})
    root.run("mkdir /results && chown imagemill /results")
    said = root.run(
        "cd /home/imagemill; HOME=$PWD imagemill run /photos --output /results/out --model efficientnet_lite0 --json",
        user=value("USER"),
    )
    assert json.loads(said)["ok"] == 1
    assert "11 images: 10 ok" in root.run(
        "cd /home/imagemill; HOME=$PWD imagemill demo", user=value("USER")
    )
    root.run(
        "cd /home/imagemill; HOME=$PWD imagemill bench --synthetic --model efficientnet_lite0",
        user=value("USER"),
    )


def test_the_image_has_no_compiler_and_its_size_is_what_readme_says(root: Root) -> None:
    """What the steps add to the image that they begin with, which is not Debian's own here."""
    root.run("which gcc", code=1)
    root.run("rm -rf /results /photos /tmp/* /home/imagemill/*")
    (said,) = re.findall(r"adds (\d+) MB to", " ".join(README.split()))
    added = (root.size() - root.begun) / 1e6
    print(f"\nthe steps add {added:.0f} MB to {root.begun / 1e6:.0f} MB")
    print(root.run("du --bytes --one-file-system --max-depth=2 / /opt | sort -rn | head"))
    print(
        root.run("dpkg-query --show --showformat '${Installed-Size} kB ${Package}\\n' | sort -rn")
    )
    assert abs(added - int(said)) < 0.05 * added
