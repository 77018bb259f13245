"""Targets on the generator's grid: a frozen encoder's patch tokens, online or from a cache.

    tokens = to_grid(network(preprocess(image_u8)))           [B,3,R,R] uint8 -> [B,T,Z]

B batch, R image side, T = grid side squared tokens in row-major order, Z feature width. How an
encoder's own grid becomes the generator's (`EncoderConfig.grid`):

- exact: they are equal, or building is an error that says which `input` would make them equal;
- area: adaptive average pooling, for an encoder grid at least as large as the generator's;
- bilinear: torch's bilinear interpolation (align_corners=False, antialias=False), either way.

A data set's feature column holds the tokens on the encoder's own grid (quantise.py), so that one
cache serves generators of any patch; `CachedFeatures` brings them to the generator's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrepa.config import EncoderConfig
from fastrepa.errors import ConfigError, worded
from fastrepa.vision import weights as weights_of
from fastrepa.vision.preprocess import Preprocess
from fastrepa.vision.registry import STRIDE, Recipe, default_side, find_recipe
from fastrepa.vision.weights import digest

RANDOM_SEED = 0
# What timm's networks raise, each in its own way, for an input side they cannot take.
UNBUILDABLE = (AssertionError, RuntimeError, ValueError, TypeError, ArithmeticError)


@dataclass(frozen=True)
class EncoderPlan:
    """An encoder's shapes, known without its weights.

    `input_side` in pixels; `own_grid` is the network's token grid (h, w) at that side; `width` is
    Z; `index` is timm's number of the block or stage whose output is taken; `plain`: a transformer
    with patch tokens of one size, rather than a network of feature maps; `norm`: through the final
    norm; `timm_args` rebuild the network at this size.
    """

    recipe: Recipe
    input_side: int
    own_grid: tuple[int, int]
    width: int
    index: int
    plain: bool
    norm: bool
    timm_args: Mapping[str, Any]


def plan_encoder(config: EncoderConfig, *, resolution: int) -> EncoderPlan:
    """The encoder's input side, token grid and width for images of `resolution` pixels.

    The network is built on torch's meta device: no weights are made, read or downloaded.
    ConfigError: unknown name, an input side the network cannot take, no feature map at stride 16.
    """
    recipe = find_recipe(config.name)
    if recipe.own:
        from fastrepa.vision.own import own_shape

        pixels, own, z = own_shape(config, resolution)
        of_own: dict[str, Any] = {"weights": config.weights}
        return EncoderPlan(recipe, pixels, (own, own), z, 0, True, True, of_own)
    where = f"vision.encoders ({config.name})"
    model = blueprint(recipe, recipe.timm_args, where)
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"{where}: this timm model gives no intermediate features")
    index, stride, plain = _tap(model, where)
    side = config.input or default_side(recipe, stride, resolution)
    if side == 0 or side % stride:
        near = max(stride, round((side or resolution) / stride) * stride)
        raise ConfigError(
            f"{where}: an input of {side or resolution} px is not a multiple of its stride "
            f"{stride}; set input, for example to {near}"
        )
    args = dict(recipe.timm_args)
    if getattr(timm.get_pretrained_cfg(recipe.timm_name), "fixed_input_size", False):
        args["img_size"] = side
        model = blueprint(recipe, args, where)
    norm = plain and recipe.norm
    cut(model, index, norm)
    try:
        shape = feature_map(model, torch.empty(1, 3, side, side, device="meta"), index, norm).shape
    except UNBUILDABLE as error:
        reason = worded(error, 160)
        raise ConfigError(f"{where}: cannot take an input of {side} px ({reason})") from error
    _, width, *grid = shape
    if len(grid) != 2 or grid[0] != grid[1]:
        raise ConfigError(
            f"{where}: gives features of shape {list(shape)} for an input of {side} px; a square "
            f"token grid is needed"
        )
    return EncoderPlan(recipe, side, (grid[0], grid[1]), width, index, plain, norm, args)


class FrozenEncoder(nn.Module):
    """A pretrained network that is looked at and never trained.

    `forward(image_u8 [B,3,R,R] uint8) -> [B,T,Z]` in `dtype`, on the generator's grid, row-major,
    outside autograd: the result is an ordinary tensor (not an inference one), so it can be a target
    in another model's loss. The module stays in eval mode whatever `train()` is called on it or on
    a parent, its parameters need no gradient, and a parent's state dict neither holds nor expects
    them. Preprocessing runs in fp32; the network runs in `dtype`.

    name: as configured; width: Z; grid: (h, w) of the tokens returned; input_side: pixels the
    network sees; digest: SHA-256 of the network's fp32 weights, without parts no token passes;
    plan: how it was built (preprocessing included).
    """

    def __init__(
        self,
        network: nn.Module,
        plan: EncoderPlan,
        *,
        name: str,
        digest: str,
        grid: int,
        rule: str,
        resolution: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.name, self.digest, self.dtype = name, digest, dtype
        self.width, self.grid, self.input_side = plan.width, (grid, grid), plan.input_side
        self.plan, self.resolution, self.rule = plan, resolution, rule
        self.preprocess = Preprocess(plan.recipe, plan.input_side, device)
        # Channels last makes convolutions 2 to 5 times faster on the CPU and suits tensor cores.
        self._layout = torch.contiguous_format if plan.plain else torch.channels_last
        self.network = network.to(device, dtype).to(memory_format=self._layout)
        self._run: Callable[[Tensor], Tensor] = self._tokens
        self.requires_grad_(False)
        self.train(False)
        self.register_load_state_dict_pre_hook(_offer_own_weights)

    @torch.no_grad()
    def forward(self, image_u8: Tensor) -> Tensor:
        if image_u8.shape[-2:] != (self.resolution, self.resolution):
            raise ValueError(
                f"{self.name} was built for {self.resolution} px images, got {list(image_u8.shape)}"
            )
        return self._run(image_u8)

    def use_graphs(self) -> None:
        """Compile the forward and replay it as a CUDA graph from now on (vision/replays.py)."""
        from fastrepa.vision.replays import Replays

        self._run = Replays(torch.compile(self._tokens, dynamic=False))

    def _tokens(self, image_u8: Tensor) -> Tensor:
        x = self.preprocess(image_u8).to(self.dtype, memory_format=self._layout)
        maps = feature_map(self.network, x, self.plan.index, self.plan.norm)  # [B, Z, h, w]
        if self.plan.own_grid != self.grid:
            maps = _regrid(maps, self.grid, self.rule)
        return maps.flatten(2).transpose(1, 2).contiguous()

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in eval mode: `mode` is ignored."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Return nothing: a model's checkpoint does not hold its encoder's weights."""
        return {} if destination is None else destination


def build_encoder(
    config: EncoderConfig,
    *,
    resolution: int,
    grid: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> FrozenEncoder:
    """The frozen encoder of `config` for images of `resolution` px and a `grid` x `grid` generator.

    ConfigError: an unknown name or grids that `config.grid` cannot reconcile (before any weights
    are touched). WeightsError: weights that are missing or do not fit.
    """
    plan = plan_encoder(config, resolution=resolution)
    _check_grids(config, plan, grid)
    network = _load_network(config, plan)
    return FrozenEncoder(
        network,
        plan,
        name=config.name,
        digest=digest(network),
        grid=grid,
        rule=config.grid,
        resolution=resolution,
        dtype=dtype,
        device=device,
    )


class CachedFeatures(nn.Module):
    """Stands in for a `FrozenEncoder` whose tokens were stored with the data set.

    `forward(scale [B,t] fp16, tokens [B,t,Z] int8) -> [B,T,Z]` in `dtype`, on the generator's grid,
    where t are the encoder's own tokens. Attributes as those of `FrozenEncoder`.
    """

    def __init__(
        self, plan: EncoderPlan, *, name: str, grid: int, rule: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.name, self.plan, self.rule, self.dtype = name, plan, rule, dtype
        self.width, self.grid, self.input_side = plan.width, (grid, grid), plan.input_side

    @torch.no_grad()
    def forward(self, scale: Tensor, tokens: Tensor) -> Tensor:
        from fastrepa.vision.quantise import dequantise  # of stored features alone

        x = dequantise(scale, tokens, self.dtype)
        if self.plan.own_grid == self.grid:
            return x
        maps = x.transpose(1, 2).unflatten(2, self.plan.own_grid)
        return _regrid(maps, self.grid, self.rule).flatten(2).transpose(1, 2).contiguous()


def cached_features(
    config: EncoderConfig, *, resolution: int, grid: int, dtype: torch.dtype = torch.float32
) -> CachedFeatures:
    """Do as `build_encoder` without the encoder: nothing of its weights is read or downloaded.

    ConfigError as there: an unknown name, or grids that `config.grid` cannot reconcile.
    """
    plan = plan_encoder(config, resolution=resolution)
    if plan.recipe.own:
        raise ConfigError(f"vision.targets: 'cached' takes encoders by name, not {config.name}")
    _check_grids(config, plan, grid)
    return CachedFeatures(plan, name=config.name, grid=grid, rule=config.grid, dtype=dtype)


def own_grid_encoder(
    config: EncoderConfig, resolution: int, dtype: torch.dtype, device: torch.device
) -> FrozenEncoder:
    """The encoder with its tokens as they are, for a generator of any grid."""
    grid = plan_encoder(config, resolution=resolution).own_grid[0]
    return build_encoder(config, resolution=resolution, grid=grid, dtype=dtype, device=device)


def weights_digest(config: EncoderConfig, plan: EncoderPlan) -> str:
    """SHA-256 of the weights that the encoder of `config` would have; reads or downloads them."""
    return digest(_load_network(config, plan))


def blueprint(recipe: Recipe, args: Mapping[str, Any], where: str) -> nn.Module:
    """The network without weights, on the meta device, in eval mode."""
    try:
        with torch.device("meta"):
            return timm.create_model(recipe.timm_name, **args).eval()
    except UNBUILDABLE as error:
        reason = worded(error, 160)
        raise ConfigError(f"{where}: timm cannot build it with {dict(args)} ({reason})") from error


def _tap(model: Any, where: str) -> tuple[int, int, bool]:
    """Return the block or stage taken, its stride in pixels, and if it is a plain transformer's.

    A plain transformer (patch tokens of one size in every block) is taken at its last block; any
    other network at its deepest feature map of stride 16.
    """
    strides = [stage["reduction"] for stage in model.feature_info]
    if hasattr(model, "num_prefix_tokens") and len(set(strides)) == 1:
        return len(strides) - 1, strides[-1], True
    at_stride = [index for index, stride in enumerate(strides) if stride == STRIDE]
    if not at_stride:
        raise ConfigError(
            f"{where}: no feature map at stride {STRIDE}; this network has strides "
            f"{', '.join(map(str, sorted(set(strides))))}"
        )
    return at_stride[-1], STRIDE, False


def cut(model: Any, index: int, norm: bool) -> None:
    """Drops, in place, what no token passes through: later stages, head, an unused norm."""
    model.prune_intermediate_layers([index], prune_norm=not norm, prune_head=True)


def feature_map(network: Any, x: Tensor, index: int, norm: bool) -> Tensor:
    """Compute [B,3,S,S] -> the taken map [B,Z,h,w], prefix tokens (class, registers) dropped."""
    (maps,) = network.forward_intermediates(
        x, indices=[index], norm=norm, output_fmt="NCHW", intermediates_only=True
    )
    return maps


def _check_grids(config: EncoderConfig, plan: EncoderPlan, grid: int) -> None:
    own = plan.own_grid[0]
    if own == grid or config.grid == "bilinear" or (config.grid == "area" and own > grid):
        return
    only_down = " ('area' only averages down)" if config.grid == "area" else ""
    rules = "'area' or 'bilinear'" if own > grid else "'bilinear'"
    raise ConfigError(
        f"vision.encoders ({config.name}): gives {own}x{own} tokens at an input of "
        f"{plan.input_side} px, the generator has {grid}x{grid}{only_down}; set input to "
        f"{grid * plan.input_side // own} for equality, or grid to {rules}"
    )


def _regrid(maps: Tensor, grid: tuple[int, int], rule: str) -> Tensor:
    if rule == "area":
        return F.adaptive_avg_pool2d(maps, grid)
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=False)


def load_network(
    config: EncoderConfig, recipe: Recipe, args: Mapping[str, Any], cut: Callable[[nn.Module], None]
) -> nn.Module:
    """The network with its weights, fp32, on the CPU; `cut` takes off, in place, what is not used.

    Only what is left must have weights. Raises WeightsError.
    """
    if recipe.own:
        from fastrepa.vision.own import own_network

        return own_network(config.name, config.weights)
    # Building draws initial values: the run's own randomness must not notice. Only the CPU's
    # generator is seeded; torch.manual_seed would also reset the GPUs', which nobody puts back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        if config.weights == "hub":
            network = weights_of.from_hub(recipe, args, f"vision.encoders ({config.name})")
        else:
            network = timm.create_model(recipe.timm_name, **args)
    if config.weights in ("hub", "random"):
        cut(network)
        return network
    package = config.weights.removeprefix("package:")
    from_package = package != config.weights
    path = weights_of.find_package_weights(package) if from_package else Path(config.weights)
    state = weights_of.unwrap(weights_of.read_checkpoint(path), path)
    state = weights_of.rename(state, network, path, by_order=from_package)
    cut(network)
    weights_of.load(state, network, path)
    return network


def spatial_norm(tokens: Tensor, share: float) -> Tensor:
    """Tokens [B,T,Z] without what an image's tokens have in common, in their dtype.

    (x - share mean) / (deviation + 1e-6), per image and channel, mean and (unbiased) deviation over
    the T tokens, in float32: the spatial normalisation of iREPA (Singh et al. 2025, "What matters
    for Representation Alignment: Global Information or Spatial Structure?", section 4).
    """
    x = tokens.float()
    deviation, mean = torch.std_mean(x, dim=1, keepdim=True)
    return ((x - share * mean) / (deviation + 1e-6)).to(tokens.dtype)


def _load_network(config: EncoderConfig, plan: EncoderPlan) -> nn.Module:
    """The network of the tokens: cut after the block or stage that is taken."""
    return load_network(
        config, plan.recipe, plan.timm_args, lambda network: cut(network, plan.index, plan.norm)
    )


def _offer_own_weights(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    """Offer the module's own weights to a load: a parent's state dict holds none of them."""
    state_dict.update(nn.Module.state_dict(module, prefix=prefix))
