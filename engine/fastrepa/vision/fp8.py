"""A frozen encoder's products in e4m3 (`vision.precision: fp8`): twice bf16's rate where a GPU has
them (compute capability 8.9 and later). Nothing is trained, so there is no backward to scale.

    y = (q_x q_w^T) s_x s_w + b,    q = e4m3(v / s),    s = max |v| / 448

One scale for each token of the activations, taken anew, and one for each output of the weights
(Micikevicius et al. 2022, "FP8 formats for deep learning", with scales finer than per tensor: of
whole tensors, outlier tokens cost the others their bits). Everything between the products stays in
bf16. What it does to features depends on the network, so it is measured on images and refused below
LIKENESS. Shapes: N tokens of all images, D inputs, F outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from fastrepa.errors import ConfigError
from fastrepa.vision.features import FrozenEncoder

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
LEAST_CAPABILITY = (8, 9)
LIKENESS = 0.999
"""Least mean cosine of a token to the same token in fp32."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [N,D] to (e4m3 [N,D], scale fp32 [N,1]): x = e4m3 * scale but for rounding.

    In eager mode several passes; under torch.compile one, joined to what made x.
    """
    x = x.float()
    scale = (x.abs().amax(1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale).to(E4M3), scale


class Fp8Linear(nn.Module):
    """A frozen nn.Linear whose product is of e4m3: [..., D] -> [..., F] in bf16."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise_rows(linear.weight.detach())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale.t().contiguous(), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantise_rows(x.reshape(-1, x.shape[-1]))
        y = F.scaled_mm(
            rows, self.weight.t(), scale, ScalingType.RowWise, self.scale, ScalingType.RowWise,
            bias=self.bias, output_dtype=torch.bfloat16, use_fast_accum=x.is_cuda,
        )  # fmt: skip
        return y.view(*x.shape[:-1], -1)


def use_fp8(encoder: FrozenEncoder, image_u8: Tensor) -> float:
    """Turn an encoder built in fp32, in place, into bf16 with its products in e4m3.

    Returns the mean cosine of its tokens to those of before, of the images [B,3,R,R] uint8.
    Raises ConfigError: a device without e4m3 products, no product that could be one, B = 0.
    """
    where = f"vision.precision: 'fp8' ({encoder.name})"
    device = encoder.preprocess.mean.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        need = ".".join(map(str, LEAST_CAPABILITY))
        raise ConfigError(
            f"{where}: needs a GPU of compute capability {need} or later, and "
            f"{torch.cuda.get_device_name(device)} is older"
        )
    if not len(image_u8):
        raise ConfigError(f"{where}: there is no image to measure it on")
    image_u8 = image_u8.to(device)
    before = encoder(image_u8)
    network = encoder.network
    if not _replace(network):
        raise ConfigError(
            f"{where}: this network has no linear layer whose sizes are multiples of 16; use 'run'"
        )
    encoder.dtype = torch.bfloat16
    quantised = {name for name, m in network.named_modules() if isinstance(m, Fp8Linear)}
    for name, module in network.named_modules():
        if name not in quantised:
            _to_bf16(module)
    after = encoder(image_u8)
    return F.cosine_similarity(before.float(), after.float(), dim=-1).mean().item()


def check_likeness(name: str, likeness: float) -> None:
    """ConfigError where an encoder's features have lost too much."""
    if not likeness >= LIKENESS:
        raise ConfigError(
            f"vision.precision: 'fp8' changes the features of {name} too much: their cosine to "
            f"those of fp32 is {likeness:.5f} on images of the data set, at least {LIKENESS} is "
            f"wanted; use 'run'"
        )


def _replace(module: nn.Module) -> int:
    """Every linear layer that can be; returns how many. scaled_mm wants multiples of 16."""
    found = 0
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            found += _replace(child)
        elif child.in_features % 16 == 0 and child.out_features % 16 == 0:
            setattr(module, name, Fp8Linear(child))
            found += 1
    return found


def _to_bf16(module: nn.Module) -> None:
    """The module's own tensors; its children have theirs changed in their turn."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16)
