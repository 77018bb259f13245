"""Texts of others: YAML, overrides and JSON are read as they are meant, or refused in one line."""

import json
import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fastrepa.config import Config, config_from_dict, load_config, save_config
from fastrepa.errors import ConfigError, DataError, shown
from fastrepa.reading.text import (
    MAX_YAML_BYTES,
    dump_yaml,
    parse_json,
    parse_yaml,
    read_json,
    read_yaml,
    whole_number,
    written,
)
from fastrepa.vision.registry import parse_encoders

SMALL = """\
run: r
data: {path: d, codec: {name: pixel, side: 16}}
model: {width: 32, depth: 2, heads: 2, patch: 4}
training:
  steps: 10
  optimizer: {lr: 1e-3, betas: [0.9, 0.95]}
  tensorboard: no
"""
TREE = yaml.safe_load(SMALL)  # another reader's, for what both read alike
TREE["training"]["optimizer"]["lr"] = 1e-3


def loaded(folder: Path, text: str | bytes, *overrides: str) -> Config:
    return load_config(_written(folder, text), overrides)


def _written(folder: Path, text: str | bytes = SMALL) -> Path:
    path = folder / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text, *overrides)
    said = str(caught.value).replace(str(folder), "")
    assert len(said) <= 500 and "\n" not in said, said
    return said


# YAML --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-010", -10), ("0x1F", 31), ("0o17", 15), ("400_000", 400_000), ("+5", 5),
        ("1e-4", 1e-4), ("1E3", 1e3), (".5", 0.5), ("5.", 5.0), ("1_0.5", 10.5),
        ("1e999", math.inf),
        (".inf", math.inf), ("-.INF", -math.inf), ("1:30", "1:30"), ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"), ("0x_", "0x_"), ("0b11", "0b11"), ("1_", "1_"), ("_1", "_1"),
        ("1__0", "1__0"), ("²", "²"), ("٣", "٣"), ("1.2.3", "1.2.3"), ("=", "="), ("inf", "inf"),
        ("nan", "nan"), ("yes", True), ("No", False), ("OFF", False), ("on", True), ("y", "y"),
        ("true", True), ("tRUE", "tRUE"), ("~", None), ("", None), ("Null", None), ("'010'", "010"),
        ("!!str 010", "010"), ("!!int '010'", 10), ("!!float 3", 3.0), ("[1, 2,]", [1, 2]),
        ("1: a\non: b\n~: c", {"1": "a", "on": "b", "~": "c"}),
        ("- &a {k: 1}\n- *a", [{"k": 1}] * 2),
        ("%YAML 1.2\n---\na: 1\n...\n", {"a": 1}), ("| \n text\n", "text\n"),
        ("a: {<<: {k: 1, l: 1}, k: 2}", {"a": {"k": 2, "l": 1}}),
        ("<<: [{k: 1}, {k: 2, l: 2}]", {"k": 1, "l": 2}),
    ],
)  # fmt: skip
def test_what_yaml_says(text, value):
    read = parse_yaml(text, "text")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' stands there twice, in line 3"),
        ("{a: 1, 'a': 2}", "the key 'a' stands there twice, in line 1"),
        ("1: a\n'1': b", "the key '1' stands there twice"),
        ("a:\n  b: 1\n  c: {d: 1, d: 1}", "the key 'd' stands there twice, in line 3"),
        ("<<: {a: 1}\n<<: {b: 1}", "the key '<<' stands there twice"),
        ("<<: 3", "<< in line 1 takes mappings"),
        ("? [a]\n: 1", "the key in line 1 is no word"),
        ("a: " + "9" * 5000, "a number of 5,000 digits in line 1"),
        ("[" * 3000, "nested too deeply"),
        ("{a: " * 1500, "nested too deeply"),
        ("&a [*a]", "nested too deeply"),
        ('"a\\0b"', "a NUL character in line 1"),
        ('"\\ud800"', "no character in line 1"),
        ('"\\U00110000"', "no character"),
        ("a\x1b", "character 2 is a control one"),
        ("a\0b", "character 2 is a control one"),
        ("!!python/object/apply:os.system [x]", "the tag"),
        ("!!binary aGk=", "the tag"),
        ("!!set {a}", "the tag"),
        ("!!timestamp 2024-01-01", "the tag"),
        ("!mine x", "the tag '!mine' in line 1"),
        ("!!int x", "'x' in line 1 is no int"),
        ("!!null x", "'x' in line 1 is no null"),
        ("*" + "x" * 5000, "undefined alias"),
        ("a: 1\n---\nb: 1", "another document, line 2"),
        ("a: b: c", "mapping values are not allowed here, line 1, column 5"),
        ("- &a " + "[1]\n- *a" * 3, "line 2"),
    ],
)
def test_what_yaml_cannot_say(text, words):
    with pytest.raises(DataError, match=r"^text: not valid YAML: ") as caught:
        parse_yaml(text, "text")
    assert words in str(caught.value) and len(str(caught.value)) < 300


def test_aliases_are_counted_as_what_they_stand_for():
    grown = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 9):
        grown.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    merged = ["m0: &m0 {k: 1, l: 1}"]
    for i in range(1, 30):
        merged.append(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}")
    for lines in (grown, merged):
        with pytest.raises(DataError, match="more than 20,000 values, aliases written out"):
            parse_yaml("\n".join(lines), "text")
        assert parse_yaml("\n".join(lines[:3]), "text")


def test_an_alias_is_a_copy_and_an_override_changes_one(tmp_path):
    text = SMALL + "vision: {encoders: [&e {name: x, input: 5}, *e]}\n"
    encoders = loaded(tmp_path, text, "vision.encoders.1.input=7").vision.encoders
    assert [e.input for e in encoders] == [5, 7]


def test_of_a_yaml_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes("a: é\r\nb: 2\r\n".encode("utf-8-sig"))
    assert read_yaml(path) == {"a": "é", "b": 2}
    for raw, words in (
        ("a: é".encode("latin-1"), "byte 3 is not UTF-8"),
        ("a: 1".encode("utf-16"), "not UTF-8"),
        (b"#" * (MAX_YAML_BYTES + 1), "larger than 500 kB"),
    ):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=words):
            read_yaml(path)
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        read_yaml(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="larger than 500 kB"):
        read_yaml(Path("/dev/zero"), ConfigError)


TEXTS = ["010", "1e3", "yes", "1:30", "0o7", "2024-01-01", "<<", "a # b", " x", "", "~", "null",
         "0x_", "é\x1b\u202e", "1_0", "0x1f", ".", "- a", "{", "a: b", "\n", "'", "!x",
         "*x"]  # fmt: skip


@given(st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=["Cs"]))))
@settings(max_examples=150, derandomize=True, deadline=None, database=None)
def test_what_is_dumped_is_read_back_by_us_and_by_others(text):
    value = {"key": text, text or "k": [text, 1e-5, 10, None, True]}
    dumped = dump_yaml(value)
    if "\0" not in text:
        assert parse_yaml(dumped, "text") == value
    assert yaml.safe_load(dumped) == value


# Configurations -----------------------------------------------------------------------------------


def test_the_small_configuration_is_one(tmp_path):
    config = loaded(tmp_path, SMALL)
    assert config == config_from_dict(TREE)
    assert config.training.tensorboard is False and config.training.optimizer.lr == 1e-3


def test_a_byte_order_mark_line_ends_of_windows_and_an_exponent(tmp_path):
    windows = SMALL.replace("1e-3", "1E-3").replace("\n", "\r\n").encode("utf-8-sig")
    assert loaded(tmp_path, windows) == config_from_dict(TREE)


@pytest.mark.parametrize(
    ("found", "put", "words"),
    [
        ("  steps: 10\n", "  steps: 10\n  steps: 20\n", "the key 'steps' stands there twice, in"),
        ("lr: 1e-3", "lr: 1e-3, lr: 5", "the key 'lr' stands there twice"),
        ("model:", "training: {}\nmodel:", "the key 'training' stands there twice"),
        ("10", "1:30", "training.steps: '1:30' is not allowed: input should be a valid integer"),
        ("10", "2024-01-01", "training.steps: '2024-01-01'"),
        ("10", "0x_", "training.steps: '0x_'"),
        ("10", "9" * 5000, "a number of 5,000 digits in line 5"),
        ("10", "9" * 300, "training.steps: 999"),
        ("10", "[" * 1500, "nested too deeply"),
        ("run: r", 'run: "a\\0b"', "a NUL character in line 1"),
        ("run: r", 'run: ""', "run: '' is not allowed: a path cannot be empty"),
        ("run: r", "run: '  '", "a path cannot be empty"),
        ("run: r", "run: no", "run: False is not allowed: without quotes it is true or false"),
        ("run: r", "run: [r]", "run: ['r'] is not allowed"),
        ("run: r", "run: ~nobody_has_this_name/x", "there is no such home folder"),
        ("pixel", "k" * 5000, "data.codec.name: 'kkkkkkkk"),
        ("  tensorboard", "  " + "k" * 1000, "k...: unknown key"),
        ("d, codec", "'', codec", "data.path: '' is not allowed"),
        ("name: pixel", "name: pixel, weights: ''", "data.codec.weights: '' is not allowed"),
    ],
)  # fmt: skip
def test_what_a_configuration_cannot_hold(tmp_path, found, put, words):
    said = refusal(tmp_path, SMALL.replace(found, put, 1))
    assert words in said
    assert all(len(part) <= 82 for part in said.split(" ") if part[:1] == "'"), said


def test_of_many_mistakes_as_many_are_told_as_there_is_room_for(tmp_path):
    said = refusal(tmp_path, SMALL + "".join(f"{'k' * 60}{i}: 1\n" for i in range(900)))
    assert said.startswith("/c.yaml: kkk") and said.endswith(" more")
    values = ", ".join(["[x]"] * 900)
    said = refusal(tmp_path, SMALL, f"evaluation.metrics=[{values}]")
    assert "evaluation.metrics.2: ['x'] is not allowed" in said and said.endswith(" more")


@pytest.mark.parametrize("name", ["no", "2024", "a # b", "[x", "~", "\x1b\u202e", "a: b", ""])
def test_a_run_that_is_made_of_a_path_is_called_as_the_path(tmp_path, name):
    folder = tmp_path / name
    assert load_config(_written(tmp_path), ["seed=1"], run=folder).run == str(folder)


def test_an_octal_that_is_none(tmp_path):
    assert loaded(tmp_path, SMALL.replace("10\n", "010\n")).training.steps == 10
    assert loaded(tmp_path, SMALL, "training.steps=010").training.steps == 10
    assert loaded(tmp_path, SMALL, "training.steps=1_000").training.steps == 1000


@pytest.mark.parametrize("name", ["0123", "2024", "1e3", "0x1F", "1_000", "-5", ".5", "2024-01-01"])
def test_text_that_looks_like_a_number_is_kept_as_it_is_written(tmp_path, name):
    """In a file, in an override, in a list, and in the configuration that a run saves."""
    assert loaded(tmp_path, SMALL.replace("run: r", f"run: {name}")).run == name
    config = loaded(
        tmp_path, SMALL, f"run={name}", f"data.path={name}", f"training.wandb={name}",
        f"evaluation.metrics=[{name}]", f"vision.encoders=[{{name: {name}}}]",
        f"training.keep_best={{metric: {name}}}",
    )  # fmt: skip
    assert config.run == config.data.path == config.training.wandb == name
    assert config.evaluation.metrics == (name,) and config.vision.encoders[0].name == name
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["run"] == name
    assert f"model.name: '{name}' is not one of" in refusal(tmp_path, SMALL, f"model.name={name}")


def test_numbers_in_the_configuration_are_plain_ones(tmp_path):
    text = SMALL + "zero: {reduce_bucket_size: 1_000}\n"
    config = loaded(tmp_path, text, "training.ema=[0.9, 0.5]", "training.recompute=02")
    for value in (config.training.steps, config.training.recompute, config.training.ema[0].decay,
                  config.zero.reduce_bucket_size, config.training.optimizer.betas[0]):  # fmt: skip
        assert type(value) in (int, float)
    assert written(config.training.steps) == 10


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.optimizer.betas.²=3", "'²' is no position in a list of 2"),
        ("training.optimizer.betas.٣=3", "'٣' is no position in a list of 2"),
        ("training.optimizer.betas.-1=3", "'-1' is no position in a list of 2"),
        ("training.optimizer.betas.2=3", "'2' is no position in a list of 2"),
        ("training.optimizer.betas." + "1" * 5000 + "=3", "is no position in a list of 2"),
        ("training..steps=1", "expected path.to.key=value"),
        (".training=1", "expected path.to.key=value"),
        ("training.=1", "expected path.to.key=value"),
        ("=1", "expected path.to.key=value"),
        ("x" * 5000, "expected path.to.key=value"),
        ("x" * 5000 + "=1", "unknown key"),
        ("\nrun=x", "\\nrun: unknown key"),
        ("training.steps=" + "9" * 5000, "a number of 5,000 digits"),
        ("training.steps=" + "x" * 5000, "training.steps: 'xxxx"),
        ("training.log_every" + ".a" * 5000 + "=1", "is a value"),
        ("survival.bad_steps" + ".a" * 5000 + "=1", "survival.bad_steps: {'a': "),
        ("run=a #b", "begins a comment; put the value in quotes"),
        ("run=*x", "undefined alias 'x'"),
        ("run=\udce9", "not UTF-8"),
        ("run=a\0b", "a control one"),
        ("survival={bad_steps: 1, bad_steps: 2}", "the key 'bad_steps' stands there twice"),
        ("seed=9223372036854775808", "seed: 9223372036854775808 is not allowed"),
    ],
)
def test_what_an_override_cannot_say(tmp_path, override, words):
    text = SMALL.replace("no\n", "no\n  log_every: 5\n")
    said = refusal(tmp_path, text, override)
    assert words in said
    if said.startswith("override"):
        assert len(said.split(": ")[0]) <= len("override ") + 80


def test_a_position_in_a_list_can_be_set(tmp_path):
    config = loaded(tmp_path, SMALL, "training.optimizer.betas.1=.5", "run='a #b'", "seed=3")
    assert config.training.optimizer.betas == (0.9, 0.5) and config.run == "a #b"


def _keys(model: type[BaseModel], path: str = "") -> list[str]:
    """The dotted keys of a section, and of those in it."""
    found = []
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        found += _keys(sections[0], f"{path}{name}.") if sections else [path + name]
    return found


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_no_number_of_the_configuration_is_infinite_or_none(number):
    keys = [key for key in _keys(Config) if not key.startswith("training.ema.")]
    assert {"training.optimizer.lr", "objective.time_mean", "survival.stall_seconds"} <= {*keys}
    keys.remove("model.name")
    for key in [*keys, "training.ema"]:
        tree = json.loads(json.dumps(TREE))
        *parents, last = key.replace("encoders.", "encoders.0.").split(".")
        node = tree
        for part in parents:
            if part == "0":
                node = node[0]
            else:
                node = node.setdefault(part, [{"name": "x"}] if part == "encoders" else {})
        node[last] = [number] if last == "betas" else number
        with pytest.raises(ConfigError) as caught:
            config_from_dict(tree)
        assert last in str(caught.value)


def test_home_folders_are_meant_by_a_tilde_wherever_a_path_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = loaded(
        tmp_path,
        SMALL.replace("run: r", "run: ~/runs/x"),
        "data.path=~/set", "data.codec.weights=~/vae", "zero.nvme_path=~/swap",
        "evaluation.reference=~/set", "evaluation.inception_weights=~/i.pt",
        "vision.encoders=[{name: x, weights: ~/w.pth}]",
    )  # fmt: skip
    assert config.run == "/home/me/runs/x" and config.data.path == "/home/me/set"
    assert config.data.codec.weights == "/home/me/vae"
    assert config.zero.nvme_path == "/home/me/swap"
    assert config.evaluation.reference == "/home/me/set"
    assert config.evaluation.inception_weights == "/home/me/i.pt"
    assert config.vision.encoders[0].weights == "/home/me/w.pth"
    (encoder,) = parse_encoders("x=~/w.pth@224", "--encoders")
    assert encoder.weights == "/home/me/w.pth" and encoder.input == 224
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    # A folder that is called so, and what has one inside.
    assert loaded(tmp_path, SMALL, "run=./~", "data.path=a~b").run == "./~"
    for text in ("x=~nobody_has_this_name", "x@²", "x@" + "9" * 5000, "x= @5"):
        with pytest.raises(ConfigError):
            parse_encoders(text, "--encoders")


# JSON ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        ('{"a": [{"b": 1, "b": 1}]}', "the key 'b' stands there twice"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "digits"),
        (b"\xff{}", "decode"),
        ("{", "line 1 column 2"),
        ("", "line 1 column 1"),
    ],
)
def test_what_json_cannot_say(tmp_path, text, words):
    with pytest.raises(DataError, match=r"^text: not valid JSON") as caught:
        parse_json(text, "text")
    assert words in str(caught.value)
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"x\.json: not valid JSON"):
        read_json(path, ConfigError)


def test_what_json_says(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes('{"é": [1, NaN]}'.encode("utf-8-sig"))
    read = read_json(path)
    assert math.isnan(read["é"][1])
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path)


# Small things -------------------------------------------------------------------------------------


def test_what_an_error_echoes_is_short():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("k" * 5000, list(range(5000)), deep, {"a" * 5000: 1}, 10**400, 10**5000,
                  "\x1b" * 500, {i: i for i in range(99)}, b"x" * 5000, object()):  # fmt: skip
        assert len(shown(value)) <= 80 and shown(value).isprintable()
    assert shown("a'b") == '"a\'b"' and shown(5) == "5" and shown(None) == "None"


def test_whole_numbers_are_of_ascii_digits():
    assert whole_number("0") == 0 and whole_number("007") == 7
    for text in ("", "-1", "+1", "²", "٣", "1_0", " 1", "1\n", "1.0", "9" * 19, "9" * 5000):
        assert whole_number(text) is None


# Mutations: only a refusal in one line may come of them -------------------------------------------

NASTY = [
    "\0", "\x1b", "\ufeff", "\u202e", "²", "٣", "9" * 400, "[" * 300, "{", "}", "]", ":", ": ", ",",
    "&a ", "*a", "<<: ", "!!python/none", "!!int ", "? ", "- ", "|", ">", "'", '"', "\\", "\t",
    "\n", "#", "%", "@", "~", "~x", "0x_", "1:30", ".inf", ".nan", "null", "yes", "\udc80",
    "\u2028", "..", "=", "-1", "1e999", "\\ud800", '"\\0"', "é", "\r", "NaN", "Infinity",
]  # fmt: skip
FUZZ = settings(
    max_examples=2000, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def mutated(base: str) -> st.SearchStrategy[str]:
    """`base` with one to three pieces cut out, put in, or said twice."""
    edit = st.tuples(
        st.integers(0, len(base)), st.integers(0, 12), st.sampled_from(["", *NASTY, base[:40]])
    )

    def apply(edits: list[tuple[int, int, str]]) -> str:
        text = base
        for start, length, put in edits:
            text = text[:start] + put + text[start + length :]
        return text

    return st.lists(edit, min_size=1, max_size=3).map(apply)


def one_line(error: Exception) -> None:
    assert len(str(error)) <= 600 and "\n" not in str(error)


FLOW = "{run: r, data: {path: d}, model: {name: SiT-B/2}, seed: 1}"


@given(mutated(FLOW))
@FUZZ
def test_mutated_configurations(text):
    path = Path(os.environ["FUZZED"])
    path.write_bytes(text.encode(errors="surrogateescape"))
    try:
        load_config(path)
    except ConfigError as e:
        one_line(e)


@given(mutated("training.1=[0.9, {a: 1}]"))
@example("training.²=3")
@FUZZ
def test_mutated_overrides(override):
    path = Path(os.environ["FUZZED"])
    path.write_text("training: [0, 0]")
    with pytest.raises(ConfigError) as caught:  # there is no model, at the latest
        load_config(path, [override])
    one_line(caught.value)


@given(mutated('{"labels": [["00000/a.png", 0], ["b", -1.5e3]], "x": {"y": null, "z": true}}'))
@FUZZ
def test_mutated_json(text):
    try:
        parse_json(text.encode(errors="surrogateescape"), "text")
    except DataError as e:
        one_line(e)


@pytest.fixture(autouse=True, scope="module")
def _fuzzed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUZZED", str(tmp_path_factory.mktemp("fuzz") / "c.yaml"))
        yield
