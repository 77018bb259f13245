"""The regions of a step's time: the keys under which metrics.jsonl has its shares."""

REGIONS = (
    "data_wait", "encoder", "codec", "forward", "backward", "communication", "optimiser",
    "checkpoint",
)  # fmt: skip
OTHER = "other"
SAMPLING = "sampling"  # drawing pictures is no training: it counts nowhere
NAMES = (*REGIONS, OTHER)
"""The shares of a log line, of the time since the last one: they add up to 1."""
