"""What the tests of trouble from outside share: a source with everything in it, and commands that can be killed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset_tools.cli import main
from dataset_tools.conversion import convert, merge, split_conversion, verify  # noqa: F401 - for all that are forked
from dataset_tools.conversion.options import ConvertOptions

Image.init()  # once, and not in each forked process that meets a damaged image

LIMIT_S = 60.0
"""Far more than any command here takes."""
FORMATS = ("ffcv", "webdataset")


def options(format: str, **given: Any) -> ConvertOptions:
    return ConvertOptions(format=format, shard_size="128KiB", **given)


def jpeg(width: int, height: int, seed: int, mode: str = "RGB", **options: Any) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    image = Image.fromarray(small.squeeze(), mode).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def mixed_files(num_train: int, num_val: int, seed: int = 0) -> dict[str, bytes]:
    """Path → bytes: mostly JPEGs that are passed through; some of every eight are re-encoded or cannot be used."""
    kept = [jpeg(24 + 5 * i, 20 + 7 * (i % 5), seed + i) for i in range(10)] + [jpeg(30, 31, seed, "L")]
    cmyk, png = jpeg(28, 22, seed, "CMYK"), io.BytesIO()
    Image.open(io.BytesIO(kept[3])).save(png, "PNG")
    files = {}
    for split, count in (("train", num_train), ("val", num_val)):
        for number in range(count):
            data, extension = kept[number % len(kept)], "jpg"
            data = data[:2] + b"\xff\xfe\x00\x0a%08d" % number + data[2:]  # a comment, so that all are different
            kind = number % 24
            if kind == 5:
                data = cmyk
            elif kind == 11:
                data, extension = png.getvalue(), "png"
            elif kind == 17:
                data = data[: len(data) // 2]
            elif kind == 23:
                data = b"no image at all"
            files[f"{split}/class {number % 3}/{number:05}.{extension}"] = data
    return files


def contents(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of each file: what must be identical."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


class Command:
    """A command line of dataset_tools in a forked process, which leads a session of its own."""

    def __init__(self, arguments: list[Any], log: Path, prepare: Callable[[], None]) -> None:
        """`prepare` is called in the process, before the command."""
        self.log = log
        log.write_bytes(b"")
        self.code: int | None = None
        leads, tells = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.close(tells)
            os.close(leads)
            self._run([str(argument) for argument in arguments], prepare)
        os.close(tells)
        os.read(leads, 1)  # ends when the process leads its session: whoever kills the group finds it
        os.close(leads)

    def _run(self, arguments: list[str], prepare: Callable[[], None]) -> None:
        code = 99
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            prepare()
            main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 98
        except BaseException as error:
            print(f"raised {error!r}", flush=True)
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, limit_s: float = LIMIT_S) -> int:
        until(lambda: self.poll() is not None, limit_s, f"the end of the command, whose output was:\n{self.output}")
        assert self.code is not None
        return self.code

    @property
    def output(self) -> str:
        return self.log.read_text()

    def workers(self) -> list[int]:
        try:
            text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        except OSError:
            return []
        return [int(pid) for pid in text.split()]

    def session(self) -> list[int]:
        """All living processes that it began, itself too."""
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal():
                try:
                    state, _, _, session = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:4]
                except (OSError, ValueError):
                    continue
                if int(session) == self.pid and state not in "ZX":
                    found.append(int(entry.name))
        return found

    def kill(self, group: bool) -> int:
        """SIGKILL, to the whole group or to the main process alone. Returns the exit code: 0 if it was too late."""
        if self.poll() is None:
            (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)
        return self.wait()

    def end(self) -> None:
        """Whatever happened: nothing of it goes on."""
        for pid in self.session():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.code is None:
            self.wait()


def tampered(content: dict[str, Any], values: list[Any], chance: random.Random) -> None:
    """Puts another value, one of `values`, in some place of a JSON document, at any depth."""
    place: Any = content
    step: Any = None
    while isinstance(place, dict | list) and place and (step is None or chance.random() < 0.5):
        step = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        holder, place = place, place[step]
    holder[step] = chance.choice([value for value in values if value != place or value is True])


class Commands(list[Command]):
    """Starts command lines, and ends them."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs

    def __call__(self, *arguments: Any, prepare: Callable[[], None] | None = None) -> Command:
        self.append(Command(list(arguments), self.logs / f"log {len(self)}", prepare or journal_often()))
        return self[-1]

    def end(self) -> None:
        for command in self:
            command.end()
        self.clear()


def until(condition: Callable[[], Any], limit_s: float, what: str) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {limit_s:.0f} s in vain for {what}")
        time.sleep(0.002)


def journal_often(every_s: float = 0.02, pause_s: float = 0.0) -> Callable[[], None]:
    """For `Command`: save the journal more often, and take `pause_s` more for each image."""

    def prepare() -> None:
        assert convert.convert.__kwdefaults__ is not None
        convert.convert.__kwdefaults__["journal_every_s"] = every_s
        transform = split_conversion.transform

        def slowly(*arguments: Any) -> Any:
            time.sleep(pause_s)
            return transform(*arguments)

        if pause_s:
            split_conversion.transform = slowly  # type: ignore[assignment]

    return prepare


def journaled(destination: Path) -> dict[str, Any]:
    """The splits as the journal knows them; {} if there is none."""
    try:
        text = destination.with_name(destination.name + ".partial").joinpath("journal.json").read_text()
        splits: dict[str, Any] = json.loads(text.split("\n")[1])["state"].get("splits", {})
    except (OSError, IndexError):
        return {}
    return splits


def images_done(destination: Path) -> int:
    """How many images the journal knows as done."""
    return sum(split.get("done", 0) for split in journaled(destination).values())
