"""The guides in docs/ and the README: every command in them runs, made small, or is one that the program knows."""

from __future__ import annotations

import re
import shlex
import tomllib
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.guides import consoles
from leoclr_fast.cli import _OTHER_NAMES, COMMANDS, parse_command, run_command
from tests.pipelines.pictures import picture

ROOT = Path(__file__).parents[2]
GUIDES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
SMALLER = {
    "demo": "--max-images 200 --max-steps 3",
    "pretrain": "--max-images 200",
    "linear": "--epochs 1 --max-images 100",
    "finetune": "--epochs 1 --batch-size 8 --max-images 100",
    "bench train-time": "--rounds 2 --steps 1 --warmup-steps 1 --batch-size 8 --max-images 64",
    "parity": "--max-images 40 --workers 1",
}


def commands(guide: str) -> list[list[str]]:
    """The words of each `$ leoclr-fast …` line in the console blocks of a guide."""
    words = [shlex.split(line) for line in consoles(guide)]
    assert words
    assert all(line[0] == "leoclr-fast" for line in words), "a command that this test cannot run"
    return [line[1:] for line in words]


def inline_commands(guide: str) -> list[str]:
    """The commands within a sentence or a table, and in blocks that are no console: `leoclr-fast …` or `torchrun …`."""
    text = re.sub(r"```console\n.*?```", "", (ROOT / guide).read_text(), flags=re.DOTALL)
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = [" ".join(span.split()).replace("\\|", "|") for span in spans]
    return [text for text in (*spans, *lines) if re.match(r"(torchrun .*-m leoclr_fast|leoclr-fast) \S", text)]


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_within_the_text_are_known(guide: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Name and flags of each; a whole one, without a placeholder, is parsed."""
    for line in inline_commands(guide):
        words = shlex.split(re.sub(r"[][…]|#.*", " ", re.sub(r"^torchrun .*-m leoclr_fast", "leoclr-fast", line)))[1:]
        if words == ["COMMAND", "--help"]:
            continue
        for name in words[0].split("|"):
            given = [name, *words[1:]]
            kind = next(" ".join(given[:length]) for length in (2, 1) if " ".join(given[:length]) in COMMANDS)
            recipe = ["leoclr_demo"] if kind == "pretrain" else []
            with suppress(SystemExit):
                parse_command([*kind.split(), *recipe, "--help"])
            known = capsys.readouterr().out
            flags = [re.sub(r"[=|].*", "", word) for word in given if word.startswith("--")]
            assert all(_OTHER_NAMES.get(flag, flag) in known for flag in flags), (line, flags)
        if not re.search(r"\b[A-Z]{1,}\b|[][…|]", line) and len(given) > len(kind.split()):
            assert parse_command(given) is not None, line


def test_everything_can_be_made_small(capsys: pytest.CaptureFixture[str]) -> None:
    """The flags that the README promises."""
    small = {"--max-images": ["demo", "knn", "preview", "parity", "bench train-time"]}
    small["--max-steps"] = ["demo", "pretrain", "linear", "finetune", "transfer", "detect"]
    small["--max-images"] += small["--max-steps"]
    for flag, names in small.items():
        for name in names:
            with suppress(SystemExit):
                parse_command([*name.split(), *(["leoclr_demo"] if name == "pretrain" else []), "--help"])
            assert f"{flag} " in capsys.readouterr().out, (name, flag)


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_of_the_consoles_are_parsed(guide: str) -> None:
    """Each as it stands."""
    for line in consoles(guide):
        program, *words = shlex.split(line, comments=True)
        if program == "leoclr-fast":
            assert parse_command(words) is not None, line
        else:
            assert program == "make", line


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("pages")
def test_every_command_of_the_guides_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order in which a reader types them: pretraining first, then evaluation and timing, in one folder."""
    monkeypatch.chdir(tmp_path)
    readme = [shlex.split(line)[1:] for line in inline_commands("README.md") if " runs/demo/" in line]
    assert [words[0] for words in readme] == ["preview"]
    (tmp_path / "docs").mkdir()
    for guide in ("docs/pretrain.md", "docs/evaluate.md", "docs/time.md", "README.md"):
        for words in readme if guide == "README.md" else commands(guide):
            small = [
                "3" if before == "--max-steps" else word for before, word in zip(["", *words], words, strict=False)
            ]
            small += SMALLER.get(words[0], SMALLER.get(" ".join(words[:2]), "")).split()
            if words[0] == "pretrain":
                small += ["--device", "cpu", *([] if "--max-steps" in words else ["--max-steps", "5"])]
            code = run_command(small)
            assert code == 0, (guide, small, capsys.readouterr())
    assert (tmp_path / "runs" / "both.html").is_file()
    assert (tmp_path / "docs" / "preview.png").is_file()
    assert (tmp_path / "runs" / "demo" / "run" / "report.html").is_file()


TINY_IMAGENET = shlex.split(
    "--backbone.arch resnet18 --backbone.width-multiplier 0.0625 --views.image-size 32 --batch-size 8 "
    "--method.queue-size 16 --method.key-batchnorm-group 4 --max-steps 1 --device cpu --monitor.knn-k 2"
)


def test_every_command_of_the_guide_to_converting_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/data and /fast are folders of the test; the machines that make the parts are this one, one after another."""
    monkeypatch.chdir(tmp_path)
    photographs, folder = Path("data/imagenet"), "train/n01440764"
    for split, count in (("train", 40), ("val", 10)):
        for index in range(count):
            wnid = ("n01440764", "n01443537")[index % 2]
            place = photographs / split / wnid / f"{wnid}_{index}.JPEG"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(40 + index, 60, "waves", index)).save(place)
    (tmp_path / "semi_files").mkdir()
    names = [path.name for path in sorted((photographs / folder).iterdir())[:3]]
    (tmp_path / "semi_files" / "1percent.txt").write_text("\n".join(names) + "\n")
    for part in ("1/2", "2/2"):
        made = ["data/imagenet", f"fast/parts/{part[0]}", "--format", "ffcv", "--part", part, "--workers", "1"]
        assert run_command(["convert", *made]) == 0
    for words in commands("docs/convert.md"):
        here = [word[1:] if word.startswith(("/data/", "/fast/")) else word for word in words]
        here = [path for word in here for path in (sorted(map(str, tmp_path.glob(word))) if "*" in word else [word])]
        if here[0] == "merge":
            here[-1] = "fast/merged"  # one machine made the same data set above
        small = {"pretrain": TINY_IMAGENET, "convert": ["--workers", "1"], "subset": []}.get(here[0], [])
        assert run_command([*here, *small]) == 0, (here, capsys.readouterr())
    assert (tmp_path / "fast/merged/train.beton").read_bytes() == (
        tmp_path / "fast/imagenet-ffcv/train.beton"
    ).read_bytes()
    assert (tmp_path / "runs" / "leoclr" / "summary.json").is_file()


@pytest.mark.parametrize("guide", [*GUIDES, "CONTRIBUTING.md"])
def test_the_files_that_a_guide_shows_and_links_exist(guide: str) -> None:
    path = ROOT / guide
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert all((path.parent / name).exists() for name in linked), linked
    modules = re.findall(r"python -m (benchmarks[\w.]*)", path.read_text())
    assert all(find_spec(module) for module in modules if module != "benchmarks.NAME"), modules


def test_the_map_is_true() -> None:
    """The floors are those that the linter holds, top to bottom, and every file that is named is there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if "floors" in contract["name"])
    floors = [name for layer in layers for name in layer.split(" | ") if name != "__main__"]
    table = text.partition("| floor, top to bottom")[2].partition("\n\n")[0]
    shown = [name for row in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)/?`", row.split("|")[1])]
    assert [name.removesuffix(".py") for name in shown] == floors
    files = set(re.findall(r"`([\w/]+\.py)`", text))
    packages = ("dataset_tools", "pipelines", "leoclr_fast", "tests")
    there = [path.as_posix() for package in packages for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 20
    assert {name for name in files if not any(path.endswith(f"/{name}") for path in there)} == set()
