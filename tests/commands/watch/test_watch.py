"""A run in a browser: what is served and what is not, pages that follow the run, samples drawn."""

import http.client
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from fastrepa.commands.watch import watch
from fastrepa.commands.watch.painter import MOST, Painter, Wanted, draw_samples
from fastrepa.commands.watch.watch import Server
from fastrepa.config import SampleConfig
from fastrepa.errors import ConfigError, FastrepaError
from fastrepa.generation.generate import default_labels, generate
from fastrepa.generation.pictures import save_grid
from fastrepa.runtime.ownership import owned
from fastrepa.runtime.regions import NAMES
from tests import browser
from tests.commands.report.test_report import CONTRAST, chromium
from tests.generation.tiny import CLASSES, CODEC, fake_run, tiny_model
from tests.runs import command, environment

__all__ = ["chromium"]  # a fixture
WANTED = {"classes": "", "num": 4, "seed": 7, "cfg": 2, "steps": 3}


def log(run, *steps):
    shares = dict.fromkeys(NAMES, 0.0) | {"forward": 0.25, "backward": 0.5, "other": 0.25}
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(
                json.dumps(
                    {"step": step, "seconds": step / 4, "loss": 1 / step, "velocity_loss": 1 / step,
                     "images_per_s": 32.0, "step_seconds": 0.25, **shares}
                ) + "\n"
            )  # fmt: skip


def draw_grid(run, step):
    (run / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (400, 300), (step, 90, 90)).save(run / "samples" / f"step_{step:07d}.png")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "config.yaml").write_text("training: {steps: 100}\nsample: {cfg: 3.0, steps: 8}\n")
    (folder / "environment.json").write_text(json.dumps({"device": "a machine"}))
    log(folder, 1, 2, 3)
    draw_grid(folder, 2)
    return folder


@contextmanager
def served(run, draw=None):
    with Server(run, 0, Painter(run, draw)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path, method="GET", body=None, **headers):
    """The answer's status, headers and bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def post(server, wanted=WANTED, **headers):
    origin = f"http://127.0.0.1:{server.server_port}"
    sent = {"Origin": origin, "Content_Type": "application/json", **headers}
    status, _, said = ask(server, "/draw", "POST", json.dumps(wanted), **sent)
    return status, said


# What is served -----------------------------------------------------------------------------------


def test_pages_are_served_with_their_policy_and_no_file_by_its_path(run, tmp_path):
    draw_grid(tmp_path, 5)  # beside the run
    (run / "samples/step_0000005.png").symlink_to(tmp_path / "samples/step_0000005.png")
    (run / "samples/step_0000006.png").write_text("no picture")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with served(run) as server:
        assert server.server_address[0] == "127.0.0.1"
        for path in ("/", "/draw", "/draw/state", "/samples/2.png", "/?x=1"):
            status, headers, data = ask(server, path)
            assert (status, len(data)) == (200, int(headers["Content-Length"])), path
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert "unsafe-inline' script" not in headers["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff"
            head = ask(server, path, "HEAD")
            assert head[0] == 200 and head[2] == b""
        assert ask(server, "/samples/2.png")[2] == (run / "samples/step_0000002.png").read_bytes()
        for path in (
            "/config.yaml", "/samples/../config.yaml", "/samples/%2e%2e/config.yaml", "//etc/hosts",
            "/samples/", "/samples/3.png", "/samples/5.png", "/samples/6.png", "/samples/2.png/",
            "/samples/-2.png", "/samples/step_0000002.png", "http://127.0.0.1/config.yaml",
            "/drawn/1.png", "/drawn/../samples/2.png", "/report.js",
        ):  # fmt: skip
            assert ask(server, path)[0] in (400, 404), path
        tag = ask(server, "/")[1]["ETag"]
        assert ask(server, "/", If_None_Match=tag)[0] == 304
        log(run, 4)
        assert ask(server, "/", If_None_Match=tag)[0] == 200
        (run / "config.yaml").rename(tmp_path / "kept.yaml")
        (tmp_path / "secret.yaml").write_text("training: {steps: 77}\n")
        (run / "config.yaml").symlink_to(tmp_path / "secret.yaml")
        page = ask(server, "/")[2]
        assert b"waiting: config.yaml is a link that leads out of the run" in page
        assert b"of 77" not in page
        (run / "config.yaml").unlink()
        (tmp_path / "kept.yaml").rename(run / "config.yaml")
        assert b"4 of 100" in ask(server, "/")[2]
    changed = {p for p in run.rglob("*") if p.stat().st_mtime_ns != before.get(p)}
    assert changed == {run / "metrics.jsonl"}


def test_strangers_are_refused(run):
    drawn = []
    with served(run, lambda *_: drawn.append(1)) as server:
        port = server.server_port
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", ""):
            assert ask(server, "/", Host=host)[0] == 421
            assert post(server, Host=host)[0] == 421
        for host in (f"localhost:{port}", "127.0.0.1", "localhost:9000"):  # a forwarded port
            assert ask(server, "/", Host=host)[0] == 200
        assert post(server, Origin="http://evil.example")[0] == 403
        assert post(server, Origin=f"http://localhost:{port}")[0] == 403  # not where it was asked
        assert post(server, Content_Type="text/plain")[0] == 415
        assert ask(server, "/draw", "POST", "{}")[0] == 403  # no Origin
        own = {"Origin": f"http://127.0.0.1:{port}", "Content_Type": "application/json"}
        assert ask(server, "/", "POST", "{}", **own)[0] == 404
        assert ask(server, "/draw", "POST", "x" * 5000, **own)[0] == 413
        assert ask(server, "/draw", "POST", "[" * 3000, **own)[0] == 400
        for method in ("PUT", "DELETE", "OPTIONS", "PATCH"):
            assert ask(server, "/", method)[0] == 501
    assert not drawn


def test_a_run_that_has_not_begun_and_one_that_is_removed(run, tmp_path):
    later = tmp_path / "later"
    with served(later) as server:
        page = ask(server, "/")[2]
        assert b"Idle: not begun yet." in page and b"waiting: " in page
        assert ask(server, "/draw")[0] == 200
        run.rename(later)
        (later / "metrics.jsonl").open("a").write('{"step": 4, "lo')  # a line half written
        page = ask(server, "/")[2]
        assert b"waiting: " not in page and b"step 3 of 100" in page
        shutil.rmtree(later)
        assert b"waiting: " in ask(server, "/")[2]


def test_ports(run, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: {port} cannot be had .*in use"):
            Server(run, port)
        monkeypatch.setattr(watch, "PORTS", range(port, port + 1))
        with pytest.raises(ConfigError, match="--port: none of"):
            Server(run)
        monkeypatch.setattr(watch, "PORTS", (port, 0))  # the next one that is free
        with Server(run) as server:
            assert server.server_port != port


def test_ctrl_c_ends_it_without_a_word(run):
    process = subprocess.Popen(
        command("watch", run, "--port", "0"), env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    said = process.stdout.readline()
    assert said.startswith("http://127.0.0.1:") and str(run) in said
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


# Samples ------------------------------------------------------------------------------------------


def wait_for(server, *states):
    for _ in range(600):
        state = json.loads(ask(server, "/draw/state")[2])
        if state["now"] and state["now"]["state"] in states:
            return state
        time.sleep(0.05)
    raise AssertionError(state)


def test_one_drawing_at_a_time_of_an_idle_run(run, monkeypatch):
    let_go = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: let_go.append(1))
    go, png = threading.Event(), (run / "samples/step_0000002.png").read_bytes()

    def draw(folder, wanted, progress):
        progress(1.5)
        assert go.wait(30)
        if wanted.seed == 8:
            raise RuntimeError("out of memory")
        return png, "checkpoint of step 2"

    with served(run, draw) as server:
        assert post(server)[0] == 202
        state = wait_for(server, "drawing")
        assert (state["now"]["done"], state["now"]["total"]) == (1.5, 4)
        status, said = post(server)
        assert status == 409 and b"one drawing at a time" in said
        go.set()
        state = wait_for(server, "done")
        assert state["drawn"][0]["words"].startswith("all classes, seed 7, guidance 2, 3 steps; ch")
        assert ask(server, "/drawn/1.png")[2] == png
        assert post(server, WANTED | {"seed": 8})[0] == 202
        assert wait_for(server, "failed")["now"]["said"] == "RuntimeError: out of memory"
        assert ask(server, "/drawn/2.png")[0] == 404
        assert len(let_go) == 2  # what torch kept of a GPU's memory
        with owned(run, "fastrepa train"):
            status, said = post(server)
            assert status == 409 and b"the run is not idle: fastrepa train on " in said
            assert b"At work: fastrepa train on" in ask(server, "/")[2]
        for wrong in (
            {"num": 0}, {"num": MOST + 1}, {"num": "4"}, {"seed": -1}, {"steps": 10**9},
            {"cfg": 0.5}, {"cfg": float("nan")}, {"out": "/etc"}, {"classes": "x" * 501},
            {"classes": ["a"]},
        ):  # fmt: skip
            status, said = post(server, WANTED | wrong)
            assert status == 400 and next(iter(wrong)) in json.loads(said)["refused"], wrong
        assert post(server, [])[0] == 400


def test_what_is_drawn_is_what_the_sampler_gives(tmp_path, monkeypatch):
    from fastrepa.generation import loading

    model, config, info = fake_run("run", torch.device("cpu"))
    monkeypatch.setattr(
        loading, "load_generator", lambda *_: loading.Loaded(model, config, info, "x", "0.9999")
    )
    told = []
    png, said = draw_samples(tmp_path, Wanted(**WANTED | {"classes": "food, #4"}), told.append)
    assert said == "checkpoint of step 500"
    assert sum(told) == pytest.approx(4)
    expected = generate(
        tiny_model().to(torch.bfloat16), CODEC, torch.tensor([2, 4, 2, 4]), seed=7,
        sample_ids=torch.arange(4), batch_size=4, path="linear",
        sample_config=SampleConfig(sampler="ode", steps=3, cfg=2.0),
    )  # fmt: skip
    save_grid(expected, tmp_path / "grid.png", names=[CLASSES[i] for i in (2, 4, 2, 4)])
    assert (tmp_path / "grid.png").read_bytes() == png
    assert not torch.equal(expected[:2], expected[2:])  # noise of their own
    assert default_labels(4, 5, [2, 4]).tolist() == [2, 4, 2, 4]
    for classes, words in (("fod", "'fod' is no class"), ("#9", "is no class")):
        with pytest.raises(FastrepaError, match=words):
            draw_samples(tmp_path, Wanted(**WANTED | {"classes": classes}), told.append)


# In a browser -------------------------------------------------------------------------------------

DRAWN = "document.querySelector('#curve-loss path:not(.raw)').getAttribute('d')"
SHOWN = """[...document.querySelectorAll("figure.grid img")].filter((i) => i.checkVisibility())
  .map((i) => i.dataset.step).join()"""
LOADED = """[...document.querySelectorAll("figure.grid img")].some((i) => i.checkVisibility()
  && i.naturalWidth === 400)"""


def until(tab, expression, wanted=True):
    for _ in range(200):
        if (found := tab.run(expression)) == wanted:
            return
        time.sleep(0.05)
    raise AssertionError((expression, found, tab.problems))


def fits(tab):
    for width, scheme in ((1280, "light"), (390, "dark"), (390, "light")):
        tab.call("Emulation.setDeviceMetricsOverride",
                 width=width, height=844, deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": scheme}
        tab.call("Emulation.setEmulatedMedia", features=[feature])
        tab.run("new Promise(done => setTimeout(done, 100))")
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert tab.run(CONTRAST) == []


def test_the_page_follows_the_run(chromium, run, tmp_path):
    with (
        served(run) as server,
        browser.Page(chromium, tmp_path / "profile", width=1280) as tab,
    ):
        tab.open(server.address)
        until(tab, SHOWN, "2")
        tab.run("document.getElementById('sample-step').scrollIntoView()")
        until(tab, LOADED)
        before = tab.run(DRAWN)
        log(run, 4, 5)
        draw_grid(run, 4)
        until(tab, SHOWN, "4")  # the newest, while nobody chose another
        assert tab.run(DRAWN).count("L") == before.count("L") + 2
        assert "5 of 100" in tab.run("document.querySelector('.figures').textContent")
        tab.run("document.getElementById('sample-step').focus()")
        tab.press("Home")
        assert tab.run(SHOWN) == "2"
        draw_grid(run, 6)
        until(tab, "document.getElementById('sample-step').max", "2")
        assert tab.run(SHOWN) == "2"  # chosen, and kept
        assert tab.run("document.activeElement.id") == "sample-step"
        tab.press("End")
        assert tab.run(SHOWN) == "6"
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 6, "loss": 0.1, "fid": 20.0}) + "\n")
        until(tab, "document.querySelectorAll('#curve-fid path:not(.raw)').length", 1)
        fits(tab)
        assert tab.problems == []
        assert all(url.startswith((server.address, "data:")) for url in tab.requests)


def test_samples_are_drawn_from_the_page(chromium, run, tmp_path):
    asked = []

    def draw(folder, wanted, progress):
        asked.append(wanted)
        for _ in range(4):
            progress(4)
            time.sleep(0.2)
        return (run / "samples/step_0000002.png").read_bytes(), "checkpoint of step 2"

    said = "document.getElementById('said').textContent"
    with (
        served(run, draw) as server,
        browser.Page(chromium, tmp_path / "profile", width=390, dark=True) as tab,
    ):
        tab.open(f"{server.address}draw")
        until(tab, said, "Nothing drawn yet.")
        assert tab.run("document.querySelector('[name=cfg]').value") == "3.0"  # the run's own
        tab.run("document.querySelector('[name=seed]').value = 11")
        tab.run("document.querySelector('button').click()")
        until(tab, f"/^(4|8|12) of 16 images$/.test({said})")
        assert tab.run("document.querySelector('button').disabled")
        until(tab, "document.querySelector('.drawn img')?.naturalWidth", 400)
        assert tab.run(said) == "Done: checkpoint of step 2"
        assert asked == [Wanted(classes="", num=16, seed=11, cfg=3.0, steps=8)]
        with owned(run, "fastrepa train"):
            until(tab, "document.querySelector('button').disabled")
            assert "The run is not idle: fastrepa train" in tab.run(said)
        until(tab, "document.querySelector('button').disabled", False)
        tab.run("document.querySelector('[name=classes]').value = 'x'.repeat(600)")
        tab.run("document.querySelector('button').click()")
        until(tab, f"{said}.startsWith('classes: ')")
        fits(tab)
        # The refused request is the one that the browser itself notes.
        assert [p for p in tab.problems if "400" not in p.get("text", "")] == []
