"""Run as a program, in one process or under torchrun: real steps of real engines, measured.

Arguments are JSON objects, one per case; the first rank prints one JSON object per case: bytes that
torch's allocator held at the highest moment of a step, and what DeepSpeed's comms logger counted.
"""

import gc
import json
import sys
import time
from functools import partial

import deepspeed.comm
import torch

from fastrepa.commands.bench.peak_memory import highest, storages
from fastrepa.config import config_from_dict
from fastrepa.model.sit import SiT
from fastrepa.runtime.world import destroy_world, init_world
from fastrepa.training.zero import engine as zero

CPU = torch.device("cpu")
SIDE, CHANNELS, WIDTHS = 16, 3, [96]


def config_of(case):
    model = {"width": 192, "depth": 6, "heads": 3, "patch": 2, "num_classes": 10}
    world, micro, forwards = case["world"], case["micro"], case.get("forwards", 1)
    return config_from_dict(
        {
            "run": "run",
            "data": {"path": "data", "resolution": SIDE, "codec": {"name": "pixel"}},
            "model": model | case.get("model", {}),
            "alignment": {"projector_width": 256},
            "training": {
                "global_batch": world * micro * forwards,
                "micro_batch": micro,
                "precision": case.get("precision", "fp32"),
                "ema": case.get("ema", 0.9999),
                "recompute": case.get("recompute", "none"),
                "keep": case.get("keep", "none"),
            },
            "zero": {"stage": case.get("stage", 0)} | case.get("settings", {}),
            "kernels": case.get("kernels", "fused"),
        }
    )


def measure(case, world):
    config = config_of(case)
    before = storages(CPU)  # held on to, so that no address is used again
    torch.manual_seed(0)
    shape = {"side": SIDE, "channels": CHANNELS, "encoder_widths": WIDTHS}
    model = SiT.from_config(config, **shape, attention="sdpa-flash")  # as on a GPU
    engine, optimizer = zero.start_engine(model, config, world)
    engine.train()
    whole_tensors = zero.WholeTensors(engine, optimizer)
    optimizer.set_rate(1e-4)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    tokens = (SIDE // model.patch) ** 2
    micro, forwards = case["micro"], case.get("forwards", 1)

    def step():
        for _ in range(forwards):
            x, t = torch.randn(micro, CHANNELS, SIDE, SIDE), torch.rand(micro)
            labels = torch.randint(10, (micro,))
            targets = [torch.randn(micro, tokens, z).to(dtype) for z in WIDTHS]
            velocity, alignment = engine(x, t, labels, targets, t < 0.1)
            engine.backward((velocity - x).square().mean() + 0.5 * alignment)
            del velocity, alignment
            engine.step()

    step()
    step()

    def held():
        time.sleep(0.05)  # in which gloo's threads let go of what they have sent
        return sum(s.nbytes() for at, s in storages(CPU).items() if at not in before)

    moments = 3 if world.size > 1 else 1
    resident = min(held() for _ in range(moments))
    log = deepspeed.comm.comms_logger
    log.comms_dict.clear()
    log.enabled = log.prof_all = True
    step()
    log.enabled = log.prof_all = False
    # What another rank has not yet taken is held on to for a while, now and then beside the peak:
    # the least of three moments is free of it more often than the middle one of five.
    peak = min(highest(step, CPU) for _ in range(moments))
    sent = {
        op: sum(size * record[0] for size, record in sizes.items())
        for op, sizes in log.comms_dict.items()
    }
    del whole_tensors
    return {"resident": resident, "peak": resident + peak, "sent": sent}


def with_settings(plain, settings, *given):
    out = plain(*given)
    out["zero_optimization"] |= settings
    return out


def main():
    world = init_world()
    plain = zero.deepspeed_config
    gc.freeze()  # libraries' objects, which need not be looked through for tensors
    for text in sys.argv[1:]:
        case = json.loads(text)
        zero.deepspeed_config = partial(with_settings, plain, case.get("zero", {}))
        result = measure(case, world)
        if world.is_rank_0:
            print("MEASURED " + json.dumps(result), flush=True)
    destroy_world()


if __name__ == "__main__":
    main()
