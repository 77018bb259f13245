"""The folder for others: its numbers are ours, in a process that has nothing of ours."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastrepa.commands.convert.diffusers_folder import SAMPLING, _described
from fastrepa.commands.convert.exchange import export_run, import_reference
from fastrepa.commands.convert.shared import sit
from fastrepa.config import ModelConfig, SampleConfig, config_from_dict, save_config
from fastrepa.errors import WeightsError
from fastrepa.generation.sample import sample_run
from fastrepa.generation.sampler import sample
from fastrepa.model.sit import SiT
from fastrepa.randomness import KeyedRandom, Stream
from tests.runs import environment
from tests.sets.autoencoder import small_vae

LABELS = torch.tensor([2, 0, 1])
IDS = torch.tensor([0, 7, 2**33 + 5])


def a_config(run="unused", **sections):
    tree = {
        "run": str(run),
        "data": {"path": "unused", "resolution": 16, "codec": {"name": "pixel"}},
        "model": {"width": 24, "depth": 2, "heads": 3, "patch": 4, "num_classes": 3},
        "sample": {"sampler": "heun", "steps": 3, "cfg": 2.0, "guidance_high": 0.7, "num": 4},
        "training": {"precision": "fp32"},
    }
    return config_from_dict({**tree, **sections})


def a_model(config, *, side=16, channels=3, encoder_widths=()):
    """Every weight is at work: a fresh model puts out nothing."""
    model = SiT.from_config(config, side=side, channels=channels, encoder_widths=encoder_widths)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    return model.eval()


class State:
    side, channels, classes, step = 16, 3, ["cat", "dog", "eel"], 5


def test_noise_is_ours():
    for stream, step in ((Stream.SAMPLE_NOISE, 0), (Stream.SAMPLE_STEP, 3)):
        ours = KeyedRandom(2**63 + 9).normal(stream, step, IDS, (30,), torch.float64)
        theirs = sit.keyed_normal(2**63 + 9, int(stream), step, IDS, 30)
        unit = torch.finfo(torch.float64).eps * ours.abs().clamp(min=1)
        assert ((ours - theirs).abs() <= 4 * unit).all()  # of log, sqrt, cos and a product


VARIANTS = [
    ({}, {}, {"sampler": "ode"}),
    ({"qk_norm": True}, {}, {"sampler": "heun", "cfg": 3.0}),
    ({}, {"path": "cosine"}, {"sampler": "sde", "cfg": 1.5, "guidance_low": 0.2}),
    ({}, {"prediction": "data"}, {"sampler": "sde", "steps": 1}),
    ({"qk_norm": True}, {"prediction": "data", "path": "cosine"},
     {"sampler": "ode", "cfg": 4.0, "guidance_low": 0.3, "guidance_high": 0.6}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "objective", "settings"), VARIANTS)
def test_latents_are_ours(model, objective, settings):
    base = a_config().model.model_dump(exclude_none=True)
    config = a_config(model={**base, **model}, objective=objective)
    ours, settings = a_model(config), {"steps": 4, **settings}
    theirs = sit.SiT(_described(config, State))
    kept = {n: v for n, v in ours.state_dict().items() if not n.startswith("projectors.")}
    theirs.load_state_dict(kept)
    random = KeyedRandom(4)

    def drawn(dtype):
        return sample(
            ours.to(dtype), random.normal(Stream.SAMPLE_NOISE, 0, IDS, (3, 16, 16)), LABELS,
            **settings, path=config.objective.path, null_label=3, dtype=dtype,
            step_noise=lambda i: random.normal(
                Stream.SAMPLE_STEP, i, IDS, (3, 16, 16), torch.float64),
        )  # fmt: skip

    eager, exact = drawn(torch.float32), drawn(torch.float64)
    unguided = {"cfg": 1.0, "guidance_low": 0.0, "guidance_high": 1.0}
    latents = theirs.sample(LABELS, seed=4, ids=IDS, **{**unguided, **settings})
    error = (latents - exact).abs().max()
    unit = torch.finfo(torch.float32).eps * exact.abs().max()
    assert error <= 2 * (eager - exact).abs().max() + unit


def test_every_option_of_a_model_is_known_to_the_file():
    """A new key of `model` must be handled in shared/sit.py, and one of `sample` thought of."""
    known = {"label_dropout"} | _described(a_config(), State).keys()  # dropout is for training
    assert ModelConfig.model_fields.keys() <= known
    left = {"num", "precision", "compile"}
    assert SampleConfig.model_fields.keys() == {*SAMPLING, *left}


def test_what_is_asked_for_wrongly_is_named():
    model = sit.SiT(_described(a_config(), State))
    for settings, words in (
        ({"sampler": "euler"}, "sampler 'euler' of 3 steps is none"),
        ({"stepz": 3}, "stepz: unknown; known are cfg, guidance_high"),
    ):
        with pytest.raises(ValueError, match=words):
            model.sample([0], **settings)
    with pytest.raises(ValueError, match=r"labels: not all of them are in 0 \.\. 2"):
        model.sample([3])


def a_run(folder, **sections):
    """A run of random weights that was never trained, with the names of its classes."""
    config = a_config(folder, **sections)
    latent = config.data.codec.is_autoencoder
    model = a_model(config, side=8 if latent else 16, channels=4 if latent else 3)
    file, written = folder.with_suffix(".pt"), folder.with_suffix(".yaml")
    torch.save(model.state_dict(), file)
    save_config(config, written)
    import_reference(file, folder, written)
    return folder


# Nothing of the engine's can be imported; what is needed lies in two folders.
CHILD = """
import sys
sys.modules["fastrepa"] = sys.modules["fastrepa_kernels"] = None
import json
import numpy as np
import torch
pixel, latent, named_vae, out = sys.argv[1:]
sys.path.insert(0, pixel + "/transformer")
from sit import SiT, to_images
plain = to_images(SiT.from_pretrained(pixel + "/transformer").sample([0, 1, 2, 0], seed=5))
assert "diffusers" not in sys.modules
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(pixel, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
named = pipe(["cat", "dog", "eel", "cat"], seed=5, output_type="pt").images
pil = pipe([0], seed=5, ids=[3]).images[0]
try:
    pipe(["cow"])
except ValueError as e:
    words = str(e)
vae = DiffusionPipeline.from_pretrained(latent, trust_remote_code=True).to("cpu")
vae.set_progress_bar_config(disable=True)
decoded = vae([0, 1, 2, 0], seed=5, output_type="pt").images
lent = DiffusionPipeline.from_pretrained(named_vae, trust_remote_code=True, vae=vae.vae)
lent.set_progress_bar_config(disable=True)
assert torch.equal(lent([0], seed=5, ids=[1], output_type="pt").images,
                   vae([0], seed=5, ids=[1], output_type="pt").images)
half = DiffusionPipeline.from_pretrained(pixel, trust_remote_code=True, torch_dtype=torch.bfloat16)
half.set_progress_bar_config(disable=True)
rough = half([0, 1, 2, 0], seed=5, output_type="pt").images
np.savez(out, plain=plain, named=named, pil=np.asarray(pil), decoded=decoded, rough=rough)
print(json.dumps(words))
"""


def drawn_by_us(run, **settings):
    folder = run.with_name(run.name + "-images")
    sample_run(run, folder, seed=5, device=torch.device("cpu"), overwrite=True, **settings)
    images = [np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(4)]
    return np.stack(images).transpose(0, 3, 1, 2).astype(int)


def test_both_load_where_there_is_nothing_of_ours(tmp_path, monkeypatch):
    small_vae().save_pretrained(tmp_path / "vae")
    vae = {"name": "sd-vae", "weights": str(tmp_path / "vae")}
    monkeypatch.setattr(
        "fastrepa.commands.convert.exchange._classes", lambda _: ["cat", "dog", "eel"]
    )
    pixel = a_run(tmp_path / "pixel")
    base = a_config().model.model_dump(exclude_none=True)
    latent = a_run(
        tmp_path / "latent",
        data={"path": "unused", "resolution": 64, "codec": vae},
        model={**base, "patch": 2, "qk_norm": True},
        sample={"sampler": "sde", "steps": 3, "num": 4},
    )
    folders = [tmp_path / f"{run.name}-folder" for run in (pixel, latent)]
    for run, folder in zip((pixel, latent), folders, strict=True):
        export_run(run, folder, "diffusers")
        assert str(tmp_path) not in (folder / "transformer/config.json").read_text()
    folders.append(tmp_path / "named-folder")
    elsewhere = ["data.codec.weights=stabilityai/sd-vae-ft-mse"]
    export_run(latent, folders[-1], "diffusers", overrides=elsewhere)
    env = {**environment(), "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, folders), str(tmp_path / "out.npz")],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == "class_labels: 'cow' is not one of cat, dog, eel"
    out = {name: value.astype(int) for name, value in np.load(tmp_path / "out.npz").items()}
    ours = drawn_by_us(pixel)
    for name in ("plain", "named"):
        assert (out[name] == out["plain"]).all()
        assert np.abs(out[name] - ours).max() <= 1
        assert (out[name] == ours).mean() > 0.99
    single = np.abs(out["pil"].transpose(2, 0, 1) - ours[3])
    assert single.max() <= 1
    error = np.abs(drawn_by_us(pixel, precision="bf16") - ours).max()
    assert np.abs(out["rough"] - ours).max() <= 2 * error + 1
    decoded = drawn_by_us(latent)
    assert np.abs(out["decoded"] - decoded).max() <= 1
    assert (out["decoded"] == decoded).mean() > 0.99


def test_an_autoencoder_is_named_or_goes_along(tmp_path):
    named = {"name": "sd-vae", "weights": "stabilityai/sd-vae-ft-mse"}
    data = {"path": "unused", "resolution": 64, "codec": named}
    run = a_run(tmp_path / "run", data=data)
    export_run(run, tmp_path / "a", "diffusers", weights="raw")
    about = json.loads((tmp_path / "a/transformer/config.json").read_text())
    assert (about["vae"], about["weights"], about["latent_scale"]) == (
        "stabilityai/sd-vae-ft-mse", "raw", 0.18215,
    )  # fmt: skip
    assert not (tmp_path / "a/vae").exists()
    (tmp_path / "lost").mkdir()
    data["codec"]["weights"] = str(tmp_path / "lost")
    run = a_run(tmp_path / "other", data=data)
    with pytest.raises(WeightsError, match=r"lost\): this folder has no config\.json"):
        export_run(run, tmp_path / "b", "diffusers")
    assert not (tmp_path / "b").exists()
