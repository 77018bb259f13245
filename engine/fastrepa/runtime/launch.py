"""A launcher's words to a rank, and a process that is to hear nothing of them."""

import os

VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def outside_the_world() -> dict[str, str]:
    """This process's environment for one that it starts and that is no rank of this one's world:
    joining a world, of one even, leaves these variables behind.
    """
    return {key: value for key, value in os.environ.items() if key not in VARIABLES}
