"""Change the code at random, one change at a time, and see whether a test notices.

    python benchmarks/mutate_code.py --module ledger,leases,paths --count 60 --seed 1 --results
    mutants.jsonl

A guarantee holds as long as a test fails without it. This script changes one comparison, condition,
constant, argument or statement of a module, runs the tests of that module, and prints each change
that no test noticed. Some of these change nothing that anybody can observe; the others want a test.

The working tree is never touched: sources and tests are copied to a temporary folder. Run the
command again to continue: changes that were noticed are skipped, changes that survived are tried
again, so that you see which new tests work.

mutmut and cosmic-ray do this for whole projects, and were not tried. Here a sample is wanted rather
than every change, each module has a few fast tests of its own, and the worker processes that tests
start must import the changed module too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import difflib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW = (
    "not many and not without_end and not photographs and not mutated_images and not"
    " any_unscaled_jpeg and not any_damage"
)
"""As `pytest -k`: leaves out tests that take seconds and that faster ones back up."""
MODULES: dict[str, tuple[str, str]] = {
    "ledger": ("job/ledger.py", "test_ledger.py"),
    "leases": ("workers/leases.py", "test_leases.py test_worker_pool.py"),
    "launcher": ("workers/launcher.py", "test_worker_pool.py"),
    "sink": ("pipeline/sink.py", "test_sink.py"),
    "paths": ("job/paths.py", "test_layout.py test_sink.py"),
    "files": ("system/files.py", "test_layout.py test_sink.py"),
    "feed": ("pipeline/feed.py", "test_feed.py"),
    "plan": ("job/plan.py", "test_plan.py"),
    "decode": ("pipeline/decoding/decode.py", "test_resample.py test_decode.py"),
    "zip": ("pipeline/sources/zip.py", "test_sources_zip.py"),
    "tar": ("pipeline/sources/tar.py", "test_sources_tar.py"),
    "gz": ("pipeline/sources/gz.py", "test_sources_tar.py"),
    "parquet": ("pipeline/sources/parquet.py", "test_sources_parquet.py"),
    "checkpoint": ("models/checkpoints/checkpoint.py", "test_checkpoint.py"),
    "pickled": ("models/checkpoints/pickled.py", "test_checkpoint.py"),
    "freeze": (
        "runner/freeze.py",
        (
            "test_freezing.py"
            " test_run.py::test_settings_that_make_no_sense_are_refused_before_anything_is_written"
            " test_run.py::test_a_flag_that_would_change_the_job_is_refused_with_both_values"
            " test_run.py::test_a_damaged_job_is_one_clear_error"
            " test_run.py::test_a_job_that_cannot_be_read_is_not_taken_for_none"
            " test_run.py::test_a_foreign_output_is_refused"
            " test_run.py::test_a_model_that_changed_on_disk_is_refused"
            " test_run.py::test_a_limit_that_is_changed_is_reported"
            " test_run.py::test_sub_folders_are_distributed_to_as_many_devices"
            " test_run.py::test_center_crop_cuts_without_resizing"
            " test_run.py::test_filters_and_hidden_entries_are_in_the_summary"
        ),
    ),
}
"""Module → its file, and the tests that keep its guarantees, the fastest first."""
LIBRARIES = (
    "hypothesis",
    "numpy",
    "onnx",
    "pyarrow.parquet",
    "PIL.Image",
    "safetensors.numpy",
    "simplejpeg",
)

_ORDER: dict[type[ast.cmpop], list[type[ast.cmpop]]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}
_SUMS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
}


@dataclass(frozen=True)
class Mutant:
    """One changed module."""

    module: str
    line: int
    what: str
    text: str
    """The whole module, changed."""

    @property
    def key(self) -> str:
        """Names the change as long as the module stays as it is."""
        return hashlib.sha256(f"{self.module}\n{self.text}".encode()).hexdigest()[:16]


def expressions(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield what an expression or statement could be instead, with a word for the change."""

    def changed(**values: object) -> ast.AST:
        other = copy.copy(node)
        for name, value in values.items():
            setattr(other, name, value)
        return other

    match node:
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                for kind in _ORDER[type(op)]:
                    yield "comparison", changed(ops=[*ops[:place], kind(), *ops[place + 1 :]])
        case ast.BoolOp(op=op, values=values):
            yield "and/or", changed(op=ast.Or() if isinstance(op, ast.And) else ast.And())
            yield "operand dropped", values[0] if len(values) == 2 else changed(values=values[:-1])
            yield "operand dropped", values[1] if len(values) == 2 else changed(values=values[1:])
        case ast.BinOp(op=op) if type(op) in _SUMS:
            yield "arithmetic", changed(op=_SUMS[type(op)]())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "not dropped", operand
        case ast.IfExp(body=body, orelse=orelse):
            yield "condition negated", changed(body=orelse, orelse=body)
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            for other in sorted({value + 1, value - 1, 0} - {value}):
                yield "constant", ast.Constant(other)
        case ast.Call(args=args, keywords=keywords):
            if len(args) >= 2 and not any(isinstance(one, ast.Starred) for one in args[:2]):
                yield "arguments swapped", changed(args=[args[1], args[0], *args[2:]])
            if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
                yield "min/max", changed(func=ast.Name("max" if node.func.id == "min" else "min"))
            for place, keyword in enumerate(keywords):
                if keyword.arg:
                    yield (
                        f"argument {keyword.arg} dropped",
                        changed(keywords=[*keywords[:place], *keywords[place + 1 :]]),
                    )
        case ast.Return(value=value) if value is not None and not (
            isinstance(value, ast.Constant) and value.value is None
        ):
            yield "return None", ast.Return(ast.Constant(None))
        case ast.Break():
            yield "break/continue", ast.Continue()
        case ast.Continue():
            yield "break/continue", ast.Break()
            yield "statement dropped", ast.Pass()
        case ast.Expr() | ast.Raise() | ast.AugAssign() | ast.Delete():
            yield "statement dropped", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement dropped", ast.Pass()


def worth(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yield the nodes to change, with the source that surrounds a replacement. Texts, types and
    logging are left as they are.
    """

    def is_left(node: ast.AST) -> bool:
        match node:
            case ast.JoinedStr() | ast.Import() | ast.ImportFrom():
                return True
            case ast.Expr(value=ast.Constant()):
                return True
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="_log")))):
                return True
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                return True
        return False

    def visit(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
        if is_left(node):
            return
        if isinstance(node, ast.expr | ast.stmt):
            yield node, "({})" if isinstance(node, ast.expr) else "{}"
        for name, child in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for one in child if isinstance(child, list) else [child]:
                if isinstance(one, ast.AST):
                    yield from visit(one)

    yield from visit(tree)


def mutants(module: str) -> list[Mutant]:
    """Every change of one module."""
    source = (ROOT / "src" / "imagemill" / MODULES[module][0]).read_text(encoding="utf-8")
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    data = source.encode()
    found = {}

    def add(node: ast.expr | ast.stmt, what: str, replacement: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin, end = (
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
        )
        text = (data[:begin] + replacement.encode() + data[end:]).decode()
        found[text] = Mutant(module, node.lineno, what, text)

    for node, around in worth(ast.parse(source)):
        assert isinstance(node, ast.expr | ast.stmt)
        for what, other in expressions(node):
            add(node, what, around.format(ast.unparse(ast.fix_missing_locations(other))))
        tests = [node.test] if isinstance(node, ast.If | ast.While) else []
        for test in tests + [
            condition for part in getattr(node, "generators", ()) for condition in part.ifs
        ]:
            add(test, "condition negated", f"(not ({ast.unparse(test)}))")
        for handler in node.handlers if isinstance(node, ast.Try) else ():
            if isinstance(handler.type, ast.Tuple):
                for place in range(len(handler.type.elts)):
                    kept = [one for at, one in enumerate(handler.type.elts) if at != place]
                    add(
                        handler.type,
                        "exception not caught",
                        f"({''.join(ast.unparse(one) + ', ' for one in kept)})",
                    )
    return list(found.values())


class Project:
    """A copy of sources and tests, in which one module is changed at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("src", "tests"):
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "home").mkdir()
        with (folder / "tests" / "conftest.py").open(
            "a"
        ) as file:  # a failure is enough: its smallest example is not looked for
            file.write(
                'from hypothesis import Phase\nsettings.register_profile("quick", settings(),'
                " phases=[Phase.explicit, Phase.generate])\n"
            )
            file.write('settings.load_profile("quick")\n')
        for name in LIBRARIES:  # once: each run of the tests is a fork of this process
            importlib.import_module(name)

    def outcome(self, module: str, text: str | None, limit_s: float) -> str:
        """Run a module's tests on its changed text. Returns: `passed`, `failed` or `timeout`."""
        path = self.folder / "src" / "imagemill" / MODULES[module][0]
        original = path.read_bytes()
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as scratch:
            if text is not None:
                path.write_text(text, encoding="utf-8")
            child = os.fork()
            if child == 0:
                self._test(module, Path(scratch))
            try:
                deadline = time.monotonic() + limit_s
                while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
                    if time.monotonic() > deadline:
                        return "timeout"
                    time.sleep(0.02)
                return "passed" if ended[1] == 0 else "failed"
            finally:
                with contextlib.suppress(
                    ProcessLookupError
                ):  # nothing is left of it: no worker either
                    os.killpg(child, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child, 0)
                path.write_bytes(original)

    def _test(self, module: str, scratch: Path) -> NoReturn:
        """Become the tests of a module, and end with their exit code."""
        code = 1
        try:
            os.setsid()
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(nowhere, stream)
            os.chdir(self.folder)
            sys.path[0] = str(self.folder / "src")
            sys.dont_write_bytecode = True
            names = {
                "PYTHONPATH": sys.path[0],
                "PYTHONDONTWRITEBYTECODE": "1",
                "HOME": str(self.folder / "home"),
                "TMPDIR": str(scratch),
            }
            os.environ.update(names)
            tempfile.tempdir = None
            files = [str(self.folder / "tests" / name) for name in MODULES[module][1].split()]
            options = [
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "-W",
                "ignore::pytest.PytestAssertRewriteWarning",
                "-k",
                SLOW,
            ]
            code = pytest.main([*options, f"--basetemp={scratch}/pytest", *files])
        finally:
            os._exit(code)


def check_paths(names: list[str]) -> None:
    """Exit with a message if a module or one of its tests does not exist."""
    for name in names:
        module, tests = MODULES[name]
        wanted = [(ROOT / "src" / "imagemill" / module, "")]
        for test in tests.split():
            file, _, function = test.partition("::")
            wanted.append((ROOT / "tests" / file, function and f"def {function}("))
        for path, text in wanted:
            if not path.is_file() or text not in path.read_text(encoding="utf-8"):
                sys.exit(f"{name}: no {text} {path.relative_to(ROOT)}; change MODULES here")


def shown(mutant: Mutant) -> str:
    """Format a change as a diff without context."""
    name = f"src/imagemill/{MODULES[mutant.module][0]}"
    before = (ROOT / name).read_text(encoding="utf-8").splitlines()
    changed = [
        line
        for line in difflib.unified_diff(before, mutant.text.splitlines(), n=0, lineterm="")
        if line[:3] not in ("---", "+++")
    ]
    return "\n".join(
        [
            f"{name}:{mutant.line}: {mutant.what}",
            *(f"    {line}" for line in changed if line[:1] != "@"),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", default=",".join(MODULES), help="comma-separated; default: all")
    parser.add_argument(
        "--count", type=int, default=200, help="changes in all, as many of each module"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("mutants.jsonl"),
        help="outcomes so far, one a line; makes the command resumable",
    )
    options = parser.parse_args()
    names = options.module.split(",")
    for name in names:
        if name not in MODULES:
            parser.error(f"--module {name}: not known. Known: {', '.join(MODULES)}")
    check_paths(names)

    known = {}
    if options.results.exists():
        known = {
            line["key"]: line["outcome"]
            for line in map(json.loads, options.results.read_text().splitlines())
        }
    chosen: list[Mutant] = []
    for place, name in enumerate(names):
        every = mutants(name)
        share = (options.count + place) // len(
            names
        )  # the remainder of the division goes to the last modules
        chosen += random.Random(f"{options.seed} {name}").sample(every, min(share, len(every)))
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in names}
    limits: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as folder:
        project = Project(Path(folder))
        for mutant in chosen:
            outcome = known.get(mutant.key, "passed")
            if outcome == "passed":
                if mutant.module not in limits:
                    begun = time.monotonic()
                    if project.outcome(mutant.module, None, 1200) != "passed":
                        sys.exit(f"{mutant.module}: its tests do not pass on unchanged code")
                    limits[mutant.module] = 30 + 3 * (time.monotonic() - begun)
                outcome = project.outcome(mutant.module, mutant.text, limits[mutant.module])
                with options.results.open("a") as file:
                    line = {
                        "key": mutant.key,
                        "module": mutant.module,
                        "line": mutant.line,
                        "what": mutant.what,
                        "outcome": outcome,
                    }
                    file.write(json.dumps(line) + "\n")
            outcomes[mutant.module][outcome] += 1
            if outcome == "passed":
                print(shown(mutant), flush=True)
    total = sum(outcomes.values(), Counter())
    for name, counts in [*outcomes.items(), ("all", total)]:
        noticed = counts["failed"] + counts["timeout"]
        print(f"{name}: {noticed} of {counts.total()} noticed ({counts['timeout']} by time-out)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
