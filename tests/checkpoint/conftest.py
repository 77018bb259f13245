"""A small engine, and what writes its checkpoints."""

import pytest
import torch.distributed as dist

from fastrepa.checkpoint.writer import CheckpointWriter
from fastrepa.config import TrainingConfig, load_config
from fastrepa.model.sit import SiT
from fastrepa.training.zero.engine import WholeTensors, start_engine
from tests.runs import ROOT, SMALL


@pytest.fixture(scope="module")
def engine(world):
    """A started ZeRO-1 engine of one process: (world, gloo group, whole tensors, fixed ones)."""
    config = load_config(ROOT / "configs/quickstart.yaml", ["run=unused", *SMALL])
    model = SiT.from_config(config, side=32, channels=3, encoder_widths=[])
    fixed = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    started, optimizer = start_engine(model, config, world)
    return world, dist.new_group(backend="gloo"), WholeTensors(started, optimizer), fixed


@pytest.fixture
def writer(engine, tmp_path):
    world, group, whole, fixed = engine
    policy = TrainingConfig(keep_checkpoints=2)
    return CheckpointWriter(tmp_path, whole, fixed, world, group, policy)
