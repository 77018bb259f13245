"""Events of a profiler, made by hand."""

from types import SimpleNamespace

from torch.autograd import DeviceType

from fastrepa.profiling.trace import PART, REGION, STEP


class Events:
    """A trace made by hand, in microseconds: what a GPU's looks like."""

    def __init__(self):
        self.all = []

    def add(self, name, start, end, parent=None, *, kernels=(), on_gpu=False, seq=-1, thread=0):
        e = SimpleNamespace(
            id=len(self.all), name=name, cpu_parent=parent, sequence_nr=seq, thread=thread,
            time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
            device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU,
            is_user_annotation=name.startswith((REGION, PART, STEP)),
            kernels=[SimpleNamespace(name=k, duration=d) for k, d in kernels],
        )  # fmt: skip
        self.all.append(e)
        return e
