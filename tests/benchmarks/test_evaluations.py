"""The benchmark of the evaluators says how it was called, and what it was made with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.evaluations import Evaluations

SEEN: dict[str, Any] = {
    "cpu": "a CPU", "gpu": None, "torch_threads": 1, "device": "cpu", "python": "3", "versions": {"torch": "2"},
}  # fmt: skip


def test_the_call_is_in_every_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also the commit that the first run saw: the later ones see this program's own results as changes."""
    commits = iter(("clean", "changed+"))

    def command(arguments: list[str], **_: Any) -> SimpleNamespace:
        name = arguments[3]
        document: dict[str, Any] = {"top1": 20.0 if "--untrained" in arguments else 30.0}
        if name == "pretrain":
            run = Path(arguments[arguments.index("--out") + 1])
            run.mkdir()
            (run / "environment.json").write_text(json.dumps(SEEN | {"git_commit": next(commits)}))
        elif name == "finetune":
            document = {"evaluations": [document]}
        elif name == "compare":
            document = {"columns": [{"runs": arguments[4:-1]}]}
        return SimpleNamespace(returncode=0, stdout=f"said\n{json.dumps(document)}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", command)
    monkeypatch.setattr(
        sys, "argv", ["evaluations.py", "--name", "a", "--data", "/secret/place", "--data-label", "data"]
    )
    assert Evaluations(name="a", data="/secret/place", data_label="data", out=tmp_path).run() == 0
    call = "python -m benchmarks.evaluations --name a --data data --data-label data"
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["command"] == call
    assert document["commands"][0].startswith("leoclr-fast pretrain leoclr_cifar10")
    assert document["environment"]["git_commit"] == "clean"
    assert f"`{call}`" in (tmp_path / "a.md").read_text()
    assert (tmp_path / "a.log").read_text().startswith(f"$ {call}\n$ leoclr-fast pretrain")
