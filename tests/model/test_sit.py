"""The generator against an independent float64 oracle, the reference's names, and its settings."""

import math
import re

import pytest
import torch

from fastrepa.config import ObjectiveConfig
from fastrepa.errors import CheckpointError
from fastrepa.model.conversion import load_reference, load_weights, save_reference
from fastrepa.model.sit import SiT, sincos_position_embedding
from fastrepa.training.objective import Objective
from tests.model import oracle

SMALL = {
    "side": 4, "channels": 4, "width": 384, "depth": 12, "heads": 6, "patch": 2, "num_classes": 10,
    "encoder_widths": [48], "alignment_block": 4, "projector_width": 96,
}  # fmt: skip
ODD = {
    "side": 9, "channels": 5, "width": 84, "depth": 3, "heads": 7, "patch": 3, "num_classes": 3,
    "encoder_widths": [23, 7], "alignment_block": 2, "projector_width": 33, "qk_norm": True,
}  # fmt: skip


def seeded(shape, seed=0, **settings):
    """A model whose every weight, the zero-initialised ones too, is random."""
    generator = torch.Generator().manual_seed(seed)
    model = SiT(**shape, **settings)
    for name, p in model.named_parameters():
        if p.requires_grad:
            fan_in = p[0].numel() if p.ndim > 1 else 50
            noise = torch.randn(p.shape, generator=generator) / math.sqrt(fan_in)
            p.data = noise + (1 if "norm.weight" in name else 0)
    return model


def example(shape, batch=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    tokens = (shape["side"] // shape["patch"]) ** 2
    x = (batch, shape["channels"], shape["side"], shape["side"])
    return {
        "z": torch.randn(x, generator=g),
        "noise": torch.randn(x, generator=g),
        "t": torch.rand(batch, generator=g),
        "labels": torch.randint(0, shape["num_classes"] + 1, (batch,), generator=g),
        "targets": [torch.randn(batch, tokens, z, generator=g) for z in shape["encoder_widths"]],
    }


def run_model(model, e, path):
    objective = Objective(ObjectiveConfig(path=path))
    x, wanted = objective.interpolate(e["z"], e["noise"], e["t"])
    velocity, alignment = model.eval()(x, e["t"], e["labels"], e["targets"])
    loss = objective.velocity_loss(velocity, wanted)
    (loss + 0.5 * alignment).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"velocity": velocity, "velocity loss": loss, "alignment": alignment, **grads}


def run_oracle(state, e, path, shape, dtype):
    s = {n: v.to(dtype).requires_grad_(n != "pos_embed") for n, v in state.items()}
    cast = {k: [u.to(dtype) for u in v] if k == "targets" else v for k, v in e.items()}
    z, noise, t = (e[k].to(dtype) for k in ("z", "noise", "t"))
    velocity, loss, alignment = oracle.losses(
        s, z, noise, t, e["labels"], cast["targets"], path=path, heads=shape["heads"],
        patch=shape["patch"], block=shape["alignment_block"],
    )  # fmt: skip
    (loss + 0.5 * alignment).backward()
    grads = {n: v.grad for n, v in s.items() if v.requires_grad}
    return {"velocity": velocity, "velocity loss": loss, "alignment": alignment, **grads}


def distance(a, exact, scale=None):
    return (a.double() - exact).norm().item() / max(
        (exact if scale is None else scale).norm().item(), 1e-30
    )


def by_kind(values):
    """Every block's tensor of one name in one: a tensor of 12 numbers can be lucky by itself."""
    kinds = {}
    for name, value in values.items():
        kinds.setdefault(re.sub(r"blocks\.\d+", "blocks", name), []).append(
            value.detach().flatten()
        )
    return {name: torch.cat(parts) for name, parts in kinds.items()}


def scale_of(name, exact):
    """Return what a value is measured against that is the small remainder of a cancellation."""
    if name == "alignment":
        return torch.ones(())  # a mean of cosines
    if name.endswith("k_norm.bias"):
        # Softmax makes this one exactly zero: what is left of sums of gradients of this size.
        return exact[name.replace("k_norm.bias", "qkv.weight")]
    return exact[name]


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(
    "shape",
    [SMALL, ODD, {**ODD, "alignment_block": ODD["depth"]}],
    ids=["S", "odd, two encoders, qk-norm", "last block aligned"],
)
def test_velocity_losses_and_every_gradient_match_the_oracle(shape, path):
    e, state = example(shape), seeded(shape).state_dict()
    exact = by_kind(run_oracle(state, e, path, shape, torch.float64))
    eager = by_kind(run_oracle(state, e, path, shape, torch.float32))
    for kernels in ("eager", "fused"):
        ours = by_kind(run_model(seeded(shape, kernels=kernels), e, path))
        assert ours.keys() == exact.keys()
        for name, value in ours.items():
            scale = scale_of(name, exact)
            allowed = 2 * distance(eager[name], exact[name], scale) + torch.finfo(torch.float32).eps
            assert distance(value, exact[name], scale) <= allowed, (kernels, name)


def test_float64_agrees_with_the_oracle_to_rounding():
    shape, e = ODD, example(ODD)
    model = seeded(shape).double()
    state = {n: v.clone() for n, v in model.state_dict().items()}
    x, _ = Objective(ObjectiveConfig()).interpolate(e["z"], e["noise"], e["t"])
    ours, _ = model.eval()(x, e["t"], e["labels"], [u.double() for u in e["targets"]])
    for i in range(len(x)):
        exact, _ = oracle.velocity_and_hidden(
            state, x[i].double(), e["t"][i].double(), int(e["labels"][i]), heads=7, patch=3, block=2
        )
        assert distance(ours[i], exact) < 1e-12


def test_position_embedding_is_column_then_row():
    exact = oracle.position_embedding(84, 3)
    assert torch.equal(sincos_position_embedding(84, 3)[0], exact.float())


def test_names_and_shapes_are_the_reference_ones():
    state = SiT(**SMALL, qk_norm=True).state_dict()
    d, c, p, projector = 384, 4, 2, 96
    expected = {
        "pos_embed": (1, 4, d),
        "x_embedder.proj.weight": (d, c, p, p), "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256), "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d), "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (11, d),
        "final_layer.linear.weight": (p * p * c, d), "final_layer.linear.bias": (p * p * c,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }  # fmt: skip
    widths = {"0": (projector, d), "2": (projector, projector), "4": (48, projector)}
    for layer, weight in widths.items():
        expected[f"projectors.0.{layer}.weight"] = weight
        expected[f"projectors.0.{layer}.bias"] = weight[:1]
    for i in range(12):
        parts = {
            "attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d),
            "mlp.fc2": (d, 4 * d), "adaLN_modulation.1": (6 * d, d),
        }  # fmt: skip
        for part, weight in parts.items():
            expected[f"blocks.{i}.{part}.weight"] = weight
            expected[f"blocks.{i}.{part}.bias"] = weight[:1]
        for part in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
            expected[f"blocks.{i}.attn.{part}"] = (64,)
    assert {n: tuple(v.shape) for n, v in state.items()} == expected


@pytest.mark.parametrize(
    ("width", "depth", "heads", "block", "parameters"),
    [(1152, 28, 16, 8, 683_242_512), (1024, 24, 16, 8, 465_955_600), (768, 12, 12, 4, 137_845_008)],
)
def test_published_parameter_counts(width, depth, heads, block, parameters):
    with torch.device("meta"):
        model = SiT(
            side=32, channels=4, width=width, depth=depth, heads=heads, patch=2, num_classes=1000,
            encoder_widths=[768], alignment_block=block,
        )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_initialisation():
    torch.manual_seed(0)
    model = SiT(**SMALL)
    e = example(SMALL)
    assert not model(e["z"], e["t"], e["labels"]).any()  # adaLN-Zero: the first output is zero
    bound = math.sqrt(6 / (384 + 3 * 384))
    weight = model.blocks[0].attn.qkv.weight
    assert 0.99 * bound < weight.abs().max() <= bound
    bound = math.sqrt(6 / (384 + 4 * 2 * 2))
    assert 0.98 * bound < model.x_embedder.proj.weight.abs().max() <= bound
    assert model.projectors[0][0].bias.eq(0).all()
    for w in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[0].weight):
        assert abs(w.std().item() - 0.02) < 0.002


def test_label_dropout_is_explicit_restorable_and_off_in_eval():
    model, e = seeded({**SMALL, "label_dropout": 0.5}), example(SMALL, batch=32)
    null = torch.full_like(e["labels"], 10)
    call = lambda labels, **k: model(e["z"], e["t"], labels, **k)  # noqa: E731
    model.eval()
    kept, dropped = call(e["labels"]), call(null)
    assert torch.equal(kept, call(e["labels"]))
    model.train()
    chosen = torch.arange(32) % 3 == 0
    mixed = torch.where(chosen.view(-1, 1, 1, 1), dropped, kept)
    assert torch.equal(call(e["labels"], label_drop=chosen), mixed)
    state = torch.get_rng_state()
    first, second = call(e["labels"]), call(e["labels"])
    torch.set_rng_state(state)
    assert torch.equal(call(e["labels"]), first)
    assert not torch.equal(first, second)


def test_without_encoders_it_is_plain_sit():
    model, e = SiT(**{**SMALL, "encoder_widths": []}), example(SMALL)
    assert not [n for n in model.state_dict() if n.startswith("projectors")]
    assert model(e["z"], e["t"], e["labels"]).shape == e["z"].shape


def test_bfloat16_weights_keep_a_float32_residual():
    model, e = seeded(SMALL).bfloat16(), example(SMALL)
    seen = []
    model.blocks[3].register_forward_hook(lambda m, a, out: seen.append(out[1].x.dtype))
    velocity, alignment = model.eval()(e["z"], e["t"], e["labels"], e["targets"])
    assert (velocity.dtype, alignment.dtype, seen) == (
        torch.float32,
        torch.float32,
        [torch.float32],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": 5}, "side: 5 is not a multiple of patch 2"),
        ({"heads": 5}, "width: 384 must be a multiple of heads"),
        ({"alignment_block": 13}, r"alignment_block: 13 is not in 1\.\.12"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        SiT(**{**SMALL, **change})


def test_wrong_inputs_name_the_argument():
    model, e = SiT(**SMALL), example(SMALL)
    with pytest.raises(ValueError, match="x: expected"):
        model(e["z"][..., :2], e["t"], e["labels"])
    with pytest.raises(ValueError, match="targets: got 2 for 1 projectors"):
        model(e["z"], e["t"], e["labels"], e["targets"] * 2)
    with pytest.raises(ValueError, match=r"targets\[0\]: expected \(3, 4, 48\)"):
        model(e["z"], e["t"], e["labels"], [e["targets"][0][..., :3]])


# State dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference.pt", "bare.pt", "ema.safetensors"])
def test_reference_files_load_strictly_and_save_in_the_same_names(tmp_path, name):
    import argparse

    source, target = seeded(SMALL, seed=3), SiT(**SMALL)
    state, path = source.state_dict(), tmp_path / name
    if name == "reference.pt":
        args = argparse.Namespace(model="SiT-S/2")
        wrong = {n: v + 1 for n, v in state.items()}
        torch.save({"model": wrong, "ema": state, "opt": {}, "args": args, "steps": 5}, path)
    elif name == "bare.pt":
        torch.save({f"module.{n}": v for n, v in state.items()}, path)
    else:
        save_reference(path, model=state, ema=state, steps=1)
    load_weights(target, load_reference(path).ema, source=name)
    for n, v in target.state_dict().items():
        assert torch.equal(v, state[n]), n


def test_another_architecture_is_named():
    other = SiT(**{**SMALL, "depth": 11}).state_dict()
    with pytest.raises(CheckpointError, match=r"x\.pt: blocks\.11\.\S+ is missing"):
        load_weights(SiT(**SMALL), other, source="x.pt")
    wide = SiT(**{**SMALL, "projector_width": 97}).state_dict()
    with pytest.raises(CheckpointError, match=r"projectors\.0\.0\.bias is \[97\], this model's"):
        load_weights(SiT(**SMALL), wide, source="x.pt")


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_that_wants_more_is_refused(tmp_path, capsys):
    torch.save({"model": {}, "ema": {}, "args": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt: holds more than tensors, refused"):
        load_reference(tmp_path / "bad.pt")
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"junk\.pt"):
        load_reference(tmp_path / "junk.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_reference(tmp_path / "none.pt")
