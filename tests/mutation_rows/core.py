"""The recipe, the configuration, the kernels and the model: rows of tests/mutations.py."""

ADALN_STATISTICS = "tests/kernels/test_adaln_statistics.py"
ALIGNMENT_TESTS = "tests/kernels/test_projector_alignment.py"
TRAINER_TESTS = "tests/training/test_trainer.py"
PARITY = "tests/training/test_parity.py"
TRAINER = "engine/fastrepa/training/trainer.py"
THREADS = "engine/fastrepa/runtime/threads.py"
THREADS_TESTS = "tests/runtime/test_threads.py"
SCHEDULE = "engine/fastrepa/training/schedule.py"

ROWS = (
    # The recipe.
    (
        "alignment weight ignored", TRAINER,
        "velocity_loss + self.config.alignment.weight * alignment", "velocity_loss + alignment",
        TRAINER_TESTS,
    ),
    (
        "label dropout inverted", TRAINER,
        "samples) < self.config.model.label_dropout", "samples) >= self.config.model.label_dropout",
        TRAINER_TESTS,
    ),
    (
        "warm-up starts at 0", SCHEDULE,
        "lr * (step + 1) / s.warmup", "lr * step / s.warmup",
        TRAINER_TESTS,
    ),
    (
        "cosine ignores the warm-up", SCHEDULE,
        "(step - s.warmup) / max(1, steps - s.warmup)", "step / max(1, steps)",
        TRAINER_TESTS,
    ),
    (
        "time_std ignored", TRAINER,
        "o.time_mean + o.time_std * normal", "o.time_mean + normal", TRAINER_TESTS,
    ),
    (
        "a key of the curve may change", "engine/fastrepa/training/messages.py",
        '"deterministic")  # fmt: skip', '"deterministic", "objective")  # fmt: skip',
        TRAINER_TESTS,
    ),
    (
        "rate of the next step", TRAINER,
        "set_rate(learning_rate(self.config.training, self.step))",
        "set_rate(learning_rate(self.config.training, self.step + 1))", PARITY,
    ),
    (
        "losses are sums over micro-batches", TRAINER,
        "value.detach() / self.forwards", "value.detach()", PARITY,
    ),
    (
        "micro-batches share their draws", TRAINER,
        "(self.world.rank * self.forwards + forward) * self.micro",
        "self.world.rank * self.forwards * self.micro", PARITY,
    ),
    (
        "data target not clamped", "engine/fastrepa/training/objective.py",
        'if self.config.prediction == "data":', "if False:",
        "tests/training/test_objective.py",
    ),
    (
        "data velocity not clamped", "engine/fastrepa/interpolant.py",
        "t.clamp(min=DATA_T_MIN)", "t.clamp(min=1e-6)", "tests/training/test_objective.py",
    ),
    (
        "cosine path falls upwards", "engine/fastrepa/interpolant.py",
        "-(math.pi / 2) * sigma", "(math.pi / 2) * sigma", "tests/test_interpolant.py",
    ),
    (
        "lognormal time mirrored", "engine/fastrepa/training/objective.py",
        "ratio / (1 + ratio)", "1 / (1 + ratio)", "tests/test_interpolant.py",
    ),
    # Configuration.
    (
        "another alignment weight", "engine/fastrepa/config/ingredients.py",
        '0.5, description="of the alignment loss', '1.0, description="of the alignment loss',
        "tests/test_config.py",
    ),
    (
        "another label dropout", "engine/fastrepa/config/ingredients.py",
        '0.1,\n        description="share of labels', '0.15,\n        description="share of labels',
        "tests/test_config.py",
    ),
    (
        "SiT-XL aligned at block 4", "engine/fastrepa/config/loading.py",
        '"SiT-XL": (1152, 28, 16, 8)', '"SiT-XL": (1152, 28, 16, 4)', "tests/test_config.py",
    ),
    (
        "any micro-batch is taken", "engine/fastrepa/config/sections.py",
        "if t.micro_batch and t.global_batch % t.micro_batch:", "if False:",
        "tests/test_config.py",
    ),
    (
        "default alignment block", "engine/fastrepa/config/loading.py",
        "max(1, depth // 3)", "max(1, depth // 2)", "tests/test_config.py",
    ),
    # Kernels.
    (
        "statistics of the unrounded residual", "kernels/fastrepa_kernels/adaln_kernels.py",
        "xw = kept.copy_(torch.addcmul(*update)).to(wide)",
        "kept.copy_(xw := torch.addcmul(*update))", ADALN_STATISTICS,
    ),
    (
        "statistics of the unrounded residual, kernel",
        "kernels/fastrepa_kernels/adaln_kernels.py",
        "x = x.to(x_new_ptr.dtype.element_ty).to(tl.float32)", "x = x.to(tl.float32)",
        ADALN_STATISTICS,
    ),
    (
        "a trial's tolerance times ten", "kernels/fastrepa_kernels/attention/choice.py",
        "allowed = 10 * torch.finfo", "allowed = 100 * torch.finfo",
        "tests/kernels/attention/test_attention_trial.py",
    ),
    (
        "clamp below eps ignored in backward", "kernels/fastrepa_kernels/projector_alignment.py",
        "torch.where(length < eps, 0, -cos * rz * rz)", "-cos * rz * rz",
        f"{ALIGNMENT_TESTS}::test_projections_below_eps",
    ),
    (
        "clamp below eps ignored in backward, kernel",
        "kernels/fastrepa_kernels/projector_alignment_kernels.py",
        "tl.where(length < eps, 0.0, c * rz)", "c * rz",
        f"{ALIGNMENT_TESTS}::test_projections_below_eps",
    ),
    (
        "weight gradients of the last chunk alone",
        "kernels/fastrepa_kernels/projector_alignment.py",
        "beta = 0 if first else 1", "beta = 0",
        f"{ALIGNMENT_TESTS}::test_chunking_does_not_change_the_result",
    ),
    (
        "targets' scale ignored", "kernels/fastrepa_kernels/projector_alignment_kernels.py",
        "y *= tl.load(y_scale_ptr + row)\n", "y *= 2 * tl.load(y_scale_ptr + row) - y\n",
        f"{ALIGNMENT_TESTS}::test_int8_targets",
    ),
    (
        "second moment not corrected", "kernels/fastrepa_kernels/adamw_ema.py",
        "bias2_rsqrt=1 / math.sqrt(1 - betas[1] ** step)", "bias2_rsqrt=1.0", PARITY,
    ),
    (
        "weight decay ignored", "kernels/fastrepa_kernels/adamw_ema.py",
        "decay_factor=1 - lr * weight_decay,", "decay_factor=1.0,", PARITY,
    ),
    (
        "eps inside the bias correction", "kernels/fastrepa_kernels/adamw_ema.py",
        "(m / (tl.sqrt(v) * bias2_rsqrt + eps))", "(m / ((tl.sqrt(v) + eps) * bias2_rsqrt))",
        "tests/kernels/test_adamw_ema.py::test_as_good_as_eager",
    ),
    (
        "EMA of the old weights", "kernels/fastrepa_kernels/adamw_ema.py",
        "torch._foreach_lerp_(e, p, weight)", "torch._foreach_lerp_(e, p, weight * weight)",
        "tests/kernels/test_adamw_ema.py::test_several_averages_in_one_pass",
    ),
    (
        "power function one off", "kernels/fastrepa_kernels/adamw_ema.py",
        "(1 - 1 / step) ** (gamma + 1)", "(1 - 1 / step) ** gamma",
        "tests/kernels/test_adamw_ema.py::test_power_decay_averages_with_a_power_function",
    ),
    (
        "uniforms at a cell's edge", "kernels/fastrepa_kernels/keyed_random.py",
        "((high >> 9).double() + 0.5)", "((high >> 9).double() + 0.25)",
        "tests/kernels/test_keyed_random.py",
    ),
    (
        "sample's high bits lost", "kernels/fastrepa_kernels/keyed_random.py",
        "zero + ((sample >> 32) | (stream << 24))", "zero + (stream << 24)",
        "tests/test_randomness.py",
    ),
    (
        "tanh-GELU's constant", "kernels/fastrepa_kernels/activation.py",
        "value=0.044715 * _GELU", "value=0.0447 * _GELU", "tests/kernels/test_activation.py",
    ),
    (
        "SiLU's slope", "kernels/fastrepa_kernels/activation.py",
        "da = dh * s * (1.0 + a * one_minus_s)", "da = dh * s * (1.0 + a * s)",
        "tests/kernels/test_activation.py",
    ),
    (
        "bias left out of the product", "kernels/fastrepa_kernels/adaln_linear.py",
        "out = torch.addmm(bias, _rows(y), weight.t())", "out = torch.mm(_rows(y), weight.t())",
        PARITY,
    ),
    (
        "float64 computed in float32", "kernels/fastrepa_kernels/launch.py",
        "return torch.float64 if any64 else torch.float32", "return torch.float32",
        "tests/kernels/test_adaln.py::test_formula_gradcheck",
    ),
    # Model.
    (
        "rows and columns of a patch swapped", "engine/fastrepa/model/sit.py",
        "permute(0, 5, 1, 3, 2, 4)", "permute(0, 5, 1, 4, 2, 3)", "tests/model/test_sit.py",
    ),
    (
        "aligned one block early", "engine/fastrepa/model/sit.py",
        "if done == self.alignment_block:", "if done + 1 == self.alignment_block:",
        "tests/model/test_sit.py",
    ),
    (
        "sines before cosines", "engine/fastrepa/model/sit.py",
        "torch.cat([angle.cos(), angle.sin()], dim=-1)",
        "torch.cat([angle.sin(), angle.cos()], dim=-1)", PARITY,
    ),
    (
        "a dropped label is class 0", "engine/fastrepa/model/sit.py",
        "torch.where(drop, self.num_classes, labels)", "torch.where(drop, 0, labels)", PARITY,
    ),
    (
        "rows before columns in the positions", "engine/fastrepa/model/sit.py",
        "torch.cat([column, row], dim=-1)", "torch.cat([row, column], dim=-1)",
        "tests/model/test_sit.py",
    ),
    (
        "label table's first values", "engine/fastrepa/model/sit.py",
        "nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)",
        "nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.03)",
        "tests/model/test_sit.py",
    ),
    (
        "gate of the other branch", "engine/fastrepa/model/sit.py",
        "return x, Residual(y, out, gate2)", "return x, Residual(y, out, gate1)", PARITY,
    ),
    (
        "every block is recomputed", "engine/fastrepa/model/sit.py",
        "and done % self.recompute == 0", "and True", "tests/model/test_recompute.py",
    ),
    (
        "encoders' losses added up", "engine/fastrepa/model/projector.py",
        "torch.stack(losses).mean()", "torch.stack(losses).sum()", PARITY,
    ),
    (
        "backward counted thrice", "engine/fastrepa/model/flops.py",
        "3 * forward - unwanted", "3 * forward", "tests/model/test_flops.py",
    ),
    # CPU threads.
    (
        "a quota of its own group alone", "engine/fastrepa/runtime/hardware.py",
        "folders = (below, *below.parents)", "folders = (below,)", THREADS_TESTS,
    ),
    (
        "a trial takes the slowest", THREADS,
        "if self._tried[count] < BETTER", "if self._tried[count] > BETTER", THREADS_TESTS,
    ),
    (
        "half the rate is not looked at", THREADS,
        "now > 2 * self._best", "now > 9 * self._best", THREADS_TESTS,
    ),
    (
        "a run forgets its threads", THREADS,
        'min(recorded, most), "as before"', 'most, "as before"', THREADS_TESTS,
    ),
)  # fmt: skip
