"""The guides in docs/: every command in them runs, made small."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from leoclr_fast.cli import run_command

ROOT = Path(__file__).parents[2]
SMALLER = {"demo": ["--max-images", "200", "--max-steps", "3"], "pretrain": ["--max-images", "200"]}


def commands(guide: str) -> list[list[str]]:
    """The words of each `$ leoclr-fast …` line in the console blocks of a guide."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / guide).read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    words = [shlex.split(line.removeprefix("$ ")) for line in lines]
    assert words
    assert all(line[0] == "leoclr-fast" for line in words), "a command that this test cannot run"
    return [line[1:] for line in words]


@pytest.mark.timeout(300)
def test_every_command_of_the_guides_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order in which a reader types them: pretraining first, then evaluation, in one folder."""
    monkeypatch.chdir(tmp_path)
    for guide in ("docs/pretrain.md", "docs/evaluate.md"):
        for words in commands(guide):
            small = [
                "3" if before == "--max-steps" else word for before, word in zip(["", *words], words, strict=False)
            ]
            small += SMALLER.get(words[0], [])
            if words[0] == "pretrain":
                small += ["--device", "cpu", *([] if "--max-steps" in words else ["--max-steps", "5"])]
            code = run_command(small)
            assert code == 0, (guide, small, capsys.readouterr())
    assert (tmp_path / "runs" / "both.html").is_file()
    assert (tmp_path / "runs" / "demo" / "run" / "report.html").is_file()


@pytest.mark.parametrize("guide", ["docs/pretrain.md", "docs/evaluate.md", "README.md"])
def test_the_files_that_a_guide_shows_and_links_exist(guide: str) -> None:
    path = ROOT / guide
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert all((path.parent / name).exists() for name in linked), linked
