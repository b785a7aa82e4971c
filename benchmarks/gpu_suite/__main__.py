"""The command: every section in a process of its own, stopped when its time is over, its result written at once."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.sections import SECTIONS
from benchmarks.gpu_suite.targets import judge, targets_markdown

_SOFT = 0.8  # of a section's limit: within that it should stop by itself
_CHECKOUT = Path(__file__).parents[2]


def main() -> int:
    """0 if every section that could run did; 1 if one failed or was stopped."""
    flags = _parse()
    if flags.result_file is not None:
        return _run_section(flags)
    suite = Suite(flags)
    suite.run()
    print(suite.page())
    return int(any(section["status"] in ("failed", "stopped") for section in suite.document["sections"].values()))


class Suite:
    """NAME.json, NAME.md and NAME.log in the output folder, rewritten after every section."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.out: Path = flags.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.document: dict[str, Any] = {
            "command": _command_line(flags),
            "began_unix_s": round(time.time()),
            "tiny": flags.tiny,
            "limit_s": flags.limit_s,
            "sections": {},
        }
        self._log = [f"$ {self.document['command']}\n"]
        self._start = time.perf_counter()

    def run(self) -> None:
        """All sections that were asked for, `machine` first. The limits of the sections are a GPU's, so at tiny sizes
        only that of the suite counts.
        """
        wanted = [name for name in SECTIONS if name == "machine" or name in self.flags.sections]
        allowed_s = 0.0
        for name in wanted:
            allowed_s += SECTIONS[name].limit_s
            until_s = self.flags.limit_s if self.flags.tiny else min(allowed_s, self.flags.limit_s)
            left_s = until_s - (time.perf_counter() - self._start)
            print(f"section {name}: at most {max(0.0, left_s):.0f} s", flush=True)
            if left_s < 1:
                section = {"status": "stopped", "reason": "the suite's time was over before it began", "seconds": 0.0}
            else:
                section = self._in_a_process(name, left_s)
            self.document["sections"][name] = section
            print(f"  {section['status']} after {section['seconds']:.0f} s. {section.get('reason', '')}", flush=True)
            self.document["seconds"] = time.perf_counter() - self._start
            self._write()

    def page(self) -> str:
        """Everything as Markdown."""
        document = self.document
        sections = document["sections"]
        lines = [f"# {self._title()}", "", f"`{document['command']}`", ""]
        if document["tiny"]:
            lines += ["**Tiny sizes: this shows that everything runs, its figures mean nothing.**", ""]
        if self._on_cpu():
            lines += ["**There was no GPU: what follows ran on a CPU.**", ""]
        lines += [f"{document['seconds']:.0f} s in all.", "", targets_markdown(document["targets"])]
        for name, section in sections.items():
            lines += [
                f"## {SECTIONS[name].title}",
                "",
                f"`{name}`: {section['status']}, {section['seconds']:.0f} s.",
                "",
            ]
            if section.get("reason"):
                lines += [section["reason"], ""]
            if section.get("markdown"):
                lines += [section["markdown"]]
        return "\n".join(lines)

    def _on_cpu(self) -> bool:
        machine = self.document["sections"].get("machine", {}).get("result") or {}
        return bool(machine) and machine.get("gpu") is None

    def _title(self) -> str:
        run = " ".join(word for word, holds in (("tiny", self.flags.tiny), ("CPU", self._on_cpu())) if holds)
        return f"GPU suite: a {run} run, which says nothing of GPUs" if run else "GPU suite"

    def _write(self) -> None:
        sections = self.document["sections"]
        results = {name: section["result"] for name, section in sections.items() if "result" in section}
        self.document["targets"] = judge(results, tiny=self.document["tiny"])
        name = self.flags.name
        _write_whole(self.out / f"{name}.md", self._without_paths(self.page()))
        _write_whole(self.out / f"{name}.log", self._without_paths("".join(self._log)))
        plain = {
            key: {part: value for part, value in section.items() if part != "markdown"}
            for key, section in sections.items()
        }
        document = {"title": self._title(), **self.document, "sections": plain}
        _write_whole(self.out / f"{name}.json", self._without_paths(json.dumps(document, indent=1)) + "\n")

    def _in_a_process(self, name: str, limit_s: float) -> dict[str, Any]:
        """status (done, unavailable, failed, stopped), seconds, reason; result and markdown where it is done, or of
        the parts that were done before it failed or was stopped.
        """
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result_file = Path(folder) / "result.json"
            command = [sys.executable, "-m", "benchmarks.gpu_suite", "--sections", name, "--device", self.flags.device]
            command += [
                "--result-file",
                str(result_file),
                "--limit-s",
                str(limit_s),
                "--precision",
                self.flags.precision,
            ]
            command += ["--epochs", str(self.flags.epochs), *(["--tiny"] if self.flags.tiny else [])]
            for flag in ("data", "photographs"):
                given = getattr(self.flags, flag)
                command += [f"--{flag}", str(given)] if given else []
            process = subprocess.Popen(
                command,
                cwd=_CHECKOUT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            stopped = False
            try:
                output, _ = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                stopped = True
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            if stopped:
                output, _ = process.communicate()
            section: dict[str, Any] = {"seconds": time.perf_counter() - start}
            self._log.append(f"\n== {name}\n{output}")
            told: dict[str, Any] = json.loads(result_file.read_text()) if result_file.is_file() else {}
            if stopped:
                told |= {"status": "stopped", "reason": f"its {limit_s:.0f} s were over; the log has what it said"}
            elif told.get("status") in (None, "unfinished"):
                told |= {"status": "failed", "reason": f"it ended with code {process.returncode} and no result"}
            if told["status"] != "done" and "result" in told:
                told["reason"] += "; what it had found by then follows"
            return section | told

    def _without_paths(self, text: str) -> str:
        """No path of this machine: the results are to be published."""
        given = [path for path in (self.flags.data, self.flags.photographs) if path is not None]
        names = {Path(sys.prefix): "(python)", Path(sys.base_prefix): "(python)", _CHECKOUT: "."}
        names |= {path: path.name for path in given}
        names |= {Path(tempfile.gettempdir()): "(temporary)", Path.home(): "~"}
        for path, name in names.items():
            if path != path.parent:  # a home of / would take every slash
                text = text.replace(str(path), name)
        return text


def _run_section(flags: argparse.Namespace) -> int:
    """In the process of a section: write its result, whatever comes."""
    from benchmarks.gpu_suite.suite_config import Answer, SuiteConfig, UnavailableError

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    (name,) = flags.sections
    told: dict[str, Any] = {}

    def keep(answer: Answer) -> None:
        told.update(status="unfinished", result=answer.result, markdown=answer.markdown)
        _write_whole(flags.result_file, json.dumps(told))

    config = SuiteConfig(
        device=flags.device,
        tiny=flags.tiny,
        precision=flags.precision,
        data=flags.data,
        photographs=flags.photographs,
        epochs=flags.epochs,
        soft_limit_s=_SOFT * flags.limit_s,
        keep=keep,
    )
    try:
        module, _, function = SECTIONS[name].function.rpartition(".")
        run = getattr(importlib.import_module(f"benchmarks.gpu_suite.{module}"), function)
        answer = run(config, lambda line: print(line, flush=True))
        keep(answer)
        told["status"] = "done"
    except UnavailableError as error:
        told |= {"status": "unavailable", "reason": str(error)}
    except Exception as error:  # the other sections shall still run, and the page say what happened
        traceback.print_exc()
        told |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    _write_whole(flags.result_file, json.dumps(told))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument(
        "--sections",
        nargs="+",
        default=list(SECTIONS),
        choices=list(SECTIONS),
        help="all, if not given",
        metavar="NAME",
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs; no measurement")
    parser.add_argument("--data", type=Path, help="CIFAR-10, in any form that pretrain reads")
    parser.add_argument(
        "--photographs", type=Path, help="JPEGs of 224 pixels or more, for the section loaders (default: --data)"
    )
    parser.add_argument("--epochs", type=int, help="of the pretraining on it (8; with --tiny 1)")
    parser.add_argument("--limit-s", type=float, default=590.0, help="for the whole suite")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of NAME.json, .md and .log"
    )
    parser.add_argument("--name", default="gpu_suite", help="of the result files")
    parser.add_argument("--result-file", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    for name in ("data", "photographs"):
        given = getattr(flags, name)
        if given is not None and not given.exists():
            parser.error(f"--{name} {given} does not exist")
        setattr(flags, name, given and given.absolute())
    flags.epochs = (1 if flags.tiny else 8) if flags.epochs is None else flags.epochs
    if flags.epochs < 1:
        parser.error(f"--epochs {flags.epochs} is not allowed: give at least 1")
    if flags.precision is None:
        flags.precision = "bf16" if _means_gpu(flags.device) else "fp32"
    return flags


def _means_gpu(device: str) -> bool:
    """Without touching CUDA: this process shall hold none of the GPU's memory."""
    if device != "auto":
        return device.startswith("cuda")
    import torch

    return torch.cuda.device_count() > 0


def _write_whole(path: Path, text: str) -> None:
    """A reader, or a machine that is taken away, never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _command_line(flags: argparse.Namespace) -> str:
    words = list(sys.argv[1:])
    for place, word in enumerate(words):
        if Path(word).is_absolute() or (place and words[place - 1] in ("--data", "--photographs")):
            words[place] = Path(word).name
    return shlex.join(["python", "-m", "benchmarks.gpu_suite", *words])


if __name__ == "__main__":
    sys.exit(main())
