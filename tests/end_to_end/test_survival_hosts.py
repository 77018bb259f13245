"""Hosts, links and disks that are lost: real ones, in namespaces, where those are permitted."""

import pytest

from benchmarks.faults.files import disk_full_and_flipped_byte
from benchmarks.two_hosts import EVERY, STEPS, TIMEOUT, lose_hosts, refusal
from tests.runs import ROOT, SMALL

pytestmark = pytest.mark.ranks

REFUSAL = refusal()
needs_namespaces = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
ARGUMENTS = [str(ROOT / "configs/quickstart.yaml"), *SMALL]


@needs_namespaces
def test_a_lost_host_or_link_ends_both_sides_and_a_restart_goes_on(tmp_path):
    killed, pulled, end = lose_hosts(tmp_path, ARGUMENTS)
    first = ["fastrepa: error: rank 1 (node1) lost: silent"]
    second = ["fastrepa: error (rank 1): rank 0 (node0) lost: silent"]
    for done, expected in ((killed, [first, []]), (pulled, [first, second])):
        assert [len(lines) for lines in done["errors"]] == [len(lines) for lines in expected]
        for lines, starts in zip(done["errors"], expected, strict=True):
            assert all(line.startswith(s) for line, s in zip(lines, starts, strict=True)), lines
        # The set time, and four seconds to end in on a loaded machine.
        assert done["seconds"] < TIMEOUT + 4
        assert done["resumed"] == done["saved"] > 0
        assert 0 < done["step"] - done["resumed"] <= 2 * EVERY
    assert end["codes"] == [0, 0]
    assert end["steps"] == list(range(1, STEPS + 1))


@needs_namespaces
def test_a_full_disk_and_a_flipped_byte_cost_steps_and_nothing_else(tmp_path):
    done = disk_full_and_flipped_byte(tmp_path, ARGUMENTS)
    full, flipped = done["warnings"], done["warnings_again"]
    assert any(f"checkpoints/step_{done['kept'] + 3:07d}: cannot be written" in w for w in full)
    assert any(f"step_{done['kept']:07d} still counts" in w for w in full)
    assert done["exit_code"] == 75 and done["last"] > done["kept"] + 3
    # Lines of metrics that found no room were written later.
    assert any("metrics.jsonl: cannot be written" in w for w in full)
    assert done["logged"] == list(range(1, done["last"] + 1))
    assert (
        len(flipped) == 1 and f"step_{done['last']:07d} is damaged (ema.safetensors" in flipped[0]
    )
    assert done["code_again"] == 0 and done["resumed"] == done["before"]
