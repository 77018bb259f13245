"""Two hosts on one machine train together, until one is lost: what the survivor does, and when.

    python -m benchmarks.two_hosts FOLDER

Each host is a network namespace with an address of its own, its own host name and its own
processes; a veth pair is the cable between them. All of it lives in a user and a process namespace
of its own, needs no root, and ends with the command, however that ends. configs/cluster/torchrun.sh
runs on both hosts as it does on a cluster. Then, in mid-step each time: every process of the second
host is killed, and the same command there goes on; the cable is pulled and, once both sides have
stopped, put back. Prints one JSON object a fault.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import logged, newest, steps_of, until
from fastrepa.runtime.world import outside_the_world

ROOT = Path(__file__).resolve().parents[1]
NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--uts", "--mount", "--pid")
NAMESPACES += ("--fork", "--kill-child", "--mount-proc")
TIMEOUT = 6.0  # survival.timeout_seconds
EVERY = 3  # training.checkpoint_every
STEPS = 14
HOSTS = ("node0", "node1")
_until = partial(until, seconds=300.0, pause=0.02)  # to ask the hosts takes a while


def refusal() -> str | None:
    """Say why this machine does not permit such namespaces, None where it does."""
    probe = "ip link add probe0 type veth peer name probe1 && mount --bind /etc/hosts /etc/hosts"
    try:
        done = subprocess.run(
            [*NAMESPACES, "sh", "-c", probe], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"no network namespaces here: {e}"
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else None


def lose_hosts(folder: Path, command: list[str]) -> list[dict[str, Any]]:
    """Train by `command` (of the configuration and its overrides; run=FOLDER/run is added) and lose
    a host and the link; what happened, one dictionary a fault.
    """
    done = subprocess.run(
        [*NAMESPACES, sys.executable, "-m", "benchmarks.two_hosts", str(folder), *command],
        cwd=ROOT, env=outside_the_world(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


# Inside the namespaces ------------------------------------------------------------------------


class Host:
    """A network namespace with a name and an address, and the processes that run in it."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address = HOSTS[number], f"10.0.0.{number + 1}"
        self.output = folder / f"{self.name}.txt"
        self.holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "sh", "-c", f"hostname {self.name}; exec sleep infinity"]
        )
        self.launcher: subprocess.Popen[bytes] | None = None
        self.starts = 0
        _until(lambda: self._inside("hostname") == self.name, "a host has its name")

    def _inside(self, *command: str) -> str:
        enter = ["nsenter", "--target", str(self.holder.pid), "--net", "--uts", *command]
        return subprocess.run(enter, capture_output=True, text=True, check=False).stdout.strip()

    def plug_in(self) -> None:
        """The end of the cable called after this host becomes its interface."""
        _run("ip", "link", "set", self.name, "netns", str(self.holder.pid))
        self._inside("ip", "address", "add", f"{self.address}/24", "dev", self.name)
        self._inside("ip", "link", "set", "lo", "up")
        self.link("up")

    def link(self, state: str) -> None:
        self._inside("ip", "link", "set", self.name, state)

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        enter = ["nsenter", "--target", str(self.holder.pid), "--net", "--uts"]
        # torchrun's agents are told apart by host name and process number: a machine that was
        # started again does not have the same numbers either.
        self.starts += 1
        numbers = f"echo {1000 * self.starts} > /proc/sys/kernel/ns_last_pid"
        own = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        own += ["sh", "-c", f'{numbers}; "$@"', "sh"]
        with self.output.open("ab") as output:
            self.launcher = subprocess.Popen(
                [*enter, *own, *command], cwd=ROOT, env=environment, stdout=output, stderr=output
            )

    def kill(self) -> None:
        """SIGKILL to all of its processes; its address goes on to answer."""
        assert self.launcher is not None
        self.launcher.kill()
        self.launcher.wait()

    def ranks(self) -> int:
        """Count its processes of training: ranks, and what they started."""
        home, found = os.readlink(f"/proc/{self.holder.pid}/ns/net"), 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                mine = os.readlink(process / "ns/net") == home
                found += mine and b"\0LOCAL_RANK=" in (process / "environ").read_bytes()
            except OSError:  # it has ended
                continue
        return found

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _mid_step(run: Path, first: int) -> None:
    """Wait until a step of at least `first` is under way, and a checkpoint behind it."""
    _until(lambda: steps_of(run)[-1:] >= [first] and newest(run) > 0, f"step {first}")
    time.sleep(0.4 * logged(run)[-1]["step_seconds"])


def _errors(host: Host, before: str) -> list[str]:
    return re.findall(r"^fastrepa: error.*$", host.said()[len(before) :], re.M)


def _main(folder: Path, command: list[str]) -> None:
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n10.0.0.1 node0\n10.0.0.2 node1\n")
    _run("mount", "--bind", str(names), "/etc/hosts")
    run = folder / "run"
    hosts = [Host(number, folder) for number in (0, 1)]
    _run("ip", "link", "add", HOSTS[0], "type", "veth", "peer", "name", HOSTS[1])  # the cable
    for host in hosts:
        host.plug_in()
    # torchrun is this Python's, whether or not its environment is activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {
        **os.environ, "PATH": path, "RDZV": "node0:29400", "NNODES": "2", "NPROC_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    launch = [
        "bash", "configs/cluster/torchrun.sh", *command, f"run={run}",
        f"survival.timeout_seconds={TIMEOUT}", f"training.checkpoint_every={EVERY}",
        f"training.steps={STEPS}", "training.log_every=1",
    ]  # fmt: skip

    def lose(fault: str, first: int, act: Any, sides: list[Host], again: Any) -> None:
        _mid_step(run, first)
        before = [host.said() for host in hosts]
        act()
        began, last = time.monotonic(), steps_of(run)[-1]
        _until(lambda: not any(host.ranks() for host in sides), f"{fault}: all ranks ended")
        seconds = time.monotonic() - began
        errors = [_errors(h, b) for h, b in zip(hosts, before, strict=True)]
        saved = newest(run)
        again()
        _until(lambda: "from step" in "".join(
            h.said()[len(b):].replace("\n", " ") for h, b in zip(hosts, before, strict=True)
        ), f"{fault}: continues")  # fmt: skip
        found = [re.findall(r"from step (\d+)", h.said()[len(b) :].replace("\n", " "))
                 for h, b in zip(hosts, before, strict=True)]  # fmt: skip
        (resumed,) = {int(step) for steps in found for step in steps}
        print(json.dumps({
            "fault": fault, "seconds": seconds, "errors": errors, "step": last, "saved": saved,
            "resumed": resumed, "took_up_seconds": time.monotonic() - began - seconds,
        }), flush=True)  # fmt: skip

    def second_host_again() -> None:
        hosts[1].start(launch, environment)

    for host in hosts:
        host.start(launch, environment)
    try:
        lose("host killed", 4, hosts[1].kill, [hosts[0]], second_host_again)
        lose("link pulled", newest(run) + 4, lambda: hosts[0].link("down"), hosts,
             lambda: hosts[0].link("up"))  # fmt: skip
    except TimeoutError as e:
        raise SystemExit(
            "\n".join([str(e), *(f"{h.name}: {h.said()[-2000:]}" for h in hosts)])
        ) from e
    codes = [host.launcher.wait() for host in hosts if host.launcher]
    print(json.dumps({"fault": "none", "codes": codes, "steps": steps_of(run)}))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _main(Path(sys.argv[1]), sys.argv[2:])
