"""`leoclr-fast doctor`: what each check says of machines as they might be, and that none can hang or break it."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from leoclr_fast.cli import run_command
from leoclr_fast.commands.doctor import table
from leoclr_fast.doctor import disks, gpus, packages, processors
from leoclr_fast.doctor.checks import CHECKS, Check, chosen_checks
from leoclr_fast.doctor.examination import run_apart
from leoclr_fast.doctor.processors import cpu_quota, memory_left_bytes
from leoclr_fast.doctor.result import Result, failed, not_applicable, warning

GIB = 2**30
NOTHING_GIVEN = {"data": "", "out": ""}


def check_named(name: str, **changes: Any) -> Check:
    (check,) = chosen_checks([name])
    return replace(check, **changes)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts a module of this source in the way of the real one, for processes started later."""

    def put(module: str, source: str) -> None:
        write(tmp_path / "broken" / module / "__init__.py", textwrap.dedent(source))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))

    return put


class TestResults:
    def test_the_worst_problem_decides_and_every_remedy_is_kept(self) -> None:
        result = Result("a disk")
        assert (result.status, result.remedy) == ("ok", None)
        result.warn("slow", "Speed it up.")
        assert result == warning("a disk; slow", "Speed it up.")
        result.fail("dead", "Mend it.")
        result.warn("slow", "Speed it up.")
        assert result == failed("a disk; slow; dead; slow", "Speed it up. Mend it.")

    def test_the_table_can_be_read_without_colours(self) -> None:
        results = [Result("2 cores"), warning("little", "Ask for more."), failed("stopped", "Wind it up."),
                   not_applicable("none")]  # fmt: skip
        printed = StringIO()
        Console(width=60, file=printed).print(table(["cores", "memory", "clock", "gpus"], results))
        rows = [" ".join(line.split()) for line in printed.getvalue().splitlines()]
        assert rows == [
            "ok cores 2 cores", "WARNING memory little", "→ Ask for more.", "FAILED clock stopped", "→ Wind it up.",
            "n/a gpus none",
        ]  # fmt: skip

    def test_an_unknown_check_names_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"there is no check 'gluo'\. Did you mean gloo"):
            chosen_checks(["gluo"])
        assert [check.name for check in chosen_checks(["memory", "cores"])] == ["cores", "memory"]
        assert len({check.name for check in CHECKS}) == len(CHECKS) == len(chosen_checks([]))


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestProcesses:
    """Each check runs apart: whatever it does there, there is one result, in time."""

    def test_a_module_that_kills_its_process(self, broken: Any) -> None:
        broken("torch", "import os\nos.kill(os.getpid(), 11)")
        result = run_apart(check_named("required packages"), NOTHING_GIVEN)
        assert result.found == "the check was ended by SIGSEGV: importing torch"
        assert result.status == "failed"
        broken("torch", "import os\nos._exit(3)")
        result = run_apart(check_named("required packages"), NOTHING_GIVEN)
        assert result.found == "the check ended with code 3 and no answer: importing torch"

    def test_a_check_that_hangs_is_ended_with_all_that_it_started(self, broken: Any, tmp_path: Path) -> None:
        pid_file = tmp_path / "pid"
        broken(
            "torch",
            f"""
            import signal, subprocess, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen(["sleep", "600"])
            open({str(pid_file)!r}, "w").write(str(child.pid))
            time.sleep(600)
            """,
        )
        began = time.monotonic()
        result = run_apart(check_named("required packages", limit_s=4.0, when_late="Wait."), NOTHING_GIVEN)
        assert time.monotonic() - began < 60
        assert result == failed("no answer within 4 s", "Wait.")
        child = int(pid_file.read_text())
        while lives(child):  # until the kernel has ended it
            assert time.monotonic() - began < 120
            time.sleep(0.05)

    def test_the_command_starts_without_torch_and_says_what_is_broken(self, broken: Any) -> None:
        broken("torch", "raise OSError('libcudart.so.13: wrong ELF class')")
        done = subprocess.run(
            [sys.executable, "-m", "leoclr_fast", "doctor", "--only", "required packages", "limits", "--json"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        document = json.loads(done.stdout.splitlines()[-1])
        by_name = {result["name"]: result for result in document["findings"]}
        assert list(by_name) == ["limits", "required packages"]
        assert "torch cannot be imported (OSError: libcudart.so.13: wrong ELF class)" in (
            by_name["required packages"]["found"]
        )  # fmt: skip
        assert by_name["limits"]["status"] in ("ok", "warning")
        assert document["ok"] is False
        assert document["counts"]["failed"] == 1
        assert "Traceback" not in done.stdout + done.stderr
        assert "FAILED  required packages" in done.stdout

    @pytest.mark.long
    def test_an_interface_that_is_not_there_is_named(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        """gloo, for real, with a left-over variable."""
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "gone0")
        assert run_command(["doctor", "--only", "gloo", "--json"]) == 1
        (talk,) = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
        assert talk["status"] == "failed"
        assert "two processes cannot talk (GLOO_SOCKET_IFNAME=gone0)" in talk["found"]

    @pytest.mark.long
    def test_an_ffcv_that_cannot_be_imported(self, broken: Any) -> None:
        broken("ffcv", "")
        result = run_apart(check_named("loader ffcv"), NOTHING_GIVEN)
        assert result.status == "failed"
        assert "there is no _libffcv in the package ffcv" in result.found
        assert "`make ffcv`" in (result.remedy or "")

    @pytest.mark.long
    def test_all_checks_answer(self, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code = run_command(["doctor", "--data", str(tiny_data), "--out", str(tmp_path / "new" / "run"), "--json"])
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [result["name"] for result in document["findings"]] == [check.name for check in CHECKS]
        assert code == (0 if document["ok"] else 1)
        by_name = {result["name"]: result for result in document["findings"]}
        for name in ("required packages", "gloo", "out folder", "data", "loader torchvision"):
            assert by_name[name]["status"] == "ok", by_name[name]
        assert "two JPEGs on" in by_name["loader torchvision"]["found"]
        assert by_name["gloo"]["found"] == "two processes on this machine have summed their tensors"
        assert "train 40 images, val 12 images; 3 classes" in by_name["data"]["found"]
        assert not any("no answer within" in result["found"] for result in document["findings"])
        assert not (tmp_path / "new").exists()


class TestPackages:
    def test_too_old_and_missing_packages_are_named(self) -> None:
        wanted = [Requirement("pillow>=999"), Requirement("no-such-package>=1")]
        result = packages.import_all(wanted)
        assert re.fullmatch(r"pillow (\S+); pillow \1 is older than 999; no-such-package is missing", result.found)
        assert (result.status, result.remedy) == ("failed", "Install it: `pip install -e .`.")


class TestProcessors:
    def test_the_tightest_quota_of_the_groups_around_counts(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/slurm/job/step\n")
        groups = tmp_path / "sys/fs/cgroup"
        assert cpu_quota(tmp_path) is None
        write(groups / "slurm/job/step/cpu.max", "max 100000\n")
        write(groups / "slurm/job/cpu.max", "150000 100000\n")
        write(groups / "slurm/cpu.max", "400000 100000\n")
        assert cpu_quota(tmp_path) == 1.5

    def test_a_quota_below_the_cores_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))
        assert processors.cores(tmp_path) == Result("16 of 64 cores, load 3.0")
        write(tmp_path / "proc/self/cgroup", "0::/\n")
        write(tmp_path / "sys/fs/cgroup/cpu.max", "400000 100000\n")
        result = processors.cores(tmp_path)
        assert result.status == "warning"
        assert "a quota of 4 cores' time" in result.found
        assert result.remedy == "Give `--loader.workers 4`, or ask for more cores."


class TestMemory:
    def test_the_control_group_may_leave_less_than_the_machine(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {48 * 2**20} kB\n")
        assert processors.memory(tmp_path) == Result("48.0 of 64.0 GiB available")
        write(tmp_path / "proc/self/cgroup", "0::/pod\n")
        group = tmp_path / "sys/fs/cgroup/pod"
        write(group / "memory.max", f"{16 * GIB}\n")
        write(group / "memory.current", f"{14 * GIB}\n")
        write(group / "memory.stat", f"anon 5\ninactive_file {4 * GIB}\n")
        assert memory_left_bytes(tmp_path) == (16 * GIB, 6 * GIB)
        result = processors.memory(tmp_path)
        assert result.status == "warning"
        assert result.found.endswith("this control group: 6.0 of 16.0 GiB left; 6.0 GiB are little")
        write(group / "memory.current", f"{int(19.5 * GIB)}\n")
        assert processors.memory(tmp_path).status == "failed"

    @pytest.mark.parametrize(
        ("mib", "status"), [(64, "failed"), (1024, "warning"), (8192, "ok")], ids=["Docker's", "small", "enough"]
    )
    def test_shared_memory(self, mib: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        room = SimpleNamespace(f_blocks=mib, f_bavail=mib, f_frsize=2**20)
        monkeypatch.setattr(os, "statvfs", lambda _: room)
        result = processors.shared_memory(str(tmp_path))
        assert result.status == status
        assert ("--shm-size" in (result.remedy or "")) == (status != "ok")

    def test_no_shared_memory(self, tmp_path: Path) -> None:
        assert processors.shared_memory(str(tmp_path / "shm")).status == "failed"


class TestLimits:
    def test_few_files_and_locked_memory_with_infiniband(self, tmp_path: Path) -> None:
        values = {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_MEMLOCK: 2**16}
        result = processors.limits(lambda which: (values[which], -1), tmp_path)
        assert result.status == "warning"
        assert "open files 1,024, locked memory 65,536 B" in result.found
        assert result.remedy == "Allow more with `ulimit -n 65536`."
        (tmp_path / "sys/class/infiniband").mkdir(parents=True)
        assert "`ulimit -l unlimited`" in (processors.limits(lambda which: (values[which], -1), tmp_path).remedy or "")
        values[resource.RLIMIT_NOFILE] = 128
        assert processors.limits(lambda which: (values[which], -1), tmp_path).status == "failed"


class TestDisks:
    def test_a_folder_that_is_still_to_be_made(self, tmp_path: Path) -> None:
        result = disks.out_folder(str(tmp_path / "runs" / "new"))
        assert result.status in ("ok", "warning")  # the disk of the tests may be nearly full
        assert result.found.startswith(f"{tmp_path}, {disks.file_system(tmp_path)}: ")
        assert list(tmp_path.iterdir()) == []
        assert disks.out_folder(str(write(tmp_path / "run", ""))).found == f"{tmp_path}/run is a file"

    def test_no_room_and_no_inodes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        room = SimpleNamespace(
            f_bavail=512, f_blocks=10 * 1024, f_frsize=2**20, f_files=10**6, f_favail=50, f_flag=os.ST_NOEXEC
        )
        monkeypatch.setattr(os, "statvfs", lambda _: room)
        result = disks.out_folder(str(tmp_path))
        assert result.status == "failed"
        assert "0.5 of 10.0 GiB free, 50 inodes left; 0.50 GiB are little; few files can be made" in result.found
        assert disks.temporary_folder().found.endswith("programs cannot be loaded from it (noexec)")

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**_: Any) -> Any:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(disks.tempfile, "TemporaryFile", refuse)
        assert disks.out_folder(str(tmp_path)).found.endswith("cannot be written (Read-only file system)")

    def test_what_training_would_see(self, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert disks.data("").status == "not applicable"
        for unreadable in (tmp_path / "nowhere", tmp_path):
            result = disks.data(str(unreadable))
            assert result.status == "failed"
            assert str(unreadable) in result.found
        result = disks.data(str(tiny_data))
        assert result.found.startswith(
            f"image folder on {disks.file_system(tiny_data)}: train 40 images, val 12 images"
        )
        monkeypatch.setattr(disks, "file_system", lambda path: "nfs")
        result = disks.data(str(tiny_data))
        assert result.status == "warning"
        assert f"leoclr-fast convert {tiny_data} DEST" in (result.remedy or "")


class TestGpus:
    """On machines that this one is not; on a GPU nothing of doctor has run."""

    def test_no_gpu_and_a_gpu_that_torch_does_not_see(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_driver() -> None:
            raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

        monkeypatch.setattr("torch.cuda.init", no_driver)
        assert gpus.explain_no_gpu({}, tmp_path).status == "not applicable"
        write(tmp_path / "proc/driver/nvidia/version", "")
        in_container = gpus.explain_no_gpu({}, tmp_path)
        assert in_container.status == "failed"
        assert "docker run --gpus all" in (in_container.remedy or "")
        write(tmp_path / "dev/nvidia0", "")
        too_old = gpus.explain_no_gpu({}, tmp_path)
        assert too_old.status == "failed"
        assert too_old.found.endswith(
            "sees no GPU (The NVIDIA driver on your system is too old (found version 12020).)"
        )
        hidden = gpus.explain_no_gpu({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)
        assert (hidden.status, hidden.remedy) == ("warning", "`unset CUDA_VISIBLE_DEVICES`.")
