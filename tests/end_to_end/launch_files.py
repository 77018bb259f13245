"""Commands of clusters, checked as far as it goes without one: syntax and configuration."""

import os
import shlex
import subprocess
from pathlib import Path

import yaml

from fastrepa.config import load_config


def launch_file(words: list[str]) -> str:
    """The script is there and is valid bash; what it passes on is a valid configuration."""
    script, *rest = words[1:] if words[0] == "sbatch" else words
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) or words[0] == "sbatch"
    assert "fastrepa train" in Path(script).read_text()
    load_config(rest[0], rest[1:])
    return ""


def kubectl(words: list[str]) -> str:
    """The manifest is valid YAML whose container trains a valid configuration."""
    assert words[:3] == ["kubectl", "apply", "-f"]
    job = yaml.safe_load(Path(words[3]).read_text())
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["torchrun", "-m", "fastrepa", "train"]
    load_config(container["args"][0], container["args"][1:])
    return ""


def sky(words: list[str]) -> str:
    """The task has keys that SkyPilot's schema knows, and its script starts the launch file."""
    assert words[:3] == ["sky", "jobs", "launch"]
    task = yaml.safe_load(Path(words[3]).read_text())
    assert task.keys() <= {"name", "num_nodes", "workdir", "resources", "volumes", "setup", "run"}
    resources = {"infra", "accelerators", "cpus", "memory", "job_recovery"}
    assert task["resources"].keys() <= resources
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75, 76]}
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    started = task["run"].replace("\\\n", "").rpartition("exec ")[2]
    return launch_file(shlex.split(started))
