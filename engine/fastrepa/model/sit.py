"""SiT, the scalable interpolant transformer (Ma et al. 2024), with REPA's projectors.

Module and parameter names are the reference's, so that its state dicts load with strict=True.
Shapes: B batch, C channels, S latent side, p patch, T = (S/p)^2 tokens, D width, H heads.

Weights may be float32, bfloat16 or float64. The residual stream, the normalisations and the losses
stay in at least float32, as under the reference's autocast; products run in the weights' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastrepa.config import Config
from fastrepa.errors import ConfigError
from fastrepa.interpolant import velocity_from_data
from fastrepa.model.operations import FUSED, OPERATIONS, Operations
from fastrepa.model.projector import Projector, alignment_loss
from fastrepa_kernels import attention
from fastrepa_kernels.attention import PACKED

FREQUENCIES = 256  # width of the sinusoidal time embedding


def sincos_position_embedding(width: int, side: int) -> Tensor:
    """[1, side*side, D] float32: the column in the first D/2 dims, the row in the rest.

    Each half is [sin | cos] with omega_k = 10000^(-k / (D/4)), computed in float64.
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.outer(torch.arange(side, dtype=torch.float64), omega)  # [side, D/4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, D/2]
    column = axis.expand(side, side, -1)
    row = axis[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side * side, width).float()


class _PatchLinear(nn.Conv2d):
    """The convolution of patches that do not overlap, as the matrix product that it is: its output
    is row-major as it stands, a convolution's [B,D,T] would be copied into it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,S,S] -> [B,T,D]."""
        b, c, side, _ = x.shape
        p = self.kernel_size[0]
        patches = x.view(b, c, side // p, p, side // p, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(b, -1, c * p * p), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, row-major: [B,C,S,S] -> [B,T,D]."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = _PatchLinear(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype))


class TimestepEmbedder(nn.Module):
    """t [B] in [0, 1] (not times 1000) to [B,D]: 256 cos-then-sin features, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        weights = next(self.mlp.parameters()).dtype
        dtype = torch.promote_types(weights, torch.float32)
        half = FREQUENCIES // 2
        exponent = torch.arange(half, dtype=dtype, device=t.device) / half
        angle = t.to(dtype)[:, None] * torch.exp(-math.log(10000.0) * exponent)  # [B,128]
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(weights))


class LabelEmbedder(nn.Module):
    """Class labels [B] to [B,D]; the last row, number num_classes, is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        if drop is not None:
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class Residual(NamedTuple):
    """The residual stream x + gate * branch, whose sum the next norm makes in its own pass.

    x: [B,T,D], float32 or wider; branch: [B,T,D] and gate: [B,D], None where the sum is made.
    """

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    @property
    def pending(self) -> tuple[Tensor, Tensor] | None:
        """The branch [B,T,D] and gate [B,D] still to be added, as the operations take them."""
        if self.branch is None or self.gate is None:
            return None
        return self.branch, self.gate


def _norm_modulate_linear(
    operations: Operations, h: Residual, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (the stream's sum [B,T,D], the Linear of its modulated norm [B,T,O])."""
    given = (h.x, shift, scale, weight, bias)
    if h.pending is None:
        return h.x, operations.adaln_linear(*given)
    return operations.adaln_linear(*given, residual=h.pending)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(d)) v, qkv packed [B,T,3,H,d].

    backend: of fastrepa_kernels.attention. The norms' weights are read here, inside the wrapped
    forward, where ZeRO-3 has them whole.
    """

    def __init__(
        self, width: int, heads: int, qk_norm: bool, backend: str, operations: Operations
    ) -> None:
        super().__init__()
        self.heads, self.backend, self.operations = heads, backend, operations
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, h: Residual, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the stream's sum, attention over its modulated norm), both [B,T,D]."""
        b, t, d = h.x.shape
        q_norm, k_norm = (
            (norm.weight, norm.bias) if isinstance(norm, nn.LayerNorm) else None
            for norm in (self.q_norm, self.k_norm)
        )
        # Attention's backward writes qkv's gradient, and sums it for the bias in the same pass.
        plain = q_norm is None and k_norm is None
        summed = plain and self.operations is FUSED and self.backend in PACKED
        bias = self.qkv.bias.detach() if summed else self.qkv.bias
        x, qkv = _norm_modulate_linear(
            self.operations, h, shift, scale, self.qkv.weight, bias
        )  # [B,T,D], [B,T,3D]
        out = attention(
            qkv.view(b, t, 3, self.heads, d // self.heads), q_norm=q_norm, k_norm=k_norm,
            backend=self.backend, bias=self.qkv.bias if summed else None,
        )  # [B,T,H,d]  # fmt: skip
        return x, self.proj(out.reshape(b, t, d))


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear, with ratio 4; keep_h: GELU's output is kept for backward."""

    def __init__(self, width: int, operations: Operations, keep_h: bool) -> None:
        super().__init__()
        self.operations, self.keep_h = operations, keep_h
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, h: Residual, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the stream's sum, the MLP of its modulated norm), both [B,T,D]."""
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return self.operations.adaln_mlp(
            h.x, shift, scale, weights, residual=h.pending, keep_h=self.keep_h
        )


class SiTBlock(nn.Module):
    """adaLN-Zero block (Peebles & Xie 2023) of a stream x [B,T,D], under a condition c [B,D]:

    x = x + gate1 * attention(modulate(norm(x), shift1, scale1))
    x = x + gate2 * mlp(modulate(norm(x), shift2, scale2))
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: bool,
        attention: str,
        operations: Operations,
        keep_h: bool,
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm, attention, operations)
        self.mlp = Mlp(width, operations, keep_h)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h: Residual, c: Tensor) -> tuple[Tensor, Residual]:
        """Return (the sum of the stream that came in [B,T,D], the stream that goes out)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.adaLN_modulation(c).chunk(6, dim=1)
        )  # [B,D] each  # fmt: skip
        x, attended = self.attn(h, shift1, scale1)  # [B,T,D] each
        y, out = self.mlp(Residual(x, attended, gate1), shift2, scale2)  # y = x + gate1 attended
        return x, Residual(y, out, gate2)


class FinalLayer(nn.Module):
    """Modulated norm, then tokens to patches: [B,T,D] -> [B,T,p*p*C], the channel last."""

    def __init__(self, width: int, patch: int, channels: int, operations: Operations) -> None:
        super().__init__()
        self.operations = operations
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Residual, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the stream's sum [B,T,D], patches [B,T,p*p*C])."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # [B,D] each
        return _norm_modulate_linear(
            self.operations, h, shift, scale, self.linear.weight, self.linear.bias
        )


def recomputed_blocks(depth: int, every: int) -> int:
    """Count a SiT's blocks that run again in backward: 1, 1 + every, ..., the last one never."""
    return len(range(0, depth - 1, every)) if every else 0


class SiT(nn.Module):
    """The generator: (x_t, t, labels) -> velocity, and with targets also the alignment loss.

    side: latent side S in elements, a multiple of patch. encoder_widths: Z of every frozen encoder,
    one projector each, fed by the output of block number alignment_block (1-based). With prediction
    "data" the last layer's output is the clean latent, and is turned into the velocity of `path`.
    recompute N > 0: blocks 1, 1 + N, 1 + 2N, ... keep their input alone (Chen et al. 2016) and run
    again in backward, to the same bits; 0: none do. keep_h: the fused MLPs keep GELU's output for
    backward and do not make it again. Raises ValueError where a shape is impossible.
    """

    def __init__(
        self,
        *,
        side: int,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        num_classes: int,
        label_dropout: float = 0.1,
        qk_norm: bool = False,
        encoder_widths: Sequence[int] = (),
        alignment_block: int = 1,
        projector_width: int = 2048,
        attention: str = "auto",
        prediction: str = "velocity",
        path: str = "linear",
        kernels: str = "fused",
        recompute: int = 0,
        keep_h: bool = False,
    ) -> None:
        super().__init__()
        if side % patch:
            raise ValueError(f"side: {side} is not a multiple of patch {patch}")
        if width % heads or width % 4:
            raise ValueError(f"width: {width} must be a multiple of heads ({heads}) and of 4")
        if encoder_widths and not 1 <= alignment_block <= depth:
            raise ValueError(f"alignment_block: {alignment_block} is not in 1..{depth}")
        self.side, self.channels, self.patch = side, channels, patch
        self.label_dropout, self.alignment_block = label_dropout, alignment_block
        self.prediction, self.path, self.recompute = prediction, path, recompute
        self.operations = OPERATIONS[kernels]
        self.grid = side // patch
        self.x_embedder = PatchEmbed(channels, width, patch)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.pos_embed = nn.Parameter(
            sincos_position_embedding(width, self.grid), requires_grad=False
        )
        self.blocks = nn.ModuleList(
            SiTBlock(width, heads, qk_norm, attention, self.operations, keep_h)
            for _ in range(depth)
        )
        self.projectors = nn.ModuleList(
            Projector(width, projector_width, z) for z in encoder_widths
        )
        self.final_layer = FinalLayer(width, patch, channels, self.operations)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        side: int,
        channels: int,
        encoder_widths: Sequence[int],
        attention: str = "auto",
    ) -> SiT:
        """The model of a resolved configuration; side and channels come from the codec.

        attention: the backend; only a trainer passes the configured one, which may be for its
        device and precision alone. A recompute that is still auto recomputes nothing, and a keep
        that is still auto keeps nothing.
        """
        m = config.model
        if m.takes_the_sets_classes:
            raise ConfigError(
                "model.num_classes: auto is for training, which knows the set; weights that are "
                "there have their own number"
            )
        return cls(
            side=side,
            channels=channels,
            width=m.width,
            depth=m.depth,
            heads=m.heads,
            patch=m.patch,
            num_classes=m.num_classes,
            label_dropout=m.label_dropout,
            qk_norm=m.qk_norm,
            encoder_widths=encoder_widths,
            alignment_block=config.alignment.block,
            projector_width=config.alignment.projector_width,
            attention=attention,
            prediction=config.objective.prediction,
            path=config.objective.path,
            kernels=config.kernels,
            recompute=config.training.recompute_every,
            keep_h=config.training.keep_h,
        )

    def reset_parameters(self) -> None:
        """The reference's initialisation, drawn from torch's default generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        conv = self.x_embedder.proj
        nn.init.xavier_uniform_(conv.weight.view(conv.weight.shape[0], -1))
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for linear in self.t_embedder.mlp:
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, the output as zero.
        for block in (*self.blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
            nn.init.zeros_(block.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor,
        targets: Sequence[Tensor] | None = None,
        label_drop: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B,C,S,S], t [B] in [0,1], labels [B] int64 -> velocity [B,C,S,S] in float32 or wider.

        With targets (one [B,T,Z_k] per projector): (velocity, alignment loss []).
        label_drop [B] bool says which labels become the null class; without it, training mode draws
        it with probability label_dropout from torch's default generator, and eval drops none.
        """
        if x.shape[1:] != (self.channels, self.side, self.side):
            expected = ("B", self.channels, self.side, self.side)
            raise ValueError(f"x: expected {expected}, got {tuple(x.shape)}")
        if label_drop is None and self.training and self.label_dropout > 0:
            label_drop = torch.rand(labels.shape, device=labels.device) < self.label_dropout
        tokens = self.x_embedder(x)  # [B,T,D]
        wide = torch.promote_types(tokens.dtype, torch.float32)
        h = Residual(tokens.to(wide) + self.pos_embed)
        c = self.t_embedder(t) + self.y_embedder(labels, label_drop)  # [B,D]
        for done, block in enumerate(self.blocks):
            if self.is_recomputed(done):
                # The blocks draw nothing at random: no generator's state need be kept.
                before, h = checkpoint(block, h, c, use_reentrant=False, preserve_rng_state=False)
            else:
                before, h = block(h, c)
            if done == self.alignment_block:  # the output of block `done`, counted from 1
                hidden = before
        last, patches = self.final_layer(h, c)  # [B,T,D], [B,T,p*p*C]
        if len(self.blocks) == self.alignment_block:
            hidden = last
        velocity = self.unpatchify(patches.to(wide))  # [B,C,S,S]
        if self.prediction == "data":
            velocity = velocity_from_data(self.path, x.to(wide), velocity, t.to(wide))
        if targets is None:
            return velocity
        return velocity, alignment_loss(hidden, self.projectors, targets, self.operations)

    def is_recomputed(self, done: int) -> bool:
        """Tell if block `done` (from 0) runs again in backward; the last never does."""
        last = done == len(self.blocks) - 1
        return (
            self.recompute > 0
            and done % self.recompute == 0
            and not last
            and torch.is_grad_enabled()
        )

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """[B,T,p*p*C] -> [B,C,S,S]."""
        g, p, c = self.grid, self.patch, self.channels
        patches = tokens.view(-1, g, g, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(-1, c, g * p, g * p)
