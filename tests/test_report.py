"""report.html: its figures are the rows', its images the images, and nothing that it shows can harm
wherever it is opened.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import encoded
import helpers
import made_jobs
import sample_images
from imagemill.job.open_job import OpenJob
from imagemill.models import variants
from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Clock, DeviceSummary, Limits, Recipe, Settings, Throughput
from imagemill.report import charts, figures, page, thumbnails
from imagemill.runner import run
from imagemill.workers.tally import BUCKETS, Commit, throughput
from s3 import Bucket
from tiny import CLASSES, TINY_CARD

CLI = Callable[..., helpers.Result]
Jobs = Callable[..., Settings]
Pages = Callable[..., Page]
HOSTILE_NAMES = (
    "<img src=x onerror=alert(1)>.jpg",
    "</script>.jpg",
    "a'\"&amp;b.jpg",
    "{{ 7 * 7 }}{% raw %}.jpg",
    "\u202egpj.exe.jpg",
    "tab\tand\x1b[31mescape.jpg",
    "l" * 200 + ".jpg",
    "javascript:alert(1).jpg",
    "<!-- <script>alert(1).jpg",
    "]]>.jpg",
)
HOSTILE_LABELS = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "<svg onload=alert(3)>",
    "{{ config }}",
    "\u202etfel ot thgir",
    "<b>bold</b> & 'quoted'",
    "W" * 300,
    "plain",
    "</style><style>body{display:none}</style>",
    "\u2028separated",
)


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""The first one draws no window, which takes others half of a core as long as they are open."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium-headless-shell")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"], timeout=300_000
        )
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Pages]:
    """Opens a report from disk; whatever it complains of, asks for or pops up fails the test at its
    end.
    """
    contexts, seen = [], []

    def open_page(report: Path, width: int = 1280, **options: Any) -> Page:
        context = browser.new_context(
            offline=True, viewport={"width": width, "height": 800}, **options
        )
        contexts.append(context)
        context.set_default_timeout(300_000)
        shown = context.new_page()
        shown.on("console", lambda message: seen.append(f"console: {message.text}"))
        shown.on("pageerror", lambda error: seen.append(f"error: {error}"))
        shown.on(
            "dialog", lambda dialog: (seen.append(f"dialog: {dialog.message}"), dialog.dismiss())
        )
        shown.on(
            "request",
            lambda request: (
                seen.append(request.url[:1000])
                if not request.url.startswith("data:image/webp;")
                else None
            ),
        )
        shown.goto(report.as_uri())
        assert seen.pop(0) == report.as_uri()
        return shown

    yield open_page
    assert not seen
    for context in contexts:
        context.close()


@dataclass(frozen=True)
class Reported:
    """A finished job whose report is looked at."""

    source: Path
    output: Path

    @property
    def report(self) -> Path:
        return self.output / "report.html"

    @property
    def rows(self) -> list[dict[str, Any]]:
        return helpers.rows(self.output)


@pytest.fixture(scope="session")
def reported(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """A job over 150 images, some of them broken, some of hostile name, with hostile labels;
    written by `run` itself.
    """
    folder = tmp_path_factory.mktemp("reported")
    files = {
        f"{seed % 5}/{seed:03d}.jpg": sample_images.jpeg(60 + seed % 40, 50 + seed % 30, seed=seed)
        for seed in range(140)
    }
    files |= {
        name: sample_images.jpeg(80, 60, seed=200 + number)
        for number, name in enumerate(HOSTILE_NAMES)
    }
    files |= {
        f"broken/{number:02d} <svg onload=alert(4)>.jpg": b"<i onclick=alert(5)>"
        for number in range(12)
    }
    files |= {
        "broken/half.jpg": sample_images.half(sample_images.jpeg(300, 200)),
        "broken/empty.jpg": b"",
    }
    helpers.fill(folder / "source", files)
    labels = folder / "labels.txt"
    labels.write_text("\n".join(HOSTILE_LABELS[:-1]) + "\nlast\n", encoding="utf-8")
    environment = helpers.environment(IMAGEMILL_MODELS=str(models_dir))
    arguments = ("--model", "tiny", "--devices", "null:2", "--shard-size", "7", "--labels", labels)
    result = helpers.imagemill_here(
        "run", folder / "source", "--output", folder / "out", *arguments, env=environment
    )
    assert result.code == 0, result
    return Reported(folder / "source", folder / "out")


def cards(shown: Page, part: str) -> list[dict[str, Any]]:
    """Name, label, probability and image of each image in a part of the gallery."""
    found: list[dict[str, Any]] = shown.eval_on_selector_all(
        f"#{part} .images > li",
        """items => items.map(item => ({
            name: item.querySelector(".name bdi").textContent,
            label: item.querySelector(".answer bdi").textContent,
            probability: item.querySelector(".answer .number").textContent,
            image: item.querySelector("img")?.src,
            alt: item.querySelector("img")?.alt,
            gone: item.querySelector(".gone")?.textContent}))""",
    )
    return found


def visible_names(shown: Page) -> list[str]:
    return shown.locator(".part .images > li:visible .name bdi").all_text_contents()


def write_summary(output: Path, **changes: Any) -> None:
    """Change fields of a job's summary."""
    summary = json.loads((output / "summary.json").read_bytes()) | changes
    (output / "summary.json").write_text(json.dumps(summary))


# ── what it says ──────────────────────────────────────────────────────────────────────────────────


def test_the_figures_are_those_of_the_rows(reported: Reported, opened: Pages) -> None:
    """Counts, classes, certainty and failures are what anybody counts in predictions/."""
    rows = reported.rows
    ok = [row for row in rows if row["status"] == "ok"]
    shown = opened(reported.report)
    shown_values = dict(
        zip(
            shown.locator(".figures dt").all_text_contents(),
            shown.locator(".figures dd").all_text_contents(),
            strict=True,
        )
    )
    assert shown_values["Classified"].startswith(
        f"{len(ok)}{100 * len(ok) / len(rows):.1f} % of {len(rows)} images"
    )
    assert shown_values["Failed"].startswith(str(len(rows) - len(ok)))
    counts = Counter(row["class_id"] for row in ok)
    assert shown_values["Classes seen"].startswith(f"{len(counts)}of {CLASSES}")
    table = [
        line.split("\t")
        for line in shown.locator(".classes tbody").inner_text().splitlines()
        if "\t" in line
    ]
    assert [int(line[1]) for line in table] == sorted(counts.values(), reverse=True)
    shown.locator("#certainty ~ details summary").click()
    histogram = shown.locator("#certainty ~ details tbody td:nth-child(2)").all_text_contents()
    assert [int(cell) for cell in histogram] == np.histogram(
        [row["probability"] for row in ok], 20, (0, 1)
    )[0].tolist()
    failed = Counter(row["status"] for row in rows if row["status"] != "ok")
    section = shown.locator("section:has(> #failures)")
    order = sorted(failed.items(), key=lambda item: (-item[1], item[0]))
    told_failed = [text.split() for text in section.locator("tbody tr").all_inner_texts()]
    assert told_failed == [
        [status, str(count), f"{100 * count / len(rows):.2f}", "%"] for status, count in order
    ]
    assert (
        section.locator("details")
        .all_inner_texts()[0]
        .startswith("not_an_image: 8 of 12, at random")
    )
    assert "broken/half.jpg" in section.text_content()  # type: ignore[operator]


def test_tables_of_classes_name_both_things_of_their_first_column() -> None:
    """A label and a number need a heading that says which number it is."""
    template = Path(page.__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    tables = re.findall(r"{% call table.*?{% endcall %}", template, re.DOTALL)
    of_classes = [table for table in tables if ".class_id }}</span>" in table]
    assert len(of_classes) == 2
    assert all('["Class and id", ' in table for table in of_classes)


def test_the_gallery_shows_both_ends_and_a_sample(reported: Reported, opened: Pages) -> None:
    """The surest and least sure images are those that sorting all rows finds; the sample is of the
    others, and all are labelled.
    """
    ok = [row for row in reported.rows if row["status"] == "ok"]
    shown = opened(reported.report)
    by_name = {page.visible(row["path"]): row for row in ok}
    found = {part: cards(shown, part) for part in ("most", "least", "sample")}
    most = sorted(ok, key=lambda row: (-row["probability"], row["index"]))[:24]
    least = sorted(ok, key=lambda row: (row["probability"], row["index"]))[:24]
    assert [card["name"] for card in found["most"]] == [page.visible(row["path"]) for row in most]
    assert [card["name"] for card in found["least"]] == [page.visible(row["path"]) for row in least]
    assert len({card["name"] for part in found.values() for card in part}) == 24 + 24 + 48
    for card in (card for part in found.values() for card in part):
        assert card["label"] == page.visible(by_name[card["name"]]["label"])
        assert float(card["probability"].strip("<> %")) == pytest.approx(
            100 * by_name[card["name"]]["probability"], abs=0.1
        )


def test_thumbnails_are_their_images(reported: Reported, opened: Pages) -> None:
    """Each thumbnail is what the model saw of the image it stands for, and of no other."""
    recipe = TINY_CARD.recipe
    seen = {}
    for row in reported.rows:
        if row["status"] == "ok":
            pixels = decode((reported.source / row["path"]).read_bytes(), recipe, Limits()).pixels
            assert pixels is not None
            seen[page.visible(row["path"])] = pixels.astype(int)
    shown = opened(reported.report)
    gallery = [card for part in ("most", "least", "sample") for card in cards(shown, part)]
    assert len(gallery) == 96
    for card in gallery:
        pixels = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(card["image"].partition(",")[2]))), int
        )
        distances = {name: np.abs(pixels - others).mean() for name, others in seen.items()}
        assert min(distances, key=lambda name: distances[name]) == card["name"]
        assert distances[card["name"]] < 12
        assert card["alt"] == f"The model's view of {card['name']}"
    assert shown.evaluate(
        "[...document.images].every(image => image.complete && image.naturalWidth === 32)"
    )


@given(st.integers(1, 40), st.integers(0, 3))
def test_any_cut_into_shards_gives_the_same_figures(
    reported: Reported, size: int, seed: int
) -> None:
    """Heaps and sample are kept part by part; they are what the whole at once would give."""
    keys = np.random.default_rng(seed).integers(0, 9, 137).astype(np.float64)
    kept, whole = figures._Smallest(11), figures._Smallest(11)
    for start in range(0, 137, size):
        kept.offer(keys[start : start + size], np.arange(start, min(start + size, 137)))
    whole.offer(keys, np.arange(137))
    assert (
        kept.indices.tolist()
        == whole.indices.tolist()
        == np.lexsort((np.arange(137), keys))[:11].tolist()
    )


def test_the_random_sample_is_uniform() -> None:
    """Whatever the seed, every image has the same chance: chi-squared over a thousand samples of
    ten out of a hundred.
    """
    counts = np.zeros(100)
    for seed in range(1000):
        counts[np.argsort(figures.shuffled(np.arange(100), seed * 0x1234567890AB))[:10]] += 1
    assert (
        (counts - 100) ** 2 / 90
    ).sum() < 160  # 99.99 % of chi-squared with 99 degrees of freedom


def test_many_classes_are_in_a_fold_and_the_least_certain_are_named(
    models_dir: Path, tmp_path: Path
) -> None:
    """The table has the ten most frequent classes, the fold all. A class of two images says too
    little to be called uncertain.
    """
    labels = [f"class {letter}" for letter in "abcdefghijkl"]
    ids = [n for n in range(12) for _ in range(14 - n)]
    names = [f"{number:03d}.jpg" for number in range(len(ids))]
    source = helpers.fill(tmp_path / "source", dict.fromkeys(names, b"x"))
    job = made_jobs.made_job(
        made_jobs.settings_of(source, output=tmp_path / "out", models_dir=models_dir),
        made_jobs.tiny(models_dir),
        lambda path: (ids[int(path[:3])], 0.9 - ids[int(path[:3])] / 20),
        labels,
    )
    found = figures.gather(job)
    assert [item.label for item in found.classes] == labels
    assert (found.classes_seen, found.other_images) == (12, 4 + 3)
    assert [item.class_id for item in found.uncertain_classes] == [11, 10, 9, 8, 7]
    shown = [*found.most_certain, *found.least_certain, *found.sample]
    nothing = {image.index: thumbnails.Thumbnail(reason="not made") for image in shown}
    text = page.render(job, None, found, figures.Accuracy(None), nothing).decode()
    table, _, fold = text.partition('<ol class="all">')
    assert "All 12 classes seen, with their images" in table
    assert table.count('class="quiet id"') == 10
    assert re.findall("<bdi>(.*?)</bdi>", fold.partition("</ol>")[0]) == labels


def test_provenance_is_all_there(reported: Reported, opened: Pages) -> None:
    """Model and its hash, licence and origin, settings, sources, versions and machine are on
    the page.
    """
    frozen = OpenJob.open(reported.output).frozen
    shown = opened(reported.report)
    shown.click(".provenance > summary")
    text = shown.locator("section:has(> #provenance)").inner_text()
    card = frozen.job.session.card
    named = (
        card.sha256,
        card.licence,
        str(reported.source),
        "source: file",
        "null",
        "Pillow".lower(),
    )
    for value in (
        *named,
        *json.loads((reported.output / "summary.json").read_bytes())["machine"].values(),
    ):
        assert value in text, value


def test_the_accuracy_check_is_shown_if_a_precision_was_checked(
    reported: Reported, copy_of: Callable[[Path], Path], opened: Pages
) -> None:
    """Comparison, agreement, interval and speed-up of each faster precision that the card knows."""
    output = copy_of(reported.output)
    job = json.loads((output / "job.json").read_bytes())
    session = job["job"]["session"]
    model = shutil.copytree(Path(session["model_file"]).parent, output.parent / "model")
    session["model_file"] = str(model / "model.onnx")
    (output / "job.json").write_text(json.dumps(job))
    comparison = variants.Comparison(
        images=1000,
        agreement=0.978,
        wilson_low=0.967,
        wilson_high=0.9855,
        sure=900,
        flips_where_sure=3,
        mean_probability_difference=0.01,
        accepted=True,
        reason="<b>it agrees</b>",
        min_agreement=0.95,
        flips=(variants.Flip("<i>a.jpg", "tench", 0.75, "<b>carp", 0.5),),
    )
    record = variants.PrecisionRecord(
        comparison,
        "id",
        "sha256",
        {},
        "avx2",
        Recipe(),
        images_per_second=23.1,
        fp32_images_per_second=10.0,
    )
    variants.write(model, int8=record)
    assert helpers.imagemill_here("report", output).code == 0
    shown = opened(output / "report.html")
    rows = shown.locator("section:has(> #accuracy) tbody")
    assert rows.first.inner_text().split("\t") == [
        *("int8", "accepted: <b>it agrees</b>", "1,000", "97.80 %", "96.70 % to 98.55 %"),
        *("3 of 900", "0.0100", "2.31 ×"),
    ]
    shown.locator("section:has(> #accuracy) summary").click()
    assert rows.last.inner_text().split("\t") == [
        *("<i>a.jpg", "tench", "75.0 %", "<b>carp", "50.0 %")
    ]
    assert not opened(reported.report).locator("#accuracy").count()


@pytest.mark.parametrize(
    ("precision", "file", "reason", "found"),
    [
        ("int8", "int8-a.xml", "too few", ("used because of --precision int8", "ran in int8.")),
        ("int8", "int8-b.xml", "too few", None),
        ("int8", "int8-b.xml", "it agrees", ("int8\t", "replaced since.")),
        ("fp32", "model.onnx", "too few", None),
        ("fp32", "model.onnx", "it agrees", ("int8\t", "ran in fp32.")),
    ],
    ids=["its own", "of an older file", "of a newer file", "of another precision", "a verdict"],
)
def test_a_result_of_few_images_is_shown_only_to_the_job_that_used_it(
    reported: Reported,
    copy_of: Callable[[Path], Path],
    precision: str,
    file: str,
    reason: str,
    found: tuple[str, str] | None,
) -> None:
    """A job in fp32 has nothing to do with them, nor a job with an int8 file that was replaced. A
    result on enough images is shown, with the right answers that `--truth` found.
    """
    output = copy_of(reported.output)
    job = json.loads((output / "job.json").read_bytes())
    session = job["job"]["session"]
    model = shutil.copytree(Path(session["model_file"]).parent, output.parent / "model")
    session |= {"model_file": str(model / file), "precision": precision}
    (output / "job.json").write_text(json.dumps(job))
    true = variants.TrueAccuracy("folders", 900, 0.912, 0.9)
    accepted = reason == "it agrees"
    reason = f"{variants.TOO_FEW}: 50" if reason == "too few" else reason
    comparison = variants.Comparison(
        *(50, 0.9, 0.8, 0.95, 40, 1, 0.01, accepted, reason, 0.97), true=true
    )
    record = variants.PrecisionRecord(
        comparison, "id", "sha256", {}, "avx2", Recipe(), file="int8-a.xml"
    )
    variants.write(model, int8=record)
    assert helpers.imagemill_here("report", output).code == 0
    text = (output / "report.html").read_text()
    assert ('<h2 id="accuracy">' in text) == (found is not None)
    section = text.partition('<h2 id="accuracy">')[2].partition("</section>")[0]
    plain = re.sub(r"<[^>]*>", "", section.replace("</th>", "\t"))
    assert found is None or all(part in plain for part in found), plain
    assert found is None or "90.0 %, fp32 91.2 %" in plain


def test_speed_is_shown_per_device(
    reported: Reported, copy_of: Callable[[Path], Path], opened: Pages
) -> None:
    """A line for all and for each device, whose numbers add up to the job's rows; and where each
    device's time went. A job of less than two seconds has none of it: the axis would repeat itself.
    """
    output = copy_of(reported.output)
    for seconds in (60.0, 0.3):
        write_summary(output, seconds=seconds)
        page_file = output.parent / f"{seconds:g}.html"
        assert helpers.imagemill_here("report", output, "--output", page_file).code == 0
    short = opened(output.parent / "0.3.html")
    assert "164 images in 0.3 s" in short.locator("section:has(> #figures)").inner_text()
    assert not short.locator("#speed, [href='#speed']").count()
    shown = opened(output.parent / "60.html")
    axes = shown.locator("section:has(> #speed) .axis").all_inner_texts()
    assert axes == ["images/s", "time since the start"]
    assert shown.locator("#speed ~ .legend").first.inner_text().split() == [
        "all",
        "devices",
        "null#0",
        "null#1",
    ]
    summary = json.loads((reported.output / "summary.json").read_bytes())
    made = sum(map(sum, summary["throughput"]["images"]))
    assert made == pytest.approx(len(reported.rows), abs=0.05 * 2 * BUCKETS)
    assert shown.locator(".devices tbody th").all_text_contents() == ["null#0", "null#1"]
    for cells in shown.locator(".devices tbody tr").all():
        shares = [
            float(text.strip("<> %")) for text in cells.locator("td").all_text_contents()[3:7]
        ]
        assert sum(shares) == pytest.approx(100, abs=0.5)


def test_a_job_that_is_not_finished_says_so(
    job: Jobs, jpegs: Callable[..., Path], tmp_path: Path, opened: Pages
) -> None:
    """The page is about the rows there are, and names the ones that lack. The speed of a job of
    several goes is that of its last one.
    """
    settings = job(jpegs(12), shard_size=4, report=True)
    run.run(settings)
    part = tmp_path / "out" / "predictions" / "part-000001.parquet"
    part.unlink()
    assert helpers.imagemill_here("report", tmp_path / "out").code == 0
    shown = opened(tmp_path / "out" / "report.html")
    assert "8 of 12 images have their row" in shown.locator(".note").inner_text()
    run.run(settings)
    shown = opened(tmp_path / "out" / "report.html")
    assert not shown.locator(".note").count()
    assert re.search(r"\b4 images in [\d.]+ s", shown.locator(".figures").first.inner_text())
    write_summary(tmp_path / "out", seconds=60.0)
    assert helpers.imagemill_here("report", tmp_path / "out").code == 0
    shown = opened(tmp_path / "out" / "report.html")
    assert "added 4 of 12 images" in shown.locator("section:has(> #speed)").inner_text()
    (tmp_path / "out" / "summary.json").unlink()
    run.run(settings)
    assert not opened(tmp_path / "out" / "report.html").locator("#speed").count()


def test_a_job_without_answers_and_one_of_one_image_have_a_page(
    job: Jobs, tmp_path: Path, opened: Pages
) -> None:
    """Nothing divides by zero, and a job of few images has one gallery, without strip, search and
    histogram.
    """
    run.run(
        job(
            helpers.fill(tmp_path / "bad", {"x.jpg": b"text"}),
            report=True,
            output=str(tmp_path / "b"),
        )
    )
    shown = opened(tmp_path / "b" / "report.html")
    assert shown.get_by_text("No image has a class.").count() == 1
    assert shown.get_by_text("No image has a result.").count() == 1
    run.run(
        job(
            helpers.fill(tmp_path / "one", {"x.jpg": sample_images.jpeg()}),
            report=True,
            output=str(tmp_path / "c"),
        )
    )
    write_summary(tmp_path / "c", seconds=0.5)  # however busy the machine is
    assert helpers.imagemill_here("report", tmp_path / "c").code == 0
    shown = opened(tmp_path / "c" / "report.html")
    assert len(cards(shown, "sample")) == 1
    assert shown.locator(".part h3").all_inner_texts() == ["All images"]
    assert shown.locator("h2").all_inner_texts() == [
        *("Figures", "Gallery", "Classes", "Failures", "Provenance")
    ]
    assert not shown.locator(".strip, #filter, svg.plot").count()


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=9))
def test_numbers_side_by_side_have_the_same_decimals(values: list[float]) -> None:
    """Whatever the figures are: times of one table have one unit, and ticks and shares as many
    decimals.
    """
    assert len({text.split()[1] for text in page._times(values)}) == 1
    top = charts.ceiling(max(values))
    for texts in (
        [text.split()[0].replace(":", ".") for text in page._times(values)],
        page._ticks([top * part / 4 for part in range(5)]),
        [page._percent(value / 1e6).strip("<> %") for value in (0.0, *values, 1e6)],
    ):
        assert len({len(text.partition(".")[2]) for text in texts}) == 1, texts


def test_only_what_leads_alone_is_called_most_frequent(
    models_dir: Path, tmp_path: Path, jpegs: Callable[..., Path]
) -> None:
    """Of classes or failures that tie, none is named."""
    for ids, leads in (([3, 3, 4, 4, 5], False), ([3, 3, 3, 4, 4], True), ([1, 2, 3, 4, 5], False)):
        output = tmp_path / "".join(map(str, ids))
        answers = iter([(class_id, 0.5) for class_id in ids])
        job = made_jobs.made_job(
            made_jobs.settings_of(jpegs(5), output=output, models_dir=models_dir),
            made_jobs.tiny(models_dir),
            lambda _, answers=answers: next(answers),
            list("abcdefgh"),
        )
        found = figures.gather(job)
        failed = {"corrupt": 3 if leads else 2, "empty": 2}
        text = page.render(
            job,
            None,
            replace(found, images=9, failed_by_status=failed, examples=dict.fromkeys(failed, ())),
            figures.Accuracy(None),
            {image.index: thumbnails.Thumbnail(reason="not made") for image in found.sample},
        ).decode()
        assert ("most often <bdi>d</bdi>" in text) == leads
        assert ("most often <bdi>corrupt</bdi>" in text) == leads


# ── that it harms nobody ──────────────────────────────────────────────────────────────────────────


def test_the_page_opens_from_disk_and_asks_for_nothing(reported: Reported, opened: Pages) -> None:
    """One file, no request, nothing on the console; and at most a few MB."""
    shown = opened(reported.report)
    assert shown.title() == "164 images, tiny – imagemill report"
    assert shown.locator("#shown").inner_text() == "96 of 96 images shown"
    assert "96 of the 150 images" in shown.locator("section:has(> #gallery)").inner_text()
    assert "Search this sample" in shown.locator("#filter").inner_text()
    words = shown.locator("body").inner_text().lower()
    for internal in ("plan id", "session", "lease", "commit"):
        assert internal not in words
    assert reported.report.stat().st_size < 3_000_000
    assert "http" not in reported.report.read_text(encoding="utf-8").replace("http-equiv", "")


@pytest.mark.parametrize("with_policy", [True, False])
def test_hostile_names_labels_and_errors_are_inert(
    reported: Reported, opened: Pages, tmp_path: Path, with_policy: bool
) -> None:
    """They are shown as the text they are: escaping alone holds, and the page's own policy is a
    second wall.
    """
    html = reported.report.read_text(encoding="utf-8")
    if not with_policy:
        before, policy, after = html.partition('<meta http-equiv="Content-Security-Policy"')
        assert policy
        html = before + after.partition(">")[2]
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    shown = opened(tmp_path / "page.html")
    ours = (page._HERE / "page.js").read_text(encoding="utf-8")
    assert shown.eval_on_selector_all(
        "script", "found => found.map(script => script.textContent)"
    ) == [ours]
    assert shown.locator("style").count() == 1
    assert shown.evaluate(
        "[...document.images].every(image => image.src.startsWith('data:image/webp;base64,'))"
    )
    assert not shown.evaluate(
        "[...document.querySelectorAll('*')].some(e => [...e.attributes].some(a =>"
        " a.name.startsWith('on')))"
    )
    assert shown.evaluate(
        "[...document.links].every(link => link.getAttribute('href').startsWith('#'))"
    )
    text = shown.locator("body").text_content()
    assert text is not None
    classes = shown.locator(".classes").text_content()
    assert classes is not None
    for label in {page.visible(row["label"]) for row in reported.rows if row["label"]}:
        assert label in classes
    for error in ("<svg onload=alert(4)>", "b'<i onclick"):
        assert error in text
    assert not set(text) & {"\u202e", "\x1b", "\t", "\u2028"} - {"\t"}


def test_any_text_is_shown_as_visible_text() -> None:
    """What cannot be seen or turns the direction is spelt out, what is endless is shortened, and
    what is plain stays.
    """
    assert page.visible("crème brûlée 图片 <b>&amp;</b>") == "crème brûlée 图片 <b>&amp;</b>"
    assert page.visible("a\u202eb\nc\x00\ud800") == "a\\u202eb\\nc\\x00\\ud800"
    assert len(page.visible("x" * 10_000)) < 450


def test_each_hostile_name_is_in_the_gallery_as_it_is(
    models_dir: Path, job: Jobs, tmp_path: Path, opened: Pages
) -> None:
    """In names, alternative texts and tooltips; searching for one finds it."""
    folder = helpers.fill(
        tmp_path / "in <i>",
        {name: sample_images.jpeg(seed=n) for n, name in enumerate(HOSTILE_NAMES)},
    )
    run.run(job(folder, report=True))
    shown = opened(tmp_path / "out" / "report.html")
    names = [card["name"] for part in ("most", "least", "sample") for card in cards(shown, part)]
    assert sorted(names) == sorted(page.visible(name) for name in HOSTILE_NAMES)
    for name in names:
        shown.fill("#text", name)
        assert visible_names(shown) == [name]


def test_a_policy_lets_nothing_but_its_own_script_run(reported: Reported, browser: Browser) -> None:
    """Markup that gets into the page after all gets no further: neither script nor handler nor
    request.
    """
    html = reported.report.read_text(encoding="utf-8")
    evil = (
        "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'><img"
        " src='file:///etc/hostname'>"
    )
    shown = browser.new_page()
    messages: list[str] = []
    shown.on("console", lambda message: messages.append(message.text))
    shown.set_content(html.replace("</main>", f"{evil}</main>"))
    assert shown.evaluate("window.harmed") is None
    assert any("Content Security Policy" in line for line in messages)
    shown.close()


# ── that it can be used ───────────────────────────────────────────────────────────────────────────


def test_the_gallery_can_be_searched_and_filtered(reported: Reported, opened: Pages) -> None:
    """By name or label, by class, by part, and all three together; what fits is shown and counted,
    and Clear brings all back.
    """
    shown = opened(reported.report)
    everything = visible_names(shown)
    shown.fill("#text", "1/0")
    assert visible_names(shown) == [name for name in everything if "1/0" in name] != []
    shown.fill("#text", "")
    class_id, count = shown.eval_on_selector(
        "#class", "e => [e.options[1].value, Number(e.options[1].text.split(': ').pop())]"
    )
    shown.select_option("#class", class_id)
    rows = {page.visible(row["path"]): row for row in reported.rows}
    assert visible_names(shown) == [
        name for name in everything if rows[name]["class_id"] == int(class_id)
    ]
    assert shown.locator("#shown").inner_text() == f"{count} of 96 images shown"
    shown.select_option("#part", "sample")
    chosen = visible_names(shown)
    assert chosen == [
        card["name"]
        for card in cards(shown, "sample")
        if rows[card["name"]]["class_id"] == int(class_id)
    ]
    assert not shown.locator("#most").is_visible()
    shown.fill("#text", "no such image")
    assert visible_names(shown) == []
    assert shown.locator("#shown").inner_text() == "0 of 96 images shown"
    shown.click("#clear")
    assert visible_names(shown) == everything


def test_a_click_on_a_class_filters_the_gallery(reported: Reported, opened: Pages) -> None:
    """It replaces whatever else was asked for."""
    shown = opened(reported.report)
    shown.fill("#text", "no such image")
    shown.locator(".classes [data-pick]").first.click()
    rows = {page.visible(row["path"]): row for row in reported.rows}
    counts = Counter(row["class_id"] for row in reported.rows if row["status"] == "ok")
    assert {rows[name]["class_id"] for name in visible_names(shown)} == {
        min(counts, key=lambda class_id: (-counts[class_id], class_id))
    }
    assert shown.evaluate("location.hash") == "#gallery"


def test_an_image_opens_larger(reported: Reported, opened: Pages) -> None:
    """With its whole path, its five most probable classes, and a button that copies the path, by
    mouse and keyboard.
    """
    shown = opened(reported.report)
    row = max(
        (row for row in reported.rows if row["status"] == "ok"),
        key=lambda row: (row["probability"], -row["index"]),
    )
    shown.locator("#most img").first.press("Enter")
    assert shown.locator("#content .name").inner_text() == (
        f"{page.visible(row['path'])} in {reported.source}"
    )
    labels = shown.locator("#content .answer bdi, #content .next bdi").all_text_contents()
    assert labels == [page.visible(answer["label"]) for answer in row["top_k"]]
    assert shown.locator("#content img").bounding_box()["width"] > 300  # type: ignore[index]
    shown.evaluate(
        "() => { navigator.clipboard.writeText = async (text) => { window.copied = text; }; }"
    )
    shown.click("#copy")
    shown.get_by_text("Copied").wait_for()
    assert shown.evaluate("window.copied") == page.visible(row["path"])
    shown.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject('denied'); }")
    shown.click("#copy")
    shown.get_by_text("Selected: press").wait_for()
    assert shown.evaluate("getSelection().toString()") == page.visible(row["path"])
    assert Axe().run(shown).response["violations"] == []
    shown.keyboard.press("Escape")
    assert not shown.locator("#large").is_visible()


def test_a_truncated_image_shows_what_could_be_decoded(
    job: Jobs, tmp_path: Path, opened: Pages
) -> None:
    """The upper half is the image, and the rest is one colour."""
    halves = {"half.jpg": sample_images.half(sample_images.jpeg(300, 200))}
    whole = io.BytesIO()
    Image.open(io.BytesIO(sample_images.jpeg(300, 200))).save(whole, "PNG")
    halves["half.png"] = sample_images.half(whole.getvalue())
    run.run(job(helpers.fill(tmp_path / "source", halves), report=True))
    shown = opened(tmp_path / "out" / "report.html")
    for name in halves:
        image = shown.locator(".examples li", has_text=name).locator("img")
        data = str(image.get_attribute("src")).partition(",")[2]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), float)
        assert pixels[:10].std() > 2 * pixels[-8:].std(), name


SHOWN = ("JPEG", "PNG", "GIF", "BMP", "PPM", "PSD", "PCX", "TGA", "TIFF")
NOT_SHOWN = ("WEBP", "WEBP lossless", "AVIF", "QOI", "TIFF LZW", "TIFF deflate", "JPEG2000")


def test_formats_whose_truncated_images_are_shown_are_documented(job: Jobs, tmp_path: Path) -> None:
    """A thumbnail of one colour would show nothing."""
    files = {name: encoded.SAMPLES[name]() for name in (*SHOWN, *NOT_SHOWN)}
    files = {f"{name}.jpg": data[: len(data) * 4 // 5] for name, data in files.items()}
    run.run(job(helpers.fill(tmp_path / "source", files)))
    opened = OpenJob.open(tmp_path / "out")
    rows = figures.read_rows(opened, range(len(files)))
    assert {row.status for row in rows.values()} == {"truncated"}
    made = thumbnails.make(opened, list(rows.values()))
    shown = {Path(row.path).stem for row in rows.values() if made[row.index].webp}
    assert shown == set(SHOWN)
    text = " ".join((helpers.PROJECT / "docs" / "report.md").read_text(encoding="utf-8").split())
    assert "JPEG, PNG, GIF, BMP, PPM, PSD, PCX, TGA and TIFF without compression. WebP, " in text


def test_the_keyboard_reaches_everything(reported: Reported, opened: Pages) -> None:
    """The first stop skips to the figures; every control, link and table that scrolls is a stop,
    with a visible focus.
    """
    shown = opened(reported.report, width=360)
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.className") == "skip"
    assert shown.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    shown.keyboard.press("Enter")
    assert shown.evaluate("location.hash") == "#main"
    stops = set()
    for _ in range(90):
        shown.keyboard.press("Tab")
        name, outline = shown.evaluate(
            "[document.activeElement.id || document.activeElement.tagName,"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        if name != "BODY":
            stops.add(name)
            assert outline != "none", name
    assert {"text", "class", "part", "clear", "IMG", "SUMMARY", "DIV"} <= stops
    shown.focus("#text")
    shown.keyboard.type("half")
    shown.keyboard.press("Enter")
    assert shown.locator("#shown").inner_text() == "0 of 96 images shown"


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_an_accessibility_check_finds_nothing_serious(
    reported: Reported, opened: Pages, width: int, scheme: Any
) -> None:
    """axe-core has no finding at all, with everything unfolded, on a phone and on a desk, dark and
    light.
    """
    shown = opened(reported.report, width=width, color_scheme=scheme)
    shown.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    found = Axe().run(shown).response["violations"]
    assert [
        (item["id"], item["impact"], [node["target"] for node in item["nodes"]][:3])
        for item in found
    ] == []


@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_overflows_a_phone(reported: Reported, opened: Pages, width: int) -> None:
    """Neither the page nor anything on it is wider than the screen; wide tables scroll by
    themselves.
    """
    shown = opened(reported.report, width=width)
    shown.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    beyond = shown.evaluate(
        f"""[...document.body.querySelectorAll("*")].filter(e => !e.closest(".scroll :scope, .scroll *, svg *") && e.className !== "skip"
            && e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert beyond == []


def test_a_phone_shows_images_side_by_side_and_that_tables_scroll(
    reported: Reported, opened: Pages
) -> None:
    """Each part of the gallery is two rows that scroll sideways, and a table has a shade where it
    goes on, and a line that says so.
    """
    shown = opened(reported.report, width=390)
    hint = "getComputedStyle(document.querySelector('.scroll:has(> .classes)'), '::before').content"
    assert shown.locator("section:has(> #figures) .strip > li").count() == 8
    assert shown.get_by_role("heading", name="Some of the images").is_visible()
    for part in ("most", "least", "sample"):
        assert shown.evaluate(
            f"""(() => {{
                const list = document.querySelector("#{part} ul"), found = [...list.children];
                const rows = new Set(found.map(item => item.getBoundingClientRect().top));
                return [rows.size, list.scrollWidth > 2 * list.clientWidth];
            }})()"""
        ) == [2, True]
    assert "gradient" in shown.evaluate(
        "getComputedStyle(document.querySelector('div.scroll')).backgroundImage"
    )
    assert "Scroll sideways" in shown.evaluate(hint)
    shown.set_viewport_size({"width": 1280, "height": 800})
    assert shown.evaluate(hint) == "none"


def reported_names(job: Jobs, folder: Path, names: list[str]) -> Path:
    """Return the report of a job with images of these names."""
    images = {name: sample_images.jpeg(seed=seed) for seed, name in enumerate(names)}
    run.run(job(helpers.fill(folder / "source", images), report=True))
    return folder / "out" / "report.html"


@pytest.mark.parametrize("width", [390, 1280])
def test_names_tell_images_apart(job: Jobs, tmp_path: Path, opened: Pages, width: int) -> None:
    """A name of 48 characters is shown whole. A longer one is shortened in its middle: its end stays,
    and the tooltip has all of it.
    """
    names = [
        "short.jpg",
        "imagenet-sample/n02114548_white_wolf.JPEG",
        *(f"2026/a folder with a long name/another one of that kind/{n}/0001.jpg" for n in "ab"),
        f"{'long' * 20}, version 17 of it.jpg",
    ]
    shown = opened(reported_names(job, tmp_path, names), width=width)
    found = shown.eval_on_selector_all(
        ".images .name",
        """names => names.map(name => {
            const head = name.querySelector(".head"), box = name.getBoundingClientRect();
            const tail = (name.querySelector(".tail") ?? name).getBoundingClientRect();
            return [name.title, name.textContent, Boolean(head),
                    tail.right <= box.right + 0.5 && tail.bottom <= box.bottom + 0.5
                    && box.height <= 6 * parseFloat(getComputedStyle(name).lineHeight)];
        })""",
    )
    assert sorted(name for name, *_ in found) == sorted(names)
    for title, text, has_head, is_end_inside in found:
        assert (text, is_end_inside) == (title, True)
        assert has_head == (len(title) > 48), title


@pytest.mark.parametrize("width", [390, 1280])
def test_names_are_broken_between_words(
    job: Jobs, tmp_path: Path, opened: Pages, width: int
) -> None:
    """Below its image, and shortened or not. Only a word that is longer than a line is broken."""
    names = [
        "imagenet-sample/n02114548_white_wolf.JPEG",
        "IMG_20240817_153012_in_the_mountains_with_everybody_panorama_edited_version_2.jpg",
        "2026/holiday in the mountains/second camera of the family/white_wolf_mirrored.jpg",
        f"{'long' * 8}.jpg",
    ]
    shown = opened(reported_names(job, tmp_path, names), width=width)
    broken = shown.evaluate(
        """[...document.querySelectorAll(".images .name")].flatMap(name => {
            const texts = document.createTreeWalker(name, NodeFilter.SHOW_TEXT), found = [];
            for (let text = texts.nextNode(); text; text = texts.nextNode())
                for (const word of text.data.matchAll(/[^/_ -]+/g)) {
                    const range = document.createRange();
                    range.setStart(text, word.index);
                    range.setEnd(text, word.index + word[0].length);
                    if (range.getClientRects().length > 1) found.push(word[0]);
                }
            return found;
        })"""
    )
    assert broken == [names[-1]]


def test_a_list_of_images_is_one_stop_of_the_tab_key(reported: Reported, opened: Pages) -> None:
    """Arrow keys, Home and End move within it; Tab comes back to the image that they moved to. If a
    filter hides that one, the first image that is left is the stop.
    """
    shown = opened(reported.report)
    stops = "[...document.querySelectorAll('.images, .examples')].map(list => list.querySelectorAll('img[tabindex=\"0\"]').length)"
    assert set(shown.evaluate(stops)) <= {0, 1}
    images = shown.locator("#most .images > li img")
    focused = "document.querySelectorAll('#most .images > li img')[{}] === document.activeElement"
    images.first.focus()
    for key, place in {
        "ArrowRight": 1,
        "ArrowDown": 9,
        "ArrowLeft": 8,
        "End": 23,
        "Home": 0,
    }.items():
        shown.keyboard.press(key)
        assert shown.evaluate(focused.format(place)), key
    shown.keyboard.press("ArrowLeft")
    shown.keyboard.press("ArrowRight")
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.closest('#least') !== null")
    shown.keyboard.press("Shift+Tab")
    assert shown.evaluate(focused.format(1))
    assert set(shown.evaluate(stops)) <= {0, 1}
    name = cards(shown, "most")[5]["name"]
    shown.fill("#text", name)
    assert images.nth(5).get_attribute("tabindex") == "0"
    assert images.nth(1).get_attribute("tabindex") == "-1"


def test_failures_name_the_next_step(
    reported: Reported, copy_of: Callable[[Path], Path], opened: Pages
) -> None:
    """How to try again, where the paths are, and the package that would read some of the images.
    The page of an unfinished job, which has no such list yet, says how to continue.
    """
    output = copy_of(reported.output)
    summary = json.loads((output / "summary.json").read_bytes()) | {"extras": {"heif": 1}}
    (output / "summary.json").write_text(json.dumps(summary))
    assert helpers.imagemill_here("report", output).code == 0
    section = opened(output / "report.html").locator("section:has(> #failures)").inner_text()
    for step in ("run the same command with --retry-failed", "failed.txt", "1 failed image can"):
        assert step in section
    assert "pip install 'imagemill[heif]', then --retry-failed=unsupported" in section
    (output / "summary.json").unlink()
    (output / "predictions" / "part-000000.parquet").unlink()
    assert helpers.imagemill_here("report", output).code == 0
    shown = opened(output / "report.html")
    assert "failed.txt" not in shown.locator("section:has(> #failures)").inner_text()
    assert "Run the same command again" in shown.locator(".note").inner_text()


def test_light_and_dark_follow_the_system_and_the_reader(reported: Reported, opened: Pages) -> None:
    """The system's choice holds until the reader makes another one; print is always dark on light,
    without controls.
    """
    shown = opened(reported.report, color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = shown.evaluate(paper)
    shown.select_option("#theme", "light")
    light = shown.evaluate(paper)
    assert light == "rgb(255, 255, 255)" != dark
    shown.select_option("#theme", "dark")
    assert shown.evaluate(paper) == dark
    shown.emulate_media(media="print")
    assert shown.evaluate(paper) == light
    for hidden in ("nav", "#filter", "#theme"):
        assert not shown.locator(hidden).is_visible()
    assert shown.locator(".images img").first.is_visible()
    assert opened(reported.report, color_scheme="light").evaluate(paper) == light


def test_paper_gets_what_paper_can_use(reported: Reported, opened: Pages) -> None:
    """In print nothing is there to be clicked, it is light even in the dark, lists of failures say
    of what, and no footer is repeated.
    """
    shown = opened(reported.report, width=680, color_scheme="dark")
    shown.emulate_media(media="print")
    for useless in ("nav", ".filter", ".appearance", "details:not([open])"):
        assert not any(found.is_visible() for found in shown.locator(useless).all()), useless
    assert shown.locator("details[open] summary", has_text="not_an_image").is_visible()
    assert shown.locator(".part img").first.is_visible()
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    foot = (  # this job has too few classes for one
        "getComputedStyle(document.querySelector('.classes').createTFoot()).display"
    )
    assert shown.evaluate(foot) == "table-row-group"
    assert shown.evaluate("document.documentElement.scrollWidth") <= 680, (
        "wider than A4 between its margins"
    )


def test_without_scripts_everything_is_there(reported: Reported, opened: Pages) -> None:
    """Controls that would do nothing are hidden; all images and tables are shown."""
    shown = opened(reported.report, java_script_enabled=False)
    assert shown.locator(".part .images > li").count() == 96
    assert shown.locator(".part .next").first.is_visible()
    assert not shown.locator("#filter").is_visible()
    assert not shown.locator("#appearance").is_visible()


# ── that making it harms nothing ──────────────────────────────────────────────────────────────────


def test_images_that_are_gone_changed_or_deadly_are_placeholders(
    job: Jobs, tmp_path: Path, opened: Pages
) -> None:
    """Each says why it has no thumbnail, and the others have theirs, though one crashes its decoder
    and one takes too long.
    """
    source = helpers.fill(
        tmp_path / "source", {f"{n}.jpg": sample_images.jpeg(60, 50, seed=n) for n in range(6)}
    )
    for name, data in {"crash": b"imagemill-test-crash", "slow": b"imagemill-test-alarm"}.items():
        (source / f"{name}.jpg").write_bytes(sample_images.jpeg(60, 50, seed=9) + data)
    run.run(job(source))
    assert not (tmp_path / "out" / "report.html").exists()
    (source / "0.jpg").unlink()
    (source / "1.jpg").write_bytes(sample_images.jpeg(90, 50, seed=50))
    (source / "2.jpg").write_bytes(b"text")
    result = helpers.imagemill_cli(
        "report", tmp_path / "out", env=helpers.environment(**helpers.faulty_decoders())
    )
    assert (result.code, result.out) == (0, f"{tmp_path / 'out' / 'report.html'}\n"), result
    shown = opened(tmp_path / "out" / "report.html")
    found = {
        card["name"]: card["gone"]
        for part in ("most", "least", "sample")
        for card in cards(shown, part)
    }
    reasons = {name: reason for name, reason in found.items() if reason}
    assert reasons.keys() == {"0.jpg", "1.jpg", "2.jpg", "crash.jpg", "slow.jpg"}
    wanted = {
        "0.jpg": "is gone",
        "1.jpg": "changed after",
        "2.jpg": "not a known image format",
        "crash.jpg": "SIGSEGV",
        "slow.jpg": "than 5 s",
    }
    for name, reason in wanted.items():
        assert reason in reasons[name]
    shutil.rmtree(source)
    assert helpers.imagemill_here("report", tmp_path / "out").code == 0


def test_a_source_that_never_answers_is_waited_for_no_longer_than_the_deadline(
    job: Jobs, tmp_path: Path
) -> None:
    """Images that come late are placeholders that say so."""
    source = helpers.fill(
        tmp_path / "source", {"a.jpg": sample_images.jpeg(), "b.jpg": sample_images.jpeg(seed=1)}
    )
    run.run(job(source))
    opened = OpenJob.open(tmp_path / "out")
    found = figures.gather(opened)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.jpg"
        frozen = replace(opened.frozen, job=replace(opened.frozen.job, sources=(url,)))
        made = thumbnails.make(replace(opened, first=frozen), found.sample, seconds=0.3)
    assert {made[shown_values.index].reason for shown_values in found.sample} == {
        "not ready within 0.3 s for all thumbnails"
    }


def test_a_report_that_cannot_be_made_is_a_note(
    imagemill: CLI, jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """The job is finished all the same, with exit code 0, and says how to try again; --no-report
    makes none.
    """
    arguments = (
        "run",
        jpegs(4),
        "--output",
        tmp_path / "out",
        "--model",
        "tiny",
        "--devices",
        "null",
    )
    assert imagemill(*arguments, "--no-report").code == 0
    assert not (tmp_path / "out" / "report.html").exists()
    (tmp_path / "out" / "report.html").mkdir()
    (tmp_path / "out" / "summary.json").unlink()
    result = imagemill(*arguments)
    assert result.code == 0
    assert "but the report could not be written: cannot write" in result.err
    assert f"`imagemill report {tmp_path / 'out'}` to try again" in result.err
    assert (tmp_path / "out" / "summary.json").is_file()
    failed = imagemill("report", tmp_path / "out")
    assert (failed.code, failed.err.count("\n")) == (1, 1), failed


def test_the_page_can_be_written_to_another_file(
    imagemill: CLI, reported: Reported, tmp_path: Path
) -> None:
    """`--output` leaves the job's own page alone; a folder that does not exist is one line."""
    before = reported.report.stat().st_mtime_ns
    result = imagemill("report", reported.output, "--output", tmp_path / "page.html")
    assert (result.code, result.out) == (0, f"{tmp_path / 'page.html'}\n")
    assert (tmp_path / "page.html").read_bytes().startswith(b"<!DOCTYPE html>")
    assert reported.report.stat().st_mtime_ns == before
    failed = imagemill("report", reported.output, "--output", tmp_path / "none" / "page.html")
    assert (failed.code, failed.err.count("\n")) == (1, 1), failed


def test_report_names_what_it_cannot_read(
    imagemill: CLI, reported: Reported, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    """A folder that is no job, and a damaged part, are one line and exit code 1."""
    assert "is not an imagemill job" in imagemill("report", tmp_path).err
    output = copy_of(reported.output)
    (output / "predictions" / "part-000003.parquet").write_bytes(b"PAR1")
    result = imagemill("report", output)
    assert result.code == 1
    assert "part-000003.parquet is damaged" in result.err


def test_a_job_in_an_object_store_has_its_report_there(
    s3: Bucket, jpegs: Callable[..., Path], job: Jobs, tmp_path: Path, opened: Pages
) -> None:
    """With thumbnails of images that lie in a store too."""
    url = s3.fill({path.name: path.read_bytes() for path in jpegs(6).iterdir()}, "images/")
    run.run(job(url, report=True, output=f"{s3.url}/job"))
    (tmp_path / "report.html").write_bytes(s3.get("job/report.html"))
    shown = opened(tmp_path / "report.html")
    assert shown.locator(".images img").count() == 6


# ── bounded, however large the job ────────────────────────────────────────────────────────────────


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.floats(0, 1e6), st.floats(0, 1e3), st.integers(1, 10_000)
        ),
        max_size=40,
    )
)
def test_a_timeline_keeps_every_row_in_a_bounded_number_of_buckets(
    commits: list[tuple[str, float, float, int]],
) -> None:
    """Whatever is committed when, per device the buckets hold the rows, and there are never more of
    them.
    """
    made: Counter[str] = Counter()
    for device, _, _, rows in commits:
        made[device] += rows
    kept = throughput(
        ["a", "b"],
        [
            Commit(device, ended_s - took_s, ended_s, rows)
            for device, ended_s, took_s, rows in commits
        ],
    )
    assert kept.devices == ("a", "b")
    assert len(kept.images[0]) == len(kept.images[1]) <= BUCKETS
    for device, images in zip(kept.devices, kept.images, strict=True):
        assert sum(images) == pytest.approx(made[device], abs=0.05 * BUCKETS + 1e-6)


def test_a_timeline_puts_rows_where_they_were_made() -> None:
    """A commit's rows lie in the time its shard took, also after buckets were merged."""
    kept = throughput(["a"], [Commit("a", 0.0, 2.0, 100), Commit("a", 14.0, 16.0, 60)])
    (images,) = kept.images
    assert (kept.bucket_s, sum(images[:4]), sum(images[4:28]), sum(images[28:])) == (
        0.5,
        100.0,
        0,
        60.0,
    )
    chart = charts.rates(kept, 16.0)
    assert chart is not None
    assert {values for start, _, values in chart.rows if start < 2} == {(50.0,)}
    assert chart.ticks == (50, 37.5, 25, 12.5, 0)


@given(st.floats(1e-6, 1e12))
def test_a_scale_ends_at_a_round_number_that_is_not_too_far(value: float) -> None:
    """The largest value fits and takes at least half of the height."""
    assert value <= charts.ceiling(value) * (1 + 1e-9) <= 2 * value * (1 + 1e-6)


def test_shares_of_time_add_up() -> None:
    """Whatever the clocks say, the pieces are one bar."""
    for clock, seconds in (
        (Clock(starved=1, compute=2, write=1), 10.0),
        (Clock(starved=9, compute=9, write=1), 10.0),
        (Clock(), 0.0),
    ):
        found = charts.shares(DeviceSummary("cpu#0", 1, 1.0, 0, clock), seconds)
        assert sum(share.width for share in found) in (pytest.approx(100, abs=0.01), 0.0)
    assert charts.rates(Throughput(1.0, (), ()), 1.0) is None


def test_thumbnails_of_the_worst_images_are_small() -> None:
    """Noise does not compress; even so ninety-six of them are no more than 2 MB."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    made = thumbnails.encode(noise)
    assert (made.width, made.height) == (224, 224)
    assert len(made.webp) <= 16_384
    odd = thumbnails.encode(np.arange(160 * 160 * 3, dtype=np.uint8).reshape(160, 160, 3))
    assert 0 < len(odd.webp) <= 16_384
    harsh = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (224, 224, 3))
    buffer = io.BytesIO()
    Image.fromarray(harsh).save(buffer, "WEBP", quality=thumbnails._QUALITIES[0])
    assert len(buffer.getvalue()) > 16_384, "no quality had to be given up"
    assert 0 < len(thumbnails.encode(harsh).webp) <= 16_384
