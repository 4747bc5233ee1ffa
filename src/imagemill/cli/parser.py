"""The parser: errors on one line that say what was probably meant, and shell completion."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

_OLD_FLAGS = {
    "--batch_size": "--batch-size",
    "--batches_per_step": "--batches-per-step",
    "--data_dir": "the SOURCE argument of `imagemill run` (or `partition --data-dir`)",
    "--data-dir": "the SOURCE argument of `imagemill run`",
    "--data_sub_dir": "the SOURCE argument of `imagemill run`",
    "--device_iterations": "--batches-per-step",
    "--half_partials": "--precision",
    "--hide_output": "nothing (logs are files, see --log-dir)",
    "--log_path": "--log-dir",
    "--log-path": "--log-dir",
    "--micro_batch_size": "--batch-size",
    "--micro-batch-size": "--batch-size",
    "--model_name": "--model",
    "--model-name": "the NAME argument of `imagemill get-model` (or `run --model`)",
    "--model_path": "--models-dir",
    "--model-path": "--models-dir",
    "--nohide_output": "nothing (logs are files, see --log-dir)",
    "--num_ipus": "--devices ipu:N",
    "--num-ipus": "--devices ipu:N",
    "--num_workers": "--num-workers",
    "--num_of_partitions": "--partitions",
    "--pretrained-model-path": "get-model --from FILE",
    "--report_hw_cycle_count": "nothing (`imagemill bench` measures rates)",
    "--use_popart": "--devices ipu:N@popart",
}
"""Flags of Graphcore's example, and similar ones → what to write instead."""


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors that knows the flags of Graphcore's example."""

    arguments: Sequence[str] = ()
    """What the user typed."""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Refuse blank places: `--into "$UNSET"` would mean the current folder."""
        is_place = str(action.metavar).startswith(("DIR", "FOLDER", "FILE", "SOURCE"))
        if is_place and any(not text.strip() for text in arg_strings):
            raise argparse.ArgumentError(
                action, "is empty. If it comes from a variable of the shell, that is not set"
            )
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Exit with one line: what is wrong, and what was probably meant."""
        for argument in self.arguments:
            flag = argument.partition("=")[0]
            at_fault = (
                not message.startswith("unrecognized arguments") or argument in message.split()
            )
            if at_fault and flag in _OLD_FLAGS and flag not in self._option_string_actions:
                message = f"unknown option {flag}; use instead: {_OLD_FLAGS[flag]}"
        if message.startswith("the following arguments are required"):  # perhaps a mistyped one
            flags = [word for word in self.arguments if word.startswith("--")]
            known = self._option_string_actions
            if unknown := [flag for flag in flags if flag.partition("=")[0] not in known]:
                message = f"unrecognized arguments: {unknown[0]}"
        from imagemill.display.text import fit_to  # which other calls need later, or never

        typed = next((word for word in self.arguments if word in self._commands()), None)
        of = f"{self.prog} {typed}" if typed else self.prog
        if meant := self._suggestion(message):
            message = message.partition(" (choose from ")[0]
        message = f"{self.prog}: {message}. {meant}See `{of} --help`."
        self.exit(2, f"{fit_to(message, sys.stderr)}\n")

    def _suggestion(self, message: str) -> str:
        from difflib import get_close_matches  # takes a millisecond that no other call needs

        unknown = re.match(r"unrecognized arguments: (-\S+)|.* invalid choice: '([^']*)'", message)
        if unknown is None:
            return ""
        word = unknown[1] or unknown[2]
        commands = self._commands()
        known = re.findall(r"'([^']*)'", message.partition("(choose from ")[2]) or list(commands)
        if unknown[1]:
            typed = next((word for word in self.arguments if word in commands), None)
            known = [*(commands[typed] if typed else self)._option_string_actions]
        is_source = "://" in word or os.path.exists(word)  # noqa: PTH110 - false if it is too long
        if is_source and known == list(commands):
            return f"Did you mean `{self.prog} run {shlex.quote(word)} --output DIR`? "
        close = get_close_matches(word.partition("=")[0], known, 1)
        return f"Did you mean {close[0]}? " if close else ""

    def _commands(self) -> dict[str, Parser]:
        return next(
            (action.choices for action in self._actions if isinstance(action.choices, dict)), {}
        )

    def walk(self) -> Iterator[argparse.Action]:
        """Yield the arguments of this parser and of its commands."""
        yield from self._actions
        for command in self._commands().values():
            yield from command.walk()


class PrintCompletion(argparse.Action):
    """Prints a script that completes commands, options and files in a shell, and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, _namespace: Any, shell: Any, _flag: str | None = None
    ) -> None:
        """Print the script."""
        import shtab

        assert isinstance(parser, Parser)
        for action in parser.walk():
            if action.metavar in ("DIR", "FOLDER"):
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif str(action.metavar).startswith(("FILE", "SOURCE", "P|FILE")):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell))
        parser.exit()
