"""Section `tests`: the tests that need a GPU."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig, UnavailableError
from leoclr_fast.bench.tables import markdown_table

_CHECKOUT = Path(__file__).parents[2]


def run(config: SuiteConfig, say: Say) -> Answer:
    """pytest over `tests/gpu`; every test with its outcome and its reason."""
    if not (_CHECKOUT / "tests" / "gpu").is_dir():
        raise UnavailableError("the folder tests/gpu is missing: run from a checkout of the repository")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "--no-header", f"--junitxml={report}"]
        command.append("--continue-on-collection-errors")  # a file that lacks a package keeps no other from running
        done = subprocess.run(command, cwd=_CHECKOUT, capture_output=True, text=True, check=False)
        say((done.stdout + done.stderr)[-6000:])
        if "No module named pytest" in done.stderr:
            raise UnavailableError("pytest is not installed")
        if not report.is_file():
            raise RuntimeError(f"pytest ended with code {done.returncode} and left no report")
        tests = outcomes(ElementTree.parse(report).getroot())
    counts = {kind: sum(test["outcome"] == kind for test in tests) for kind in ("passed", "skipped", "failed")}
    markdown = ", ".join(f"{count} {kind}" for kind, count in counts.items()) + ".\n"
    if counts["failed"]:
        rows = [(test["name"], test["reason"]) for test in tests if test["outcome"] == "failed"]
        markdown += "\n" + markdown_table(("failed", "reason"), rows)
    if counts["skipped"]:
        reasons = Counter(test["reason"] for test in tests if test["outcome"] == "skipped")
        markdown += "\n" + markdown_table(
            ("skipped because", "tests"), [(why, str(many)) for why, many in reasons.items()]
        )
    return Answer(result={**counts, "pytest_exit_code": done.returncode, "tests": tests}, markdown=markdown)


def outcomes(report: ElementTree.Element) -> list[dict[str, Any]]:
    """Name, outcome (passed, skipped, failed), seconds and reason of each test of a JUnit report."""
    tests = []
    for case in report.iter("testcase"):
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                lines = (child.get("message") or "").strip().splitlines()
                if lines[:1] == ["collection failure"]:  # what failed stands at the end of the traceback
                    lines = (child.text or "").strip().splitlines()[-1:]
                reason = lines[0] if lines else child.tag
        module = (case.get("classname") or "").rsplit(".", 1)[-1]
        seconds = float(case.get("time") or 0)
        tests.append(
            {
                "name": f"{module}::{case.get('name')}".removeprefix("::"),
                "outcome": outcome,
                "seconds": seconds,
                "reason": reason,
            }
        )
    return tests
