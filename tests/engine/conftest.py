"""What the engine's tests share."""

import pytest


@pytest.fixture(scope="session")
def world():
    """This process alone. Its group stays to the end, and so does the environment it was made
    with: DeepSpeed holds on to both, and cannot meet again in the same process.
    """
    from fastrepa.training.zero import join_world

    return join_world()
