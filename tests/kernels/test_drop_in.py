"""patch_reference on a tree with the reference's names, built here, and a loss like its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrepa_kernels import drop_in, patch_reference
from tests.kernels.accuracy import assert_as_good_as_eager

WIDTH, TOKENS, CLASSES = 24, 6, 3


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, d, drop=0.0, approximate="tanh"):
        super().__init__()
        self.fc1, self.act = nn.Linear(d, 4 * d), nn.GELU(approximate=approximate)
        self.drop1, self.norm, self.fc2 = nn.Dropout(drop), nn.Identity(), nn.Linear(4 * d, d)

    def forward(self, x):
        return self.fc2(self.norm(self.drop1(self.act(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm1 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(d)
        self.norm2 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(d)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x, c):
        a, b, gate1, d, e, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), a, b))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), d, e))


class Final(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm_final = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(d, 4)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Stock(nn.Module):
    """A SiT with projectors, cut down to what the patch touches."""

    def __init__(self, features=(16, 8)):
        super().__init__()
        self.x_embedder = nn.Linear(4, WIDTH)
        self.y_embedder = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, z)
            )
            for z in features
        )
        self.final_layer = Final(WIDTH)

    def forward(self, x, t, y):
        x, c = self.x_embedder(x), self.y_embedder(y) + t[:, None]
        zs = None
        for i, block in enumerate(self.blocks):
            x = block(x, c)
            if i == 1:
                n, tokens, d = x.shape
                zs = [p(x.reshape(-1, d)).reshape(n, tokens, -1) for p in self.projectors]
        return self.final_layer(x, c), zs


class Loss:
    """The interface of the original: a denoising loss and a loop over samples."""

    def __call__(self, model, images, model_kwargs=None, zs=None):
        t = torch.linspace(0.1, 0.9, images.shape[0]).to(images)
        output, projected = model(images * (1 - t[:, None, None]), t, **(model_kwargs or {}))
        alignment = 0.0
        for z, z_tilde in zip(zs, projected, strict=True):
            for a, b in zip(z, z_tilde, strict=True):
                alignment -= (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1).mean()
        denoising = (output - images).square().mean(dim=(1, 2))
        return denoising, alignment / (len(zs) * zs[0].shape[0])


@pytest.fixture
def case():
    torch.manual_seed(5)
    images, y = torch.randn(4, TOKENS, 4), torch.tensor([0, 1, 2, 1])
    targets = [torch.randn(4, TOKENS, z) for z in (16, 8)]
    return Stock(), images, {"y": y}, targets


def step(model, loss_fn, images, kwargs, targets):
    denoising, alignment = loss_fn(model, images, kwargs, zs=targets)
    (denoising.mean() + 0.5 * alignment).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return denoising.detach(), alignment.detach(), grads


def test_losses_and_gradients_are_as_good_as_stock(case):
    model, images, kwargs, targets = case
    keys = list(model.state_dict())
    patched = copy.deepcopy(model)
    loss_fn = patch_reference(patched, Loss())
    wide = copy.deepcopy(model).double()
    exact = step(wide, Loss(), images.double(), kwargs, [z.double() for z in targets])
    stock = step(model, Loss(), images, kwargs, targets)
    ours = step(patched, loss_fn, images, kwargs, targets)
    # The two losses together: a lone scalar may be right to many digits by luck.
    losses = [torch.cat([d, a[None]]) for d, a, _ in (ours, stock, exact)]
    assert_as_good_as_eager("losses", *losses)
    for name in exact[2]:
        assert_as_good_as_eager(name, ours[2][name], stock[2][name], exact[2][name])
    assert list(patched.state_dict()) == keys


def test_outside_the_loss_projectors_project(case):
    model, images, kwargs, targets = case
    t = torch.full((4,), 0.5)
    expected, projections = model(images, t, **kwargs)
    loss_fn = patch_reference(model, Loss())
    loss_fn(model, images, kwargs, zs=targets)
    output, same = model(images, t, **kwargs)
    assert torch.allclose(output, expected, atol=1e-6)
    for a, b in zip(same, projections, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_targets_are_forgotten_after_an_error(case):
    model, images, kwargs, targets = case

    class Failing(Loss):
        def __call__(self, model, images, model_kwargs=None, zs=None):
            raise KeyError

    loss_fn = patch_reference(model, Failing())
    with pytest.raises(KeyError):
        loss_fn(model, images, kwargs, zs=targets)
    assert not any("alignment_target" in p.__dict__ for p in model.projectors)


def test_a_deep_copy_is_independent(case):
    model, images, kwargs, _ = case
    patch_reference(model)
    average = copy.deepcopy(model)
    for p in average.parameters():
        p.data.zero_()
    assert average(images, torch.zeros(4), **kwargs)[0].abs().max() == 0
    assert model(images, torch.zeros(4), **kwargs)[0].abs().max() > 0


def test_under_autocast(case):
    model, images, kwargs, targets = case
    patched = copy.deepcopy(model)
    loss_fn = patch_reference(patched, Loss())
    wide = copy.deepcopy(model).double()
    exact = step(wide, Loss(), images.double(), kwargs, [z.double() for z in targets])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = step(model, Loss(), images, kwargs, targets)
        ours = step(patched, loss_fn, images, kwargs, targets)
    for a, b, c in zip(ours[:2], stock[:2], exact[:2], strict=True):
        unit = torch.finfo(torch.bfloat16).eps  # the network between is bf16
        error = (b.double() - c).norm() / c.norm()
        assert (a.double() - c).norm() / c.norm() <= 2 * error + unit


def test_a_model_without_projectors(case):
    _, images, kwargs, _ = case
    model = Stock(features=())
    del model.projectors
    model.projectors = ()
    assert patch_reference(model) is None
    assert model(images, torch.zeros(4), **kwargs)[0].shape == images.shape


@pytest.mark.parametrize("mlp", [Mlp(WIDTH, drop=0.5), Mlp(WIDTH, approximate="none")])
def test_other_mlps_are_left_alone(case, mlp):
    model, images, kwargs, _ = case
    model.blocks[0].mlp = mlp
    patch_reference(model)
    assert "forward" not in mlp.__dict__
    assert "forward" in model.blocks[1].mlp.__dict__
    model(images, torch.zeros(4), **kwargs)


def spoil_projector(model):
    model.projectors[1] = nn.Sequential(nn.Linear(WIDTH, 8))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: delattr(m, "final_layer"), "model has no final_layer"),
        (lambda m: delattr(m.blocks[1], "attn"), "blocks.1 has no attn"),
        (lambda m: setattr(m.blocks[2], "norm2", nn.LayerNorm(WIDTH)), "blocks.2.norm2 must be"),
        (lambda m: delattr(m.final_layer, "linear"), "final_layer has no linear"),
        (spoil_projector, "projectors.1 must be"),
    ],
)
def test_errors_name_the_module_and_change_nothing(case, spoil, words):
    model = case[0]
    spoil(model)
    with pytest.raises(ValueError, match=f"patch_reference: {words}"):
        patch_reference(model, Loss())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_the_number_of_targets_must_fit(case):
    model, images, kwargs, targets = case
    loss_fn = patch_reference(model, Loss())
    with pytest.raises(ValueError, match="2 projectors; got 1 targets"):
        loss_fn(model, images, kwargs, zs=targets[:1])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_timms_attention_runs_on_the_chosen_backend(case, monkeypatch, qk_norm):
    timm = pytest.importorskip("timm.layers.attention")
    _, images, kwargs, targets = case
    model = Stock()
    for block in model.blocks:
        block.attn = timm.Attention(
            WIDTH, num_heads=3, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm
        )
        for norm in (block.attn.q_norm, block.attn.k_norm):
            for p in norm.parameters():
                nn.init.normal_(p, mean=1.0, std=0.1)
    patched, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    loss_fn = patch_reference(patched, Loss())
    calls, real = [], drop_in.attention
    monkeypatch.setattr(drop_in, "attention", lambda *a, **k: calls.append(k) or real(*a, **k))
    exact = step(wide, Loss(), images.double(), kwargs, [z.double() for z in targets])
    stock = step(model, Loss(), images, kwargs, targets)
    ours = step(patched, loss_fn, images, kwargs, targets)
    assert len(calls) == len(model.blocks)
    assert all((k["q_norm"] is not None) == qk_norm for k in calls)
    # Together: 8 numbers may be right to many digits by luck. A bias of k shifts whole rows of
    # scores, so its gradient is 0 and no error is relative to it.
    names = [n for n in exact[2] if ".attn." in n and not n.endswith(("qkv.bias", "k_norm.bias"))]
    together = (torch.cat([r[2][n].flatten() for n in names]) for r in (ours, stock, exact))
    assert_as_good_as_eager("attention's gradients", *together)


@pytest.mark.parametrize(
    "change", [{"attn_drop": 0.1}, {"proj_drop": 0.1}, {"scale_norm": True}, {"gated": True}]
)
def test_attention_that_does_more_is_left_alone(change):
    timm = pytest.importorskip("timm.layers.attention")
    kwargs = {"num_heads": 3, "norm_layer": nn.LayerNorm} | change
    assert not drop_in._plain_attention(timm.Attention(WIDTH, **kwargs))
    assert drop_in._plain_attention(timm.Attention(WIDTH, num_heads=3))
