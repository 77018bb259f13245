"""The card of a model: what it is, what it was made of, how good it is, how to draw from it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from fastrepa.checkpoint.format import RunState, step_number
from fastrepa.config import Config
from fastrepa.errors import printable
from fastrepa.generation.pictures import EVALUATION
from fastrepa.reading.evaluations import read_evaluations
from fastrepa.reading.metrics import read_metrics
from fastrepa.reading.text import dump_yaml

GRID, RECIPE = "samples.png", "config.yaml"
LOSSES = ("loss", "velocity_loss", "alignment_loss")
MOST_CLASSES = 200  # that the card names; all of them are in transformer/config.json
SOURCES = (
    "[SiT](https://arxiv.org/abs/2401.08740) (Ma et al. 2024), trained with representation "
    "alignment, [REPA](https://arxiv.org/abs/2410.06940) (Yu et al. 2025)."
)


@dataclass(frozen=True)
class CardWords:
    """Say what only a model's author can: its repository, licence and data sets' hub ids."""

    repo: str
    licence: str | None = None
    datasets: Sequence[str] = ()


def write_card(folder: Path, run: Path, config: Config, state: RunState, words: CardWords) -> None:
    """Write README.md, the recipe and the newest grid of samples into a model's folder.

    Paths on this machine go with their last name alone. Raises FastrepaError and OSError.
    """
    recipe = _public(config.model_dump(mode="json"))
    (folder / RECIPE).write_text(dump_yaml(recipe), encoding="utf-8")
    grid = _newest_grid(run, state.step)
    if grid is not None:
        shutil.copyfile(grid, folder / GRID)
    about = {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        **({"license": words.licence} if words.licence else {}),
        "tags": ["sit", "repa", "class-conditional-image-generation", "fastrepa"],
        **({"datasets": list(words.datasets)} if words.datasets else {}),
    }
    name = words.repo.rpartition("/")[2]
    parts = [
        f"# {name}",
        _first_words(config, state),
        f"![Samples of step {state.step}]({GRID})" if grid else "",
        *_use(words.repo, config),
        *_data(config, state),
        *_training(config, state),
        *_measured(run, state.step),
        *_licence(words.licence, config),
        "## Sources",
        SOURCES,
    ]
    text = "\n\n".join(part for part in parts if part)
    (folder / "README.md").write_text(f"---\n{dump_yaml(about)}---\n\n{text}\n", encoding="utf-8")


def _public(value: Any) -> Any:
    """A configuration whose paths from the root or a home folder are names alone."""
    if isinstance(value, Mapping):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~", "..")):
        return PurePath(value).name
    return value


def _newest_grid(run: Path, step: int) -> Path | None:
    """The run's last grid up to a step."""
    found = {
        drawn: path
        for path in (run / "samples").glob("step_*.png")
        if (drawn := step_number(path.with_suffix(""))) is not None and drawn <= step
    }
    return found[max(found)] if found else None


def _first_words(config: Config, state: RunState) -> str:
    names = " and ".join(_code(e.name) for e in config.vision.encoders)
    aligned = f", aligned with {names}," if names else ""
    what = config.model.name or f"a SiT of width {config.model.width}"
    side = config.data.resolution if config.data.codec.is_autoencoder else state.side
    return (
        f"Draws images of {side} x {side} pixels by class: {what}{aligned} after {state.step:,} "
        f"steps of {config.training.global_batch:,} images."
    )


def _use(repo: str, config: Config) -> Iterator[str]:
    yield "## Use"
    yield (
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{repo}", trust_remote_code=True)\n'
        "print(pipe.classes)\nimages = pipe([0, 1, 2], seed=0).images  # numbers or names\n```"
    )
    yield (
        "`trust_remote_code` runs `pipeline.py` and `transformer/sit.py` of this repository. The "
        "second is plain torch and works without diffusers: its first lines say how."
    )
    if config.data.codec.is_autoencoder:
        yield "Latents are decoded by Stable Diffusion's autoencoder."


def _data(config: Config, state: RunState) -> Iterator[str]:
    yield "## Data"
    count = f"{state.num_samples:,} images" if state.num_samples else "images"
    name = PurePath(config.data.path).name or "a set"
    yield f"{_code(name)}: {count} in {config.model.num_classes:,} classes."
    if state.classes:
        shown = ", ".join(map(_code, state.classes[:MOST_CLASSES]))
        yield shown + (", ..." if len(state.classes) > MOST_CLASSES else "")


def _training(config: Config, state: RunState) -> Iterator[str]:
    t, a = config.training, config.alignment
    rows = {
        "images seen": f"{state.samples_seen:,}",
        "model": f"width {config.model.width}, depth {config.model.depth}, {config.model.heads} "
        f"heads, patch {config.model.patch}",
        "alignment": f"block {a.block}, weight {a.weight}" if config.vision.encoders else "none",
        "objective": f"{config.objective.prediction} on the {config.objective.path} path",
        "optimiser": f"AdamW, learning rate {t.optimizer.lr}, {t.schedule.name}",
        "precision": t.precision,
        "sampled with": f"{config.sample.sampler}, {config.sample.steps} steps, guidance "
        f"{config.sample.cfg}",
    }
    yield "## Training"
    yield _table(("", ""), rows.items())
    yield f"Every setting: [{RECIPE}]({RECIPE})."


def _measured(run: Path, step: int) -> Iterator[str]:
    """The last value of every loss and metric that was logged or measured up to a step."""
    rows: dict[tuple[str, str], tuple[float, int]] = {}
    for line in read_metrics(run / "metrics.jsonl").by_step():
        for key in [k for k in line if k in LOSSES or EVALUATION.match(k)]:
            if line["step"] <= step and math.isfinite(line[key]):
                rows[key, "in training"] = line[key], int(line["step"])
    for one in read_evaluations(run)[0]:
        if one.step > step:
            continue
        how = f"{one.num:,} images against {_code(PurePath(one.reference).name)}; {one.sampler}"
        for key, value in one.scores.items():
            rows[key, how] = value, one.step
    if rows:
        yield "## Metrics"
        yield _table(
            ("metric", "value", "step", "measured"),
            [(key, f"{v:.4g}", f"{at:,}", how) for (key, how), (v, at) in sorted(rows.items())],
        )


def _licence(licence: str | None, config: Config) -> Iterator[str]:
    yield "## Licence"
    whose = f"The weights: {_code(licence)}." if licence else "No licence of the weights is stated."
    vae = " The autoencoder has its own." if config.data.codec.is_autoencoder else ""
    yield f"{whose} `pipeline.py` and `transformer/sit.py`: MIT.{vae}"


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """A name as it is in markdown, whatever is in it."""
    return f"`{printable(text).replace('`', chr(39))}`"
