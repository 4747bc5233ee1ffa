"""The labels and templates of `imagemill classes`, and the prompts that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from imagemill.errors import UsageError, counted, printable
from imagemill.models.labels import CONTROL, MAX_LABEL, read_labels, read_text

DEFAULT_TEMPLATE: Final = "a photo of a {}."
"""The template of CLIP's authors for images of things."""
MAX_PROMPTS: Final = 1_000_000
"""Labels times templates. A text tower of CLIP's size reads so many in a day."""
MAX_LABELS: Final = 100_000
"""ImageNet-21k has 21,843 classes. For 100,000 labels the last layer takes 200 MB or more."""
_PLACE: Final = "{}"


class Prompts(Struct, frozen=True):
    """Labels, and the templates that turn each of them into a text."""

    labels: tuple[str, ...]
    templates: tuple[str, ...]

    def of(self, template: str) -> list[str]:
        """Return one text per label, in their order.

        Example:
            >>> Prompts(("cat", "dog"), ("a photo of a {}.",)).of("a photo of a {}.")
            ['a photo of a cat.', 'a photo of a dog.']
        """
        before, after = template.split(_PLACE)
        return [f"{before}{label}{after}" for label in self.labels]


def read_prompts(labels_file: Path, templates: Sequence[str]) -> Prompts:
    """Read the labels, and check them and the templates.

    Args:
        labels_file: one label per line.
        templates: texts with one `{}` each, or `@FILE` for a file with one per line; if there are
            none, `DEFAULT_TEMPLATE`.

    Raises:
        UsageError: a file cannot be read or is empty; a text is there twice, too long, or has
            control characters; a template has no `{}` or several; there are too many.
    """
    labels = read_labels(labels_file)
    _check(f"--labels {labels_file}", labels)
    if len(labels) > MAX_LABELS:
        raise UsageError(
            f"--labels {labels_file} has {len(labels):,} labels; at most {MAX_LABELS:,} can be the"
            " classes of one model. Divide them into several files."
        )
    found: list[str] = []
    for template in templates or (DEFAULT_TEMPLATE,):
        if template.startswith("@") and _PLACE not in template:
            found += _read_templates(template)
        else:
            found.append(template)
    _check("--template", found)
    for template in found:
        if (places := template.count(_PLACE)) != 1:
            raise UsageError(
                f'--template "{printable(template)}" has {places or "no"} places for a label: write'
                ' {} once where the label goes, for example "a photo of a {}."'
            )
    if len(labels) * len(found) > MAX_PROMPTS:
        raise UsageError(
            f"{counted(len(labels), 'label')} in {counted(len(found), 'template')} are more than"
            f" {MAX_PROMPTS:,} texts. Use fewer templates."
        )
    return Prompts(labels, tuple(found))


def _read_templates(argument: str) -> list[str]:
    """Return the lines of the file of `--template @FILE` that are not blank."""
    remedy = "Give a text file in UTF-8 with one template per line."
    text = read_text(Path(argument[1:]), f"--template {printable(argument)}", remedy)
    lines = [line for line in text.split("\n") if line.strip()]
    _check(f"--template {argument}", lines)
    return lines


def _check(origin: str, texts: Sequence[str]) -> None:
    """Refuse labels that are equal to the model, or that do not fit on one line."""
    if not texts:
        raise UsageError(f"{origin} is empty. Write one per line.")
    lines: dict[str, int] = {}
    for number, text in enumerate(texts, 1):
        shown = printable(text, 60)
        if CONTROL.search(text):
            raise UsageError(f'{origin}: "{shown}" (line {number}) has control characters.')
        if len(text) > MAX_LABEL:
            raise UsageError(
                f'{origin}: "{shown}" (line {number}) has {len(text):,} characters; at most'
                f" {MAX_LABEL:,} are read."
            )
        if (first := lines.setdefault(text.strip(), number)) != number:
            raise UsageError(
                f'{origin}: "{shown}" is there twice (lines {first} and {number}). Delete one.'
            )
