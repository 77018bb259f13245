"""Runs to the reference's files and back, tensor for tensor."""

import hashlib
import json
import math
import resource
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastrepa.checkpoint import format as checkpoint_format
from fastrepa.checkpoint.format import StoredTensors, checkpoint_path, newest_checkpoint
from fastrepa.checkpoint.kinds import KINDS
from fastrepa.commands.convert import exchange
from fastrepa.commands.convert.exchange import FORMATS, export_run, import_reference
from fastrepa.config import load_config, save_config
from fastrepa.errors import CheckpointError, ConfigError
from fastrepa.model.sit import SiT
from fastrepa.runtime.files import HOST
from fastrepa.runtime.ownership import owned
from tests.runs import ROOT, SMALL, command, environment

CONFIG = ROOT / "configs/quickstart.yaml"


def model_and_file(tmp_path, *, steps=7):
    """A SiT after one AdamW update, as the reference saves it: (model, ema, optimiser, file)."""
    torch.manual_seed(3)
    config = load_config(CONFIG, ["run=x", *SMALL])
    model = SiT.from_config(config, side=32, channels=3, encoder_widths=[112])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for p in trained:
        p.grad = torch.randn_like(p)
    optimizer.step()
    ema = {n: v + 1 for n, v in model.state_dict().items()}
    file = tmp_path / "0000007.pt"
    torch.save(
        {"model": model.state_dict(), "ema": ema, "opt": optimizer.state_dict(), "steps": steps},
        file,
    )
    return model, ema, optimizer, file


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    save_config(load_config(CONFIG, ["run=elsewhere", *SMALL]), path)
    return path


def test_from_the_reference_and_back_again(tmp_path, config):
    model, ema, optimizer, file = model_and_file(tmp_path)
    run, again = tmp_path / "run", tmp_path / "again.pt"
    done = subprocess.run(
        command("convert", run, file, "--from", "reference", "--config", config),
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "starts at step 7" in done.stdout
    path = newest_checkpoint(run)
    assert path == checkpoint_path(run, 7)
    assert load_config(run / "config.yaml").run == str(run)
    stored = {kind: StoredTensors(path, kind) for kind in KINDS}
    for name, p in model.named_parameters():
        assert torch.equal(stored["weight"][name], p)
        assert torch.equal(stored["ema"][name], ema[name])
        if p.requires_grad:
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(stored[kind][name], optimizer.state[p][kind]), (kind, name)
        else:
            assert name not in stored["exp_avg"]

    assert export_run(run, again, "reference").step == 7
    theirs = torch.load(again, weights_only=False)
    assert theirs.keys() == {"model", "ema", "opt", "args", "steps"}
    assert theirs["steps"] == 7
    assert (theirs["args"].prediction, theirs["args"].path_type) == ("x", "linear")
    assert list(theirs["model"]) == list(model.state_dict())
    assert all(torch.equal(theirs["ema"][n], v) for n, v in ema.items())
    other = SiT.from_config(load_config(config), side=32, channels=3, encoder_widths=[112])
    other.load_state_dict(theirs["model"])  # as the reference resumes
    resumed = torch.optim.AdamW(other.parameters(), lr=1.0)
    resumed.load_state_dict(theirs["opt"])
    assert resumed.param_groups[0]["lr"] == 1e-3
    for mine, p in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, p)
        assert optimizer.state.get(mine, {}).keys() == resumed.state.get(p, {}).keys()
        for key, value in optimizer.state.get(mine, {}).items():
            assert torch.equal(resumed.state[p][key], value), key


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_safetensors_with_what_is_needed_to_use_them(tmp_path, config, weights):
    model, ema, _, file = model_and_file(tmp_path)
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    import_reference(file, run, config)
    export_run(run, out, "safetensors", weights=weights)
    expected = ema if weights == "ema" else model.state_dict()
    with safe_open(out, "pt") as read:
        assert set(read.keys()) == set(expected)
        assert all(torch.equal(read.get_tensor(n), v) for n, v in expected.items())
        about = read.metadata()
    beside = tmp_path / "anything"
    beside.touch()
    assert out.stat().st_mode == beside.stat().st_mode  # safetensors alone keeps others out
    assert (about["weights"], about["step"], about["format"]) == (weights, "7", "pt")
    assert json.loads(about["config"])["model"]["width"] == 48
    assert about["ema"] == "0.995"
    with pytest.raises(CheckpointError, match=r"--ema: '0\.5' is not stored .*, which has 0\.995"):
        export_run(run, tmp_path / "other.safetensors", "safetensors", ema="0.5")
    with pytest.raises(CheckpointError, match="exists already"):
        export_run(run, out, "safetensors")


def test_bare_weights_start_a_run_at_step_0(tmp_path, config):
    model, *_ = model_and_file(tmp_path)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    state = import_reference(tmp_path / "bare.pt", tmp_path / "run", config)
    assert (state.step, state.optimizer_step, state.encoder_widths) == (0, 0, [112])
    path = newest_checkpoint(tmp_path / "run")
    for kind in ("exp_avg", "exp_avg_sq"):
        assert all(not v.any() for v in StoredTensors(path, kind).values())


def replanted(folder, kind, value):
    """One value of a kind's tensors is another now, and the manifest says so."""
    file, manifest = folder / f"{kind}.safetensors", folder / "manifest.json"
    stored = load_file(file)
    stored["blocks.0.mlp.fc1.bias"][3] = value
    save_file(stored, file, metadata={"format": "pt"})
    fields = json.loads(manifest.read_text())
    fields["files"][file.name] = {
        "bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()
    }  # fmt: skip
    manifest.write_text(json.dumps(fields))


@pytest.mark.parametrize("kind", ["ema", "weights", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_handed_on(tmp_path, config, kind, value):
    *_, file = model_and_file(tmp_path)
    run = tmp_path / "run"
    import_reference(file, run, config)
    replanted(newest_checkpoint(run), kind, value)
    asked = [("reference", "a.pt", {}), ("zero", "folder", {})]
    if kind != "exp_avg_sq":
        of = "raw" if kind == "weights" else "ema"
        asked += [("safetensors", "a.safetensors", {"weights": of})]
    for to, name, how in asked:
        words = r"step_0000007: \w+: blocks\.0\.mlp\.fc1\.bias is not finite"
        with pytest.raises(CheckpointError, match=words):
            export_run(run, tmp_path / name, to, **how)
        assert not (tmp_path / name).exists()
    if kind == "weights":
        export_run(run, tmp_path / "b.safetensors", "safetensors")  # has its averages alone


def test_a_foreign_file_that_is_not_finite_starts_no_run(tmp_path, config):
    model, ema, optimizer, file = model_and_file(tmp_path)
    ema["blocks.1.attn.qkv.weight"][0, 0] = math.nan
    saved = {"model": model.state_dict(), "ema": ema, "opt": optimizer.state_dict(), "steps": 7}
    torch.save(saved, file)
    words = r"0000007\.pt: ema: blocks\.1\.attn\.qkv\.weight is not finite"
    with pytest.raises(CheckpointError, match=words):
        import_reference(file, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_owners(tmp_path, config):
    """A file that is written has one, and a run; one that is trained can be read."""
    *_, file = model_and_file(tmp_path)
    run, out = tmp_path / "run", tmp_path / "out"
    with (
        owned(run, "fastrepa train"),
        pytest.raises(CheckpointError, match=r"run: in use by fastrepa train on .*, process \d+,"),
    ):
        import_reference(file, run, config)
    assert not list(run.iterdir())
    import_reference(file, run, config)
    for to, name in (("reference", "a.pt"), ("safetensors", "a.safetensors"), ("zero", "zero")):
        with owned(run, "fastrepa train"):
            with (
                owned(out, "another convert", file=name),
                pytest.raises(CheckpointError, match=f"out/{name}: in use by another convert on"),
            ):
                export_run(run, out / name, to)
            assert not list(out.iterdir())
            assert export_run(run, out / name, to).step == 7
        (out / name).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"cannot be written \(File name too long\)"):
        export_run(run, out / f"{'a' * 300}.pt", "reference")
    (out / "link.pt").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="exists already"):
        export_run(run, out / "link.pt", "reference")


def test_an_import_that_was_killed_goes_on(tmp_path, config):
    """Its configuration has its name, its checkpoint not yet."""
    *_, file = model_and_file(tmp_path)
    run = tmp_path / "run"
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = run / f"checkpoints/.step_0000007.{ended.pid}@{HOST}.tmp"
    left.mkdir(parents=True)
    (left / "manifest.json").touch()
    save_config(load_config(config, run=run), run / "config.yaml")
    another = tmp_path / "another.yaml"
    save_config(load_config(config, ["seed=5"]), another)
    with pytest.raises(ConfigError, match=r"has a config\.yaml already"):
        import_reference(file, run, another)
    assert import_reference(file, run, config).step == 7
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_0000007"]


def test_two_imports_at_once_make_one_run(tmp_path, config, monkeypatch):
    """The other ends while this one still reads its file."""
    *_, file = model_and_file(tmp_path)
    run, read = tmp_path / "run", exchange.load_reference

    def slow(path):
        monkeypatch.setattr(exchange, "load_reference", read)
        import_reference(file, run, config)
        return read(path)

    monkeypatch.setattr(exchange, "load_reference", slow)
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        import_reference(file, run, config)
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_a_checkpoint_that_is_pruned_while_it_is_opened(tmp_path, config, monkeypatch):
    *_, file = model_and_file(tmp_path)
    run, listed, chosen = tmp_path / "run", checkpoint_format.checkpoints, []
    import_reference(file, run, config)

    def pruned(run):
        chosen.append([checkpoint_path(run, 3)] if len(chosen) < 2 else listed(run))
        return chosen[-1]

    monkeypatch.setattr(checkpoint_format, "checkpoints", pruned)
    assert export_run(run, tmp_path / "a.pt", "reference").step == 7
    monkeypatch.setattr(checkpoint_format, "checkpoints", lambda run: [checkpoint_path(run, 3)])
    with pytest.raises(CheckpointError, match="step_0000003"):
        export_run(run, tmp_path / "b.pt", "reference")


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, config, to):
    *_, file = model_and_file(tmp_path)
    run, out = tmp_path / "run", tmp_path / "out"
    import_reference(file, run, config)
    name = {"reference": "a.pt", "safetensors": "a.safetensors"}.get(to, "zero")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written") as caught:
            export_run(run, out / name, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"{out / name}: cannot be written (")
    assert "File too large" in str(caught.value)
    assert not list(out.iterdir())


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_what_does_not_fit_is_named_and_leaves_no_run(tmp_path, config, capsys):
    model, _, optimizer, file = model_and_file(tmp_path)
    run, state, bad = tmp_path / "run", model.state_dict(), tmp_path / "bad.pt"
    saved = {"model": state, "ema": state, "opt": optimizer.state_dict(), "steps": 7}

    def refused(words, **changed):
        torch.save({**saved, **changed}, bad)
        with pytest.raises(CheckpointError, match=words):
            import_reference(bad, run, config)
        assert not run.exists()

    refused("holds more than tensors, refused", args=Payload())
    assert "executed" not in capsys.readouterr().out
    refused("steps: expected a whole number", steps="7")
    refused("opt: 4 parameters", opt=torch.optim.AdamW(nn.LSTM(2, 2).parameters()).state_dict() | {
        "state": {0: {}}})  # fmt: skip
    refused("not the state of an AdamW", opt={**saved["opt"], "state": {1: {"step": 1}}})
    wide = {**state, "blocks.0.mlp.fc1.bias": torch.zeros(3)}
    refused(r"blocks\.0\.mlp\.fc1\.bias is \[3\]", ema=wide)
    torch.save({"a": torch.zeros(1)}, bad)
    with pytest.raises(CheckpointError, match=r"pos_embed.* is missing"):
        import_reference(bad, run, config)
    import_reference(file, run, config)
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        import_reference(file, run)
    for to, name, words in (
        ("onnx", "a.pt", "--to: 'onnx' is not one of reference, safetensors, zero"),
        ("reference", "a.safetensors", r"a reference file is called \*\.pt"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_run(run, tmp_path / name, to)
