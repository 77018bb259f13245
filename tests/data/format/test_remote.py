"""A set at an address is read as the same set on a disk is, whatever the server does meanwhile."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fastrepa
from fastrepa.config import DataConfig, config_from_dict, load_config
from fastrepa.data.datasets import is_data, keep_blocks, open_data
from fastrepa.data.format import remote
from fastrepa.data.format.block_cache import BlockCache
from fastrepa.data.format.shards import ShardSet
from fastrepa.data.format.store import SampleStore
from fastrepa.data.gallery import Gallery
from fastrepa.errors import ConfigError, DataError
from tests.command_line import invoke, run
from tests.data.format.test_store import slots
from tests.runs import ROOT, metrics, train
from tests.sets import written
from tests.sets.served import Served, served
from tests.sets.trees import flip_byte

COLUMNS = {"latents": 2, "encoders": {"one": 2}}


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A set at an address, of which nothing is known, and whose blocks are small."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(remote, "BLOCK", 3000)
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(remote, "_remotes", {})
    written.write_set(tmp_path / "set", **COLUMNS)
    with served(tmp_path / "set") as state:
        yield state


def everything(path: str | Path) -> list[bytes]:
    """All bytes of a set, as training reads them."""
    data = open_data(path)
    store = data.store(image=True, moments=True, features=["one"], open_shards=2)
    places = [(s, i) for s, size in enumerate(data.shard_sizes) for i in range(size)]
    batch = slots(places, [number % 2 for number in range(len(places))])
    fill(store, batch)
    assert batch.encoded is not None and batch.moments is not None
    arrays = (batch.label, batch.moments, *batch.features[0])
    return [*(each.tobytes() for each in batch.encoded), *(each.tobytes() for each in arrays)]


def fill(store: SampleStore, batch: object) -> None:
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(store.fill, batch, i) for i in range(len(batch.places))]:  # type: ignore[attr-defined, arg-type]
            done.result()


@pytest.mark.parametrize("gigabytes", [0.0, 2e-6, 1e-5, 1.0, 1e300])
def test_it_is_read_as_from_a_disk_and_kept_as_far_as_there_is_room(
    birds: Served, tmp_path: Path, gigabytes: float
) -> None:
    keep_blocks(
        DataConfig(path=birds.address, cache_dir=str(tmp_path / "blocks"), cache_gb=gigabytes)
    )
    assert everything(birds.address) == everything(birds.folder)
    kept = [p for p in (tmp_path / "blocks").glob("*-*") if p.is_file()]
    assert sum(p.stat().st_size for p in kept) <= 1e9 * gigabytes
    assert bool(kept) == (gigabytes >= 3e-6)
    birds.asked.clear()
    remote._remotes.clear()  # as another process
    keep_blocks(
        DataConfig(path=birds.address, cache_dir=str(tmp_path / "blocks"), cache_gb=gigabytes)
    )
    assert everything(birds.address) == everything(birds.folder)
    again = {name for name, *_ in birds.asked}
    assert (again == {"manifest.json"}) == (gigabytes >= 1)
    tars = [size for name, _, size in birds.asked if name.endswith("tar")]
    assert max(tars, default=0) <= 3000 < (birds.folder / "shard-00000.tar").stat().st_size


def test_what_passes_is_tried_again(birds: Served) -> None:
    count: dict[tuple[str, int], int] = {}

    def fault(name: str, first: int) -> str | None:
        tries = count[name, first] = count.get((name, first), 0) + 1
        return ("503", "drop", None)[min(tries, 3) - 1] if name != "manifest.json" else None

    birds.fault = fault
    assert everything(birds.address) == everything(birds.folder)
    assert set(count.values()) == {1, 3} or set(count.values()) == {3}


def test_what_stays_wrong_is_one_line_that_names_it(birds: Served, tmp_path: Path) -> None:
    def refusal(fault: str | None, of: str = ".tar") -> str:
        birds.fault = lambda name, first: fault if name.endswith(of) else None
        with pytest.raises(DataError) as caught:
            everything(birds.address)
        return str(caught.value)

    tar = f"{birds.address}/shard-0000"
    assert "cannot be read (the server says 503)" in refusal("503")
    assert f"{birds.address}/manifest.json: cannot be read (refused (403)" in refusal("403", "json")
    said = refusal("whole")
    assert said.startswith(tar) and "gives whole files only, and no byte ranges" in said
    assert not is_data(remote.remote_path(f"{birds.address}/none"))
    with pytest.raises(DataError, match=r"none/manifest\.json: not there, so it is no address of"):
        open_data(f"{birds.address}/none")
    flip_byte(birds.folder / "shard-00001.tar", 700)  # the same length and, to a second, the age
    said = refusal(None)
    assert said.startswith(f"{tar}1.tar: sample") and said.endswith(
        "(its CRC-32 is not the index's)"
    )
    os.truncate(birds.folder / "shard-00002.tar", 4000)
    remote._remotes.clear()
    assert f"{tar}2.tar: truncated (4000 bytes, the manifest says" in refusal(None)


def test_a_block_that_was_damaged_here_is_fetched_again(birds: Served) -> None:
    whole = everything(birds.address)
    remote_ = remote._remote()
    tars = sorted(birds.folder.glob("*.tar"))[:-1]  # the last is shorter
    for tar in tars:
        key = remote_.info(remote.remote_path(f"{birds.address}/{tar.name}"))["key"]
        flip_byte(remote.default_cache() / f"{key}-0", 700)
        os.truncate(remote.default_cache() / f"{key}-1", 10)
    birds.asked.clear()
    assert everything(birds.address) == whole
    blocks = sorted((name, first) for name, first, _ in birds.asked if name.endswith(".tar"))
    assert blocks == [(tar.name, first) for tar in tars for first in (0, 3000)]


def test_a_full_disk_is_a_warning(
    birds: Served, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    keep_blocks(DataConfig(path=birds.address, cache_dir=str(tmp_path / "file/blocks")))
    assert everything(birds.address) == everything(birds.folder)
    said = capfd.readouterr().err
    assert said.count("warning:") == 1 and "blocks cannot be kept there (Not a directory)" in said


def test_blocks_are_fetched_once_and_the_oldest_go(tmp_path: Path) -> None:
    caches = [BlockCache(tmp_path, 1000) for _ in range(2)]
    fetched: list[int] = []

    def get(number: int) -> bytes:
        fetched.append(number)
        threading.Event().wait(0.02)
        return bytes([number]) * 100

    def read(number: int, cache: BlockCache) -> bytes:
        name = f"{number:032x}-0"
        found = cache.read(name, 10, 5)
        return found or cache.fetch(name, 10, 5, 100, lambda: get(number))

    with ThreadPoolExecutor(8) as pool:
        tasks = [pool.submit(read, n, caches[i % 2]) for n in range(4) for i in range(8)]
        assert [task.result() for task in tasks] == [
            bytes([n]) * 5 for n in range(4) for _ in "12345678"
        ]
    assert sorted(fetched) == [0, 1, 2, 3]
    for number in range(4):
        os.utime(tmp_path / f"{number:032x}-0", (number, number))
    (tmp_path / "mine.txt").write_text("x" * 5000)
    assert read(0, caches[0]) and len(fetched) == 4  # which makes it the newest
    held = os.open(tmp_path / f"{1:032x}-0", os.O_RDONLY)
    for number in range(4, 11):
        read(number, caches[number % 2])
        assert sum(p.stat().st_size for p in tmp_path.glob("*-0")) <= 1000
    names = {int(p.name[:32], 16) for p in tmp_path.glob("*-0")}
    assert {0, 10} <= names and not {1, 2} & names
    assert os.pread(held, 200, 0) == bytes([1]) * 100  # who reads it reads it to its end
    os.close(held)
    assert (tmp_path / "mine.txt").exists()


def test_what_an_address_may_be() -> None:
    tree = load_config(ROOT / "configs/quickstart.yaml").model_dump(mode="json")

    def path(text: str) -> str:
        return config_from_dict(tree | {"data": tree["data"] | {"path": text}}).data.path

    for text in ("https://host/a/b/", "s3://bucket/set", "gs://bucket/set"):
        assert path(text) == text.rstrip("/")
    assert str(remote.remote_path("https://host/a b/c.d") / "x.tar") == "https://host/a b/c.d/x.tar"
    for secret in ("https://me:secret@host/a", "https://host/a?sig=secret", "s3://b/a#secret"):
        with pytest.raises(ConfigError, match="taken without user, password") as caught:
            path(secret)
        assert str(caught.value).startswith("configuration: data.path: an address of")
        assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"data\.path: ftp:// is none of https://"):
        path("ftp://host/a")
    done = invoke("prepare", "https://host/images", "out", "--resolution", 64)
    assert "source: https://host/images: an address is read by train" in str(done.exception)
    for scheme, library in (("s3", "s3fs"), ("gs", "gcsfs")):
        with pytest.raises(
            DataError, match=f"{library} is not installed: pip install 'fastrepa.rem"
        ):
            open_data(f"{scheme}://bucket/set")


def test_commands_that_read_sets_take_addresses(
    birds: Served, tmp_path: Path, make_set: Callable[..., ShardSet]
) -> None:
    birds.folder = make_set(name="prepared").path
    assert "nothing wrong" in run("data", "verify", birds.address)
    done = invoke("data", "verify", f"{birds.address}/none")
    assert "none/manifest.json: not there, so it is no address of" in str(done.exception)
    with pytest.raises(ConfigError, match="say which to try"):  # it is known for a set
        fastrepa.probe(birds.address, out=tmp_path)
    run("data", "show", birds.address, "--out", tmp_path)
    assert (tmp_path / "birds_show.png").exists()
    near, far = Gallery(birds.folder), Gallery(remote.remote_path(birds.address))
    assert (near.image(3) == far.image(3)).all() and (near.labels == far.labels).all()
    flip_byte(birds.folder / "shard-00001.tar", 700)
    os.utime(birds.folder / "shard-00001.tar", (1, 1))
    remote._remotes.clear()
    done = invoke("data", "verify", birds.address)
    assert done.exit_code == 1 and "shard-00001.tar" in done.output


def test_a_run_goes_on_from_an_address_as_from_the_disk(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    settings = ["training.steps=3", "training.checkpoint_every=1"]
    train(near, *settings)
    shutil.copytree(near, far)
    for step in (2, 3):
        shutil.rmtree(far / f"checkpoints/step_{step:07d}")
    with served(ROOT / "configs/quickstart/emoji/train") as emoji:
        said = train(
            far, *settings, f"data.path={emoji.address}", f"data.cache_dir={tmp_path / 'blocks'}"
        )
    assert "from step 1" in said.stdout
    wanted = ("step", "loss", "alignment_loss", "grad_norm")
    lines = [[[line[k] for k in wanted] for line in metrics(run)] for run in (near, far)]
    assert lines[0] == lines[1] and len(lines[0]) == 3
    assert f"path: {emoji.address}\n" in (far / "config.yaml").read_text()
    assert any(name.endswith(".tar") for name, *_ in emoji.asked)
