"""The other rooms, from vision to the commands: rows of tests/mutations.py."""

PARITY = "tests/training/test_parity.py"

ROWS = (
    # Vision.
    (
        "orders of the resize swapped", "engine/fastrepa/vision/preprocess.py",
        'if self.order == "resize-normalise":', 'if self.order != "resize-normalise":',
        "tests/vision/test_preprocess.py",
    ),
    (
        "resize with antialias", "engine/fastrepa/vision/preprocess.py",
        'mode="bicubic", align_corners=False, antialias=False',
        'mode="bicubic", align_corners=False, antialias=True',
        "tests/vision/test_preprocess.py",
    ),
    (
        "scales rounded down", "engine/fastrepa/vision/quantise.py",
        "scale.view(torch.int16) + short.to(torch.int16)", "scale.view(torch.int16)",
        "tests/vision/test_quantise.py::test_error_is_within_half_a_step",
    ),
    (
        "biased deviation", "engine/fastrepa/vision/features.py",
        "torch.std_mean(x, dim=1, keepdim=True)",
        "torch.std_mean(x, dim=1, correction=0, keepdim=True)",
        "tests/vision/test_features.py::test_spatial_norm_by_its_definition",
    ),
    (
        "an encoder can be put into train mode", "engine/fastrepa/vision/features.py",
        "return super().train(False)", "return super().train(mode)",
        "tests/vision/test_features.py::test_it_stays_in_eval_mode_whatever_is_called",
    ),
    (
        "an encoder's side at 512 px", "engine/fastrepa/vision/registry.py",
        "return 224 * (resolution // 256)", "return 224", "tests/vision/test_registry.py",
    ),
    (
        "CLIP's tokens are normed", "engine/fastrepa/vision/registry.py",
        'side="224*", order="resize-normalise", norm=False',
        'side="224*", order="resize-normalise", norm=True',
        "tests/vision/test_registry.py",
    ),
    (
        "pooled features of colours off their mean", "engine/fastrepa/vision/pooled.py",
        "x = ((x - self.mean) / self.std)", "x = (x / self.std)",
        "tests/vision/test_pooled.py",
    ),
    # Data.
    (
        "mirrored samples inverted", "engine/fastrepa/data/pipeline.py",
        "views = (draws < 0.5)", "views = (draws >= 0.5)", "tests/data/test_mirrored.py",
    ),
    (
        "windows share the shards' stream", "engine/fastrepa/data/reader.py",
        "self._permutation(len(table), epoch, window + 1)",
        "self._permutation(len(table), epoch, window)", "tests/data/test_reader.py",
    ),
    (
        "ranks overlap", "engine/fastrepa/data/reader.py",
        "(self.rank * self.passes + forward) * self.micro_batch",
        "(self.rank + forward) * self.micro_batch", "tests/data/test_reader.py",
    ),
    (
        "latents' scale", "engine/fastrepa/vision/codec.py",
        "SD_VAE_SCALE = 0.18215", "SD_VAE_SCALE = 0.18125", PARITY,
    ),
    (
        "latents are the mean", "engine/fastrepa/vision/codec.py",
        "(mean + std * noise) * self.scale", "mean * self.scale", PARITY,
    ),
    (
        "odd pixels lost before the crop", "engine/fastrepa/data/images.py",
        "while min(image.size) >= 2 * resolution:", "while min(image.size) > 2 * resolution:",
        "tests/data/test_images.py",
    ),
    (
        "white is zero is black", "engine/fastrepa/data/images.py",
        "grey = 255 - grey", "pass", "tests/reading/test_pictures.py",
    ),
    (
        "a brightest sample is a range", "engine/fastrepa/data/images.py",
        " and most & (most + 1) == 0", "", "tests/reading/test_pictures.py",
    ),
    (
        "a 16-bit key of high bytes", "engine/fastrepa/data/images.py",
        " & (np.asarray(rest) == key & 255)", "", "tests/reading/test_pictures.py",
    ),
    (
        "a first warning hides the next", "engine/fastrepa/reading/damage.py",
        "bare = _bare(data)", "bare = data", "tests/reading/test_pictures.py",
    ),
    (
        "rough scans are whole", "engine/fastrepa/reading/damage.py",
        "or any(low[c].values())", "", "tests/reading/test_pictures.py",
    ),
    (
        "labels of samples by position", "engine/fastrepa/commands/evaluate/image_sources.py",
        "int(path.stem) % len(classes) for path in files",
        "i % len(classes) for i, path in enumerate(files)", "tests/reading/test_pictures.py",
    ),
    (
        "an endless shape is believed", "engine/fastrepa/reading/arrays.py",
        "if size != wanted:", "if size < 0:", "tests/reading/test_arrays.py",
    ),
    (
        "damaged rows pass", "engine/fastrepa/data/format/store.py",
        'if crc != int.from_bytes(stored, "little"):', "if False:",
        "tests/data/format/test_store.py",
    ),
    (
        "the view is ignored", "engine/fastrepa/data/format/store.py",
        "(sample * files.views + view)", "(sample * files.views)",
        "tests/data/format/test_store.py",
    ),
    (
        "joined tars end early", "engine/fastrepa/data/sources/tars.py",
        "position = following\n", "break\n",
        "tests/data/sources/test_archives.py::test_joined_tars_are_read_to_the_end",
    ),
    (
        "splits become classes", "engine/fastrepa/data/sources/splits.py",
        "if len(group) > 1]", "if len(group) > 9]", "tests/reading/test_sources.py",
    ),
    (
        "a file's labels are lost", "engine/fastrepa/data/sources/label_files.py",
        "labels[i] = label\n", "labels[i] = 0\n", "tests/reading/test_label_files.py",
    ),
    (
        "twins are counted as one", "engine/fastrepa/commands/prepare/report.py",
        "while names[record.name] > 1 and", "while names[record.name] > 9 and",
        "tests/reading/test_sources.py::test_twins_are_counted_by_number",
    ),
    (
        "mirroring by another stream", "engine/fastrepa/randomness.py",
        "FLIP = 6", "FLIP = 7", "tests/data/test_mirrored.py",
    ),
    # Training beside the recipe.
    (
        "short gradients are stretched", "engine/fastrepa/training/optimizer.py",
        "(self.max_norm / (norm + 1e-6)).clamp(max=1)", "(self.max_norm / (norm + 1e-6))", PARITY,
    ),
    (
        "a bad loss is not looked at", "engine/fastrepa/training/optimizer.py",
        "bad = bad.to(self.bad_loss.device) | self.bad_loss", "pass",
        "tests/training/test_optimizer.py::test_a_flag_on_the_device_moves_none_of_them",
    ),
    (
        "any loss above the mean is a spike", "engine/fastrepa/training/bad_steps.py",
        "loss > mean + self.threshold * deviation and", "",
        "tests/runtime/test_survival.py::"
        "test_a_spike_is_told_once_and_does_not_become_normal",
    ),
    (
        "what was begun from other batches is used", "engine/fastrepa/training/look_ahead.py",
        "if begun is None or begun.source is not batches:", "if begun is None:",
        "tests/training/test_look_ahead.py::"
        "test_what_was_begun_from_other_batches_is_dropped",
    ),
    (
        "inner regions count twice", "engine/fastrepa/training/meters.py",
        "self._now, self._since = name, now", "self._now = name",
        "tests/training/test_meters.py::"
        "test_inner_regions_are_taken_off_outer_ones_and_sampling_counts_nowhere",
    ),
    (
        "profiles not scaled back", "engine/fastrepa/commands/convert/posthoc.py",
        "x = unit / norms", "x = unit",
        "tests/commands/convert/test_posthoc.py::"
        "test_the_combination_is_the_least_squares_of_the_profiles",
    ),
    (
        "ZeRO: a gradient's tail shifts the next", "engine/fastrepa/training/zero/step.py",
        "pieces.append(p.new_zeros(rest))", "pieces.insert(0, p.new_zeros(rest))", PARITY,
    ),
    (
        "gamma of another deviation", "engine/fastrepa/training/optimizer.py",
        "[1, 7, 16 - t, 12 - t]", "[1, 7, 16 - t, 11 - t]",
        "tests/training/test_optimizer.py::test_gamma_is_that_of_the_paper",
    ),
    (
        "a new average starts from another", "engine/fastrepa/checkpoint/averages.py",
        "sources[key] = found or WEIGHT", "sources[key] = found or EMA",
        "tests/training/test_optimizer.py::test_what_a_resumed_average_starts_from",
    ),
    (
        "buckets without the modulation", "engine/fastrepa/training/zero/settings.py",
        "18 * model.width**2", "12 * model.width**2",
        "tests/training/test_memory.py::test_auto_is_numbers_from_size_and_world",
    ),
    # Checkpoints.
    (
        "regular checkpoints go", "engine/fastrepa/checkpoint/format.py",
        "state.step % policy.keep_every == 0", "state.step % policy.keep_every == 1",
        "tests/checkpoint/test_checkpoint.py::"
        "test_the_policy_keeps_the_newest_the_regular_and_the_best",
    ),
    (
        "the worst checkpoint is kept", "engine/fastrepa/checkpoint/format.py",
        'sign = 1.0 if rule.mode == "max" else -1.0', 'sign = 1.0 if rule.mode == "min" else -1.0',
        "tests/checkpoint/test_checkpoint.py::"
        "test_the_policy_keeps_the_newest_the_regular_and_the_best",
    ),
    (
        "the worst evaluation is saved", "engine/fastrepa/checkpoint/format.py",
        'value > before if rule.mode == "max" else value < before',
        'value < before if rule.mode == "max" else value > before',
        "tests/checkpoint/test_checkpoint.py::"
        "test_a_step_is_the_best_so_far_by_what_whole_checkpoints_have",
    ),
    (
        "only the first part of a checkpoint is read", "engine/fastrepa/checkpoint/format.py",
        "for path in paths:\n            stored", "for path in paths[:1]:\n            stored",
        "tests/checkpoint/test_checkpoint.py::test_tensors_are_found_in_however_many_files",
    ),
    # Generation and evaluation.
    (
        "guidance interval open at its upper end", "engine/fastrepa/generation/sampler.py",
        "self.low <= t <= self.high", "self.low <= t < self.high",
        "tests/generation/test_sampler.py",
    ),
    (
        "guidance from the label", "engine/fastrepa/generation/sampler.py",
        "v = v_null + self.cfg * (v_label - v_null)", "v = v_label + self.cfg * (v_label - v_null)",
        "tests/generation/test_sampler.py",
    ),
    (
        "Heun on the last step too", "engine/fastrepa/generation/sampler.py",
        'elif sampler == "heun" and not last:', 'elif sampler == "heun":',
        "tests/generation/test_sampler.py",
    ),
    (
        "noise in the last step", "engine/fastrepa/generation/sampler.py",
        "            if not last:\n                assert step_noise",
        "            if True:\n                assert step_noise",
        "tests/generation/test_sampler.py",
    ),
    (
        "all images from one noise", "engine/fastrepa/generation/generate.py",
        "random.normal(Stream.SAMPLE_NOISE, 0, ids, shape)",
        "random.normal(Stream.SAMPLE_NOISE, 0, ids * 0, shape)",
        "tests/generation/test_generate.py::test_images_start_from_their_own_noise",
    ),
    (
        "labels dropped while sampling", "engine/fastrepa/generation/generate.py",
        "    model.eval()\n", "    model.train()\n",
        "tests/generation/test_generate.py"
        "::test_the_model_is_in_eval_mode_and_left_as_it_was",
    ),
    (
        "ranks draw the same images", "engine/fastrepa/generation/generate.py",
        "[rank::world_size]", "[rank:]",
        "tests/generation/test_generate.py::test_rank_batches_share_out_every_image_once",
    ),
    (
        "images beyond the record are sample's own", "engine/fastrepa/generation/folder.py",
        "for i in _numbers(folder) if i < num)", "for i in _numbers(folder))",
        "tests/generation/test_generate.py"
        "::test_an_own_folder_is_used_again_and_nothing_goes_unasked",
    ),
    (
        "a fork holds its parent's lock", "engine/fastrepa/runtime/ownership.py",
        "os.register_at_fork(after_in_child=_let_go_in_fork)", "",
        "tests/runtime/test_ownership.py::test_death_releases_it_though_children_live_on",
    ),
    (
        "another owner's lock is removed", "engine/fastrepa/runtime/ownership.py",
        "            if _is_still(path, descriptor):\n                path", "            path",
        "tests/runtime/test_ownership.py::test_the_folder_of_an_owner_is_removed_and_made_anew",
    ),
    (
        "covariance by N", "engine/fastrepa/commands/evaluate/metrics.py",
        "self.scatter / (self.count - 1)", "self.scatter / self.count",
        "tests/commands/evaluate/test_metrics.py",
    ),
    (
        "a ball reaches one neighbour less", "engine/fastrepa/commands/evaluate/metrics.py",
        "kthvalue(neighbours + 1)", "kthvalue(neighbours)",
        "tests/commands/evaluate/test_metrics.py",
    ),
    (
        "grid by columns", "engine/fastrepa/generation/pictures.py",
        "row, column = divmod(i, columns)", "column, row = divmod(i, rows)",
        "tests/generation/test_pictures.py",
    ),
    # Commands.
    (
        "a page asked for under any name", "engine/fastrepa/commands/watch/watch.py",
        'r"(127\\.0\\.0\\.1|localhost)(:[0-9]{1,5})?"', 'r".*"',
        "tests/commands/watch/test_watch.py",
    ),
    (
        "a drawing that another site asks for", "engine/fastrepa/commands/watch/watch.py",
        """self.headers.get("Origin") != f"http://{self.headers['Host']}\"""", "False",
        "tests/commands/watch/test_watch.py",
    ),
    (
        "a link that leads out of the run", "engine/fastrepa/commands/watch/view.py",
        ".is_relative_to(os.path.realpath(self.run))", " is not None",
        "tests/commands/watch/test_watch.py",
    ),
    (
        "a heat map's scale from 0", "engine/fastrepa/pages/heat.py",
        "(self.values - self.lowest)", "self.values",
        "tests/pages/test_heat.py",
    ),
    (
        "a trace's time of all steps", "engine/fastrepa/profiling/activity.py",
        '"seconds": seconds / steps', '"seconds": seconds',
        "tests/profiling/test_activity.py",
    ),
    (
        "every tensor's own neighbour", "engine/fastrepa/commands/probe/similarity.py",
        "np.fill_diagonal(similar, -np.inf)", "np.fill_diagonal(similar, 0.0)",
        "tests/commands/probe/test_similarity.py",
    ),
    (
        "groups on both sides", "engine/fastrepa/commands/probe/separability.py",
        "return fold_of_group[place]", "return np.arange(len(place)) % folds",
        "tests/commands/probe/test_separability.py",
    ),
    (
        "encoders counted where tokens are stored", "engine/fastrepa/training/memory/workload.py",
        "online = not config.vision.cached_targets", "online = True",
        "tests/training/memory/test_workload.py::"
        "test_frozen_networks_run_only_where_nothing_is_stored",
    ),
    # What goes to others.
    (
        "the file for others guides from the wrong end",
        "engine/fastrepa/commands/convert/shared/sit.py",
        'of_null + own["cfg"] * (of_label - of_null)',
        'of_label + own["cfg"] * (of_label - of_null)',
        "tests/commands/convert/test_diffusers_folder.py::test_latents_are_ours",
    ),
    (
        "a model's card tells where its data lie", "engine/fastrepa/commands/convert/card.py",
        "return PurePath(value).name", "return value", "tests/commands/convert/test_hub.py",
    ),
)  # fmt: skip
