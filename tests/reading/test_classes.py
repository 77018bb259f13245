"""A class is its number and its name is text, from the set over the checkpoint to the pictures."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastrepa.checkpoint import choice
from fastrepa.checkpoint.format import RunState, checkpoint_path, read_state
from fastrepa.checkpoint.identity import check_classes, other_samples, trained_classes
from fastrepa.commands.evaluate.during_training import RunEvaluator
from fastrepa.commands.evaluate.evaluate import _run_source
from fastrepa.commands.prepare.prepare import prepare
from fastrepa.commands.probe import probe as probing
from fastrepa.commands.probe.images import draw_sample
from fastrepa.commands.show import show as showing
from fastrepa.commands.show.show import show
from fastrepa.commands.verify.verify import verify
from fastrepa.config import load_config
from fastrepa.data.classes import choose_classes, named, written_form
from fastrepa.data.datasets import open_data
from fastrepa.errors import ConfigError, DataError, FastrepaError, decoration
from fastrepa.generation import sample as drawing
from fastrepa.generation.sample import sample_run
from fastrepa.training import grids
from fastrepa.training.messages import untrained_classes
from fastrepa.training.run import Run
from fastrepa.training.telemetry import Telemetry
from tests.runs import ROOT, SMALL, command, environment, train
from tests.sets.archives import tar_bytes, written
from tests.sets.trees import noise, write_tree
from tests.sets.written import write_reference, write_set

pytestmark = pytest.mark.usefixtures("one_thread")

NUMERIC = ["1", "10", "11", "2"]
BIRDS = ["crane", "tern", "crane", "maillot, tank suit"]
SIDE = 16


# Names and numbers --------------------------------------------------------------------------------


def chosen(names, *requested, count=None):
    """Return the chosen numbers, and what was said."""
    said: list[str] = []
    return choose_classes(requested, names, count or len(names), say=said.append), said


@pytest.mark.parametrize(
    ("requested", "numbers", "said"),
    [
        (
            ["2"],
            [3],
            "--classes 2: the class of that name is taken, number 3; class number 2, '11'",
        ),
        (["3"], [3], "--classes 3: no class has that name; class number 3 is taken, '2'"),
        (["0"], [0], "--classes 0: no class has that name; class number 0 is taken, '1'"),
        (["#2", "#3"], [2, 3], None),
        (["11,10", "#0"], [2, 1, 0], None),  # 11 and 10 are no numbers of classes
        (["  11 , 10,"], [2, 1], None),
    ],
)
def test_a_name_wins_over_a_number_and_that_is_said(requested, numbers, said):
    found, lines = chosen(NUMERIC, *requested)
    assert found == numbers
    assert [said] == [line[: len(said)] for line in lines] if said else not lines


def test_a_number_that_is_nobody_elses_name_needs_no_word():
    assert chosen(["ant", "bee"], "1") == ([1], [])
    assert chosen(["0", "1"], "1,0") == ([1, 0], [])


def test_names_with_commas_and_blanks_are_taken_whole():
    assert chosen(BIRDS, "maillot, tank suit", "tern")[0] == [3, 1]
    assert chosen(["a", "b", "a, b", " b"], "a, b", " b", "a,b")[0] == [2, 3, 0, 1]
    assert chosen(["Animals & Nature", "x"], "animals & nature")[0] == [0]
    with pytest.raises(ConfigError, match=r"'maillot'.*did you mean.*is a --classes of its own"):
        chosen(BIRDS, "maillot, tank suit, tern")


def test_one_name_of_two_classes_is_refused_with_both_numbers():
    with pytest.raises(
        ConfigError, match="'crane' is the name of 2 classes, numbers 0 and 2; give"
    ):
        chosen(BIRDS, "crane")
    with pytest.raises(DataError, match="give '#0' or '#2'"):
        choose_classes(["x"], ["x", "0", "x", "2"], 4, kind=DataError)
    assert chosen(BIRDS, "2,0")[0] == [2, 0]
    assert [named(BIRDS, number) for number in range(5)] == [
        "crane (#0)", "tern", "crane (#2)", "maillot, tank suit", "#4"
    ]  # fmt: skip
    assert [named(NUMERIC, number) for number in (0, 3)] == ["1 (#0)", "2 (#3)"]
    assert named(["0", "1"], 1) == "1"


def test_names_are_compared_in_one_unicode_form():
    """A typed name may be composed otherwise; what is invisible is stored as an escape."""
    composed = "caf\u00e9"
    apart = unicodedata.normalize("NFD", composed)
    assert composed != apart
    for stored, typed in ((composed, apart), (apart, composed)):
        assert chosen([stored, "x"], typed)[0] == [0]
    hidden = "ant\u200b"
    assert chosen([written_form(hidden), "ant"], hidden, "ant")[0] == [0, 1]
    assert chosen(["\u65e5\u672c", "[red]x[/]", "--help"], "[red]x[/]", "--help")[0] == [1, 2]


@pytest.mark.parametrize(
    "wrong", ["4", "-1", "9" * 5000, "\u00b2", "\uff13", "#", "#4", "0x1", "1.0"]
)
def test_what_is_no_class_is_one_short_line_with_what_is_allowed(wrong):
    with pytest.raises(ConfigError, match=r"is no class.*a class is a number from 0 to 3") as error:
        chosen(["ant", "bee", "cat", "dog"], wrong)
    assert len(str(error.value)) < 300


@given(names=st.lists(st.text(max_size=6), min_size=1, max_size=6), extra=st.integers(0, 3))
def test_every_name_is_its_own_class_or_refused(names, extra):
    forms, count = [written_form(name) for name in names], len(names) + extra
    for number, name in enumerate(names):
        if forms.count(forms[number]) == 1:
            assert choose_classes([name], names, count) == [number]
        else:
            with pytest.raises(ConfigError, match="is the name of"):
                choose_classes([name], names, count)
        if f"#{number}" not in forms:
            assert choose_classes([f"#{number}"], names, count) == [number]


# Sets ---------------------------------------------------------------------------------------------


def webdataset(folder, labels, names=None):
    """Prepare a set of one grey picture for each of the labels, each of another brightness."""
    files: dict[str, bytes] = {}
    for number, label in enumerate(labels):
        picture = io.BytesIO()
        pixels = np.kron(noise(number, 4, 4) // 3, np.ones((4, 4, 1))) + 40 * label
        Image.fromarray(pixels.astype(np.uint8)).save(picture, "PNG")
        files |= {f"{number:04d}.png": picture.getvalue(), f"{number:04d}.cls": b"%d" % label}
    source = written(folder / "source.tar", tar_bytes(files))
    listed = None
    if names:
        listed = written(folder / "names.txt", "\n".join(names).encode())
    prepare(source, folder / "set", resolution=SIDE, workers=0, progress=False, class_names=listed)
    return folder / "set"


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Labels 0, 2 and 3 of four classes, two of which have one name."""
    return webdataset(tmp_path_factory.mktemp("birds"), [0, 2, 3], BIRDS)


def captions(monkeypatch, *args, **options):
    """The names on a sheet."""
    seen: list[str] = []
    plain = showing.contact_sheet

    def noting(images, captions, title):
        seen.extend(name for name, _ in captions)
        return plain(images, captions, title)

    monkeypatch.setattr(showing, "contact_sheet", noting)
    return seen, show(*args, **options)


def test_a_set_with_an_empty_class_and_two_of_one_name(birds, tmp_path, monkeypatch):
    data = open_data(birds)
    assert (data.classes, data.class_sizes) == (BIRDS, [1, 0, 1, 1])
    seen, report = captions(monkeypatch, birds, tmp_path / "x.png")
    assert seen == ["crane (#0)", "crane (#2)", "maillot, tank suit"]
    assert dict(report.summary)["classes"] == "4, of 0 to 1 images, 1 without any"
    for requested, shown in (
        (["3"], ["maillot, tank suit"]), (["maillot, tank suit"], ["maillot, tank suit"]),
        (["#2", "0"], ["crane (#0)", "crane (#2)"]),
    ):  # fmt: skip
        assert captions(monkeypatch, birds, tmp_path / "x.png", classes=requested)[0] == shown
    for wrong, message in (
        ("crane", "'crane' is the name of 2 classes, numbers 0 and 2"),
        ("tern", "class number 1, 'tern', has no images"), ("1", "class number 1, 'tern', has no"),
        ("4", "'4' is no class.*from 0 to 3"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            show(birds, tmp_path / "x.png", classes=[wrong])
    found = verify(birds, workers=1)
    assert found.ok
    assert found.notes == ["manifest.json: 'crane' is the name of classes 0 and 2"]


def test_class_0_without_images(tmp_path):
    """Labels from 1: drawn, counted and told apart by number."""
    path = webdataset(tmp_path, np.repeat([1, 3], 12), ["none", "a", "nobody", "b"])
    assert open_data(path).class_sizes == [0, 12, 0, 12]
    sample = draw_sample(path, 20)
    assert sample.classes == ["a", "b"]
    assert np.bincount(sample.labels).tolist() == [10, 10]
    brightness = sample.images.float().mean((1, 2, 3)).numpy()
    assert brightness[sample.labels == 1].min() > brightness[sample.labels == 0].max() + 20


def test_the_layout_without_names_counts_by_number_too(tmp_path):
    reference, shards = write_reference(tmp_path / "reference"), write_set(tmp_path / "shards")
    data = open_data(reference)
    assert data.class_sizes == shards.class_sizes
    assert data.digest == open_data(reference).digest
    listed = reference / "vae-sd/dataset.json"
    labels = json.loads(listed.read_text())
    labels["labels"][0][1] = (labels["labels"][0][1] + 1) % 3
    listed.write_text(json.dumps(labels))
    assert open_data(reference).digest != data.digest


def test_the_screen_says_which_class_it_was(tmp_path):
    """Through the command: a class that is called --help, one in rich's markup, one of blanks."""
    names = ["--help", "[red]x[/red]", "$HOME", "a b", "2"]
    path = webdataset(tmp_path, range(5), names)

    def ask(*words):
        return subprocess.run(
            command("data", "show", path, "--out", tmp_path, *words), env=environment(),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    done = ask("--classes=--help", "--classes", "[red]x[/red]", "--classes", "a b,2")
    assert done.returncode == 0, done.stderr
    assert "--classes 2: the class of that name is taken, number 4" in done.stdout
    assert "'#2'" in done.stdout
    refused = ask("--classes", "[red]y[/red]")
    assert refused.returncode == 1
    assert "'[red]y[/red]' is no class (did you mean '[red]x[/red]'?)" in refused.stderr


# Runs ---------------------------------------------------------------------------------------------

TINY = [
    f"data.resolution={SIDE}", f"data.codec={{name: pixel, side: {SIDE}}}", "model.width=32",
    "model.depth=2", "model.heads=2", "model.num_classes=10", "vision.encoders=[]",
    "training.optimizer.lr=0.02", "training.ema=0.5", "training.sample_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ten classes on a set of four, and what it said."""
    folder = tmp_path_factory.mktemp("numeric")
    tree = write_tree(folder / "tree", dict.fromkeys(NUMERIC, 4))
    prepare(tree, folder / "set", resolution=SIDE, workers=0, progress=False)
    done = train(folder / "run", *TINY, f"data.path={folder / 'set'}", "training.steps=4")
    return folder / "run", done.stdout


def test_classes_that_will_never_be_trained_are_counted_at_the_start(run):
    folder, said = run
    line = "model.num_classes is 10, the set has 4: 6 classes will never be trained"
    assert line in said.splitlines()
    assert said.index(line) < said.index("step 1/4")
    state = read_state(checkpoint_path(folder, 4))
    assert (state.trained, state.num_samples, state.classes) == ([0, 1, 2, 3], 16, NUMERIC)


def test_classes_that_will_never_be_trained_in_words(birds):
    data = open_data(birds)
    assert untrained_classes(data, [0, 1, 2, 3], 4) == ""  # the empty one has had images before
    assert untrained_classes(data, [0, 2, 3], 4) == (
        "model.num_classes is 4, the set has 4, 1 of them without images: 1 class will never be "
        "trained"
    )


def test_by_default_a_run_draws_the_classes_that_it_was_trained_on(run, tmp_path):
    folder, _ = run
    said: list[str] = []
    plain = sample_run(folder, tmp_path / "plain", num=10, say=said.append)
    assert said == ["6 of the model's 10 classes had no images in training: not drawn"]
    given = sample_run(folder, tmp_path / "given", num=10, classes=["1,10", "11", "2"])
    images = [sorted(done.folder.glob("0*.png")) for done in (plain, given)]
    assert len(images[0]) == 10
    assert [p.read_bytes() for p in images[0]] == [p.read_bytes() for p in images[1]]
    assert len({p.read_bytes() for p in images[0]}) == 10
    for done in (plain, given):
        record = json.loads((done.folder / "sampling.json").read_text())
        assert record["classes"] == NUMERIC
    with pytest.raises(ConfigError, match=r"class number 7 was never trained.*are 1 \(#0\), "):
        sample_run(folder, tmp_path / "other", num=1, classes=["7"])
    assert not (tmp_path / "other").exists()
    world = SimpleNamespace(device=torch.device("cpu"), is_rank_0=True, size=1)
    source = _run_source(folder, tmp_path, world, {}, [], 4, seed=0, wanted=choice.NEWEST, num=10)
    assert source.labels.tolist() == [0, 1, 2, 3] * 2 + [0, 1]


def test_two_classes_of_one_name_do_not_share_a_folder_of_samples(run, tmp_path, monkeypatch):
    folder, _ = run
    state, load = read_state(checkpoint_path(folder, 4)), choice.load_ema_model

    def renamed(*args):
        model, config, _ = load(*args)
        return model, config, replace(state, classes=BIRDS)

    monkeypatch.setattr(choice, "load_ema_model", renamed)
    first = sample_run(folder, tmp_path, num=2, classes=["0"])
    before = (first.folder / "000000.png").read_bytes()
    with pytest.raises(FastrepaError, match=r"class_numbers \[0\], now \[2\]"):
        sample_run(folder, tmp_path, num=2, classes=["2"])
    second = sample_run(folder, tmp_path, num=2, classes=["2"], overwrite=True)
    assert second.there == 0
    assert (second.folder / "000000.png").read_bytes() != before


def test_a_checkpoint_that_does_not_say_which_classes_had_images():
    state = RunState(
        step=1, optimizer_step=1, samples_seen=8, side=4, channels=3, encoder_widths=[],
        classes=NUMERIC, world_size=1,
    )  # fmt: skip
    assert trained_classes(state, 10) == [0, 1, 2, 3]
    assert trained_classes(replace(state, classes=[]), 10) == list(range(10))
    assert trained_classes(replace(state, trained=[1, 3]), 10) == [1, 3]


def test_in_training_classes_with_images_are_drawn_and_a_grid_that_fails_is_left_out(
    birds, tmp_path, world, monkeypatch
):
    drawn, warned = [], []

    def noting(model, codec, labels, *, sample_ids, **how):
        drawn.append(labels.tolist())
        if len(drawn) > 1:
            raise RuntimeError("out of memory")
        return torch.zeros(len(labels), 3, SIDE, SIDE, dtype=torch.uint8)

    monkeypatch.setattr(grids, "generate", noting)
    config = load_config(
        ROOT / "configs/quickstart.yaml",
        [*SMALL, *TINY, f"run={tmp_path / 'run'}", f"data.path={birds}", "evaluation.every=1",
         "training.global_batch=2", "evaluation.num=5", "evaluation.metrics=[fd_resnet10t]",
         "evaluation.encoders=[{name: resnet10t, weights: random, input: 32}]"],
    )  # fmt: skip
    training = Run(config, world, evaluator=RunEvaluator)
    assert training.evaluations.evaluator._images(None).labels.tolist() == [0, 2, 3, 0, 2]
    assert training.state().trained == [0, 2, 3]
    grid = grids.draw_grid(training.trainer, training.drawn, warned.append)
    assert grid.shape == (4, 3, SIDE, SIDE)
    assert warned == []
    assert grids.draw_grid(training.trainer, training.drawn, warned.append) is None
    assert drawn == [[0, 2, 3, 0]] * 2
    assert warned == ["samples of step 0: left out (RuntimeError: out of memory); the rest goes on"]


def state_of(data, **changes):
    state = RunState(
        step=7, optimizer_step=7, samples_seen=56, side=4, channels=3, encoder_widths=[],
        classes=data.classes, world_size=1, num_samples=data.num_samples, data_digest=data.digest,
    )  # fmt: skip
    return replace(state, **changes)


@pytest.mark.parametrize(
    ("recorded", "difference"),
    [
        (
            ["crane", "gull", "crane", "maillot, tank suit"],
            "class 1 is 'tern'.*step 7 it is 'gull'",
        ),
        (["crane", "crane", "tern", "maillot, tank suit"], "class 1 is 'tern'.*it is 'crane'"),
        (BIRDS[:3], "class 3 is 'maillot, tank suit'.*there is no such class"),
        ([*BIRDS, "wren"], "there is no class 4, in the checkpoint of step 7 it is 'wren'"),
        (BIRDS[::-1], "class 0 is 'crane', in the checkpoint of step 7 it is 'maillot, tank suit'"),
    ],
)
def test_the_first_class_that_differs_is_named(birds, recorded, difference):
    data = open_data(birds)
    with pytest.raises(DataError, match=difference):
        check_classes(state_of(data, classes=recorded), data)


def test_what_is_alike_or_was_not_recorded_is_no_difference(birds, tmp_path):
    data = open_data(birds)
    for changes in ({}, {"classes": []}, {"num_samples": 0, "data_digest": ""}):
        state = state_of(data, **changes)
        check_classes(state, data)
        assert list(other_samples(state, data)) == []
    cafe = SimpleNamespace(path="x", classes=["caf\u00e9"])
    check_classes(state_of(data, classes=["cafe\u0301"]), cafe)
    assert list(other_samples(state_of(data, num_samples=1200), data)) == [
        "data.path held 1,200 images and now holds 3"
    ]
    others = open_data(webdataset(tmp_path, [3, 2, 0], BIRDS))
    assert len(list(other_samples(state_of(data), others))) == 1


def test_columns_are_no_other_samples(tmp_path):
    plain = write_set(tmp_path / "plain")
    with_columns = write_set(tmp_path / "columns", latents=1, encoders={"one": 1})
    assert plain.digest == with_columns.digest


def test_a_run_whose_set_was_prepared_anew(run, tmp_path):
    """Other classes are refused; other images go on with a warning, whatever stands in the way of
    pictures and boards.
    """
    shutil.copytree(run[0], tmp_path / "run")
    for name, sizes in (("ant", ("1", "10", "2", "ant")), ("more", NUMERIC)):
        tree = write_tree(tmp_path / f"{name}_tree", dict.fromkeys(sizes, 5))
        prepare(tree, tmp_path / name, resolution=SIDE, workers=0, progress=False)
    again = [*TINY, "training.steps=6"]
    refused = train(tmp_path / "run", *again, f"data.path={tmp_path / 'ant'}", check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "class 2 is '2', in the checkpoint of step 4 it is '11'" in refused.stderr
    for name, kind in (("curves.png", "folder"), ("samples", "file"), ("tensorboard", "file")):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.mkdir() if kind == "folder" else path.touch()
    said = train(
        tmp_path / "run", *again, f"data.path={tmp_path / 'more'}", "training.tensorboard=true"
    ).stdout
    assert "data.path held 16 images and now holds 20: this run's curve changes" in said
    for name in ("curves.png", "samples/step_0000006.png", "tensorboard"):
        assert f"warning: {tmp_path / 'run' / name}: " in said
    assert checkpoint_path(tmp_path / "run", 6).is_dir()


# Decorations --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), r"x.png: cannot be written \(.*No space left"),
        (ValueError("no\n  such colour"), r"x.png: left out \(ValueError: no such colour\)"),
        (MemoryError(), "x.png: left out .MemoryError"),
        (DataError("y: z"), r"x.png: left out \(y: z\); the rest goes on"),
    ],
)
def test_whatever_fails_in_a_decoration_is_one_line(error, words, capsys):
    with decoration("x.png"):
        raise error
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert said.count("\n") == 1
    assert re.search(words, said)


def broken(*args, **options):
    raise RuntimeError("matplotlib has no mood for this")


def test_samples_stand_without_their_grid(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "save_grid", broken)
    done = sample_run(run[0], tmp_path, num=3, npz=True)
    assert done.grid is None
    assert len(list(tmp_path.glob("0*.png"))) == 3
    assert np.load(done.npz)["arr_0"].shape == (3, SIDE, SIDE, 3)
    assert "grid.png: left out (RuntimeError: matplotlib has no mood" in capsys.readouterr().err


def test_a_probe_stands_without_its_picture(tmp_path, monkeypatch, capsys):
    path = webdataset(tmp_path, np.repeat([1, 2], 12))
    monkeypatch.setattr(probing, "save_features", broken)
    probed = probing.probe(path, encoders="resnet10t=random@32", out=tmp_path / "out")
    assert probed.files == ["probe.json"]
    ranked = json.loads((tmp_path / "out/probe.json").read_text())["ranking"][0]
    assert ranked["raw_pixels"]["linear_probe"] == 1.0  # told apart, though class 0 is empty
    assert "features.png: left out" in capsys.readouterr().err


def test_boards_end_with_a_word_and_training_goes_on(tmp_path, monkeypatch, capsys):
    config = load_config(ROOT / "configs/quickstart.yaml", [f"run={tmp_path}"])
    import torch.utils.tensorboard as boards

    line = {"step": 1.0, "loss": 1.0, "images_per_s": 1.0, "peak_memory_bytes": 0.0,
            "skipped_steps": 0.0, "data_wait": 0.0, "step_seconds": 1.0}  # fmt: skip
    for failing in ("__init__", "add_scalar", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(boards.SummaryWriter, failing, broken)
            with Telemetry(tmp_path, config, start_step=0, active=True) as telemetry:
                telemetry.log(line)
                telemetry.log(line | {"step": 2.0})
        assert capsys.readouterr().out.count("tensorboard: left out (RuntimeError") == 1


def test_the_picture_that_is_asked_for_does_fail(birds):
    with pytest.raises(DataError, match=r"/proc/x\.png: cannot be written"):
        show(birds, "/proc/x.png")
