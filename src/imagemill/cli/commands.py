"""The parser of the command line, with all commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from imagemill.cli import job, machine, models, results
from imagemill.cli.options import Call
from imagemill.cli.parser import Parser, PrintCompletion
from imagemill.version import __version__


def make_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser. `arguments` are what the user typed, for suggestions in errors."""
    parser = Parser(
        prog="imagemill",
        description="Classify images in bulk: folders in, one Parquet row per image out.",
        allow_abbrev=False,
    )
    parser.arguments = arguments
    parser.add_argument("--version", action="version", version=f"imagemill {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=["bash", "zsh", "fish"],
        help="print a script that completes commands, options and files in this shell",
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )

    def command(name: str, call: Call, text: str) -> argparse.ArgumentParser:
        sub: Parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.arguments = arguments
        sub.set_defaults(call=call)
        return sub

    for module in (job, results, models, machine):
        module.add(command)
    return parser
