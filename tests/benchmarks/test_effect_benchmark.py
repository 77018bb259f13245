"""benchmarks/effect.py: its arithmetic on curves with known answers, and a real comparison."""

import json
import shutil

import pytest

from benchmarks import effect, report
from benchmarks.effect import MetricCurve, mean_and_interval, reached, records_of, speed_up
from tests import warm

pytestmark = pytest.mark.slow

TINY = [
    "model.width=48", "model.depth=2", "model.heads=3", "alignment.block=1",
    "alignment.projector_width=40", "training.steps=4", "training.schedule.warmup=1",
    "training.checkpoint_every=2", "evaluation.every=2", "evaluation.num=4", "training.log_every=1",
    "evaluation.encoders=[{name: resnet10t, weights: random, input: 64}]",
    "evaluation.metrics=[fd_resnet10t]", "sample.steps=1",
]  # fmt: skip


def test_where_a_curve_comes_down_to_a_level():
    assert reached([10, 20, 30], [3.0, 2.0, 1.0], 1.5) == 25
    assert reached([10, 20, 30], [3.0, 2.0, 1.0], 1.0) == 30
    assert reached([10, 20, 30, 40], [3.0, 1.0, 2.0, 0.5], 1.5) == 17.5  # the first time counts
    assert reached([10, 20], [3.0, 2.0], 1.9) is None
    assert reached([10, 20], [3.0, 2.0], 3.0) is None  # nobody knows since when


def test_a_speed_up_is_read_off_at_the_best_level_that_both_reach():
    plain = MetricCurve([10, 20, 30, 40], [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0])
    twice = MetricCurve([10, 20, 30, 40], [3.0, 6.0, 9.0, 12.0], [3.0, 1.0, 0.5, 0.2])
    assert speed_up(plain, twice, "steps") == 2
    assert speed_up(plain, twice, "seconds") == pytest.approx(4 / 6)
    assert speed_up(twice, plain, "steps") == 0.5
    assert speed_up(plain, MetricCurve([10, 20], [1.0, 2.0], [0.9, 0.8]), "steps") is None


def test_intervals_are_students():
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5)
    assert mean_and_interval([5.0]) == (5.0, None)


def test_arms_are_compared_seed_by_seed():
    def run(last, seconds):
        curve = MetricCurve([10, 20], [seconds / 2, seconds], [4.0, last])
        return dict.fromkeys(effect.MEASURES, curve)

    curves = {"none": [run(2.0, 8.0), run(3.0, 8.0)], "aligned": [run(1.0, 10.0), run(2.0, 10.0)]}
    none, aligned = records_of(curves, {"case": "effect"})[:2]
    assert "less" not in none and none["last"][0] == 2.5
    assert aligned["less"] == (1.0, 0.0)  # the same in both seeds, however far those are apart
    assert aligned["equal_seconds"] == 8.0
    assert aligned["last_at_equal_seconds"][0] == pytest.approx((2.2 + 2.8) / 2)
    # Seed 0: 4 -> 2 takes the plain run 20 steps and the other 10 + 10 * 2/3.
    assert speed_up(curves["none"][0]["velocity_loss"], curves["aligned"][0]["velocity_loss"],
                    "steps") == pytest.approx(20 / (10 + 20 / 3))  # fmt: skip
    unknown = {"none": [run(4.5, 8.0)], "aligned": [run(1.0, 8.0)]}
    assert records_of(unknown, {})[1]["speed_up_steps"] is None


def test_a_small_comparison_that_is_stopped_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(effect, "DISTANCE", "fd_resnet10t")
    monkeypatch.setattr(effect, "MEASURES", (effect.LOSS, "fd_resnet10t"))
    # Statistics are kept beside a reference, and nothing is to be written into the repository.
    reference = shutil.copytree(effect.EMOJI / "validation", tmp_path / "emoji/validation")
    monkeypatch.setattr(effect, "_reference", lambda folder, config: reference)
    # The held-out emoji, which are fewer, are trained on, too.
    shutil.copytree(reference, tmp_path / "emoji/train")
    monkeypatch.setattr(effect, "EMOJI", tmp_path / "emoji")
    monkeypatch.setattr(effect, "PYTHON", warm.python())
    command = [str(tmp_path), *TINY, "--seeds", "0", "--arms", "none"]
    assert effect.main(command) == 0
    first = (tmp_path / "none_0/held_out.json").read_text()
    assert list(json.loads(first)) == ["2", "4"]
    assert effect.main([*command, "aligned"]) == 0
    assert (tmp_path / "none_0/held_out.json").read_text() == first
    records = [json.loads(line) for line in (tmp_path / "effect.jsonl").read_text().splitlines()]
    assert [(r["provider"], r["direction"]) for r in records] == [
        (arm, measure) for measure in effect.MEASURES for arm in ("none", "aligned")
    ]
    assert all(r["last"][0] > 0 and r["last"][1] is None for r in records)
    assert records[0]["values"] == [list(json.loads(first).values())]
    assert records[1]["values"] != records[0]["values"]
    assert (tmp_path / "effect.png").stat().st_size > 10_000
    text = report.effect(records)
    assert text in capsys.readouterr().out.strip() + "\n"
    assert text.count("| aligned |") == 2
    other = [r | {"setting": ["training.global_batch=48"]} for r in records]
    assert report.effect([*records, *other]).count("### effect") == 2
    # Another setting does not get mixed in.
    assert effect.main([command[0], "training.optimizer.lr=1e-3", *command[1:]]) == 1
    assert "holds runs of another setting" in capsys.readouterr().err


def test_mistakes_are_named(tmp_path, capsys):
    assert effect.main([str(tmp_path), "training.step=3"]) == 1
    assert "training.step: unknown key" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        effect.main([str(tmp_path), "--arms", "nune"])
    assert "invalid choice: 'nune'" in capsys.readouterr().err
