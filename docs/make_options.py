"""Write docs/options.md: every command with its options, as the parser declares them.

python docs/make_options.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from imagemill.cli import make_parser

PAGE = Path(__file__).parent / "options.md"
HEAD = """# Which options does each command have?

[README](../README.md)

This page is made from the program itself (`python docs/make_options.py`). It says what
`imagemill COMMAND --help` says. `imagemill --version` prints the version.
"""


def page() -> str:
    """Return the page as Markdown."""
    parser = make_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    texts = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    links = [f"[{name}](#imagemill-{name})" for name in commands.choices]
    parts = [HEAD, " ·\n".join(links), ""]
    for name, command in commands.choices.items():
        parts += [f"## imagemill {name}", "", f"{texts[name][:1].upper()}{texts[name][1:]}.", ""]
        first, rest = command._action_groups[:2], command._action_groups[2:]
        parts += [*rows(action for group in first for action in group._group_actions), ""]
        if name == "demo":
            parts += ["The other options are those of [run](#imagemill-run).", ""]
            continue
        for group in rest:
            title = str(group.title)
            parts += [f"**{title[:1].upper()}{title[1:]}**", "", *rows(group._group_actions), ""]
    return "\n".join(parts).rstrip() + "\n"


def rows(actions: Iterable[argparse.Action]) -> Iterator[str]:
    """Yield a table of arguments."""
    yield "| option | meaning |"
    yield "|---|---|"
    for action in actions:
        if action.dest == "help":
            continue
        values = "|".join(map(str, action.choices)) if action.choices else action.metavar
        value = " ".join(values) if isinstance(values, tuple) else values
        value = f" {value}" if value and action.nargs != 0 else ""
        flags = ", ".join(f"`{flag}{value}`" for flag in action.option_strings)
        text = (action.help or "").replace("%(default)s", str(action.default))
        named = flags or f"`{action.metavar or action.dest}`"
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in (named, text)) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
