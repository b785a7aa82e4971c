"""Section `tests`: the tests that need a GPU, file by file, so that what is stopped loses no finished file."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig, UnavailableError
from leoclr_fast.bench.page import markdown_table
from leoclr_fast.distributed.process_group import resolve_device

_CHECKOUT = Path(__file__).parents[2]
_FIRST = ("test_captured_step.py", "test_triton_kernels.py")
_LEAST_S = 5.0
_GRACE_S = 5.0


def run(config: SuiteConfig, say: Say) -> Answer:
    """pytest over `tests/gpu`; every test with its outcome and its reason, every file with how far it came.

    On a GPU each file has a process of its own: what one does to the device harms no other. Without one, where all
    are skipped, a single process does.
    """
    if not (_CHECKOUT / "tests" / "gpu").is_dir():
        raise UnavailableError("the folder tests/gpu is missing: run from a checkout of the repository")
    files = sorted((_CHECKOUT / "tests" / "gpu").glob("test_*.py"), key=lambda file: (file.name not in _FIRST, file))
    on_gpu = resolve_device(config.device).type == "cuda"
    groups = [[file] for file in files] if on_gpu else [files]
    return run_groups(groups, limit_s=config.soft_limit_s, say=say, keep=config.keep)


def run_groups(
    groups: Sequence[Sequence[Path]], *, limit_s: float, say: Say, keep: Callable[[Answer], None] = lambda _: None
) -> Answer:
    """pytest over each group of files in a process of its own, one after the other, for at most `limit_s` together.

    keep: is given the answer so far after every group but the last.
    The result has passed, skipped and failed (counts), `tests` as from `outcomes`, and `files`: name, seconds, and
    status: finished, stopped, crashed or "not reached".
    Raises UnavailableError without pytest.
    """
    deadline = time.perf_counter() + limit_s
    tests: list[dict[str, Any]] = []
    files = {file.name: {"status": "not reached", "seconds": 0.0} for group in groups for file in group}
    for number, group in enumerate(groups):
        start = time.perf_counter()
        if deadline - start < _LEAST_S:
            break
        status, found = _run_pytest(group, deadline - start, say)
        tests += found
        for file in group:
            files[file.name] = {"status": status, "seconds": time.perf_counter() - start}
        if number < len(groups) - 1:
            keep(_answer(tests, files))
    return _answer(tests, files)


def _run_pytest(files: Sequence[Path], limit_s: float, say: Say) -> tuple[str, list[dict[str, Any]]]:
    """How it ended, and the tests that did."""
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.xml", Path(folder) / "output.txt"
        command = [sys.executable, "-m", "pytest", *map(str, files), "-q", "--no-header", f"--junitxml={report}"]
        command += ["-W", "ignore::pytest.PytestConfigWarning"]  # the settings of plugins that are not installed
        command.append("--continue-on-collection-errors")  # a file that lacks a package keeps no other from running
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=_CHECKOUT, stdout=output, stderr=subprocess.STDOUT)
            status = "finished"
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = "stopped"
                process.send_signal(signal.SIGINT)  # then it still reports the tests that have ended
                try:
                    process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        told = log.read_text(errors="replace")
        say(told[-6000:])
        if "No module named pytest" in told:
            raise UnavailableError("pytest is not installed")
        tests = outcomes(ElementTree.parse(report).getroot()) if report.is_file() else []
    if status == "finished" and not tests:
        reason = f"pytest ended with code {process.returncode} and no report"
        names = ", ".join(file.name for file in files)
        return "crashed", [{"name": names, "outcome": "failed", "seconds": 0.0, "reason": reason}]
    return status, tests


def _answer(tests: Sequence[dict[str, Any]], files: dict[str, dict[str, Any]]) -> Answer:
    counts = {kind: sum(test["outcome"] == kind for test in tests) for kind in ("passed", "skipped", "failed")}
    markdown = ", ".join(f"{count} {kind}" for kind, count in counts.items()) + ".\n"
    for status, words in (("stopped", "Stopped before the end"), ("not reached", "Not reached")):
        names = [f"`{name}`" for name, file in files.items() if file["status"] == status]
        if names:
            markdown += f"\n**{words}: {', '.join(names)}.**\n"
    if counts["failed"]:
        rows = [(test["name"], test["reason"]) for test in tests if test["outcome"] == "failed"]
        markdown += "\n" + markdown_table(("failed", "reason"), rows)
    if counts["skipped"]:
        reasons = Counter(test["reason"] for test in tests if test["outcome"] == "skipped")
        markdown += "\n" + markdown_table(
            ("skipped because", "tests"), [(why, str(many)) for why, many in reasons.items()]
        )
    told = [{"file": name, **file} for name, file in files.items()]
    return Answer(result={**counts, "files": told, "tests": list(tests)}, markdown=markdown)


def outcomes(report: ElementTree.Element) -> list[dict[str, Any]]:
    """Name, outcome (passed, skipped, failed), seconds and reason of each test of a JUnit report."""
    tests = []
    for case in report.iter("testcase"):
        if case.get("name") is None:  # it was running when pytest was stopped
            continue
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                lines = (child.get("message") or "").strip().splitlines()
                if lines[:1] == ["collection failure"]:  # what failed stands at the end of the traceback
                    lines = (child.text or "").strip().splitlines()[-1:]
                reason = lines[0] if lines else child.tag
        place = re.sub(r"^.*\b(?=test_)", "", case.get("classname") or "")  # the file and, if it has one, the class
        seconds = float(case.get("time") or 0)
        tests.append(
            {
                "name": f"{place}::{case.get('name')}".removeprefix("::"),
                "outcome": outcome,
                "seconds": seconds,
                "reason": reason,
            }
        )
    return tests
