"""benchmarks/data.py: contenders give the same samples, wrong ones are not timed."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("webdataset")

from benchmarks import data, data_sets, report, run


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_sets, "RESOLUTION", 64)
    monkeypatch.setattr(data_sets, "LATENT", (4, 8))
    monkeypatch.setattr(data_sets, "DINOV2_B", (4, 8))
    monkeypatch.setattr(data, "BATCH", 4)


def test_every_case_compares_times_and_reports(tmp_path: Path) -> None:
    chosen = ["decode", "cached", "reference"]
    records = []
    for case in data._cases(tmp_path / "sets", chosen, [0], 24):
        records += data.measure(case, rounds=2, warm_up=1)
    assert [r["case"] for r in records] == [f"data_{name}" for name in chosen for _ in range(2)]
    for r in records:
        assert r["n"] == 2
        assert 0 < r["p20_images_per_s"] <= r["p50_images_per_s"] <= r["p80_images_per_s"]
        assert r["error"] <= (2 if r["case"] == "data_decode" else 0)
    context = run.environment(data.CPU) | {"dali": "1", "webdataset": "1", "pillow": "1"}
    run.append(tmp_path / "data_cpu.jsonl", records, context)
    assert (
        json.loads((tmp_path / "data_cpu.jsonl").read_text().splitlines()[0])["provider"] == "ours"
    )
    text = report.rates(report.load(tmp_path))
    assert text.count("| ours |") == text.count("1.00x") == 3


def test_a_contender_that_gives_other_samples_is_not_timed(tmp_path: Path) -> None:
    case = next(data._cases(tmp_path, ["decode"], [0], 24))

    @contextmanager
    def darker():  # type: ignore[no-untyped-def]
        with case.contenders[1].start() as stream:
            yield ((images // 2, labels) for images, labels in stream)

    with pytest.raises(AssertionError, match=r"darker: .* off"):
        case.check(data.Contender("darker", darker))


def test_what_a_generator_takes_in() -> None:
    """REPA_SPEC: 118.6 GMAC a forward for XL/2, so 712 GFLOP an image and 666 images/s."""
    assert "SiT-XL/2      712 GFLOP an image ->    666 images/s" in data.needs(790.0, 0.6)
