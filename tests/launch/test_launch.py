"""The launch scripts: SLURM's run for real beside stand-ins for SLURM's programs; Kubernetes' is read and compared."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from leoclr_fast.recipes import RECIPES
from leoclr_fast.run.checkpoint import list_checkpoints, load_checkpoint, step_of
from leoclr_fast.run.folder import RunFolder
from tests.launch.slurm_stubs import REQUEUED, STEP_PID, descendants, install
from tests.leoclr_fast.conftest import write_tiny_images
from tests.leoclr_fast.tiny_flags import TINY_FLAGS

ROOT = Path(__file__).parents[2]
SLURM, KUBERNETES = ROOT / "launch" / "slurm.sbatch", ROOT / "launch" / "kubernetes.yaml"
JOB_ID = str(30_000 + os.getpid())
NUM_STEPS = 60
FLAGS = [
    *TINY_FLAGS,
    "--epochs=20",
    "--monitor.knn-every-epochs=20",
    "--monitor.checkpoint-every-epochs=20",
]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a SLURM job; whatever it started is ended."""
    install(tmp_path / "bin")
    write_tiny_images(tmp_path / "data")
    yield {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_STUB_STATE": str(tmp_path),
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_JOB_NUM_NODES": "1",
        "RECIPE": "leoclr_demo",
        "DATA": str(tmp_path / "data"),
        "OUT": str(tmp_path / "run"),
        "PYTHON": sys.executable,
    }
    step = tmp_path / STEP_PID
    for pid in descendants(int(step.read_text())) if step.exists() else []:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def finished_steps(out: Path) -> list[int]:
    return [record["step"] for record in RunFolder(out).read_metrics("step")]


def start(job: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as output:
        return subprocess.Popen(
            ["bash", str(SLURM), *FLAGS], env=job, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("nodes", "ranks"), [(1, 2), (2, 1)], ids=["one machine", "two machines"])
def test_a_preempted_slurm_job_saves_queues_itself_again_and_continues(
    job: dict[str, str], tmp_path: Path, nodes: int, ranks: int
) -> None:
    """USR1 to the batch script, as `#SBATCH --signal=B:USR1@120` sends it."""
    job |= {"SLURM_JOB_NUM_NODES": str(nodes), "RANKS_PER_NODE": str(ranks)}
    out, log = tmp_path / "run", tmp_path / "job.log"
    with start(job, log) as script:
        try:
            deadline = time.monotonic() + 150
            while len(finished_steps(out)) < 3 and script.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert script.poll() is None, log.read_text()
            script.send_signal(signal.SIGUSR1)
            script.wait(90)
        finally:
            script.kill()
    printed = log.read_text()
    (checkpoint,) = list_checkpoints(out / "checkpoints")
    saved = step_of(checkpoint)
    assert 3 <= saved < NUM_STEPS, printed
    assert load_checkpoint(checkpoint)["step"] == saved
    assert (tmp_path / REQUEUED).read_text() == f"{JOB_ID}\n", printed
    assert "asking all ranks for a checkpoint by SIGUSR1" in printed
    assert f"launch: queued again; it will continue from {checkpoint}" in printed

    with start(job, log) as script:
        try:
            script.wait(200)
        finally:
            script.kill()
    printed = log.read_text()
    assert script.returncode == 0, printed
    assert f"resuming from {checkpoint}" in printed
    assert printed.rstrip().endswith("launch: finished")
    assert finished_steps(out) == list(range(1, NUM_STEPS + 1))
    assert (tmp_path / REQUEUED).read_text() == f"{JOB_ID}\n"


def run_with(job: dict[str, str], srun: str, *, send: bool = False) -> tuple[int, str]:
    """The script with another srun; its exit code and what it printed. send: USR1, once srun has made a file."""
    program = Path(job["PATH"].split(":")[0]) / "srun"
    program.write_text(f"#!/bin/bash\n{srun}\n")
    fast_python = program.with_name("fast-python")  # only its list of options is asked for
    fast_python.write_text("#!/bin/sh\necho ' --signals-to-handle --shutdown-timeout'\n")
    fast_python.chmod(0o755)
    began, cancelled = (Path(job["SLURM_STUB_STATE"]) / name for name in ("began", "cancelled"))
    program.with_name("scancel").write_text(f"#!/bin/sh\ntouch {cancelled}\n")
    environment = {**job, "PYTHON": str(fast_python), "BEGAN": str(began), "CANCELLED": str(cancelled)}
    with subprocess.Popen(
        ["bash", str(SLURM)], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as script:
        deadline = time.monotonic() + 30
        while send and not began.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if send:
            script.send_signal(signal.SIGUSR1)
        printed, _ = script.communicate(timeout=60)
    return script.returncode, printed


def test_a_failed_job_is_not_queued_again(job: dict[str, str], tmp_path: Path) -> None:
    code, printed = run_with(job, "exit 3")
    assert code == 3
    assert "launch: failed with code 3" in printed
    assert "continues from the beginning" in printed
    assert not (tmp_path / REQUEUED).exists()


def test_a_job_that_saves_nothing_for_a_long_time_is_not_queued_for_ever(job: dict[str, str], tmp_path: Path) -> None:
    wait = 'touch "$BEGAN"; until [ -e "$CANCELLED" ]; do sleep 0.02; done; exit 1'
    code, printed = run_with({**job, "SECONDS": "700"}, wait, send=True)
    assert code == 1
    assert "so the job is not queued again" in printed
    assert not (tmp_path / REQUEUED).exists()
    for name in ("began", "cancelled"):
        (tmp_path / name).unlink()
    run_with(job, wait, send=True)  # preempted as it began: nothing is wrong with it
    assert (tmp_path / REQUEUED).read_text() == f"{JOB_ID}\n"


def test_every_machine_gets_the_same_meeting_point(job: dict[str, str]) -> None:
    code, printed = run_with({**job, "SLURM_CPUS_PER_TASK": "7"}, 'printf "[%s]\\n" "$@"')
    words = [line[1:-1] for line in printed.splitlines() if line.startswith("[")]
    assert code == 0
    assert "--cpus-per-task=7" in words
    assert "--master-addr=localhost" in words
    assert f"--master-port={10_000 + int(JOB_ID) % 20_000}" in words
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in words
    assert words[words.index("pretrain") : words.index("--out")] == ["pretrain", "leoclr_demo", "--data", job["DATA"]]


def test_the_script_is_sound() -> None:
    assert subprocess.run(["bash", "-n", str(SLURM)], check=False).returncode == 0
    asked = [line.split()[1] for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1"} <= set(asked)


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed: apt-get install shellcheck"
)
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", str(SLURM)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def spec() -> dict[str, Any]:
    """Of the PyTorchJob."""
    document = yaml.safe_load(KUBERNETES.read_text())
    assert (document["apiVersion"], document["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    parsed: dict[str, Any] = document["spec"]
    return parsed


class TestKubernetes:
    def test_numbers_that_must_agree(self, spec: dict[str, Any]) -> None:
        worker = spec["pytorchReplicaSpecs"]["Worker"]
        (container,) = worker["template"]["spec"]["containers"]
        elastic = spec["elasticPolicy"]
        assert spec["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
        assert 1 <= elastic["minReplicas"] <= elastic["maxReplicas"] == worker["replicas"]
        assert elastic["rdzvBackend"] == "c10d"
        assert worker["restartPolicy"] == "OnFailure"
        assert container["name"] == "pytorch"

    def test_there_is_time_for_a_checkpoint(self, spec: dict[str, Any]) -> None:
        pod = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
        (timeout,) = (word for word in pod["containers"][0]["command"] if word.startswith("--shutdown-timeout="))
        assert 30 < int(timeout.partition("=")[2]) < pod["terminationGracePeriodSeconds"]

    def test_every_mounted_volume_is_there_and_shared_memory_is_memory(self, spec: dict[str, Any]) -> None:
        pod = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts.keys() == volumes.keys()
        assert mounts["shm"] == "/dev/shm"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        command = pod["containers"][0]["command"]
        given = dict(word.removeprefix("--").split("=") for word in command if word.startswith(("--data", "--out")))
        assert given["data"].startswith(f"{mounts['data']}/")
        assert given["out"].startswith(f"{mounts['runs']}/")

    def test_the_command_is_one_of_ours(self, spec: dict[str, Any]) -> None:
        command = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["command"]
        assert command[0] == "torchrun"
        module, verb, recipe = command[command.index("-m") + 1 :][:3]
        assert (module, verb) == ("leoclr_fast", "pretrain")
        assert recipe in RECIPES
