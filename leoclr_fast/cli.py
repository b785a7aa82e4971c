"""The command line: `leoclr-fast <command>`, the same as `python -m leoclr_fast <command>`.

Each command is a dataclass whose fields are its flags, typed and explained by tyro, and whose method `run` returns one
JSON document. This file imports the command that is meant and no other, so that what needs no torch starts without.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dataset_tools.command_line import (
    CommonFlags,
    first_line,
    parse_flags,
    print_commands,
    run_command_line,
)
from dataset_tools.limits import unknown
from leoclr_fast.recipes import RECIPES

_HERE = "leoclr_fast.commands"
COMMANDS = {
    "demo": f"{_HERE}.demo:Demo",
    "convert": "dataset_tools.cli:Convert",
    "verify": "dataset_tools.cli:Verify",
    "inspect": "dataset_tools.cli:Inspect",
    "subset": "dataset_tools.cli:Subset",
    "merge": "dataset_tools.cli:Merge",
    "pretrain": f"{_HERE}.pretrain:Pretrain",
    "knn": f"{_HERE}.evaluations:Knn",
    "linear": f"{_HERE}.evaluations:Linear",
    "finetune": f"{_HERE}.evaluations:Finetune",
    "transfer": f"{_HERE}.evaluations:Transfer",
    "study": f"{_HERE}.study:Study",
    "compare": f"{_HERE}.runs:Compare",
    "detect": f"{_HERE}.evaluations:Detect",
    "export": f"{_HERE}.weights:Export",
    "import-moco": f"{_HERE}.weights:ImportMoco",
    "preview": f"{_HERE}.preview:Preview",
    "parity": f"{_HERE}.parity:Parity",
    "report": f"{_HERE}.runs:Report",
    "watch": f"{_HERE}.runs:Watch",
    "doctor": f"{_HERE}.doctor:Doctor",
    "bench train-time": f"{_HERE}.bench:BenchTrainTime",
}
"""Name → `module:Class`. A name may be of two words; its first word alone lists what follows it."""

_OTHER_NAMES = {"--loader": "--loader.name", "--max-test-images": "--max-images", "--max-iterations": "--max-steps"}
"""A shorthand, and what flags of `detect` were called before."""
_PAPER = "LeOCLR: Leveraging Original Images for Contrastive Learning of Visual Representations (TMLR 2024)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line (`sys.argv` by default) and exit: 0 done, 1 failed, 2 misused, 130 stopped by a signal."""
    sys.exit(run_command(arguments))


def run_command(arguments: Sequence[str] | None = None) -> int:
    """As `main`, but returns the exit code."""
    return run_command_line(parse_command, arguments)


def parse_command(arguments: list[str]) -> CommonFlags | None:
    """A command line as a command, not yet run; None where help was printed instead. Raises ValueError."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_overview()
        return None
    group = {name: target for name, target in COMMANDS.items() if name.startswith(f"{arguments[0]} ")}
    if group and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print_commands(_first_lines(group))
        return None
    num_words = 2 if group else 1
    name, rest = " ".join(arguments[:num_words]), arguments[num_words:]
    if name not in COMMANDS:
        raise ValueError(unknown("command", name, group or COMMANDS))
    rest = [_by_its_name(argument) for argument in rest]
    if name == "pretrain":
        from leoclr_fast.commands.pretrain import parse_pretrain

        return parse_pretrain(rest)
    if name == "study":
        from leoclr_fast.commands.study import parse_study

        return parse_study(rest)
    module, _, class_name = COMMANDS[name].partition(":")
    kind: type[Any] = getattr(import_module(module), class_name)
    command: CommonFlags = parse_flags(kind, rest, f"leoclr-fast {name}")
    return command


def _by_its_name(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return f"{_OTHER_NAMES.get(flag, flag)}{equals}{value}"


def _print_overview() -> None:
    print(f"leoclr-fast: pretrain LeOCLR, and MoCo-v2 beside it.\n{_PAPER}\n")
    print_commands(_first_lines(COMMANDS))
    print("\nleoclr-fast COMMAND --help lists the flags of a command. Recipes of pretrain:")
    for name, recipe in RECIPES.items():
        print(f"  {name:24} {first_line(recipe.__doc__)}")


def _first_lines(targets: Mapping[str, str]) -> dict[str, str]:
    """Name → the first line of the docstring of its class, read from the source: nothing is imported for it."""
    return {
        name: first_line(_docstrings(module)[class_name])
        for name, (module, _, class_name) in ((name, target.partition(":")) for name, target in targets.items())
    }


@cache
def _docstrings(module: str) -> dict[str, str | None]:
    """Class → docstring."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text()).body
    return {node.name: ast.get_docstring(node) for node in body if isinstance(node, ast.ClassDef)}
