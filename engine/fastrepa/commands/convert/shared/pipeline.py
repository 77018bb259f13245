"""A diffusers pipeline around SiT: images by class.

    pipe = DiffusionPipeline.from_pretrained("FOLDER or hub id", trust_remote_code=True)
    images = pipe(["cat", "dog"], seed=0).images

Written by fastrepa, under the MIT licence; that of the weights stands in the model's card.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from torch import Tensor


class SiTPipeline(DiffusionPipeline):
    """SiT's samplers and, for a model of latents, Stable Diffusion's autoencoder.

    vae: where it is not given and the model needs one, it is loaded by the name in the model's
    configuration when first used.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(self, transformer: Any, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)

    @property
    def classes(self) -> list[str]:
        """The classes' names, in the order of their numbers; empty where they are not known."""
        return self.transformer.config["classes"]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        *,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        sampler: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw an image for each of class_labels, which are numbers or names.

        ids: numbers of the images, 0, 1, 2, ... by default; with the seed they say what each
        starts from. guidance_interval: the times, in [0, 1], between which guidance acts. sampler:
        ode, heun or sde. Settings left out are those of the model's training. output_type: pil, or
        pt: uint8 [B,3,H,W]. ValueError: a label, setting or output_type that is not known.
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type: {output_type!r} is neither 'pil' nor 'pt'")
        low, high = guidance_interval or (None, None)
        steps = num_inference_steps or self.transformer.config["sampling"]["steps"]
        with self.progress_bar(total=steps) as bar:
            latents = self.transformer.sample(
                [self._number(label) for label in class_labels],
                seed=seed,
                ids=ids,
                steps=steps,
                cfg=guidance_scale,
                guidance_low=low,
                guidance_high=high,
                sampler=sampler,
                progress=lambda _: bar.update(),
            )
        images: Any = self._decoded(latents)
        if output_type == "pil":
            images = self.numpy_to_pil(images.permute(0, 2, 3, 1).cpu().numpy() / 255.0)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _number(self, label: int | str) -> int:
        if not isinstance(label, str):
            return int(label)
        if label not in self.classes:
            raise ValueError(f"class_labels: {label!r} is not one of {', '.join(self.classes)}")
        return self.classes.index(label)

    def _decoded(self, latents: Tensor) -> Tensor:
        config = self.transformer.config
        if config["codec"] != "pixel":
            if self.vae is None:
                vae = AutoencoderKL.from_pretrained(config["vae"], use_safetensors=True)
                self.register_modules(vae=vae.to(self.transformer.device, self.transformer.dtype))
            latents = self.vae.decode((latents / self.transformer.scale).to(self.vae.dtype)).sample
        return ((latents.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
