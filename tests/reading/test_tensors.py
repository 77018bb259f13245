"""Weights of others: taken whatever wraps them, refused by name, and never run."""

import io
import json
import shutil
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner

from fastrepa.checkpoint.format import (
    newest_checkpoint,
    read_state,
)
from fastrepa.cli import app
from fastrepa.commands.convert.exchange import import_reference
from fastrepa.commands.evaluate.extractors import Clip, Inception
from fastrepa.config import EncoderConfig, load_config, save_config
from fastrepa.errors import CheckpointError, WeightsError
from fastrepa.model.conversion import load_reference
from fastrepa.model.sit import SiT
from fastrepa.reading.tensors import SafeTensors, read_weights, state_dict
from fastrepa.vision.features import build_encoder
from fastrepa.vision.weights import read_checkpoint, unwrap
from tests.reading.refusals import one_line
from tests.runs import ROOT, SMALL

TINY = [*SMALL, "model.width=24", "model.depth=2", "model.heads=2", "alignment.block=1"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    save_config(load_config(ROOT / "configs/quickstart.yaml", ["run=elsewhere", *TINY]), path)
    return path


@pytest.fixture(scope="module")
def weights(config):
    torch.manual_seed(0)
    model = SiT.from_config(load_config(config, []), side=32, channels=3, encoder_widths=[112])
    return model.state_dict()


def named(state, prefix):
    return {prefix + name: value for name, value in state.items()}


# What is taken --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module.", "module.module."])  # fmt: skip
def test_wrappers_are_taken_off_in_every_reader(prefix, weights, tmp_path, config):
    file = tmp_path / "a.pt"
    both = {key: named(weights, prefix) for key in ("model", "ema")}
    torch.save({**both, "steps": 7}, file)
    read = load_reference(file)
    assert list(read.model) == list(read.ema) == list(weights)
    assert all(torch.equal(read.ema[n], v) for n, v in weights.items())
    assert list(unwrap(read_checkpoint(file), file)) == list(weights)
    bare = tmp_path / "a.safetensors"
    safetensors.torch.save_file(named(weights, prefix), bare)
    assert load_reference(bare).model.keys() == weights.keys()
    assert import_reference(file, tmp_path / "run", config).step == 7


def test_blocks_that_were_compiled_by_themselves(tmp_path):
    state = {"blocks.0._orig_mod.w": torch.ones(1), "blocks.1.w": torch.ones(1)}
    assert list(state_dict(state, "a.pt", WeightsError)) == ["blocks.0.w", "blocks.1.w"]
    some = {"module.w": torch.ones(1), "head.w": torch.ones(1)}
    assert list(state_dict(some, "a.pt", WeightsError)) == list(some)  # a part called module
    with pytest.raises(WeightsError, match=r"a\.pt: a\.w is there twice"):
        state_dict({"a._orig_mod.w": torch.ones(1), "a.w": torch.ones(1)}, "a.pt", WeightsError)


def test_parameters_are_tensors(weights, tmp_path, config):
    file = tmp_path / "parameters.pt"
    held = {n: nn.Parameter(v) for n, v in weights.items()}
    held["pos_embed"].note = "an attribute of its own"
    torch.save(held, file)
    read = load_reference(file).model
    assert {type(v) for v in read.values()} == {torch.Tensor}
    assert not any(v.requires_grad for v in read.values())
    assert import_reference(file, tmp_path / "run", config).step == 0


# What is refused ------------------------------------------------------------------------------


def changed(**values):
    return lambda state: {"model": state, "ema": state, "steps": 7} | values


def each(change):
    return lambda state: {n: change(v) for n, v in state.items()}


def within(value):
    holds = {}
    holds["self"] = holds
    return holds if value is None else value


def deep(levels):
    made = []
    for _ in range(levels):
        made = [made]
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed(steps=np.int64(10)), r"refused \(a numpy scalar, numpy\.\S+\.scalar\)"),
        (changed(steps=np.arange(3)), r"refused \(a numpy array, numpy\.\S+\._reconstruct\)"),
        (changed(steps=True), "steps: expected a whole number from 0 to 2.40, got True"),
        (changed(steps=-1), "steps: expected a whole number .* got -1"),
        (changed(steps=2.0), "steps: expected a whole number .* got 2.0"),
        (changed(steps=10**400), r"steps: expected a whole number .* got 10+\.\.\.0+"),
        (changed(steps=None), "steps: expected a whole number .* got None"),
        (changed(extra=within(None)), "nested more than 64 deep"),
        (changed(extra=deep(100)), "nested more than 64 deep"),
        (changed(model=5), "model: holds a int; a state dict of tensors was expected"),
        (each(lambda v: v.to_sparse() if v.dim() == 2 else v), r"is sparse \(sparse_coo\)"),
        (each(lambda v: v.to_sparse_csr() if v.dim() == 2 else v), "is sparse|not readable"),
        (each(lambda v: v.to("meta")), "is on the meta device, without values"),
        (each(lambda v: v.to(torch.complex64)), "is complex64; dense tensors of real numbers"),
        (each(lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.quint8)), "is quantised"),
        (each(lambda v: v.to(torch.int32)), "is of int32, real numbers were expected"),
        (each(lambda v: torch.zeros(1).expand(v.shape)), "has fewer values than that stored"),
        (lambda state: {}, "holds nothing; a state dict of tensors was expected"),
        (lambda state: {7: torch.ones(1)}, "a name is 7, not text"),
        (lambda state: {**state, "note": "text"}, "note is 'text'; a state dict"),
        (lambda state: {**state, "pos_embed": state["pos_embed"].flatten()},
         r"pos_embed has 1 dimension, expected \[1, T, D\]"),
        (lambda state: {**state, "x_embedder.proj.weight": torch.zeros(())},
         r"x_embedder\.proj\.weight has 0 dimensions, expected \[D, C, patch, patch\]"),
        (lambda state: {**state, "projectors.0.4.weight": torch.zeros(0, 4)},
         r"projectors\.0\.4\.weight is \[0, 4\], expected \[Z, P\]"),
        (lambda state: {n: v for n, v in state.items() if n != "pos_embed"},
         r"pos_embed \[1, T, D\] is missing"),
        (changed(opt={"state": {0: 5}, "param_groups": [5]}), "opt: not the state of an AdamW"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_named(content, words, weights, tmp_path, config):
    file, run = tmp_path / "bad.pt", tmp_path / "run"
    torch.save(content(weights), file)
    with pytest.raises(CheckpointError, match=words) as error:
        import_reference(file, run, config)
    one_line(error, file)
    assert not run.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x80", b"PK\x03\x04", b"\x89PNG\r\n", b"{}", b"\x00" * 64, b"cos\n"]
)
def test_bytes_that_are_no_weights(data, suffix, tmp_path):
    file = tmp_path / f"junk{suffix}"
    file.write_bytes(data)
    for reader, kind in ((load_reference, CheckpointError), (read_checkpoint, WeightsError)):
        with pytest.raises(kind) as error:
            reader(file)
        assert "expected" in one_line(error, file) or "safetensors" in str(error.value)


def test_half_a_file_and_a_folder(weights, tmp_path):
    for name in ("cut.pt", "cut.safetensors"):
        file = tmp_path / name
        safe = file.suffix == ".safetensors"
        (safetensors.torch.save_file if safe else torch.save)(weights, file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(CheckpointError, match="not readable as weights") as error:
            load_reference(file)
        one_line(error, file)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(WeightsError):
        read_weights(tmp_path / "folder.pt", WeightsError)
    with pytest.raises(WeightsError):
        SafeTensors(tmp_path / "folder.pt", WeightsError)


def test_an_encoders_odd_shapes_are_named(tmp_path):
    state = {"pos_embed": torch.zeros(8), "cls_token": torch.zeros(1, 1, 384),
             "patch_embed.proj.weight": torch.zeros(384, 3, 14, 14)}  # fmt: skip
    file = tmp_path / "dino.pth"
    torch.save(state, file)
    config = EncoderConfig(name="dinov2-vit-s", weights=str(file))
    with pytest.raises(WeightsError, match=r"'pos_embed' is \[8\], .* was expected") as error:
        build_encoder(config, resolution=64, grid=4)
    one_line(error, file)


# What was checked is what is used -------------------------------------------------------------


class Touch:
    """A pickle of this makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def polyglot(path, payload, header=None):
    """A valid .safetensors file whose bytes, read from their end, are a torch zip of `payload`."""
    held = io.BytesIO()
    torch.save(payload, held)
    archive = held.getvalue()
    text = json.dumps({"a": {"dtype": "U8", "shape": [len(archive)],
                             "data_offsets": [0, len(archive)]}}).encode()  # fmt: skip
    text += b" " * ((header or len(text)) - len(text))
    path.write_bytes(struct.pack("<Q", len(text)) + text + archive)


def test_a_file_of_two_kinds_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    # The second is as long as a zip's first eight bytes say, read as a safetensors header's length.
    for name, header in (("a.safetensors", None), ("b.safetensors", 0x04034B50)):
        file = tmp_path / name
        polyglot(file, {"fc.weight": Touch(marker)}, header)
        safetensors.torch.load_file(file)
        with zipfile.ZipFile(file) as archive:
            assert any(entry.endswith("data.pkl") for entry in archive.namelist())
        with pytest.raises(WeightsError, match="not torch-fidelity's Inception"):
            Inception(str(file))
        other = file.rename(tmp_path / f"{name}.pth")
        with pytest.raises(WeightsError) as error:
            Inception(str(other))
        one_line(error, other)
        other.unlink()
    assert not marker.exists()


def test_torch_fidelity_is_given_the_tensors_that_were_read(tmp_path, monkeypatch):
    """It never sees the path, so that the file may be another by then."""
    given = []

    class Network(nn.Module):
        def __init__(self, name, features, weights):
            super().__init__()
            given.append(weights)
            raise RuntimeError("seen")

    module = type("module", (), {"FeatureExtractorInceptionV3": Network, "URL_INCEPTION_V3": "x"})
    monkeypatch.setattr("fastrepa.commands.evaluate.extractors._torch_fidelity", lambda: module)
    file = tmp_path / "inception.pth"
    torch.save({"module.fc.weight": nn.Parameter(torch.ones(3))}, file)
    with pytest.raises(WeightsError, match=r"inception\.pth: .*\(seen\)"):
        Inception(str(file))
    assert isinstance(given[0], io.BytesIO)
    assert torch.load(given[0], weights_only=True)["fc.weight"].tolist() == [1, 1, 1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """open_clip's smallest network, as a folder that `local-dir:` names."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    model = {"embed_dim": 16,
             "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16,
                            "patch_size": 16},
             "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1,
                          "layers": 1}}  # fmt: skip
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {}})
    )
    torch.manual_seed(0)
    return folder, open_clip.CLIP(**model).state_dict()


def test_clips_weights_are_read_as_all_others(clip, tmp_path):
    folder, state = clip
    here = tmp_path / "clip"
    shutil.copytree(folder, here)
    file, marker = here / "open_clip_pytorch_model.bin", tmp_path / "ran"
    identities = set()
    for content in (state, {"state_dict": named(state, "module._orig_mod.")},
                    {n: nn.Parameter(v) for n, v in state.items()}):  # fmt: skip
        torch.save(content, file)
        identities.add(Clip(f"local-dir:{here}").identity)
    assert len(identities) == 1
    for content in ({**state, "x": Touch(marker)}, {**state, "x": np.int64(1)},
                    {n: v.to(torch.complex64) for n, v in state.items()}, [1]):  # fmt: skip
        torch.save(content, file)
        with pytest.raises(WeightsError, match=r"^--clip: local-dir:") as error:
            Clip(f"local-dir:{here}")
        one_line(error, file)
    polyglot(file.with_suffix(".safetensors"), Touch(marker))
    with pytest.raises(WeightsError) as error:
        Clip(f"local-dir:{here}")
    assert not marker.exists()


# A checkpoint of our own ----------------------------------------------------------------------


@pytest.fixture
def run(weights, tmp_path, config):
    """A run of two checkpoints, 2 and 4."""
    file, folder = tmp_path / "a.pt", tmp_path / "run"
    for step in (2, 4):
        torch.save({"model": weights, "ema": weights, "steps": step}, file)
        import_reference(file, tmp_path / f"at_{step}", config)
        shutil.copytree(tmp_path / f"at_{step}", folder, dirs_exist_ok=True)
    return folder


def rewritten(change):
    """A manifest as it is after `change` of what it lists."""

    def of(path):
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))

    return of


def without(*names):
    return rewritten(lambda manifest: [manifest["files"].pop(name) for name in names])


def text(name, value):
    return lambda path: (path / name).write_text(value)


DAMAGES = {
    "lists no files": rewritten(lambda m: m.update(files={})),
    "manifest.json lists no files": rewritten(lambda m: m.pop("files")),
    "json lists no files": rewritten(lambda m: m.update(files=["ema.safetensors"])),
    "leaves out state.json": without("state.json"),
    "leaves out weights.safetensors": without("weights.safetensors"),
    "leaves out ema.safetensors": without("ema.safetensors"),
    "leaves out exp_avg.safetensors": without("ema.safetensors", "exp_avg.safetensors"),
    "leaves out exp_avg_sq.safetensors": without("exp_avg_sq.safetensors"),
    "names '../config.yaml', which is no": rewritten(lambda m: m["files"].update(
        {"../config.yaml": {"bytes": 1, "sha256": ""}})),
    "names '/etc/hostname', which is no": rewritten(lambda m: m["files"].update(
        {"/etc/hostname": {"bytes": 1, "sha256": ""}})),
    "state.json has no bytes and sha256": rewritten(lambda m: m["files"].update(
        {"state.json": {"bytes": True, "sha256": "a"}})),
    "ema.safetensors has no bytes and": rewritten(lambda m: m["files"].update(
        {"ema.safetensors": None})),
    "manifest.json: not valid JSON": text("manifest.json", "[" * 100_000),
    "manifest.json: not valid JSON (": lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"),
    "manifest.json: cannot be read": lambda path: (path / "manifest.json").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("words", DAMAGES)
def test_a_manifest_that_says_too_little_is_damage(words, run):
    newest = newest_checkpoint(run)
    assert newest.name == "step_0000004"
    DAMAGES[words](newest)
    with pytest.warns(UserWarning, match="checkpoint step_0000004 is damaged") as said:
        assert newest_checkpoint(run).name == "step_0000002"
    assert words in str(said[0].message)


def test_a_checkpoint_whose_manifest_lists_nothing_is_passed_over(run):
    newest = newest_checkpoint(run)
    DAMAGES["lists no files"](newest)
    ema = newest / "ema.safetensors"
    ema.write_bytes(ema.read_bytes()[:-4000] + bytes(4000))
    words = ["sample", str(run), "--num", "1", "--steps", "2", "--out", str(run / "drawn")]
    with pytest.warns(UserWarning, match=r"step_0000004 is damaged \(manifest.json lists no files"):
        done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads((run / "drawn/sampling.json").read_text())["checkpoint_step"] == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": True}, "step: "),
        ({"step": -1}, "step: "),
        ({"step": 1.0}, "step: "),
        ({"optimizer_step": 10**30}, "optimizer_step: "),
        ({"encoder_widths": ["a"]}, "encoder_widths.0: "),
        ({"classes": 5}, "classes: "),
        ({"side": 0}, "side: "),
        ({"emas": {"../ema": 0.9}}, "'../ema' is not the name of an average"),
        ({"emas": {"ema_decay_0.5": 0.5}}, "no average is called 'ema'"),
        ({"emas": [1]}, "emas: "),
        ({"emas": {"ema": "x"}}, "emas: "),
        ({"more": 1}, "more: "),
        ({"format": 3}, "checkpoint format 3"),
        ({"format": [2]}, "checkpoint format [2]"),
    ],
)
def test_a_state_of_other_values_is_refused(change, words, run):
    path = newest_checkpoint(run)
    fields = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(fields | change))
    with pytest.raises(CheckpointError) as error:
        read_state(path)
    assert words in one_line(error, path)
