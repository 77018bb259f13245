"""A reference's file says which model it is: by the command line in it, and by its tensors."""

import argparse

import pytest
import torch

from fastrepa.commands.convert.exchange import export_run, import_reference
from fastrepa.commands.convert.reference_args import config_of, read_shape
from fastrepa.config import load_run_config
from fastrepa.errors import CheckpointError, ConfigError
from fastrepa.model.sit import SiT
from fastrepa.vision.registry import REGISTRY
from tests.command_line import invoke, run
from tests.runs import ROOT

SMALL = {
    "side": 8, "channels": 4, "width": 24, "depth": 2, "heads": 3, "patch": 2, "num_classes": 5,
    "encoder_widths": [16], "alignment_block": 1, "projector_width": 20,
}  # fmt: skip
# As REPA's train.py has them, with all that is of no use here.
ARGS = {
    "output_dir": "exps", "exp_name": "a", "logging_dir": "logs", "report_to": "wandb",
    "sampling_steps": 5000, "resume_step": 0, "model": "SiT-B/2", "num_classes": 5,
    "encoder_depth": 2, "fused_attn": True, "qk_norm": False, "data_dir": "../data/imagenet256",
    "resolution": 64, "batch_size": 32, "allow_tf32": True, "mixed_precision": "fp16",
    "epochs": 1400, "max_train_steps": 900, "checkpointing_steps": 300,
    "gradient_accumulation_steps": 1, "learning_rate": 2e-4, "adam_beta1": 0.9,
    "adam_beta2": 0.95, "adam_weight_decay": 0.0, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
    "seed": 3, "num_workers": 4, "path_type": "cosine", "prediction": "v", "cfg_prob": 0.2,
    "enc_type": "dinov1-vit-b", "proj_coeff": 0.25, "weighting": "lognormal", "legacy": False,
}  # fmt: skip


def a_file(path, args=None, prefix="", **changed):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = SiT(**{**SMALL, **changed}).state_dict()
    state = {prefix + name: value for name, value in state.items()}
    torch.save(state if args is None else {"model": state, "ema": state, "args": args}, path)
    return path


@pytest.mark.parametrize("kind", [dict, lambda **args: argparse.Namespace(**args)])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_a_file_brings_its_configuration(tmp_path, kind, prefix):
    file = a_file(tmp_path / "a.pt", kind(**ARGS), prefix)
    folder = tmp_path / "run"
    overrides = ["model.heads=3", "data.path=here"]
    import_reference(file, folder, overrides=overrides)
    c = load_run_config(folder)
    assert (c.model.width, c.model.depth, c.model.heads, c.model.patch) == (24, 2, 3, 2)
    assert (c.model.num_classes, c.model.label_dropout, c.model.qk_norm) == (5, 0.2, False)
    assert (c.data.path, c.data.resolution, c.data.codec.name) == ("here", 64, "sd-vae")
    assert (c.alignment.block, c.alignment.weight, c.alignment.projector_width) == (2, 0.25, 20)
    assert [e.name for e in c.vision.encoders] == ["dino-vit-b"]
    assert c.vision.encoders[0].name in REGISTRY
    o, t = c.objective, c.training
    assert (o.path, o.prediction, o.time) == ("cosine", "velocity", "lognormal")
    assert (t.steps, t.global_batch, t.precision, t.clip) == (900, 32, "bf16", 1.0)
    assert (t.checkpoint_every, t.sample_every, c.seed) == (300, 5000, 3)
    assert (t.optimizer.lr, t.optimizer.betas) == (2e-4, (0.9, 0.95))
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        import_reference(file, folder, overrides=overrides)


def test_named_sizes_need_no_overrides(tmp_path):
    """The real one: REPA's SiT-XL/2 on the meta device, and DINOv2's projector."""
    with torch.device("meta"):
        model = SiT(
            side=32, channels=4, width=1152, depth=28, heads=16, patch=2, num_classes=1000,
            encoder_widths=[768], alignment_block=8,
        )  # fmt: skip
    shape = read_shape(model.state_dict(), tmp_path)
    assert str(shape) == "SiT-XL/2 with 768-wide projector"
    args = {**ARGS, "enc_type": "dinov2-vit-b", "encoder_depth": 8, "resolution": 256}
    config = config_of(args, shape, tmp_path, tmp_path / "run", [])
    recipe = ROOT / "configs/imagenet256_sit_xl2_dinov2b.yaml"
    assert "SiT-XL/2" in recipe.read_text()
    assert (config.model.name, config.model.heads, config.alignment.block) == ("SiT-XL/2", 16, 8)
    with pytest.raises(ConfigError, match="has 1 projectors, its args name 0 encoders"):
        config_of({**args, "enc_type": "None"}, shape, tmp_path, tmp_path / "run", [])
    with pytest.raises(ConfigError, match=r"args: training\.global_batch: 'many' is not allowed"):
        config_of({**args, "batch_size": "many"}, shape, tmp_path, tmp_path / "run", [])


def test_our_own_files_come_back_without_a_configuration(tmp_path):
    first, back = tmp_path / "first", tmp_path / "back"
    import_reference(a_file(tmp_path / "a.pt", ARGS, qk_norm=True), first, overrides=["seed=8"])
    export_run(first, tmp_path / "b.pt", "reference")
    import_reference(tmp_path / "b.pt", back, overrides=["data.path=../data/imagenet256"])
    ours, theirs = (load_run_config(f).model_dump() for f in (first, back))
    for of in (ours, theirs):
        of.pop("run")
        of["training"] = {k: of["training"][k] for k in ("steps", "global_batch", "optimizer")}
    assert ours == theirs


def test_without_arguments_a_configuration_is_asked_for(tmp_path):
    file, folder = a_file(tmp_path / "a.pt"), tmp_path / "run"
    done = invoke("convert", folder, file, "--from", "reference")
    words = str(done.exception)
    assert words.startswith(f"--config is needed: {file} has no args; it is a SiT of width 24, ")
    assert words.endswith("depth 2 and patch 2 with 16-wide projector")
    assert not folder.exists()


def written(tmp_path, **changed):
    sizes = {k: SMALL[k] for k in ("width", "depth", "heads", "patch", "num_classes")}
    sizes = ", ".join(f"{k}: {v}" for k, v in {**sizes, **changed}.items())
    path = tmp_path / "small.yaml"
    path.write_text(
        "run: elsewhere\ndata: {path: none, resolution: 64}\nmodel: {" + sizes + "}\n"
        "alignment: {block: 1, projector_width: 20}\nvision: {encoders: [{name: dino-vit-b}]}\n"
    )
    return path


def test_a_bare_average_is_for_sampling(tmp_path):
    file, folder = a_file(tmp_path / "a.pt"), tmp_path / "run"
    said = run("convert", folder, file, "--from", "reference", "--config", written(tmp_path))
    assert f"{folder} starts at step 0: fastrepa sample {folder}; to train" in said


def test_a_configuration_that_says_otherwise_is_named(tmp_path, capsys):
    file, folder = a_file(tmp_path / "a.pt", ARGS), tmp_path / "run"
    import_reference(file, folder, written(tmp_path), overrides=["objective.path=cosine"])
    said = capsys.readouterr().err
    assert "a.pt: alignment.block is 1, its args say 2; the configuration is taken" in said
    assert "objective.time is 'uniform', its args say 'lognormal'" in said
    assert "objective.path" not in said and "training" not in said


@pytest.mark.parametrize(("changed", "words"), [
    ({"width": 48}, r"is \[5?.*: another architecture; the file is a SiT of width 24, depth 2 and "
     r"patch 2 with 16-wide projector: model\.width=24$"),
    ({"num_classes": 9}, r"projector: model\.num_classes=5$"),
    ({"qk_norm": "true"}, r"projector: model\.qk_norm=False$"),
    ({"patch": 4}, r"a\.pt: another architecture; the file is .*: model\.patch=2$"),
])  # fmt: skip
def test_a_mismatch_says_which_model_the_file_is(tmp_path, changed, words):
    file, folder = a_file(tmp_path / "a.pt"), tmp_path / "run"
    with pytest.raises(CheckpointError, match=words):
        import_reference(file, folder, written(tmp_path, **changed))
    assert not folder.exists()


def test_a_run_s_own_configuration_counts(tmp_path):
    file, folder = a_file(tmp_path / "a.pt", ARGS), tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(written(tmp_path).read_text())
    with pytest.raises(ConfigError, match=r"^seed=1: .*run has a config\.yaml of its own"):
        import_reference(file, folder, overrides=["seed=1", "model.heads=3"])
    import_reference(file, folder)
    assert load_run_config(folder).alignment.block == 1
