"""Heat maps of a probe: one scale of colours, from unrelated features to the encoder itself."""

import numpy as np
import pytest

from fastrepa.pages.heat import heat_colours, heat_maps


def probe_record():
    """Make the record of a probe of two blocks at a hundred steps."""
    return {
        "encoders": ["x"], "steps": list(range(0, 1000, 10)), "blocks": [1, 2], "aligned_block": 2,
        "unrelated_cknna": 0.1, "cknna": {"x": [[0.1, 1.0, *[0.55] * 98], [0.05] * 100]},
        "linear_cka_debiased": {"x": [[-0.1] * 100, [None] * 100]},
        "linear_probe": [[0.25] * 100, [0.45] * 100], "linear_probe_of_encoder": {"x": 0.65},
        "guessing": 0.25, "said": ["Block 1 leads."],
    }  # fmt: skip


def test_a_place_on_the_scale_is_a_share_of_the_way_to_the_encoder():
    cknna, cka, probe = heat_maps(probe_record())
    assert cknna.shares[:, :3] == pytest.approx(np.array([[0, 1, 0.5], [0, 0, 0]]))
    assert (cka.shares[0] == 0).all() and np.isnan(cka.shares[1]).all()
    assert probe.shares[:, 0] == pytest.approx([0, 0.5])
    assert probe.reference == "guessing: 25%, the encoder: 65%"
    without = heat_maps(probe_record() | {"linear_probe": [[None] * 100] * 2})
    assert [heat.title for heat in without] == ["CKNNA", "linear CKA"]


def test_text_stands_out_from_its_ground():
    colours = heat_colours(np.array([[*np.linspace(0, 1, 50), np.nan]]))[0]
    assert colours[-1] == ("", "")
    for pair in colours[:-1]:
        rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in pair])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        dark, light = sorted(linear @ (0.2126, 0.7152, 0.0722))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair
    assert len({ground for ground, _ in colours}) > 40


def test_what_is_no_record_of_a_run_is_refused():
    record = probe_record()
    wrong = ({"cknna": {}}, {"blocks": [1]}, {"linear_probe": "x"}, {"encoders": None})
    for changed in wrong:
        with pytest.raises((KeyError, TypeError, ValueError)):
            heat_maps(record | changed)
