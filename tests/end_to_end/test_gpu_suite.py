"""The kit for a borrowed GPU (benchmarks/gpu_suite): nothing that goes wrong costs records."""

import json
import random
import shutil
import subprocess
import sys
import textwrap

import pytest

from benchmarks import provenance
from benchmarks.gpu_suite import __main__ as kit
from benchmarks.gpu_suite import plan, records, rehearsal, steps, summary, supervise, tests, wheels
from benchmarks.gpu_suite.plan import FULL, STAGES, Stage

pytestmark = pytest.mark.slow

HERE = {"git": "abc", "device": "a GPU", "code": "123", "dirty": False}


def end(stage, item, **values):
    return {
        "stage": stage,
        "item": item,
        "failed": False,
        "seconds": 1.0,
        "utc": "2",
        **HERE,
    } | values


def test_short_rehearsal(tmp_path):
    """Killed once and resumed, with a contender that fails and one that is late, without git."""
    short = rehearsal.Rehearsal(tmp_path, ["ceilings", "rivals"], wheels=None)
    try:
        rehearsal.killed(short, 1, random.Random(3))
    finally:
        short.kill_all()
    assert not list(short.processes())
    found = records.load(tmp_path / "killed")
    assert {r["dirty"] for r in found} == {provenance.provenance()["dirty"]}
    late = next(r for r in found if r.get("contender") == "ours" and "seed=1" in r["name"])
    assert late["problem"].startswith("ended after")
    (failed,) = (r for r in found if "sdpa-cudnn" in r.get("name", ""))
    assert "Traceback" in failed["stderr"]


def test_the_check_of_a_rehearsal_sees_what_is_missing(tmp_path):
    """Each way in which records can be lost or a failure can go unnoticed."""
    here = HERE | {"git": provenance.provenance()["git"]}
    good = [
        end("correct", "a") | here, end("correct", "b") | here,
        {"stage": "correct", "item": "", "due": ["a", "b"], "left": [], "took": 2.0} | here,
    ]  # fmt: skip
    bad = good[1] | {"failed": True, "problem": "x", "stderr": "y" * 30}
    cases = (
        (good, ""), (good[1:], "no record of"), (good[:2], "has no end"),
        ([good[0], bad, good[2]], "failed"), ([good[0] | {"git": "other"}, *good[1:]], "commit"),
    )  # fmt: skip
    for number, (found, wrong) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        records.append(folder, found)
        if wrong:
            with pytest.raises(AssertionError, match=wrong):
                rehearsal.check(folder, ["correct"])
        else:
            rehearsal.check(folder, ["correct"])


CHILD = """
    import json, os, sys, time
    from pathlib import Path
    stage, pipe, task = sys.argv[1], int(sys.argv[2]), json.loads(sys.stdin.readline())
    def tell(**m): os.write(pipe, (json.dumps(m) + chr(10)).encode())
    tell(context={context}, due=["slow", "dead", "good"])
    file = Path(task["out"], "suite.jsonl")
    done = file.read_text() if file.exists() else ""
    for item in ("slow", "dead", "good"):
        if f'"item": "{{item}}"' in done:
            continue
        tell(begin=item, limit=0.5 if item == "slow" else 30, logged=os.fstat(2).st_size)
        print("this is", item, flush=True)
        if item == "slow":
            time.sleep(60)
        if item == "dead":
            os.abort()
        with file.open("a") as records:
            end = dict(stage=stage, item=item, failed=False, seconds=0)
            records.write(json.dumps(end) + chr(10))
        tell(end=item)
"""


def test_what_hangs_or_dies_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    program = tmp_path / "child.py"
    program.write_text(textwrap.dedent(CHILD.format(context=HERE)))
    monkeypatch.setattr(supervise, "PROGRAM", [sys.executable, str(program)])
    run = supervise.SuiteRun(tmp_path, "toy", 1e12, tmp_path / "cache")
    stage = Stage("rows", 60, "operations")
    ended = supervise.run_stage(supervise.Child(stage, run), run)
    assert ended["due"] == ["slow", "dead", "good"]
    found = {r["item"]: r for r in records.load(tmp_path) if "seconds" in r}
    assert found["slow"]["problem"] == "killed after 0.5 s, its limit"
    assert "this is slow" in found["slow"]["stderr"]
    assert found["dead"]["problem"] == "died of SIGABRT"
    assert found["dead"]["device"] == "a GPU" and not found["dead"]["cut"]
    assert not found["good"]["failed"]


def test_a_stage_is_cut_off_when_its_time_is_over(tmp_path, monkeypatch):
    program = tmp_path / "child.py"
    slow = CHILD.replace("0.5", "60")
    program.write_text(textwrap.dedent(slow.format(context=HERE)))
    monkeypatch.setattr(supervise, "PROGRAM", [sys.executable, str(program)])
    run = supervise.SuiteRun(tmp_path, "toy", 1e12, tmp_path / "cache")
    supervise.run_stage(supervise.Child(Stage("rows", 1.5, "operations"), run), run)
    (found,) = (r for r in records.load(tmp_path) if "seconds" in r)
    assert found["item"] == "slow" and found["cut"] and found["failed"]
    assert records.ended([found], "rows", HERE) == set()  # a later call has more time


def test_what_is_not_measured_again():
    found = [
        end("rows", "good"), end("rows", "bad", failed=True, problem="x"),
        end("rows", "cut", failed=True, cut=True), end("step", "other stage"),
        {"stage": "rows", "item": "no end", **HERE},
    ]  # fmt: skip
    assert records.ended(found, "rows", HERE) == {"good", "bad"}
    assert records.ended(found, "rows", HERE | {"code": "mended"}) == {"good"}
    assert records.ended(found, "rows", HERE | {"git": "later"}) == set()
    assert records.ended(found, "rows", HERE | {"device": "another"}) == set()
    assert records.ended(found, "rows", HERE, since="3") == set()


def test_earlier_records_are_taken_in_once(tmp_path):
    before, out = tmp_path / "before", tmp_path / "out"
    before.mkdir()
    records.append(before, [end("rows", "a"), end("rows", "b")])
    with (before / records.FILE).open("a") as file:
        file.write('{"stage": "rows", "it')  # cut by a kill
    (before / records.PROFILE).write_text("{}")
    for _ in range(2):
        records.take_in(before, out)
        assert [r["item"] for r in records.load(out)] == ["a", "b"]
    assert (out / records.FILE).read_text().endswith("}\n")
    assert (out / records.PROFILE).exists()
    with pytest.raises(ValueError, match=r"--resume: .*nothing has no suite\.jsonl"):
        records.take_in(tmp_path / "nothing", out)


def test_the_plan():
    assert [s.name for s in STAGES][:4] == ["ceilings", "correct", "rows", "step"]
    for turns in (*FULL.turns.values(), *plan.TOY.turns.values()):
        for turn in turns:
            assert (provenance.ROOT / turn.config).is_file()
            assert turn.batches[-1] > 0
    (ours,) = FULL.turns["step"]
    assert ours.batches[0] == 256 and ours.profile
    assert {t.contender for t in FULL.turns["rivals"]} >= {"plain+compile", "eager+compile"}


def test_the_largest_batch_that_may_fit_is_tried_first(tmp_path):
    (ours,) = FULL.turns["step"]
    plain = FULL.turns["rivals"][0]
    assert steps._batches(ours, tmp_path)[0] == 256
    for free, at_first in ((84e9, (256, 192)), (140e9, (256, 256)), (1e9, (64, 64))):
        records.append(tmp_path, [{"free_bytes": free}])
        assert (steps._batches(ours, tmp_path)[0], steps._batches(plain, tmp_path)[0]) == at_first


def test_commit_without_git(tmp_path):
    for folder in provenance.CODE:
        (tmp_path / folder).mkdir()
    (tmp_path / "engine/a.py").write_text("1")
    read = provenance.provenance.__wrapped__
    assert read(tmp_path)["git"] == "none" and read(tmp_path)["dirty"]
    written = tmp_path / provenance.COMMIT
    written.parent.mkdir()
    written.write_text(json.dumps({"git": "abc", "dirty": False, "code": read(tmp_path)["code"]}))
    assert read(tmp_path) | {"code": ""} == {"git": "abc", "dirty": False, "code": ""}
    (tmp_path / "engine/a.py").write_text("2")
    assert read(tmp_path)["dirty"]
    written.write_text("{}")
    with pytest.raises(ValueError, match=r"commit\.json.*make gpu-wheels"):
        read(tmp_path)


def test_commit_that_travelled_with_the_wheels(tmp_path, monkeypatch):
    """It counts where git has another tree's commit, and only for the code it was written for."""
    for folder in provenance.CODE:
        (tmp_path / folder).mkdir()
    (tmp_path / "engine/a.py").write_text("1")
    (tmp_path / ".git").mkdir()
    said = {"rev-parse": "old", "status": " M engine/a.py"}
    monkeypatch.setattr(provenance, "_git", lambda root, command, *_: said[command])
    read = provenance.provenance.__wrapped__
    code = read(tmp_path)["code"]
    assert read(tmp_path) == {"git": "old", "dirty": True, "code": code}
    written = tmp_path / provenance.COMMIT
    written.parent.mkdir()
    written.write_text(json.dumps({"git": "abc", "dirty": False, "code": code}))
    assert read(tmp_path) == {"git": "abc", "dirty": False, "code": code}
    said["status"] = ""
    assert read(tmp_path) == {"git": "old", "dirty": False, "code": code}
    said["status"] = " M engine/a.py"
    (tmp_path / "engine/a.py").write_text("2")
    assert read(tmp_path)["git"] == "old" and read(tmp_path)["dirty"]


def test_parts_of_dali_are_joined_checked_and_installed(tmp_path, monkeypatch):
    installed = []
    monkeypatch.setattr(wheels, "PARTS", tmp_path / "dali.json")
    monkeypatch.setattr(wheels, "_pip", lambda *words: installed.append(words))
    source, carried, kept = tmp_path / "source", tmp_path / "carried", tmp_path / "kept"
    for folder in (source, carried):
        folder.mkdir()
    (source / "x-1-py3-none-any.whl").write_bytes(bytes(range(256)) * 40)
    whole = shutil.make_archive(str(tmp_path / "dali"), "tar", source)
    cut = wheels._cut(tmp_path / whole, source, 8000)
    (tmp_path / "dali.json").write_text(json.dumps(cut))
    names = list(cut["parts"])
    assert len(names) == 3
    for name in names[1:]:  # a part a call, in any order
        for old in carried.iterdir():
            old.unlink()
        shutil.copy(source / name, carried / name)
        missing = wheels.join(carried, kept, tmp_path / "site")
        assert names[0] in missing and not installed
    (carried / names[0]).write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the part that was cut"):
        wheels.join(carried, kept, tmp_path / "site")
    shutil.copy(source / names[0], carried / names[0])
    assert wheels.join(carried, kept, tmp_path / "site") == []
    assert installed[0][-1].endswith("x-1-py3-none-any.whl")
    assert set(wheels.INSTALL) <= set(installed[0])


def test_every_carried_wheel_has_its_version():
    everything = (*wheels.BINARY, *wheels.FROM_SOURCE, *wheels.OF_DALI)
    assert all("==" in requirement for requirement in wheels.pinned(everything))
    with pytest.raises(ValueError, match="no-such not pinned"):
        wheels.pinned(("no-such",))


def test_outcomes_of_tests(tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/>'
        '<testcase classname="a" name="bad"><failure message="off by 1&#10;more"/></testcase>'
        '<testcase classname="a" name="out"><skipped/></testcase></testsuite></testsuites>'
    )
    counts, failed = tests.outcomes(tmp_path / "tests.xml")
    assert counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert failed == {"a::bad": "off by 1"}


@pytest.mark.parametrize("processes", [("-p", "no:xdist"), ("-n", "1")])
def test_tests_end_in_time_for_their_report(tmp_path, processes):
    (tmp_path / "test_many.py").write_text(
        "import pytest, time\n@pytest.mark.parametrize('n', range(40))\n"
        "def test_one(n):\n    time.sleep(0.1)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    arguments = (str(tmp_path), "-c", str(tmp_path / "pytest.ini"), *processes)
    program = f"""
import pathlib
from benchmarks.gpu_suite.tests import _tests
(record,) = _tests({arguments}, pathlib.Path({str(tmp_path / "tests.xml")!r}), seconds=0)
assert 0 < record["passed"] < 40 and record["failed"] == 0, record
assert "not all had run" in record["problem"]
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=provenance.ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_table_says_what_failed_and_whose_loss_is_another():
    step = {"name": "XL", "batch": 256, "p50_ms": 400.0, "images_per_s": 640.0, "peak_bytes": 9e10}
    found = [
        end("correct", "a", failed=True, problem="wrong: tensor 0"),
        end("correct", "b", failed=True, problem="mended"), end("correct", "b"),
        end("correct", "c", failed=True, problem="old", git="another"),
        {"stage": "step", "item": "x", "contender": "ours", "last_loss": 1.0, **step},
        {"stage": "rivals", "item": "y", "contender": "eager", "last_loss": 1.5, **step},
        {"stage": "rivals", "item": "z", "contender": "plain", "last_loss": 1.01, **step},
        *({"stage": "rows", "item": "r", "row": "norm 1152", "launched_with": str(n), "now": n == 1,
           "p50_ms": 1.0 / n} for n in (1, 2)),
        {"stage": "rows", "item": "", "due": ["r"], "left": ["r"], "took": 3.0},
    ]  # fmt: skip
    text = summary.table([HERE | r for r in found])
    assert text.count("FAILED") == 1 and "FAILED correct: a: wrong: tensor 0" in text
    (eager,) = (line for line in text.splitlines() if "eager" in line)
    assert "loss 1.5 is not 1" in eager
    assert text.count("is not") == 1 and "640.0 images/s" in text
    assert "now 1.0000 ms, best 0.5000 ms by 2" in text
    assert "left for a later call: 1" in text
    many = [end("rows", str(n), failed=True, problem="x") for n in range(999)]
    assert len(summary.table(many)) <= summary.MOST


def test_options(tmp_path, capsys):
    with pytest.raises(SystemExit):
        kit.main(["--out", str(tmp_path), "--only", "everything"])
    assert "everything" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        kit.main(["--out", str(tmp_path / "new"), "--resume", str(tmp_path)])
    assert "has no suite.jsonl" in capsys.readouterr().err
