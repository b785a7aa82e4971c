"""The command: every section in a process of its own, stopped when its time is over, its result written at once."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.suite_config import SECTIONS, SuiteConfig, run_section
from benchmarks.gpu_suite.targets import compare_with_targets, targets_markdown
from benchmarks.results import RESULTS, Results

_SOFT = 0.8  # of a section's limit: within that it should stop by itself
_CHECKOUT = Path(__file__).parents[2]
_CACHE = Path(tempfile.gettempdir()) / "leoclr-gpu-suite"
_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
"""What one section has compiled, the next ones find, and those of the next call."""


def main() -> int:
    """0 if every section that could run did; 1 if one failed or was stopped."""
    suite = Suite(_parse())
    os.environ |= {name: str(_CACHE / place) for name, place in _CACHES.items()}
    suite.run()
    print(suite.page())
    return int(any(section["status"] in ("failed", "stopped") for section in suite.document["sections"].values()))


class Suite:
    """NAME.json, NAME.md and NAME.log in the output folder, rewritten after every section, without paths of this
    machine: they are to be published.
    """

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        given = [path for path in (flags.data, flags.photographs) if path is not None]
        hidden = {sys.prefix: "(python)", sys.base_prefix: "(python)", str(_CHECKOUT): "."}
        hidden |= {str(path): path.name for path in given}
        hidden[tempfile.gettempdir()] = "(temporary)"
        self.results = Results(name=flags.name, out=flags.out, hidden=hidden)
        self.document: dict[str, Any] = {
            "began_unix_s": round(time.time()),
            "tiny": flags.tiny,
            "limit_s": flags.limit_s,
            "sections": {},
        }
        self._start = time.perf_counter()

    def run(self) -> None:
        """All sections that were asked for, `machine` first. The limits of the sections are a GPU's, so at tiny sizes
        only that of the suite counts.
        """
        allowed_s = 0.0
        for name in SECTIONS:
            if name != "machine" and name not in self.flags.sections:
                continue
            allowed_s += SECTIONS[name].limit_s
            until_s = self.flags.limit_s if self.flags.tiny else min(allowed_s, self.flags.limit_s)
            left_s = until_s - (time.perf_counter() - self._start)
            print(f"section {name}: at most {max(0.0, left_s):.0f} s", flush=True)
            if left_s < 1:
                section = {"status": "stopped", "reason": "the suite's time was over before it began", "seconds": 0.0}
            else:
                section = self.in_a_process(name, left_s)
            self.document["sections"][name] = section
            print(f"  {section['status']} after {section['seconds']:.0f} s. {section.get('reason', '')}", flush=True)
            self.write()

    def page(self) -> str:
        document = self.document
        lines = [f"# {self._title()}", "", f"`{self.results.command}`", ""]
        if document["tiny"]:
            lines += ["**Tiny sizes: this shows that everything runs, its figures mean nothing.**", ""]
        if self._on_cpu():
            lines += ["**There was no GPU: what follows ran on a CPU.**", ""]
        lines += [f"{document['seconds']:.0f} s in all.", "", targets_markdown(document["targets"])]
        for name, section in document["sections"].items():
            lines += [
                f"## {SECTIONS[name].title}",
                "",
                f"`{name}`: {section['status']}, {section['seconds']:.0f} s.",
                "",
            ]
            lines += [section["reason"], ""] if section.get("reason") else []
            lines += [section["markdown"]] if section.get("markdown") else []
        return "\n".join(lines)

    def _on_cpu(self) -> bool:
        machine = self.document["sections"].get("machine", {}).get("result") or {}
        return bool(machine) and machine.get("gpu") is None

    def _title(self) -> str:
        run = " ".join(word for word, holds in (("tiny", self.flags.tiny), ("CPU", self._on_cpu())) if holds)
        return f"GPU suite: a {run} run, which says nothing of GPUs" if run else "GPU suite"

    def write(self) -> None:
        """The three files, with what has been found so far."""
        sections = self.document["sections"]
        found = {name: section["result"] for name, section in sections.items() if "result" in section}
        self.document["targets"] = compare_with_targets(found, tiny=self.document["tiny"])
        self.document["seconds"] = time.perf_counter() - self._start
        plain = {
            name: {part: value for part, value in section.items() if part != "markdown"}
            for name, section in sections.items()
        }
        self.results.write({"title": self._title(), **self.document, "sections": plain}, self.page())

    def in_a_process(self, name: str, limit_s: float) -> dict[str, Any]:
        """status (done, unavailable, failed, stopped), seconds, reason; result and markdown where it is done, or of
        the parts that were done before it failed or was stopped.
        """
        start, flags = time.perf_counter(), self.flags
        config = SuiteConfig(
            device=flags.device,
            tiny=flags.tiny,
            precision=flags.precision,
            data=flags.data,
            photographs=flags.photographs,
            epochs=flags.epochs,
            soft_limit_s=_SOFT * limit_s,
        )
        with tempfile.TemporaryDirectory() as folder:
            result_file, log = Path(folder) / "result.json", Path(folder) / "log.txt"
            process = get_context("spawn").Process(target=run_section, args=(name, config, result_file, log))
            process.start()
            pid = process.pid
            assert pid is not None
            try:
                process.join(limit_s)
            finally:
                if stopped := process.is_alive():
                    with suppress(ProcessLookupError):  # it has just been started, and leads no group yet
                        os.killpg(pid, signal.SIGKILL)
                    process.kill()
                process.join()
            output = log.read_text(errors="replace") if log.is_file() else ""
            self.results.log.append(f"\n== {name}\n{output}")
            answer: dict[str, Any] = json.loads(result_file.read_text()) if result_file.is_file() else {}
        if stopped:
            answer |= {"status": "stopped", "reason": f"its {limit_s:.0f} s were over; the log has what it said"}
        elif answer.get("status") in (None, "unfinished"):
            answer |= {"status": "failed", "reason": f"it ended with code {process.exitcode} and no result"}
        if answer["status"] != "done" and "result" in answer:
            answer["reason"] += "; what it had found by then follows"
        return {"seconds": time.perf_counter() - start, **answer}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    names = list(SECTIONS)
    parser.add_argument("--sections", nargs="+", default=names, choices=names, help="all by default", metavar="NAME")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs; no measurement")
    parser.add_argument("--data", type=Path, help="CIFAR-10, in any form that pretrain reads")
    parser.add_argument("--photographs", type=Path, help="JPEGs of 224 pixels or more, for loaders (default: --data)")
    parser.add_argument("--epochs", type=int, help="of the pretraining on it (8; with --tiny 1)")
    parser.add_argument("--limit-s", type=float, default=840.0, help="for the whole suite")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of NAME.json, .md and .log")
    parser.add_argument("--name", default="gpu_suite", help="of the result files")
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


if __name__ == "__main__":
    sys.exit(main())
