"""The attention that a run computes with: the configuration's wish, and what this device can."""

from __future__ import annotations

from typing import Any

import torch

from fastrepa.config import AttentionConfig, ModelConfig
from fastrepa.errors import ConfigError
from fastrepa_kernels.attention import FLASH, Choice, choose


def choose_attention(
    attention: AttentionConfig,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    deterministic: bool,
) -> Choice:
    """The backend for the training of `model` in `dtype` on `device`.

    Raises ConfigError, naming attention.backend or attention.require, where it cannot run.
    """
    try:
        return choose(
            device,
            dtype,
            model.width // model.heads,
            backend=attention.backend,
            require=attention.require,
            deterministic=deterministic,
        )
    except ValueError as e:
        raise ConfigError(f"attention.{e}") from None


def attention_record(attention: AttentionConfig, choice: Choice) -> dict[str, Any]:
    """Return what environment.json says: what runs, who chose it, and why nothing better did."""
    return {
        "attention": {
            "backend": choice.backend,
            "configured": attention.backend,
            "require": attention.require,
            "passed_over": dict(choice.passed_over),
        }
    }


def slow_attention(choice: Choice, device: torch.device) -> str:
    """A warning where a GPU computes attention with less than FlashAttention, otherwise ''."""
    if device.type != "cuda" or choice.backend in (*FLASH, "sdpa"):  # torch may take any
        return ""
    why = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over if name in FLASH)
    return f"attention runs on {choice.backend}, which is slow" + (f" ({why})" if why else "")
