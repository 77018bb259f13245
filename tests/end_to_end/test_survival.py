"""The launch files: their own command lines train here, one machine standing in for many."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.runs import ROOT, environment, metrics, train_command

pytestmark = pytest.mark.ranks

CLUSTER = ROOT / "configs/cluster"


def on_path(folder, **programs):
    """An environment whose PATH begins with these programs, and with this Python's."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    env = environment()
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | {"PATH": path}


def arguments(run, *overrides):
    command = train_command(run, "training.checkpoint_every=0", *overrides, cold=True)
    return command[command.index("train") + 1 :]


def launched(script, args, env):
    return subprocess.run(
        ["bash", str(CLUSTER / script), *args], env=env, cwd=ROOT,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


# srun as SLURM runs it: a task each with its own number, and the highest exit code of all.
SRUN = """
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
  SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=2 "$@" &
done
worst=0
for job in $(jobs -p); do wait "$job"; code=$?; ((code > worst)) && worst=$code; done
exit $worst
"""


def test_slurm_saves_on_its_signal_and_is_queued_again(tmp_path):
    env = on_path(
        tmp_path / "bin",
        # The ranks' signal is planted in the step: SLURM sends it to all, one is enough.
        srun=SRUN.replace('"$@" &', "${@/#fastrepa/tests.programs.faulty} &"),
        scontrol=f'if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" > {tmp_path}/asked; fi',
    )
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]", "FAULT": "usr1 1 1"}
    done = launched("slurm.sbatch", arguments(tmp_path / "run", "training.steps=9"), env)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "saved; the same command continues" in done.stdout
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    step = metrics(tmp_path / "run")[-1]["step"]
    assert 2 <= step <= 3
    assert (tmp_path / f"run/checkpoints/step_{step:07d}/manifest.json").is_file()
    assert done.stdout.count("step 1/9") == 1
    assert all((tmp_path / f"run/rank_{rank}.log").is_file() for rank in (0, 1))


def test_slurm_queues_an_error_of_the_user_not_again(tmp_path):
    scontrol = f"echo 127.0.0.1; [[ $1 == show ]] || touch {tmp_path}/asked"
    for code, asked in (
        (1, False),
        (130, False),
        (76, True),
        (134, True),
        (137, True),
        (143, True),
    ):
        env = on_path(tmp_path / f"bin{code}", srun=f"exit {code}", scontrol=scontrol)
        env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0"}
        assert launched("slurm.sbatch", ["x.yaml"], env).returncode == code
        assert (tmp_path / "asked").exists() == asked
        (tmp_path / "asked").unlink(missing_ok=True)
    env = on_path(tmp_path / "often", srun="exit 76", scontrol=scontrol) | {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", "SLURM_RESTART_COUNT": "100",
    }  # fmt: skip
    assert launched("slurm.sbatch", ["x.yaml"], env).returncode == 76
    assert not (tmp_path / "asked").exists()
    header = re.findall(r"^#SBATCH --(\S+)", (CLUSTER / "slurm.sbatch").read_text(), re.M)
    assert {"signal=USR1@120", "requeue", "open-mode=append"} <= set(header)


def test_torchrun_saves_on_a_signal_and_says_so(tmp_path):
    env = on_path(tmp_path / "bin") | {
        "RDZV": "127.0.0.1:0", "NNODES": "1", "NPROC_PER_NODE": "1",
    }  # fmt: skip
    run = tmp_path / "run"
    args = ["bash", str(CLUSTER / "torchrun.sh"), *arguments(run, "training.steps=9999")]
    launcher = subprocess.Popen(args, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    try:
        while launcher.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        launcher.send_signal(signal.SIGUSR1)  # would end torchrun itself, and leave the ranks
        out, _ = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == 75, out  # torchrun's own is 1
    assert "saved; the same command continues" in out
    step = metrics(run)[-1]["step"]
    assert (run / f"checkpoints/step_{step:07d}/manifest.json").is_file()
    # A user's error: its own code, and it is not tried again.
    done = launched("torchrun.sh", arguments(run, "training.stepz=9"), env)
    assert done.returncode == 1
    assert done.stderr.count("training.stepz: unknown key") == 1, done.stderr
    assert "RDZV" in launched("torchrun.sh", [], on_path(tmp_path / "none")).stderr


@pytest.mark.parametrize(
    ("noted", "code", "starts"),
    [
        # What the ranks noted, what the launch file ends with, how often it started torchrun.
        (["76", "", "0"], 0, 3),  # a rank was lost, then an agent without a word, then it went well
        (["76"] * 9, 76, 3),
        (["75"], 75, 1),
        (["1"], 1, 1),
    ],
)
def test_torchrun_is_started_again_after_a_loss_only(tmp_path, noted, code, starts):
    for number, text in enumerate(noted):
        (tmp_path / f"noted{number}").write_text(f"{text}\n" if text else "")
    count = f"$(ls {tmp_path} | grep -c start)"
    torchrun = f"""number={count}; touch {tmp_path}/start$number
        cat {tmp_path}/noted$number >>"$FASTREPA_EXIT_CODES"
        [[ $TORCH_DISABLE_SHARE_RDZV_TCP_STORE == 1 && $(cat {tmp_path}/noted$number) == 0 ]]"""
    env = on_path(tmp_path / "bin", torchrun=torchrun, setsid='exec "$@"')
    env |= {"RDZV": "node0:1", "NNODES": "2", "MAX_RESTARTS": "2"}
    done = launched("torchrun.sh", ["x.yaml"], env)
    assert done.returncode == code, done.stderr
    assert len(list(tmp_path.glob("start*"))) == starts


def test_deepspeed_starts_a_saved_run_again_and_no_failed_one(tmp_path):
    for code, starts in ((75, 3), (247, 3), (1, 1)):
        said = tmp_path / f"said{code}"
        env = on_path(tmp_path / f"bin{code}", deepspeed=f'echo "$@" >> {said}; exit {code}')
        done = launched("deepspeed.sh", ["x.yaml", "a=1"], env | {"MAX_RESTARTS": "2"})
        assert done.returncode == code
        lines = said.read_text().splitlines()
        assert len(lines) == starts
        assert lines[0].endswith("--module fastrepa train x.yaml a=1")
        assert f"--hostfile {CLUSTER / 'hostfile'}" in lines[0]
    # The real launcher takes the same line, and reads the hostfile.
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    parsed = parse_args(lines[0].split())
    assert (parsed.module, parsed.user_script) == (True, "fastrepa")
    assert parsed.user_args == ["train", "x.yaml", "a=1"]
    assert dict(fetch_hostfile(parsed.hostfile)) == {"node0": 8, "node1": 8}


def test_the_pytorchjob_runs_train_with_what_the_operator_sets():
    job = yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    elastic = spec["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert worker["restartPolicy"] == "OnFailure"
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == spec["nprocPerNode"]
    # As torchrun.sh has it: without, ranks that are started again find their predecessors.
    script = (CLUSTER / "torchrun.sh").read_text()
    assert {v["name"]: v["value"] for v in container["env"]} == {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110",
    }  # fmt: skip
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script and "SAVE_SECONDS:=110" in script
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["volumes"]} and "shm" in mounted
    from fastrepa.config import load_config

    assert container["command"] == ["torchrun", "-m", "fastrepa", "train"]
    config, *overrides = container["args"]
    assert load_config(ROOT / config, overrides).run == "/runs/xl2"
