"""The command line: `leoclr-fast <command>`, the same as `python -m leoclr_fast <command>`.

Each command is a dataclass in `leoclr_fast.commands` whose fields are its flags, typed and explained by tyro, and whose
method `run` returns one JSON document. This file finds the command that is meant.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import tyro

from dataset_tools.cli import COMMANDS as DATASET_COMMANDS
from dataset_tools.command_line import Command, parse_flags, print_commands, run_command_line, unknown
from leoclr_fast.commands.bench_augment import BenchAugment
from leoclr_fast.commands.bench_loader import BenchLoader
from leoclr_fast.commands.bench_loss import BenchLoss
from leoclr_fast.commands.bench_scaling import BenchScaling
from leoclr_fast.commands.bench_step import BenchStep
from leoclr_fast.commands.bench_train_time import BenchTrainTime
from leoclr_fast.commands.compare import Compare
from leoclr_fast.commands.demo import Demo
from leoclr_fast.commands.detect import Detect
from leoclr_fast.commands.doctor import Doctor
from leoclr_fast.commands.export import Export
from leoclr_fast.commands.finetune import Finetune
from leoclr_fast.commands.import_moco import ImportMoco
from leoclr_fast.commands.knn import Knn
from leoclr_fast.commands.linear import Linear
from leoclr_fast.commands.parity import Parity
from leoclr_fast.commands.pretrain import Pretrain
from leoclr_fast.commands.preview import Preview
from leoclr_fast.commands.report import Report
from leoclr_fast.commands.transfer import Transfer
from leoclr_fast.commands.watch import Watch
from leoclr_fast.recipes import RECIPES, get_recipe

COMMANDS: dict[str, type[Any]] = {
    "demo": Demo,
    **DATASET_COMMANDS,
    "pretrain": Pretrain,
    "knn": Knn,
    "linear": Linear,
    "finetune": Finetune,
    "transfer": Transfer,
    "compare": Compare,
    "detect": Detect,
    "export": Export,
    "import-moco": ImportMoco,
    "preview": Preview,
    "parity": Parity,
    "report": Report,
    "watch": Watch,
    "doctor": Doctor,
    "bench loader": BenchLoader,
    "bench augment": BenchAugment,
    "bench loss": BenchLoss,
    "bench step": BenchStep,
    "bench train-time": BenchTrainTime,
    "bench scaling": BenchScaling,
}
"""A name may be of two words; its first word alone lists what follows it."""

_SHORTHANDS = {"--loader": "--loader.name"}
_PAPER = "LeOCLR: Leveraging Original Images for Contrastive Learning of Visual Representations (TMLR 2024)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line (`sys.argv` by default) and exit: 0 done, 1 failed, 2 misused, 130 stopped by a signal."""
    sys.exit(run_command(arguments))


def run_command(arguments: Sequence[str] | None = None) -> int:
    """As `main`, but returns the exit code."""
    return run_command_line(parse_command, arguments)


def parse_command(arguments: list[str]) -> Command | None:
    """A command line as a command, not yet run; None where help was printed instead. Raises ValueError."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_overview()
        return None
    group = {name: command for name, command in COMMANDS.items() if name.startswith(f"{arguments[0]} ")}
    if group and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print_commands(group)
        return None
    num_words = 2 if group else 1
    name, rest = " ".join(arguments[:num_words]), arguments[num_words:]
    if name not in COMMANDS:
        raise ValueError(unknown("command", name, group or COMMANDS))
    rest = [_without_shorthand(argument) for argument in rest]
    return _parse_pretrain(rest) if name == "pretrain" else parse_flags(COMMANDS[name], rest, f"leoclr-fast {name}")


def _parse_pretrain(arguments: list[str]) -> Pretrain:
    """The defaults of its flags are those of the recipe, which comes first."""
    recipe_name, prog = "leoclr_imagenet_200ep", "leoclr-fast pretrain"
    if arguments and not arguments[0].startswith("-"):
        recipe_name, *arguments = arguments
        prog = f"{prog} {recipe_name}"
    elif "-h" not in arguments and "--help" not in arguments:
        raise ValueError(f"pretrain needs a recipe first: leoclr-fast pretrain RECIPE …; recipes: {', '.join(RECIPES)}")
    recipe = get_recipe(recipe_name)
    defaults = Pretrain(
        data=tyro.MISSING,
        out=tyro.MISSING,
        recipe=recipe.recipe,
        result=recipe.result,
        speed=recipe.speed,
        monitor=recipe.monitor,
    )
    return parse_flags(Pretrain, arguments, prog, default=defaults, description=_recipe_help(recipe_name))


def _without_shorthand(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return f"{_SHORTHANDS.get(flag, flag)}{equals}{value}"


def _recipe_help(name: str) -> str:
    docstring = (RECIPES[name].__doc__ or "").strip()
    return f"{Pretrain.__doc__}\n\nRecipe {name}: {docstring}\n\nAll recipes: {', '.join(RECIPES)}."


def _print_overview() -> None:
    print(f"leoclr-fast: pretrain LeOCLR, and MoCo-v2 beside it.\n{_PAPER}\n")
    print_commands(COMMANDS)
    print("\nleoclr-fast COMMAND --help lists the flags of a command. Recipes of pretrain:")
    for name, recipe in RECIPES.items():
        print(f"  {name:24} {(recipe.__doc__ or '').strip().splitlines()[0]}")
