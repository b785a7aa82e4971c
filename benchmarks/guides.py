"""The output that the guides show: every command of their consoles, typed in their order in one folder.

`python -m benchmarks.guides --out FOLDER --log benchmarks/results/guides_cpu.log`
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from leoclr_fast.run.environment import environment

GUIDES = ("docs/pretrain.md", "docs/evaluate.md")
_ROOT = Path(__file__).parents[1]


def consoles(guide: str) -> list[str]:
    """The commands after `$` in the console blocks of a guide."""
    blocks = re.findall(r"```console\n(.*?)```", (_ROOT / guide).read_text(), re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new folder, in which runs/ appears")
    parser.add_argument("--log", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    made_with = environment(torch.device("cpu"), 1)
    lines = [f"python -m benchmarks.guides --out FOLDER --log {given.log.name}", json.dumps(made_with, indent=1)]
    for guide in GUIDES:
        lines += ["", f"# {guide}"]
        for command in consoles(guide):
            lines.append(f"$ {command}")
            print(lines[-1], flush=True)
            done = subprocess.run(
                command, shell=True, cwd=given.out, env={**os.environ, "PATH": programs, "COLUMNS": "120"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
            lines += done.stdout.splitlines()
            given.log.write_text("\n".join(lines) + "\n")
            if done.returncode:
                raise SystemExit(f"{command} ended with {done.returncode}: {lines[-1]}")


if __name__ == "__main__":
    main()
