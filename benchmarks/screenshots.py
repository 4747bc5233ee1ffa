"""Makes the images of docs/images: the terminal while a job runs, and its report.

    python benchmarks/screenshots.py [--goal docs/images] [--images DIR] [--count 6000] [--all]

Needs imagemill with its dev dependencies, tmux and Chromium. The job is a real one, of links to the
demo's own images (CC0 or public domain) and some broken files. --all makes every image that is
looked at before a release: the terminal at 80 and 160 columns, without colours and as a log file,
the report at the widths of a desktop and a phone, light, dark and printed; give it another --goal.
With --images the images are yours, and so are the screenshots: they do not belong into docs/images.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from imagemill.pipeline.sources.base import IMAGE_SUFFIXES

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src" / "imagemill" / "data" / "demo"
_COLOURS = 256
"""Of a PNG file's palette: enough for text and thumbnails, and a third of the size."""
_PAGE = """\
<body style="margin:16px;background:{background};color:{foreground}">
<pre style="margin:0;font:15px/1.3 'DejaVu Sans Mono','Liberation Mono',monospace">{code}</pre>"""
_NORMAL = [
    (24, 26, 27),
    (224, 108, 117),
    (120, 190, 100),
    (229, 192, 123),
    (97, 175, 239),
    (198, 120, 221),
    (86, 182, 194),
]
_THEME = TerminalTheme((24, 26, 27), (228, 230, 232), [*_NORMAL, (200, 204, 210)])


def links(folder: Path, images: Path, count: int) -> None:
    """`count` links to images, mixed, and one broken file for each 500 of them, of three kinds."""
    found = sorted(
        path
        for path in images.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("broken")
    )
    broken = itertools.cycle((b"", b"no image at all", found[0].read_bytes()[:3000]))
    for number in range(count):
        original = found[number % len(found)]
        (folder / f"{number:06d}-{original.name}").symlink_to(original.resolve())
        if number % 500 == 0:
            (folder / f"{number:06d}-broken.jpg").write_bytes(next(broken))


def tmux(session: str, *arguments: str) -> str:
    """Ask the tmux server of this script."""
    return subprocess.run(
        ["tmux", "-L", session, *arguments], check=True, capture_output=True, text=True
    ).stdout


def terminal(
    browser: Browser,
    output: str,
    columns: int,
    goal: Path,
    end: Path | None = None,
    **environment: str,
) -> None:
    """Run a job in a terminal of so many columns; take an image of it while it runs, and one of its
    end where that is wanted.
    """
    session = f"imagemill-{os.getpid()}"
    lines = [
        f"imagemill run photos --output {output} --model efficientnet_lite0 \\",
        "    --devices cpu:2 --precision fp32",
    ]
    command = shlex.split(" ".join(lines).replace("\\", ""))
    typed = "$ " + "\n".join(lines)
    run = shlex.join(
        [
            "env",
            *(f"{name}={value}" for name, value in environment.items()),
            sys.executable,
            "-m",
            *command,
        ]
    )
    tmux(
        session,
        "-f",
        "/dev/null",
        "new-session",
        "-d",
        "-x",
        str(columns),
        "-y",
        "24",
        f"echo {shlex.quote(typed)}; {run}; echo '$ '; sleep 600",
    )
    try:
        while "failed: " not in tmux(session, "capture-pane", "-p"):
            time.sleep(0.2)
        time.sleep(8)
        draw(browser, tmux(session, "capture-pane", "-p", "-e"), columns, goal)
        while not tmux(session, "capture-pane", "-p").rstrip().endswith("\n$"):
            time.sleep(0.5)
        if end:
            draw(browser, tmux(session, "capture-pane", "-p", "-e"), columns, end)
    finally:
        tmux(session, "kill-server")


def draw(browser: Browser, shown: str, columns: int, goal: Path) -> None:
    """What a terminal showed, with its colours, as a PNG file."""
    console = Console(
        record=True,
        width=columns,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    console.print(Text.from_ansi(shown.rstrip()), soft_wrap=True)
    page = browser.new_page(viewport={"width": 32 + round(9.05 * columns), "height": 100})
    page.set_content(console.export_html(theme=_THEME, inline_styles=True, code_format=_PAGE))
    page.screenshot(path=goal, full_page=True)
    page.close()
    shrink(goal)


def shrink(path: Path) -> None:
    """Give a PNG file a palette."""
    Image.open(path).convert("RGB").quantize(_COLOURS, dither=Image.Dither.FLOYDSTEINBERG).save(
        path, optimize=True
    )


def page_images(browser: Browser, report: Path, goal: Path) -> None:
    """All of a report at two widths, light and dark, and on paper."""
    for width, scheme in itertools.product((1280, 390), ("light", "dark")):
        shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        shown.goto(report.as_uri())
        shown.screenshot(path=goal / f"report-{width}-{scheme}.png", full_page=True)
    shown.pdf(path=goal / "report.pdf", prefer_css_page_size=True, format="A4")


def gallery_image(browser: Browser, goal: Path) -> None:
    """The top of the demo's report."""
    subprocess.run(
        [sys.executable, "-m", "imagemill", "demo", "--output", "demo"],
        check=True,
        capture_output=True,
    )
    shown = browser.new_page(viewport={"width": 1280, "height": 1100})
    shown.goto(Path("demo/report.html").absolute().as_uri())
    shown.screenshot(path=goal)
    shrink(goal)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--goal", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--images", type=Path, default=DEMO)
    parser.add_argument("--count", type=int, default=6_000)
    parser.add_argument("--all", action="store_true")
    asked = parser.parse_args()
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    asked.goal = asked.goal.absolute()
    asked.goal.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="imagemill-") as temporary,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        os.chdir(temporary)
        folder = Path("photos")
        folder.mkdir()
        links(folder, asked.images.absolute(), asked.count)
        terminal(
            browser,
            "out",
            80,
            asked.goal / "terminal.png",
            asked.goal / "terminal-end.png" if asked.all else None,
        )
        gallery_image(browser, asked.goal / "report.png")
        if asked.all:
            page_images(browser, Path("out/report.html").absolute(), asked.goal)
            terminal(browser, "wide", 160, asked.goal / "terminal-160.png")
            terminal(browser, "plain", 80, asked.goal / "no-color.png", NO_COLOR="1")
            with (asked.goal / "log.txt").open("wb") as log:
                command = [
                    "imagemill",
                    "run",
                    "photos",
                    "--output",
                    "log",
                    "--model",
                    "efficientnet_lite0",
                    "--precision",
                    "fp32",
                ]
                subprocess.run([sys.executable, "-m", *command], stderr=log, stdout=log, check=True)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
