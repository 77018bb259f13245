"""Bad numbers, signals and lost ranks: what a run does about them."""

import hashlib
import json
import re
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrepa.training.bad_steps import Spikes
from tests.programs.watched_ranks import TIMEOUT as WATCHED_TIMEOUT
from tests.programs.watched_ranks import TRIALS
from tests.runs import command, environment, metrics, tensors, train, train_command

pytestmark = pytest.mark.ranks

TIMEOUT = 6.0  # survival.timeout_seconds


def faulty(run, fault, *overrides, ranks=1):
    args = train_command(run, *overrides, ranks=ranks, module="tests.programs.faulty")
    return subprocess.run(
        args, env=environment() | {"FAULT": fault}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "ranks", "settings"),
    [
        # DeepSpeed skips a bad step of stage 3 itself; stages 0 and 1 are ours.
        ("nan 1 1 3 4", 2, ("zero.stage=1", "training.precision=bf16")),
        ("loss 1 1 3 4", 2, ("zero.stage=3", "kernels=eager")),
        ("nan 0 1 3 4", 1, ("zero.stage=0", "kernels=eager", "training.clip=0")),
    ],
)
def test_a_bad_step_changes_nothing_and_two_in_a_row_end_the_run(tmp_path, fault, ranks, settings):
    done = faulty(
        tmp_path / "run", fault, "training.steps=8", "survival.bad_steps=2",
        "training.checkpoint_every=1", *settings, ranks=ranks,
    )  # fmt: skip
    assert done.returncode, done.stdout + done.stderr
    before, skipped, after = (tensors(tmp_path / "run", step) for step in (1, 2, 3))
    names = [n for n in before if not n.startswith("rng")]
    assert all(torch.equal(before[n], skipped[n]) for n in names)
    assert sum(not torch.equal(before[n], after[n]) for n in names) > len(names) / 2
    assert all(torch.isfinite(after[n]).all() for n in names)
    lines = metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines][:4] == [0, 1, 1, 2]
    assert lines[1]["loss"] is None and lines[0]["loss"] is not None
    assert "warning: 1 step(s) up to step 2" in done.stdout
    error = next(line for line in done.stderr.splitlines() if "2 steps in a row" in line)
    bad, kind = fault.split()[1], fault.split()[0]
    assert "stopped at step " in error and f"rank {bad}: loss is" in error
    assert "the last good checkpoint is" in error and "step_000000" in error
    report = json.loads((tmp_path / "run/bad_step_0000005.json").read_text())["ranks"]
    assert [bool(r["samples"]) for r in report] == [
        kind == "nan" and str(r) == bad for r in range(ranks)
    ]
    if kind == "nan":
        (sample,) = report[int(bad)]["samples"]
        assert "train/shard-" in sample and "(its latent)" in sample and sample in error
        assert "blocks.0.mlp.fc1.weight" in report[int(bad)]["gradients"]


def with_nan(checkpoint, kind):
    """Every value of a kind's tensors is NaN now, and the manifest says so."""
    file, manifest = checkpoint / f"{kind}.safetensors", checkpoint / "manifest.json"
    values = {name: value * torch.nan for name, value in load_file(file).items()}
    save_file(values, file, metadata={"format": "pt"})
    fields, data = json.loads(manifest.read_text()), file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    fields["files"][file.name] = {"bytes": len(data), "sha256": digest}
    manifest.write_text(json.dumps(fields))


def test_weights_that_become_infinite_are_never_saved_and_no_nan_is_sampled(tmp_path):
    """In a run without an encoder, whose micro-batch is larger than an image has channels."""
    run, folder = tmp_path / "run", tmp_path / "run/checkpoints"
    shared = ("vision.encoders=[]", "training.keep_checkpoints=2", "training.schedule.warmup=0")
    train(run, "training.steps=4", *shared)
    done = train(
        run, "training.steps=40", "training.optimizer.lr=1e39", "training.checkpoint_every=1",
        *shared, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert [p.name for p in sorted(folder.iterdir())] == ["step_0000002", "step_0000004"]
    assert all(value.isfinite().all() for value in tensors(run, 4).values())
    assert re.search(
        r"warning: .*step_0000005: not saved, as weight \S+ is not finite", done.stdout
    )
    (error,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert "stopped at step " in error and "loss is nan" in error
    assert f"the last good checkpoint is {folder / 'step_0000004'}; " in error
    assert Path(re.search(r"know: (.*)", error)[1]).is_file()

    with_nan(folder / "step_0000004", "ema")
    drawn = subprocess.run(
        command("sample", run, "--num", 2, "--out", tmp_path / "images"), env=environment(),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    words = r"warning: checkpoint step_0000004: ema: \S+ is not finite; trying the one before"
    assert re.search(words, drawn.stdout + drawn.stderr)
    assert json.loads((tmp_path / "images/sampling.json").read_text())["checkpoint_step"] == 2


def test_a_spike_is_told_once_and_does_not_become_normal():
    spikes = Spikes(6.0, [1.0, 1.1, 0.9] * 4)
    assert spikes.check(13, 1.2) is None
    assert "loss spike at step 14: 5" in spikes.check(14, 5.0)
    assert spikes.check(15, 5.0) and spikes.check(16, 0.1) is None
    assert Spikes(6.0, [1.0] * 9).check(10, 9.0) is None
    assert Spikes(0.0, [1.0, 2.0] * 9).check(20, 99.0) is None


def with_one_lost(run, fault, size, *overrides, stop_after=150):
    """Ranks without an agent above them, of which one is lost; (exit code, stdout, stderr, when it
    ended) of every other, and what the lost one left.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    overrides = (f"survival.timeout_seconds={TIMEOUT}", *overrides)
    args = train_command(run, *overrides, module="tests.programs.faulty")
    # As srun names them: rank 0 finds its world by torchrun's names, so both ways are walked.
    meet = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FAULT": fault}
    names = [{"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}]
    slurm = {"SLURM_NTASKS": str(size), "SLURM_STEP_ID": "0"}
    names += [slurm | {"SLURM_PROCID": f"{r}", "SLURM_LOCALID": f"{r}"} for r in range(1, size)]
    ranks = [
        subprocess.Popen(
            args, env=meet | n, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for n in names
    ]
    lost = int(fault.split(";")[-1].split()[1])
    others = {}
    try:
        for rank, process in enumerate(ranks):
            if rank != lost:
                out, err = process.communicate(timeout=stop_after)
                others[rank] = (process.returncode, out, err, time.time())
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
        rest = ranks[lost].communicate()
    return others, rest


def last_line_before(log, words):
    """Return when the last line with these words was written to a rank's log."""
    line = next(x for x in reversed(log.splitlines()) if words in x)
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()


@pytest.mark.parametrize(
    ("fault", "where", "size", "stage"),
    [
        ("sleep 1 1; kill 1 last", "step 3", 2, 1),
        ("stop 0 2", "step 3", 3, 2),
        ("raise 1 build", "the start", 4, 3),
        ("kill 1 2", "step 3", 3, 3),
    ],
)
def test_a_lost_rank_ends_the_others_which_name_it(tmp_path, fault, where, size, stage):
    kind, lost, _ = fault.split("; ")[-1].split()
    run = tmp_path / "run"
    settings = ("training.steps=3", f"zero.stage={stage}", "survival.stall_seconds=4")
    if size > 2:
        settings = ("training.global_batch=12", "training.micro_batch=1", *settings)
    others, rest = with_one_lost(run, fault, size, *settings)
    logs = [(run / f"rank_{rank}.log").read_text() for rank in range(size)]
    # All within the set time; a loaded machine is given two seconds more to notice it.
    if kind == "raise":
        began = last_line_before(logs[int(lost)], "stopped by an error")
    else:
        began = (run / "metrics.jsonl").stat().st_mtime
    for rank, (code, out, err, ended) in others.items():
        assert code == 76, (out, err, rest)
        last = err.splitlines()[-1]
        why = "failed: ValueError: planted" if kind == "raise" else "lost: "
        assert f"rank {lost} (" in last and why in last and f"stopped in {where}" in last
        assert (
            last.partition("): ")[2 if rank else 0].count("rank ") <= 1 and "Traceback" not in err
        )
        assert last.endswith(", the same command continues")
        assert last.split(": ", 2)[2] in logs[rank] and "most recent call first" in logs[rank]
        assert ended - began < TIMEOUT + 2
        assert not rank or not out  # the others print nothing but their error
    if fault.startswith("sleep"):
        # The stall before was no loss: both logs have the stacks, that of the culprit in its sleep.
        assert "warning: step 2 has taken more than 4 s; see " in others[0][1]
        for log in logs:
            stalled = log[log.index("step 2 has taken more than 4 s on rank ") :]
            assert "every thread's stack:" in stalled.splitlines()[0]
            assert "in train_step" in stalled
        assert "faulty.py" in logs[1] and "in act" in logs[1]
        assert len(metrics(run)) == 3


@pytest.fixture(scope="module")
def trials():
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.watched_ranks"],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {(found := json.loads(line))["trial"]: found for line in done.stdout.splitlines()}


@pytest.mark.parametrize("name", [n for n in TRIALS if "suspend" not in n])
def test_every_rank_that_is_left_names_those_that_failed_and_nobody_else(trials, name):
    size, faults = TRIALS[name]
    kinds = set(faults.values())
    verdict = " failed: " if {"error", "refused"} & kinds else " lost: "
    code = 1 if "refused" in kinds else 76
    if "interrupt" in kinds:
        verdict, code = " was interrupted; ", 130
    found, told = trials[name], set()
    for rank in range(size):
        if rank in faults:
            continue
        ended, said = found["ends"][rank], found["said"][rank]
        assert ended is not None and ended[0] == code, found
        assert ended[1] < WATCHED_TIMEOUT + 2, found
        assert "Traceback" not in said
        if code == 130 and rank:  # a Ctrl-C comes to all: one says so
            assert not said
            continue
        line = next(x for x in said.splitlines() if x.startswith("fastrepa: error"))
        assert verdict in line, found
        blamed = set(re.findall(r"rank ([0-9]+) \(", line))
        told.add(frozenset(blamed))
        # Of several that fail by themselves the first to say so is named.
        assert blamed == {str(r) for r in faults} or (len(blamed) == 1 and verdict == " failed: ")
        assert blamed <= {str(r) for r in faults}, found
    assert len(told) == 1, found  # all say the same


@pytest.mark.parametrize("size", [1, 4])
def test_a_job_that_is_suspended_as_a_whole_goes_on(trials, size):
    found = trials[f"suspend all of {size}"]
    assert [end and end[0] for end in found["ends"]] == [0] * size, found
    assert found["said"] == [""] * size


def test_ranks_of_one_host_listen_on_loopback_only(trials):
    """Torch's own store, at the port that the first of several ranks was told, is the exception."""
    loopback = ("0100007F:", "0" * 24 + "01000000:", "0000000000000000FFFF00000100007F:")
    assert all(a.startswith(loopback) for a in trials["suspend all of 1"]["listen"][0])
    for name, (size, _) in TRIALS.items():
        open_ports = [
            [a for a in listen if not a.startswith(loopback)] for listen in trials[name]["listen"]
        ]
        assert sum(map(len, open_ports)) == len(open_ports[0]) == (1 if size > 1 else 0), name
