"""Say what this process was given, in JSON; then do as its first word says."""

import json
import os
import signal
import sys
import threading
import time


def main(word, *rest):
    modules = sorted({"torch", "deepspeed"} & sys.modules.keys())
    given = {"argv": sys.argv[1:], "folder": os.getcwd(), "path": sys.path[0], "modules": modules}
    given |= {"pid": os.getpid(), "word": os.environ.get("WORD")}
    print(json.dumps(given), flush=True)
    match word:
        case "read":
            print(sys.stdin.read(), end="")
        case "exit":
            threading.Thread(target=lambda: (time.sleep(0.1), print("and its thread"))).start()
            sys.exit(int(rest[0]))
        case "raise":
            raise ValueError("planted")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "draw":
            import random

            import torch

            print([random.random(), torch.rand(()).item()])
        case "wait":
            time.sleep(60)


try:
    main(*sys.argv[1:])
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
