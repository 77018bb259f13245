"""The page about runs: made of real ones, read by a parser, used in a real browser."""

import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastrepa.commands.report.report import MAX_RUNS, write_report
from fastrepa.config import load_config
from fastrepa.errors import ConfigError, DataError
from fastrepa.pages.curves import POINTS, curves, is_evaluation, panels
from fastrepa.pages.heat import heat_colours
from fastrepa.pages.page import ALL_PICTURES, PICTURES
from fastrepa.pages.run_record import flattened, read_runs
from fastrepa.runtime.regions import NAMES
from tests import browser
from tests.command_line import run
from tests.pages.test_heat import probe_record
from tests.runs import ROOT, SMALL, metrics

VOID = {"meta", "link", "input", "img", "wbr"}


class Parsed(HTMLParser):
    """Every element as (tag, attributes, text inside), and whether tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {[e['tag'] for e in self._open]}"

    def handle_starttag(self, tag, attrs):
        inside = [e["tag"] for e in self._open]
        element = {"tag": tag, **dict(attrs), "text": "", "inside": inside}
        self.elements.append(element)
        if tag not in VOID and tag not in ("path", "circle"):
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag):
        return [e for e in self.elements if e["tag"] == tag]

    def by_id(self, name):
        return next(e for e in self.elements if e.get("id") == name)

    def rows(self, label):
        """Return {head: cells} of the table in the region of that label."""
        out, on = {}, False
        for e in self.elements:
            if "aria-label" in e and "wide" in (e.get("class") or ""):
                on = e["aria-label"] == label
            if on and e["tag"] == "th" and e.get("scope") == "row":
                out[(head := " ".join(e["text"].split()))] = []
            elif on and e["tag"] == "td":
                out[head].append(e["text"].strip())
        return out


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """An aligned run of 6 steps and a plain one of 4, both real."""
    folder = tmp_path_factory.mktemp("runs")
    config = ROOT / "configs/quickstart.yaml"
    both = [*SMALL, "training.sample_every=2", "training.checkpoint_every=0"]
    run("train", config, f"run={folder / 'aligned'}", *both, "training.steps=6")
    run("train", config, f"run={folder / 'plain'}", *both, "training.steps=4", "seed=1",
        "vision.encoders=[]")  # fmt: skip
    return folder / "aligned", folder / "plain"


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "both.html"
    assert run("report", *trained, "-o", out).strip() == str(out)
    return out


@pytest.fixture
def copy(trained, tmp_path):
    """The aligned run, to be damaged."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def of(folder, tmp_path):
    return Parsed(write_report([folder], tmp_path / "page.html").read_text())


def test_the_page_is_whole_by_itself_and_well_formed(page):
    text = page.read_text()
    parsed = Parsed(text)
    ids = [e["id"] for e in parsed.elements if "id" in e]
    assert len(ids) == len(set(ids))
    for e in parsed.elements:
        for name in ("src", "href"):
            if name in e:
                assert e[name].startswith(("data:", "#")), e
        for name in ("for", "aria-labelledby"):
            if name in e:
                assert e[name] in ids, e
    assert {e["href"][1:] for e in parsed.all("a") if e["href"].startswith("#")} <= set(ids)
    style = parsed.all("style")[0]["text"]
    assert "url(" not in style and "@import" not in style
    # The one address is the name of SVG's elements.
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_page_can_be_read_without_eyes(page):
    parsed = Parsed(page.read_text())
    assert parsed.all("html")[0]["lang"] == "en"
    levels = [int(e["tag"][1]) for e in parsed.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    pictures = parsed.all("img")
    assert len(pictures) == 5
    assert len({e["alt"] for e in pictures}) == 5
    for e in parsed.elements:
        if e.get("role") == "img":
            assert e["aria-label"]
        if e["tag"] == "input":
            labelled = "label" in e["inside"] or any(
                label.get("for") == e.get("id") for label in parsed.all("label")
            )
            assert labelled, e
        if e["tag"] == "th" and e["text"].strip():
            assert e["scope"] in ("row", "col")


def test_numbers_are_the_runs_own(trained, page):
    parsed = Parsed(page.read_text())
    lines = [metrics(folder) for folder in trained]
    summary = parsed.rows("Summary table")
    assert summary["state"] == ["finished: 6 steps", "finished: 4 steps"]
    assert summary["aligned to"] == ["tf_efficientnet_lite0, block 2, weight 0.5", "nothing"]
    for row, key in (("loss", "loss"), ("velocity loss", "velocity_loss")):
        means = [np.mean([line[key] for line in of]) for of in lines]
        assert summary[row] == [f"{mean:.4g}" for mean in means]
    assert summary["alignment loss"][1] == "–"
    data = json.loads(parsed.by_id("data")["text"])
    assert data["runs"] == ["aligned", "plain"]
    for number, own in enumerate(lines):
        curve = data["curves"]["loss"][number]
        assert curve["step"] == [line["step"] for line in own]
        assert curve["value"] == pytest.approx([line["loss"] for line in own], rel=1e-5)
    assert [curve["run"] for curve in data["curves"]["alignment_loss"]] == [0]

    later = lines[0][1:]
    seconds = sum(line["step_seconds"] for line in later) / len(later)
    shares = {
        name: sum(line[name] * line["step_seconds"] for line in later) / len(later) / seconds
        for name in NAMES
    }
    times = parsed.rows("Time of a step by region")
    for name, share in shares.items():
        if share:
            said = f"{1e3 * share * seconds:,.1f} ms, {share:.1%}"
            assert times[name.replace("_", " ")][0] == said


def test_what_differs_is_named_and_nothing_else(trained, page):
    rows = Parsed(page.read_text()).rows("Configuration differences")
    configs = [
        dict(flattened(load_config(folder / "config.yaml").model_dump(mode="json")))
        for folder in trained
    ]
    keys = {k for k in configs[0].keys() | configs[1].keys()
            if configs[0].get(k, "-") != configs[1].get(k, "-")} - {"run"}  # fmt: skip
    assert rows.keys() == keys
    assert {"seed", "training.steps", "vision.encoders.0.name"} <= keys
    assert rows["seed"] == ["0", "1"]
    assert rows["vision.encoders.0.name"] == ["tf_efficientnet_lite0", "not set"]


def test_one_run_is_compared_with_the_defaults(copy, tmp_path):
    rows = of(copy, tmp_path).rows("Configuration differences")
    assert rows["training.global_batch"] == ["8", "256"]
    assert rows["objective.prediction"] == ["data", "velocity"]
    assert "training.optimizer.eps" not in rows
    assert "model.width" not in rows and "data.path" not in rows  # no default goes against these


def test_environments_differ_by_mark(trained, copy, tmp_path):
    environment = json.loads((copy / "environment.json").read_text())
    environment["versions"]["torch"] = "1.0"
    environment["world_size"] = 2
    (copy / "environment.json").write_text(json.dumps(environment))
    out = write_report([trained[0], copy], tmp_path / "page.html")
    rows = Parsed(out.read_text()).rows("Environment table")
    marked = [key.removesuffix(" differs") for key in rows if key.endswith(" differs")]
    assert sorted(marked) == ["versions.torch", "world_size"]
    assert list(rows)[:2] == [f"{key} differs" for key in marked]  # first
    assert rows["versions.torch differs"][1] == "1.0"
    assert "torchrun --nproc-per-node 2 -m fastrepa train run.yaml" in out.read_text()


def test_the_configuration_that_the_page_holds_makes_the_same_run(trained, page, tmp_path):
    parsed = Parsed(page.read_text())
    link = next(e for e in parsed.all("a") if e.get("download") == "aligned.yaml")
    (tmp_path / "aligned.yaml").write_bytes(base64.b64decode(link["href"].partition(",")[2]))
    assert load_config(tmp_path / "aligned.yaml") == load_config(trained[0] / "config.yaml")
    sha = json.loads((trained[0] / "environment.json").read_text())["git"]["sha"]
    commands = [e["text"] for e in parsed.all("pre")]
    assert f"git checkout {sha}\nfastrepa train aligned.yaml run=runs/aligned" in commands
    assert f"fastrepa report {trained[0]} {trained[1]}" in commands


def test_a_run_that_goes_on_with_a_line_half_written(copy, tmp_path):
    path = copy / "metrics.jsonl"
    lines = path.read_text().splitlines()[:3]
    bad = json.loads(lines[1]) | {"loss": None}
    path.write_text("\n".join([lines[0], json.dumps(bad), lines[2], lines[2][:40]]))
    shutil.rmtree(copy / "samples")
    parsed = of(copy, tmp_path)
    assert parsed.rows("Summary table")["state"][0].startswith("not finished: step 3 of 6")
    text = " ".join(e["text"] for e in parsed.all("p"))
    assert "1 line of metrics.jsonl left out" in text
    assert "No samples have been drawn" in text
    assert "No evaluation has been logged" in text
    loss = json.loads(parsed.by_id("data")["text"])["curves"]["loss"][0]
    assert loss["step"] == [1, 3] and loss["bad"] == [2]


def test_a_run_of_which_hardly_anything_is_there(tmp_path):
    folder = tmp_path / "<b>&\"run'"
    folder.mkdir()
    (folder / "config.yaml").write_text("{unclosed")
    (folder / "samples").mkdir()
    (folder / "samples" / "step_0000002.png").write_bytes(b"no picture")
    parsed = of(folder, tmp_path)
    assert parsed.all("h1")[0]["text"] == folder.name
    text = " ".join(e["text"] for e in parsed.all("p"))
    for said in ("Nothing has been logged yet", "config.yaml cannot be read",
                 "environment.json is missing", "step_0000002.png cannot be read"):  # fmt: skip
        assert said in text


def test_evaluations_have_curves_of_their_own(copy, tmp_path):
    names = ("fid", "sfid", "kid", "inception_score", "precision", "recall", "clip_score",
             "fd_dinov2_vitb14", "kd_x", "recall_x")  # fmt: skip
    others = ("kid_std", "loss", "lr", "step", "images_per_s", "skipped_steps", *NAMES)
    assert [name for name in (*names, *others) if is_evaluation(name)] == list(names)
    path = copy / "metrics.jsonl"
    with path.open("a") as f:  # a line of its own for a step that has one
        f.write(json.dumps({"step": 4, "fd_x": 40.0}) + "\n")
        f.write(json.dumps({"step": 6, "fd_x": 30.5}) + "\n")
    [record] = read_runs([copy])
    assert len(record.lines) == 6
    panel = next(p for p in panels([record]) if p.group == "Evaluation")
    assert (panel.key, panel.title, panel.unit) == ("fd_x", "fd_x", "lower is better")
    assert curves([record], "fd_x")[0]["mean"] == [40.0, 30.5]
    assert of(copy, tmp_path).rows("Summary table")["fd_x"] == ["30.5 at step 6"]


def test_what_a_probe_found_is_shown(trained, copy, tmp_path):
    assert not [e for e in of(copy, tmp_path).elements if e.get("id") == "blocks"]
    (copy / "probe").mkdir()
    shutil.copy(trained[0] / "curves.png", copy / "probe" / "heat_map.png")
    (copy / "probe" / "probe.json").write_text(json.dumps({"said": ["Block 2 leads."]}))
    parsed = of(copy, tmp_path)
    assert "Block 2 leads." in [e["text"] for e in parsed.all("p")]
    assert "Heat maps of run" in parsed.all("img")[-1]["alt"]


def test_heat_maps_are_tables_in_their_colours(copy, tmp_path):
    record = probe_record()
    lowest, half = (heat_colours(np.array([[share]]))[0][0] for share in (0.0, 0.5))
    (copy / "probe").mkdir()
    (copy / "probe" / "probe.json").write_text(json.dumps(record))
    parsed = of(copy, tmp_path)
    tables = [e for e in parsed.all("table") if e.get("class") == "heat"]
    assert len(tables) == 3 and not [e for e in parsed.all("img") if "Heat" in e["alt"]]
    cells = [e for e in parsed.all("td") if e.get("title")]
    assert len(cells) == 3 * 2 * 60 - 60  # of many steps some, and none where nothing is known
    for cell, (ground, ink) in ((cells[0], lowest), (cells[-1], half)):
        assert cell["style"] == f"background:{ground};color:{ink}"
    assert (cells[0]["title"], cells[-1]["title"]) == ("0.10", "45")
    record["cknna"] = {}  # of no probe's: neither maps nor a picture
    (copy / "probe" / "probe.json").write_text(json.dumps(record))
    assert not [e for e in of(copy, tmp_path).elements if e.get("id") == "blocks"]


def test_long_runs_are_thinned(trained, copy):
    lines = [{"step": s, "seconds": s / 2, "loss": math.sin(s)} for s in range(1, 5001)]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = trained[0] / "samples" / "step_0000002.png"
    for step in range(100):
        shutil.copy(picture, copy / "samples" / f"step_{step:07d}.png")
    [curve] = curves(read_runs([copy]), "loss")
    assert len(curve["step"]) == len(curve["value"]) == len(curve["mean"]) == POINTS
    assert curve["step"][-1] == 5000
    parsed = of(copy, copy.parent)
    assert len(parsed.all("img")) == PICTURES
    assert parsed.by_id("sample-step")["data-steps"].split()[:: PICTURES - 1] == ["0", "99"]
    many = [copy, *(shutil.copytree(copy, copy.with_name(f"run{i}")) for i in range(MAX_RUNS - 1))]
    page = write_report(many, copy.with_name("page.html"))
    pictures = [e["alt"] for e in Parsed(page.read_text()).all("img")]
    assert len(pictures) == ALL_PICTURES
    assert sum(alt.startswith("Samples of run3 ") for alt in pictures) == ALL_PICTURES // MAX_RUNS


def test_mistakes_are_named(trained, tmp_path):
    aligned, plain = trained
    for folders, out, kind, said in (
        ([aligned.with_name("alinged")], "x.html", DataError, "did you mean 'aligned'"),
        ([aligned.parent], "x.html", DataError, "is no run folder"),
        ([aligned, aligned / "."], "x.html", DataError, "given twice"),
        ([aligned, plain], "config.yaml", ConfigError, "ends in .html"),
        ([aligned] * (MAX_RUNS + 1), "x.html", ConfigError, f"1 to {MAX_RUNS} runs"),
    ):
        with pytest.raises(kind, match=said):
            write_report(folders, tmp_path / out)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report([aligned], tmp_path / "file" / "x.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_names_tell_runs_apart(trained, tmp_path):
    twin = shutil.copytree(trained[0], tmp_path / "aligned")
    names = [record.name for record in read_runs([trained[0], twin])]
    assert names == [f"{trained[0].parent.name}/aligned", f"{tmp_path.name}/aligned"]
    folders = [shutil.copytree(twin, tmp_path / of / "script>") for of in ("a<", "b<")]
    data = Parsed(write_report(folders, tmp_path / "page.html").read_text()).by_id("data")
    assert json.loads(data["text"])["runs"] == ["a</script>", "b</script>"]


# In a browser ---------------------------------------------------------------------------------

CONTRAST = """(() => {
  const numbers = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => {
    const [r, g, b] = numbers(c).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if ((numbers(c)[3] ?? 1) > 0) return c;
    }
  };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(e.closest("svg") ? style.fill : style.color), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([e.tagName, e.className, e.textContent.slice(0, 20), ratio]);
  }
  return low;
})()"""
SHOWN = """[...document.querySelectorAll("figure.grid img")].filter((i) => i.checkVisibility())
  .map((i) => i.alt + (i.complete && i.naturalWidth > 0 ? "" : " broken"))"""
VALUES = "document.querySelector('#curve-loss .values').textContent"


@pytest.fixture(scope="module")
def chromium():
    path, why = browser.find()
    if path is None:
        pytest.skip(why)
    return path


def test_in_a_browser(chromium, page, tmp_path):
    with browser.Page(chromium, tmp_path / "profile", width=1400) as tab:
        tab.open(page.as_uri())
        assert tab.run("document.documentElement.scrollWidth") <= 1400
        drawn = "document.querySelectorAll('#curve-loss path:not(.raw)').length"
        assert tab.run(drawn) == 2

        # The slider, by keys alone.
        tab.run("document.getElementById('sample-step').focus()")
        assert tab.run(SHOWN) == ["Samples of aligned at step 6", "Samples of plain at step 4"]
        assert tab.run("document.querySelectorAll('.of')[1].textContent") == "of step 4"
        before = tab.run("document.getElementById('sample-shown').textContent")
        tab.press("ArrowLeft")
        assert tab.run(SHOWN) == ["Samples of aligned at step 4", "Samples of plain at step 4"]
        tab.press("Home")
        assert tab.run(SHOWN) == ["Samples of aligned at step 2", "Samples of plain at step 2"]
        assert tab.run("document.getElementById('sample-shown').textContent") == "2" != before
        assert tab.run("document.activeElement.getAttribute('aria-valuetext')") == "step 2"

        # A curve's values, by keys and by pointing.
        tab.run("document.querySelector('#curve-loss svg').focus()")
        for _ in range(2):
            tab.press("ArrowLeft")
        said = tab.run(VALUES)
        assert said.startswith("step 5aligned")
        assert "plain" not in said  # it has no step 5
        tab.press("Home")
        assert tab.run(VALUES).count(" ") == 3  # step 1, and both runs
        tab.press("Escape")
        assert tab.run(VALUES).startswith("last")
        box = tab.run("(() => { const svg = document.querySelector('#curve-loss svg');"
                      "svg.scrollIntoView({block: 'center'});"
                      "const b = svg.getBoundingClientRect();"
                      "return [b.left, b.top, b.width, b.height] })()")  # fmt: skip
        tab.move(box[0] + box[2] - 13, box[1] + box[3] / 2)
        assert tab.run(VALUES).startswith("step 6aligned")

        # What the controls change.
        ticks = "[...document.querySelectorAll('#curve-loss text')].map(t => t.textContent).join()"
        line = "document.querySelector('#curve-loss path:not(.raw)').getAttribute('d')"
        linear = tab.run(line)
        tab.run("document.querySelector('#curve-loss input[name=log]').click()")
        assert tab.run(line) != linear
        tab.run("document.querySelector('input[name=axis][value=seconds]').focus()")
        tab.press(" ")
        assert tab.run(ticks).endswith(" s")
        tab.run("document.querySelector('input[name=shown][value=\"1\"]').click()")
        assert tab.run(drawn) == 1
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            tab.call("Emulation.setEmulatedMedia", features=[feature])
            paper = tab.run("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
            assert tab.run(CONTRAST) == []

        # A phone.
        tab.call("Emulation.setDeviceMetricsOverride",
                 width=390, height=844, deviceScaleFactor=1, mobile=True)  # fmt: skip
        tab.run("new Promise(done => setTimeout(done, 200))")
        assert tab.run("document.documentElement.scrollWidth") <= 390
        assert tab.run("document.querySelector('#curve-loss svg').viewBox.baseVal.width") < 390

        assert tab.problems == []
        assert [r for r in tab.requests if not r.startswith("data:")] == [page.as_uri()]


def test_a_bare_page_has_no_error_either(chromium, tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": "x"}))
    out = write_report([folder], tmp_path / "page.html")
    with browser.Page(chromium, tmp_path / "profile", width=390) as tab:
        tab.open(out.as_uri())
        assert tab.problems == []
        assert tab.run(CONTRAST) == []
