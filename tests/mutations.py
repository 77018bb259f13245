"""One-line mutations of the code, each of which a test must notice: `make mutations`.

A row is a defect that somebody could make: a file, a text that stands in it once, what it becomes,
and the test that must fail. The tree is copied, each test is run as it is and must pass, then with
each of its mutations in turn, and must fail. `python -m tests.mutations NAME...` runs those whose
name, file or test contains one of the words; `--list` says what there is.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).parents[1]
TIMEOUT = 900  # seconds of one test


@dataclass(frozen=True)
class Mutation:
    """A mutation. file: from the root. old: stands in it once. test: what pytest is given."""

    name: str
    file: str
    old: str
    new: str
    test: str

    def problem(self, root: Path) -> str:
        """Say why it cannot be applied, '' where it can."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} is not there"
        if (found := path.read_text(encoding="utf-8").count(self.old)) != 1:
            return f"{self.old!r} stands in {self.file} {found} times, not once"
        if not (root / self.test.partition("::")[0]).is_file():
            return f"{self.test} is not there"
        return ""


ADALN_STATISTICS = "tests/kernels/test_adaln_statistics.py"
ALIGNMENT_TESTS = "tests/kernels/test_projector_alignment.py"
TRAINER_TESTS = "tests/training/test_trainer.py"
PARITY = "tests/training/test_parity.py"
TRAINER = "engine/fastrepa/training/trainer.py"
SCHEDULE = "engine/fastrepa/training/schedule.py"

MUTATIONS = (
    # The recipe.
    Mutation(
        "alignment weight ignored", TRAINER,
        "velocity_loss + self.config.alignment.weight * alignment", "velocity_loss + alignment",
        TRAINER_TESTS,
    ),
    Mutation(
        "label dropout inverted", TRAINER,
        "samples) < self.config.model.label_dropout", "samples) >= self.config.model.label_dropout",
        TRAINER_TESTS,
    ),
    Mutation(
        "warm-up starts at 0", SCHEDULE,
        "lr * (step + 1) / s.warmup", "lr * step / s.warmup",
        TRAINER_TESTS,
    ),
    Mutation(
        "cosine ignores the warm-up", SCHEDULE,
        "(step - s.warmup) / max(1, training.steps - s.warmup)", "step / max(1, training.steps)",
        TRAINER_TESTS,
    ),
    Mutation(
        "time_std ignored", TRAINER,
        "o.time_mean + o.time_std * normal", "o.time_mean + normal", TRAINER_TESTS,
    ),
    Mutation(
        "a key of the curve may change", "engine/fastrepa/training/messages.py",
        '"deterministic")  # fmt: skip', '"deterministic", "objective")  # fmt: skip',
        TRAINER_TESTS,
    ),
    Mutation(
        "rate of the next step", TRAINER,
        "set_rate(learning_rate(self.config.training, self.step))",
        "set_rate(learning_rate(self.config.training, self.step + 1))", PARITY,
    ),
    Mutation(
        "losses are sums over micro-batches", TRAINER,
        "value.detach() / self.forwards", "value.detach()", PARITY,
    ),
    Mutation(
        "micro-batches share their draws", TRAINER,
        "(self.world.rank * self.forwards + forward) * self.micro",
        "self.world.rank * self.forwards * self.micro", PARITY,
    ),
    Mutation(
        "data target not clamped", "engine/fastrepa/training/objective.py",
        'if self.config.prediction == "data":', "if False:",
        "tests/training/test_objective.py",
    ),
    Mutation(
        "data velocity not clamped", "engine/fastrepa/interpolant.py",
        "t.clamp(min=DATA_T_MIN)", "t.clamp(min=1e-6)", "tests/training/test_objective.py",
    ),
    Mutation(
        "cosine path falls upwards", "engine/fastrepa/interpolant.py",
        "-(math.pi / 2) * sigma", "(math.pi / 2) * sigma", "tests/test_interpolant.py",
    ),
    Mutation(
        "lognormal time mirrored", "engine/fastrepa/training/objective.py",
        "ratio / (1 + ratio)", "1 / (1 + ratio)", "tests/test_interpolant.py",
    ),
    # Configuration.
    Mutation(
        "another alignment weight", "engine/fastrepa/config/sections.py",
        "weight: Annotated[float, Field(ge=0.0)] = 0.5",
        "weight: Annotated[float, Field(ge=0.0)] = 1.0", "tests/test_config.py",
    ),
    Mutation(
        "another label dropout", "engine/fastrepa/config/sections.py",
        "label_dropout: Probability = 0.1", "label_dropout: Probability = 0.15",
        "tests/test_config.py",
    ),
    Mutation(
        "SiT-XL aligned at block 4", "engine/fastrepa/config/loading.py",
        '"SiT-XL": (1152, 28, 16, 8)', '"SiT-XL": (1152, 28, 16, 4)', "tests/test_config.py",
    ),
    Mutation(
        "any micro-batch is taken", "engine/fastrepa/config/sections.py",
        "if t.micro_batch and t.global_batch % t.micro_batch:", "if False:",
        "tests/test_config.py",
    ),
    Mutation(
        "default alignment block", "engine/fastrepa/config/loading.py",
        "max(1, depth // 3)", "max(1, depth // 2)", "tests/test_config.py",
    ),
    # Kernels.
    Mutation(
        "statistics of the unrounded residual", "kernels/fastrepa_kernels/adaln_kernels.py",
        "xw = kept.copy_(torch.addcmul(*update)).to(wide)",
        "kept.copy_(xw := torch.addcmul(*update))", ADALN_STATISTICS,
    ),
    Mutation(
        "statistics of the unrounded residual, kernel",
        "kernels/fastrepa_kernels/adaln_kernels.py",
        "x = x.to(x_new_ptr.dtype.element_ty).to(tl.float32)", "x = x.to(tl.float32)",
        ADALN_STATISTICS,
    ),
    Mutation(
        "a trial's tolerance times ten", "kernels/fastrepa_kernels/attention/choice.py",
        "allowed = 10 * torch.finfo", "allowed = 100 * torch.finfo",
        "tests/kernels/attention/test_attention_trial.py",
    ),
    Mutation(
        "clamp below eps ignored in backward", "kernels/fastrepa_kernels/projector_alignment.py",
        "torch.where(length < eps, 0, -cos * rz * rz)", "-cos * rz * rz",
        f"{ALIGNMENT_TESTS}::test_projections_below_eps",
    ),
    Mutation(
        "clamp below eps ignored in backward, kernel",
        "kernels/fastrepa_kernels/projector_alignment_kernels.py",
        "tl.where(length < eps, 0.0, c * rz)", "c * rz",
        f"{ALIGNMENT_TESTS}::test_projections_below_eps",
    ),
    Mutation(
        "weight gradients of the last chunk alone",
        "kernels/fastrepa_kernels/projector_alignment.py",
        "beta = 0 if first else 1", "beta = 0",
        f"{ALIGNMENT_TESTS}::test_chunking_does_not_change_the_result",
    ),
    Mutation(
        "targets' scale ignored", "kernels/fastrepa_kernels/projector_alignment_kernels.py",
        "y *= tl.load(y_scale_ptr + row)\n", "y *= 2 * tl.load(y_scale_ptr + row) - y\n",
        f"{ALIGNMENT_TESTS}::test_int8_targets",
    ),
    Mutation(
        "second moment not corrected", "kernels/fastrepa_kernels/adamw_ema.py",
        "bias2_rsqrt=1 / math.sqrt(1 - betas[1] ** step)", "bias2_rsqrt=1.0", PARITY,
    ),
    Mutation(
        "weight decay ignored", "kernels/fastrepa_kernels/adamw_ema.py",
        "decay_factor=1 - lr * weight_decay,", "decay_factor=1.0,", PARITY,
    ),
    Mutation(
        "eps inside the bias correction", "kernels/fastrepa_kernels/adamw_ema.py",
        "(m / (tl.sqrt(v) * bias2_rsqrt + eps))", "(m / ((tl.sqrt(v) + eps) * bias2_rsqrt))",
        "tests/kernels/test_adamw_ema.py::test_as_good_as_eager",
    ),
    Mutation(
        "EMA of the old weights", "kernels/fastrepa_kernels/adamw_ema.py",
        "torch._foreach_lerp_(e, p, weight)", "torch._foreach_lerp_(e, p, weight * weight)",
        "tests/kernels/test_adamw_ema.py::test_several_averages_in_one_pass",
    ),
    Mutation(
        "power function one off", "kernels/fastrepa_kernels/adamw_ema.py",
        "(1 - 1 / step) ** (gamma + 1)", "(1 - 1 / step) ** gamma",
        "tests/kernels/test_adamw_ema.py::test_power_decay_averages_with_a_power_function",
    ),
    Mutation(
        "uniforms at a cell's edge", "kernels/fastrepa_kernels/keyed_random.py",
        "((high >> 9).double() + 0.5)", "((high >> 9).double() + 0.25)",
        "tests/kernels/test_keyed_random.py",
    ),
    Mutation(
        "sample's high bits lost", "kernels/fastrepa_kernels/keyed_random.py",
        "zero + ((sample >> 32) | (stream << 24))", "zero + (stream << 24)",
        "tests/test_randomness.py",
    ),
    Mutation(
        "tanh-GELU's constant", "kernels/fastrepa_kernels/activation.py",
        "value=0.044715 * _GELU", "value=0.0447 * _GELU", "tests/kernels/test_activation.py",
    ),
    Mutation(
        "SiLU's slope", "kernels/fastrepa_kernels/activation.py",
        "da = dh * s * (1.0 + a * one_minus_s)", "da = dh * s * (1.0 + a * s)",
        "tests/kernels/test_activation.py",
    ),
    Mutation(
        "bias left out of the product", "kernels/fastrepa_kernels/adaln_linear.py",
        "out = torch.addmm(bias, _rows(y), weight.t())", "out = torch.mm(_rows(y), weight.t())",
        PARITY,
    ),
    Mutation(
        "float64 computed in float32", "kernels/fastrepa_kernels/launch.py",
        "return torch.float64 if any64 else torch.float32", "return torch.float32",
        "tests/kernels/test_adaln.py::test_formula_gradcheck",
    ),
    # Model.
    Mutation(
        "rows and columns of a patch swapped", "engine/fastrepa/model/sit.py",
        "permute(0, 5, 1, 3, 2, 4)", "permute(0, 5, 1, 4, 2, 3)", "tests/model/test_sit.py",
    ),
    Mutation(
        "aligned one block early", "engine/fastrepa/model/sit.py",
        "if done == self.alignment_block:", "if done + 1 == self.alignment_block:",
        "tests/model/test_sit.py",
    ),
    Mutation(
        "sines before cosines", "engine/fastrepa/model/sit.py",
        "torch.cat([angle.cos(), angle.sin()], dim=-1)",
        "torch.cat([angle.sin(), angle.cos()], dim=-1)", PARITY,
    ),
    Mutation(
        "a dropped label is class 0", "engine/fastrepa/model/sit.py",
        "torch.where(drop, self.num_classes, labels)", "torch.where(drop, 0, labels)", PARITY,
    ),
    Mutation(
        "rows before columns in the positions", "engine/fastrepa/model/sit.py",
        "torch.cat([column, row], dim=-1)", "torch.cat([row, column], dim=-1)",
        "tests/model/test_sit.py",
    ),
    Mutation(
        "label table's first values", "engine/fastrepa/model/sit.py",
        "nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)",
        "nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.03)",
        "tests/model/test_sit.py",
    ),
    Mutation(
        "gate of the other branch", "engine/fastrepa/model/sit.py",
        "return x, Residual(y, out, gate2)", "return x, Residual(y, out, gate1)", PARITY,
    ),
    Mutation(
        "every block is recomputed", "engine/fastrepa/model/sit.py",
        "and done % self.recompute == 0", "and True", "tests/model/test_recompute.py",
    ),
    Mutation(
        "encoders' losses added up", "engine/fastrepa/model/projector.py",
        "torch.stack(losses).mean()", "torch.stack(losses).sum()", PARITY,
    ),
    Mutation(
        "backward counted thrice", "engine/fastrepa/model/flops.py",
        "3 * forward - unwanted", "3 * forward", "tests/model/test_flops.py",
    ),
    # Vision.
    Mutation(
        "orders of the resize swapped", "engine/fastrepa/vision/preprocess.py",
        'if self.order == "resize-normalise":', 'if self.order != "resize-normalise":',
        "tests/vision/test_preprocess.py",
    ),
    Mutation(
        "resize with antialias", "engine/fastrepa/vision/preprocess.py",
        'mode="bicubic", align_corners=False, antialias=False',
        'mode="bicubic", align_corners=False, antialias=True',
        "tests/vision/test_preprocess.py",
    ),
    Mutation(
        "scales rounded down", "engine/fastrepa/vision/quantise.py",
        "scale.view(torch.int16) + short.to(torch.int16)", "scale.view(torch.int16)",
        "tests/vision/test_quantise.py::test_error_is_within_half_a_step",
    ),
    Mutation(
        "biased deviation", "engine/fastrepa/vision/features.py",
        "torch.std_mean(x, dim=1, keepdim=True)",
        "torch.std_mean(x, dim=1, correction=0, keepdim=True)",
        "tests/vision/test_features.py::test_spatial_norm_by_its_definition",
    ),
    Mutation(
        "an encoder can be put into train mode", "engine/fastrepa/vision/features.py",
        "return super().train(False)", "return super().train(mode)",
        "tests/vision/test_features.py::test_it_stays_in_eval_mode_whatever_is_called",
    ),
    Mutation(
        "an encoder's side at 512 px", "engine/fastrepa/vision/registry.py",
        "return 224 * (resolution // 256)", "return 224", "tests/vision/test_registry.py",
    ),
    Mutation(
        "CLIP's tokens are normed", "engine/fastrepa/vision/registry.py",
        'side="224*", order="resize-normalise", norm=False',
        'side="224*", order="resize-normalise", norm=True',
        "tests/vision/test_registry.py",
    ),
    Mutation(
        "pooled features of colours off their mean", "engine/fastrepa/vision/pooled.py",
        "x = ((x - self.mean) / self.std)", "x = (x / self.std)",
        "tests/vision/test_pooled.py",
    ),
    # Data.
    Mutation(
        "mirrored samples inverted", "engine/fastrepa/data/pipeline.py",
        "views = (draws < 0.5)", "views = (draws >= 0.5)", "tests/data/test_mirrored.py",
    ),
    Mutation(
        "windows share the shards' stream", "engine/fastrepa/data/reader.py",
        "self._permutation(len(table), epoch, window + 1)",
        "self._permutation(len(table), epoch, window)", "tests/data/test_reader.py",
    ),
    Mutation(
        "ranks overlap", "engine/fastrepa/data/reader.py",
        "(self.rank * self.passes + forward) * self.micro_batch",
        "(self.rank + forward) * self.micro_batch", "tests/data/test_reader.py",
    ),
    Mutation(
        "latents' scale", "engine/fastrepa/vision/codec.py",
        "SD_VAE_SCALE = 0.18215", "SD_VAE_SCALE = 0.18125", PARITY,
    ),
    Mutation(
        "latents are the mean", "engine/fastrepa/vision/codec.py",
        "(mean + std * noise) * self.scale", "mean * self.scale", PARITY,
    ),
    Mutation(
        "odd pixels lost before the crop", "engine/fastrepa/data/images.py",
        "while min(image.size) >= 2 * resolution:", "while min(image.size) > 2 * resolution:",
        "tests/data/test_images.py",
    ),
    Mutation(
        "damaged rows pass", "engine/fastrepa/data/format/store.py",
        'if crc != int.from_bytes(stored, "little"):', "if False:",
        "tests/data/format/test_store.py",
    ),
    Mutation(
        "the view is ignored", "engine/fastrepa/data/format/store.py",
        "(sample * files.views + view)", "(sample * files.views)",
        "tests/data/format/test_store.py",
    ),
    Mutation(
        "joined tars end early", "engine/fastrepa/data/sources/tars.py",
        "position = following\n", "break\n",
        "tests/data/sources/test_archives.py::test_joined_tars_are_read_to_the_end",
    ),
    Mutation(
        "mirroring by another stream", "engine/fastrepa/randomness.py",
        "FLIP = 6", "FLIP = 7", "tests/data/test_mirrored.py",
    ),
    # Training beside the recipe.
    Mutation(
        "short gradients are stretched", "engine/fastrepa/training/optimizer.py",
        "(self.max_norm / (norm + 1e-6)).clamp(max=1)", "(self.max_norm / (norm + 1e-6))", PARITY,
    ),
    Mutation(
        "a bad loss is not looked at", "engine/fastrepa/training/optimizer.py",
        "bad = bad.to(self.bad_loss.device) | self.bad_loss", "pass",
        "tests/training/test_optimizer.py::test_a_flag_on_the_device_moves_none_of_them",
    ),
    Mutation(
        "any loss above the mean is a spike", "engine/fastrepa/training/bad_steps.py",
        "loss > mean + self.threshold * deviation and", "",
        "tests/runtime/test_survival.py::"
        "test_a_spike_is_told_once_and_does_not_become_normal",
    ),
    Mutation(
        "what was begun from other batches is used", "engine/fastrepa/training/look_ahead.py",
        "if begun is None or begun.source is not batches:", "if begun is None:",
        "tests/training/test_look_ahead.py::"
        "test_what_was_begun_from_other_batches_is_dropped",
    ),
    Mutation(
        "inner regions count twice", "engine/fastrepa/training/meters.py",
        "self._now, self._since = name, now", "self._now = name",
        "tests/training/test_meters.py::"
        "test_inner_regions_are_taken_off_outer_ones_and_sampling_counts_nowhere",
    ),
    Mutation(
        "profiles not scaled back", "engine/fastrepa/commands/convert/posthoc.py",
        "x = unit / norms", "x = unit",
        "tests/commands/convert/test_posthoc.py::"
        "test_the_combination_is_the_least_squares_of_the_profiles",
    ),
    Mutation(
        "ZeRO: a gradient's tail shifts the next", "engine/fastrepa/training/zero/step.py",
        "pieces.append(p.new_zeros(rest))", "pieces.insert(0, p.new_zeros(rest))", PARITY,
    ),
    Mutation(
        "gamma of another deviation", "engine/fastrepa/training/optimizer.py",
        "[1, 7, 16 - t, 12 - t]", "[1, 7, 16 - t, 11 - t]",
        "tests/training/test_optimizer.py::test_gamma_is_that_of_the_paper",
    ),
    Mutation(
        "a new average starts from another", "engine/fastrepa/checkpoint/averages.py",
        "sources[key] = found or WEIGHT", "sources[key] = found or EMA",
        "tests/training/test_optimizer.py::test_what_a_resumed_average_starts_from",
    ),
    Mutation(
        "buckets without the modulation", "engine/fastrepa/training/zero/settings.py",
        "18 * model.width**2", "12 * model.width**2",
        "tests/training/test_memory.py::test_auto_is_numbers_from_size_and_world",
    ),
    # Checkpoints.
    Mutation(
        "regular checkpoints go", "engine/fastrepa/checkpoint/format.py",
        "state.step % policy.keep_every == 0", "state.step % policy.keep_every == 1",
        "tests/checkpoint/test_checkpoint.py::"
        "test_the_policy_keeps_the_newest_the_regular_and_the_best",
    ),
    Mutation(
        "the worst checkpoint is kept", "engine/fastrepa/checkpoint/format.py",
        'sign = 1.0 if rule.mode == "max" else -1.0', 'sign = 1.0 if rule.mode == "min" else -1.0',
        "tests/checkpoint/test_checkpoint.py::"
        "test_the_policy_keeps_the_newest_the_regular_and_the_best",
    ),
    Mutation(
        "only the first part of a checkpoint is read", "engine/fastrepa/checkpoint/format.py",
        "for path in paths:\n            try:\n                stored",
        "for path in paths[:1]:\n            try:\n                stored",
        "tests/checkpoint/test_checkpoint.py::test_tensors_are_found_in_however_many_files",
    ),
    # Generation and evaluation.
    Mutation(
        "guidance interval open at its upper end", "engine/fastrepa/generation/sampler.py",
        "self.low <= t <= self.high", "self.low <= t < self.high",
        "tests/generation/test_sampler.py",
    ),
    Mutation(
        "guidance from the label", "engine/fastrepa/generation/sampler.py",
        "v = v_null + self.cfg * (v_label - v_null)", "v = v_label + self.cfg * (v_label - v_null)",
        "tests/generation/test_sampler.py",
    ),
    Mutation(
        "Heun on the last step too", "engine/fastrepa/generation/sampler.py",
        'elif sampler == "heun" and not last:', 'elif sampler == "heun":',
        "tests/generation/test_sampler.py",
    ),
    Mutation(
        "noise in the last step", "engine/fastrepa/generation/sampler.py",
        "            if not last:\n                assert step_noise",
        "            if True:\n                assert step_noise",
        "tests/generation/test_sampler.py",
    ),
    Mutation(
        "all images from one noise", "engine/fastrepa/generation/generate.py",
        "random.normal(Stream.SAMPLE_NOISE, 0, ids, shape)",
        "random.normal(Stream.SAMPLE_NOISE, 0, ids * 0, shape)",
        "tests/generation/test_generate.py::test_images_start_from_their_own_noise",
    ),
    Mutation(
        "labels dropped while sampling", "engine/fastrepa/generation/generate.py",
        "    model.eval()\n", "    model.train()\n",
        "tests/generation/test_generate.py"
        "::test_the_model_is_in_eval_mode_and_left_as_it_was",
    ),
    Mutation(
        "ranks draw the same images", "engine/fastrepa/generation/generate.py",
        "[rank::world_size]", "[rank:]",
        "tests/generation/test_generate.py::test_rank_batches_share_out_every_image_once",
    ),
    Mutation(
        "covariance by N", "engine/fastrepa/commands/evaluate/metrics.py",
        "self.scatter / (self.count - 1)", "self.scatter / self.count",
        "tests/commands/evaluate/test_metrics.py",
    ),
    Mutation(
        "a ball reaches one neighbour less", "engine/fastrepa/commands/evaluate/metrics.py",
        "kthvalue(neighbours + 1)", "kthvalue(neighbours)",
        "tests/commands/evaluate/test_metrics.py",
    ),
    Mutation(
        "grid by columns", "engine/fastrepa/generation/pictures.py",
        "row, column = divmod(i, columns)", "column, row = divmod(i, rows)",
        "tests/generation/test_pictures.py",
    ),
    # Commands.
    Mutation(
        "a trace's time of all steps", "engine/fastrepa/profiling/activity.py",
        '"seconds": seconds / steps', '"seconds": seconds',
        "tests/profiling/test_activity.py",
    ),
    Mutation(
        "every tensor's own neighbour", "engine/fastrepa/commands/probe/similarity.py",
        "np.fill_diagonal(similar, -np.inf)", "np.fill_diagonal(similar, 0.0)",
        "tests/commands/probe/test_similarity.py",
    ),
    Mutation(
        "groups on both sides", "engine/fastrepa/commands/probe/separability.py",
        "return fold_of_group[place]", "return np.arange(len(place)) % folds",
        "tests/commands/probe/test_separability.py",
    ),
    Mutation(
        "encoders counted where tokens are stored", "engine/fastrepa/training/memory/workload.py",
        "online = not config.vision.cached_targets", "online = True",
        "tests/training/memory/test_workload.py::"
        "test_frozen_networks_run_only_where_nothing_is_stored",
    ),
)  # fmt: skip


# The runner -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The outcome of a test's process: killed, survived, or why that is not known."""

    verdict: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.verdict == "killed"


def run_test(copy: Path, test: str) -> tuple[int | None, str]:
    """Return (pytest's exit status, None for too long a run; its last line) in a copied tree."""
    paths = (copy / "engine", copy / "kernels", copy)
    # Bytecode is valid by second and size: that of a file before its mutation might be taken.
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    try:
        done = subprocess.run(
            command, cwd=copy, env=env, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return None, f"took more than {TIMEOUT} s"
    return done.returncode, (done.stdout + done.stderr).strip().rpartition("\n")[2]


def judge(copy: Path, mutation: Mutation) -> Outcome:
    """Apply one mutation to a copied tree, run its test, and put the file back."""
    path, started = copy / mutation.file, time.perf_counter()
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        status, last = run_test(copy, mutation.test)
    finally:
        path.write_text(before, encoding="utf-8")
    # 1: tests failed. Anything else (no test, an import that fails) shows nothing of the test.
    words = {0: "survived", 1: "killed", None: last}.get(status, f"exit status {status}: {last}")
    return Outcome(words, time.perf_counter() - started)


def copied_tree(root: Path, folder: Path) -> Path:
    """The tree without environments, version control, bytecode and runs."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")
    shutil.copytree(root, folder, ignore=left_out, symlinks=True)
    return folder


def run(root: Path, mutations: Sequence[Mutation], jobs: int, console: Console) -> int:
    """The exit status: 0 where every mutation was killed, 1 where one was not, 2 where a row does
    not fit the tree or a test fails without any mutation.
    """
    if problems := [f"{m.name}: {why}" for m in mutations if (why := m.problem(root))]:
        console.print("\n".join(problems), markup=False, style="red")
        return 2
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for i in range(jobs):
            copies.put(copied_tree(root, Path(folder) / f"tree{i}"))

        def in_a_copy(work: Callable[[Path], Any]) -> Any:
            copy = copies.get()
            try:
                return work(copy)
            finally:
                copies.put(copy)
                progress.advance(task)

        tests = sorted({m.test for m in mutations})
        with Progress(console=console) as progress, ThreadPoolExecutor(jobs) as pool:
            task = progress.add_task("tests as they are", total=len(tests))
            plain = list(pool.map(lambda t: in_a_copy(lambda c: run_test(c, t)), tests))
            if broken := [
                f"{test} fails without a mutation: {last}"
                for test, (status, last) in zip(tests, plain, strict=True)
                if status != 0
            ]:
                console.print("\n".join(broken), markup=False, style="red")
                return 2
            task = progress.add_task("mutations", total=len(mutations))

            def judged(mutation: Mutation) -> Outcome:
                outcome = in_a_copy(lambda copy: judge(copy, mutation))
                if not outcome.killed:  # at once: the table is minutes away
                    console.print(f"{mutation.name}: {outcome.verdict}", markup=False, style="red")
                return outcome

            found = list(pool.map(judged, mutations))
    table = Table("mutation", "file", "test", "verdict", "s")
    for mutation, outcome in zip(mutations, found, strict=True):
        colour = "green" if outcome.killed else "red"
        table.add_row(
            mutation.name, mutation.file, mutation.test, f"[{colour}]{outcome.verdict}",
            f"{outcome.seconds:.0f}",
        )  # fmt: skip
    console.print(table)
    left = sum(not outcome.killed for outcome in found)
    console.print(f"{len(found)} mutations, {left} survived")
    return 1 if left else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("words", nargs="*", help="of a name, file or test; none: all mutations")
    parser.add_argument("--list", action="store_true", help="say what there is and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (1)")
    given = parser.parse_args(arguments)
    chosen = [
        m
        for m in MUTATIONS
        if not given.words or any(word in f"{m.name} {m.file} {m.test}" for word in given.words)
    ]
    if given.list or not chosen:
        for m in chosen or MUTATIONS:
            print(f"{m.name}: {m.file} ({m.test})")
        return 0 if given.list else 2
    console = Console(width=None if sys.stdout.isatty() else 200)
    return run(ROOT, chosen, max(1, given.jobs), console)


if __name__ == "__main__":
    sys.exit(main())
