"""Commands in processes of their own that need not import torch, DeepSpeed and DALI first.

`[*python(), "-m", "fastrepa", ...]` is a command line for subprocess and torchrun. What it starts
is a small program that asks a server, which has imported everything once, for a fork of itself
with that program's arguments, environment, folder, input and output. The program hands on the
signals that it gets and ends as the fork ends; if it is killed, so is the fork.

Starts that a test is about stay cold, and all do where there is a GPU: a fork cannot use CUDA.
Forks share a hash seed, and none takes its modules down when it ends: who tests either starts cold.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

CLIENT = Path(__file__).parent / "programs/warm_start.py"
# What the engine imports when it needs it.
LAZY = (
    "deepspeed.runtime.zero.stage3", "diffusers.models.autoencoders.autoencoder_kl",
    "matplotlib.pyplot", "nvidia.dali.fn", "nvidia.dali.pipeline", "nvidia.dali.plugin.pytorch",
    "timm", "torch.distributed.run", "torch.utils.tensorboard", "torchvision",
)  # fmt: skip


def python():
    """Return what a command line begins with in place of `python`; `-m` and a module come next."""
    import torch

    if torch.cuda.is_available():
        return [sys.executable]
    process, path = _server()
    assert process.poll() is None, "the server of warm starts ended"
    return [sys.executable, "-ISs", str(CLIENT), path]


@cache
def _server():
    from tests.runs import ROOT, environment

    path = os.path.join(tempfile.mkdtemp(dir="/tmp"), "socket")  # its length is limited
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.warm", path], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, cwd=ROOT, env=environment() | threads, start_new_session=True,
    )  # fmt: skip
    while not os.path.exists(path):
        assert process.poll() is None, "the server of warm starts ended"
        time.sleep(0.01)
    return process, path


def stop():
    """End the server where there is one; a fork goes on as long as its client."""
    if _server.cache_info().currsize:
        process, path = _server()
        process.communicate()
        os.unlink(path)
        os.rmdir(os.path.dirname(path))
        _server.cache_clear()


def import_everything():
    """Import what a command may need, so that forks of this process need not."""
    import fastrepa

    for name in LAZY:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(fastrepa.__path__, "fastrepa."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lack the other threads"
    sys.stdout.flush()
    gc.collect()
    gc.freeze()


def _serve(path):
    """Fork at every connection until stdin ends. Returns in the forks: a module and its words."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}~")
        listener.listen(64)
        os.rename(f"{path}~", path)  # who finds it can connect, and waits for the imports
        import_everything()
        while 0 not in select.select([listener, 0], [], [])[0]:
            connection = listener.accept()[0]
            if os.fork() == 0:
                listener.close()
                return _fork_for(connection)
            connection.close()
            _reap()
    _reap()
    os._exit(0)


def _reap():
    """Reap what has ended, so that its seconds are counted as this process's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _fork_for(connection):
    """Returns in the fork, which has its client's state; here, wait for one of both to end."""
    import torch

    files = socket.recv_fds(connection, 1, 3)[1]
    ask = json.loads(connection.makefile("rb").readline())
    if pid := os.fork():
        for file in files:
            os.close(file)
        end = os.pidfd_open(pid)
        connection.sendall(f"{pid}\n".encode())
        if end not in select.select([end, connection], [], [])[0]:  # its client was killed
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        with suppress(OSError):
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    connection.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.setsid()
    random.seed()
    torch.seed()
    os.chdir(ask["folder"])
    os.environ.clear()
    os.environ.update(ask["environment"])
    sys.path[0] = ask["folder"]
    return ask["words"]


def run(option, module, *rest):
    """Be `python -m MODULE` to the end, but for taking all modules down: that takes long."""
    assert option == "-m"
    sys.argv = [module, *rest]
    sys.modules.pop(module, None)  # it is to run as the main module, not to be met there
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run(*_serve(sys.argv[1]))
