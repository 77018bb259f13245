"""Checkpoints go to DeepSpeed's folders and back, with real DeepSpeed engines on two ranks."""

import argparse
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastrepa.checkpoint.format import StoredTensors, newest_checkpoint, read_state
from fastrepa.checkpoint.kinds import KINDS
from fastrepa.cli import app
from fastrepa.commands.convert.exchange import export_run, import_reference
from fastrepa.commands.convert.zero_format import read_zero
from fastrepa.config import load_config, save_config
from fastrepa.errors import CheckpointError, ConfigError
from tests.commands.convert.test_exchange import Payload, model_and_file
from tests.runs import ROOT, SMALL, said_by

pytestmark = pytest.mark.ranks

CASES = ("1-fp32", "1-bf16-sums", "2-bf16", "3-fp32")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run of one checkpoint (step 7, one update) and its zero folder: (run, folder, config)."""
    home = tmp_path_factory.mktemp("zero")
    path = home / "small.yaml"
    save_config(load_config(ROOT / "configs/quickstart.yaml", ["run=elsewhere", *SMALL]), path)
    *_, file = model_and_file(home)
    import_reference(file, home / "run", path)
    export_run(home / "run", home / "zero", "zero")
    return home / "run", home / "zero", path


@pytest.fixture(scope="module")
def saved(exported, tmp_path_factory):
    """Return what the plain engines of every case saved, after they loaded ours: one launch of two
    processes, an engine and a step a case.
    """
    run, folder, _ = exported
    out = tmp_path_factory.mktemp("engines")
    path = newest_checkpoint(run)
    names = {"weight": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    contents = {
        f"{theirs}/{name}": value
        for kind, theirs in names.items()
        for name, value in StoredTensors(path, kind).items()
    }
    save_file(contents, out / "contents.safetensors")
    said_by("tests.programs.zero_engines", folder, out / "contents.safetensors", out, *CASES)
    return out


def equal(read, expected):
    """A Reference against whole tensors called fp32/name, exp_avg/name, exp_avg_sq/name."""
    trained = {n.removeprefix("fp32/") for n in expected if n.startswith("fp32/")}
    assert read.model.keys() == trained | {"pos_embed"}
    assert read.exp_avg.keys() == read.exp_avg_sq.keys() == trained
    for name in trained:
        assert torch.equal(read.model[name], expected[f"fp32/{name}"]), name
        assert torch.equal(read.exp_avg[name], expected[f"exp_avg/{name}"]), name
        assert torch.equal(read.exp_avg_sq[name], expected[f"exp_avg_sq/{name}"]), name


@pytest.mark.parametrize("case", CASES)
def test_what_real_engines_saved_becomes_a_run(saved, exported, tmp_path, case):
    expected, run = load_file(saved / f"{case}.safetensors"), tmp_path / "run"
    read = read_zero(saved / case)
    equal(read, expected)
    assert (read.steps, read.optimizer_step) == (8, 2)
    state = import_reference(saved / case, run, exported[2], source="zero")
    assert (state.step, state.optimizer_step, state.encoder_widths) == (8, 2, [112])
    stored = {kind: StoredTensors(newest_checkpoint(run), kind) for kind in KINDS}
    for name, value in stored["weight"].items():
        assert torch.equal(stored["ema"][name], value)  # DeepSpeed knows no average
        if name != "pos_embed":
            assert torch.equal(value, expected[f"fp32/{name}"])
            assert torch.equal(stored["exp_avg"][name], expected[f"exp_avg/{name}"])
    original = StoredTensors(newest_checkpoint(exported[0]), "weight")["pos_embed"]
    rounded = original.bfloat16() if "bf16" in case else original
    assert torch.equal(stored["weight"]["pos_embed"], rounded.float())


@pytest.mark.parametrize("case", ["2-bf16", "3-fp32"])
def test_what_deepspeed_made_universal_is_read_too(saved, tmp_path, case):
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(argparse.Namespace(
        input_folder=str(saved / case / "global_step8"), output_folder=str(tmp_path / "universal"),
        num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
        inject_missing_state=True,
    ))  # fmt: skip
    for folder in (tmp_path, tmp_path / "universal"):
        read = read_zero(folder)
        equal(read, load_file(saved / f"{case}.safetensors"))
        assert (read.steps, read.optimizer_step) == (8, 2)


def test_our_own_folder_comes_back_with_every_average(exported, tmp_path):
    """Through the command line; a second average is laid beside the first."""
    run, folder, path = exported
    shutil.copytree(folder, tmp_path / "two")
    tag = tmp_path / "two/global_step7"
    second = {n: v + 3 for n, v in load_file(tag / "ema.safetensors").items()}
    save_file(second, tag / "ema_sigma_rel_0.1.safetensors")
    states = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=True)
    emas = {"ema": 0.9, "ema_sigma_rel_0.1": {"sigma_rel": 0.1}}
    states["fastrepa"] |= {"emas": emas, "ema_since": {"ema_sigma_rel_0.1": 3}}
    torch.save(states, tag / "mp_rank_00_model_states.pt")

    again, out, last = tmp_path / "again", tmp_path / "out", tmp_path / "last"
    words = ["convert", again, tmp_path / "two", "--from", "zero", "--config", path]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert "starts at step 7" in done.output
    done = CliRunner().invoke(app, ["convert", str(again), str(out), "--to", "zero"])
    assert done.exit_code == 0, done.output
    import_reference(out, last, path, source="zero")
    a, b = newest_checkpoint(run), newest_checkpoint(last)
    for kind in KINDS:
        ours, theirs = StoredTensors(a, kind), StoredTensors(b, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(theirs[n], v) for n, v in ours.items()), kind
    state = read_state(b)
    assert (state.optimizer_step, state.samples_seen) == (1, 56)
    assert (state.emas, state.ema_since) == (emas, {"ema_sigma_rel_0.1": 3})
    export_run(last, tmp_path / "power.safetensors", "safetensors", ema="sigma_rel=0.1")
    assert all(torch.equal(v, second[n]) for n, v in load_file(
        tmp_path / "power.safetensors").items())  # fmt: skip
    assert not list(tmp_path.glob(".partial*"))


def test_what_cannot_be_read_is_named(exported, saved, tmp_path):
    _, folder, path = exported

    def refused(words, at, **changed):
        run = tmp_path / "never"
        with pytest.raises(CheckpointError, match=words):
            import_reference(at, run, path, source="zero")
        assert not run.exists()

    refused("no such folder", tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(r"no DeepSpeed checkpoint \(no \*_model_states\.pt\)", empty)
    torch.save({"module": {}, "evil": Payload()}, empty / "mp_rank_00_model_states.pt")
    refused(r"mp_rank_00_model_states\.pt: holds more than DeepSpeed writes, refused", empty)
    torch.save({"module": {}, "mp_world_size": 2}, empty / "mp_rank_00_model_states.pt")
    refused("tensor or pipeline parallel", empty)
    torch.save({"module": {}, "mp_world_size": 1}, empty / "mp_rank_00_model_states.pt")
    refused("no ZeRO states in it", empty)
    torch.save([1], empty / "mp_rank_00_model_states.pt")
    refused("not a DeepSpeed checkpoint that is known", empty)
    shutil.copytree(folder / "global_step7", tmp_path / "forged")
    states = torch.load(folder / "global_step7/mp_rank_00_model_states.pt", weights_only=True)
    states["fastrepa"]["emas"] = {"../ema": 0.9}
    torch.save(states, tmp_path / "forged/mp_rank_00_model_states.pt")
    refused(r"'\.\./ema' is not the name of an average", tmp_path / "forged")
    (empty / "latest").write_text("../elsewhere")
    refused(r"names '\.\./elsewhere'", empty)
    with pytest.raises(CheckpointError, match="exists already"):
        export_run(exported[0], folder, "zero")
    with pytest.raises(ConfigError, match="--ema: a zero folder has every stored average"):
        export_run(exported[0], tmp_path / "z", "zero", ema="0.9")
    with pytest.raises(ConfigError, match="--from: 'zero3' is not one of reference, zero"):
        import_reference(folder, tmp_path / "never", path, source="zero3")
