"""The networks that give the features which metrics compare: Inception, any encoder, CLIP.

An extractor has a `name` (the space), `widths` of the features it gives by name, an `identity` that
says all that the features depend on (network, weights, preprocessing), and maps uint8 [B,3,H,W] of
any size to {feature name: fp32 [B,D]}, outside autograd. Building one leaves the process's
randomness alone.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrepa.config import EncoderConfig
from fastrepa.errors import ConfigError, WeightsError, worded
from fastrepa.reading.tensors import read_weights, reason
from fastrepa.runtime.hub import asking_the_hub
from fastrepa.vision.pooled import PooledEncoder
from fastrepa.vision.weights import digest, read_checkpoint, unwrap

SPATIAL_CHANNELS = 7  # of sFID: what ADM takes of mixed_6/conv
SPATIAL_SIDE = 17
PROMPT = "a photo of a {}"


class Extractor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def widths(self) -> dict[str, int]: ...
    def __call__(self, image_u8: Tensor) -> dict[str, Tensor]: ...
    def to(self, device: torch.device) -> Any: ...


class Inception(nn.Module):
    """torch-fidelity's Inception-v3 (the 2015 graph that FID is defined on) and its resize.

    pool [B,2048]: FID, KID, precision and recall. spatial [B,2023]: sFID's (Nash et al. 2021), the
    first 7 channels of ADM's mixed_6/conv, in its order (17, 17, 7). logits [B,1008]: without bias,
    as the Inception Score takes them.
    """

    name = "inception"
    widths = {"pool": 2048, "spatial": SPATIAL_SIDE**2 * SPATIAL_CHANNELS, "logits": 1008}  # noqa: RUF012

    def __init__(self, weights: str | None = None) -> None:
        """`weights`: a local file; None: torch-fidelity's, downloaded once into torch's cache.

        Raises ConfigError where torch-fidelity is missing, WeightsError where no weights are.
        """
        super().__init__()
        path = inception_file(weights)
        kind = _torch_fidelity().FeatureExtractorInceptionV3
        # torch-fidelity unpickles whatever it is given, so it never sees the file: in place of a
        # path it is given a buffer that we wrote of the tensors which were read and checked.
        checked = io.BytesIO()
        torch.save(unwrap(read_checkpoint(path), path), checked)
        checked.seek(0)
        try:
            with torch.random.fork_rng(devices=[]):
                self.network = kind("inception", ["2048", "logits_unbiased"], checked).eval()
        except (RuntimeError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{path}: not torch-fidelity's Inception ({worded(error, 160)})"
            ) from None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._spatial = torch.empty(0)
        self.identity = f"torch-fidelity inception-v3-compat {digest(self.network)}"

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()

    @torch.no_grad()
    def forward(self, image_u8: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(image_u8.to(self.network.fc.weight.device))
        spatial, self._spatial = self._spatial, torch.empty(0)
        return {"pool": pool, "spatial": spatial, "logits": logits}


def _torch_fidelity() -> Any:
    try:
        import torch_fidelity.feature_extractor_inceptionv3 as module
    except ImportError:
        raise ConfigError(
            "FID, sFID, KID and the Inception Score need torch-fidelity: "
            "pip install 'fastrepa[eval]'"
        ) from None
    return module


def inception_file(weights: str | None) -> Path:
    """Return where Inception's weights are, downloaded where need be.

    WeightsError, which says what to put where, if they are not there and cannot be had.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise WeightsError(f"{weights}: no such file; it is to hold {_inception_url()}")
        return Path(weights)
    url = _inception_url()
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.redirect_stdout(io.StringIO()):
                torch.hub.download_url_to_file(url, str(path), progress=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise WeightsError(
                f"Inception's weights are not at {path} and could not be downloaded "
                f"({worded(error, 160)}): put {url} there, or name a local copy "
                f"(--inception-weights, evaluation.inception_weights)"
            ) from None
    return path


def _inception_url() -> str:
    return str(_torch_fidelity().URL_INCEPTION_V3)


class Encoder(PooledEncoder):
    """A frozen encoder's pooled feature [B,Z] (vision/pooled.py) as `pool`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.widths = {"pool": self.width}
        self.identity = f"pooled {config.name} at {self.side} px, bicubic antialiased {self.digest}"

    def __call__(self, image_u8: Tensor) -> dict[str, Tensor]:
        return {"pool": self.forward(image_u8)}


class Clip(nn.Module):
    """open_clip's image embedding [B,D] as `image`, and those of texts.

    Images are resized to the network's square (bicubic, antialiased).
    """

    name = "clip"

    def __init__(self, model: str = "ViT-L-14", weights: str | None = "openai") -> None:
        """`model`: open_clip's name, "hf-hub:..." or "local-dir:FOLDER", which bring their weights;
        `weights`: a tag of open_clip's or a local file.

        Raises ConfigError where open_clip is missing, WeightsError for weights or an unknown name.
        """
        super().__init__()
        try:
            import open_clip
        except ImportError:
            raise ConfigError("clip_score needs open_clip: pip install 'fastrepa[clip]'") from None
        problem = ""
        try:
            with contextlib.ExitStack() as held:
                held.enter_context(torch.random.fork_rng(devices=[]))
                held.enter_context(_our_reader(open_clip.factory))
                if not model.startswith("local-dir:") and not Path(weights or "").is_file():
                    problem = held.enter_context(asking_the_hub())
                self.network: Any = open_clip.create_model(
                    model, None if ":" in model else weights, require_pretrained=True
                ).eval()
                self.tokenizer = open_clip.get_tokenizer(model)
        except WeightsError as error:
            raise WeightsError(f"--clip: {model}: {error}") from None
        except Exception as error:  # the hub's client has errors of its own, without a common base
            why = problem or reason(error)
            raise WeightsError(
                f"--clip: {model}={weights}: could not be loaded ({why}); give "
                f"NAME=FILE with a local checkpoint, or local-dir:FOLDER"
            ) from None
        self.requires_grad_(False)
        visual = self.network.visual
        side = visual.image_size
        self.side = int(side[0] if isinstance(side, tuple) else side)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(visual, f"image_{name}")).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.identity = f"open_clip {model} {digest(self.network)}"
        self.widths = {"image": self.texts(["a"]).shape[1]}

    @torch.no_grad()
    def forward(self, image_u8: Tensor) -> dict[str, Tensor]:
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        x = image_u8.to(mean.device, torch.float32) / 255
        size = (self.side, self.side)
        x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        return {"image": self.network.encode_image((x - mean) / std).float()}

    @torch.no_grad()
    def texts(self, words: Sequence[str]) -> Tensor:
        """Embeddings [N,D] of texts, on the host."""
        tokens = self.tokenizer(list(words)).to(self.get_buffer("mean").device)
        return self.network.encode_text(tokens).float().cpu()


@contextlib.contextmanager
def _our_reader(factory: Any) -> Iterator[None]:
    """Let open_clip read weights, wherever it found them, as every other file of them is read.

    create_model finds, downloads, renames and loads; `load_state_dict` is the one function that it
    opens a file with, and tensors cannot be handed in past it.
    """

    def read(checkpoint_path: str, *_: Any, **__: Any) -> dict[str, Tensor]:
        path = Path(checkpoint_path)
        return unwrap(read_weights(path, WeightsError), path)

    theirs = factory.load_state_dict
    factory.load_state_dict = read
    try:
        yield
    finally:
        factory.load_state_dict = theirs
