"""Pictures of others: one decoder wherever one is opened, which mends nothing in silence."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastrepa.commands.evaluate.image_sources import Stills, open_stored
from fastrepa.commands.prepare.prepare import prepare
from fastrepa.commands.probe.images import draw_sample
from fastrepa.commands.verify.checks import image_problem
from fastrepa.commands.verify.verify import verify
from fastrepa.data.images import (
    UnreadableImageError,
    decode_rgb,
    image_files,
    open_image,
    read_rgb,
    store,
)
from fastrepa.errors import DataError
from tests.runs import command, environment
from tests.sets.pictures import chunk, every_kind, key_chunk, png, saved, smooth, tiff
from tests.sets.trees import noise

SIDE = 32


def seen(data: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(data)).astype(int)


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def images_of(source: Path) -> dict[str, np.ndarray]:
    """Every image of what `evaluate` takes, in its order."""
    stills = open_stored(source)
    assert isinstance(stills, Stills)
    parts = [part for batch in stills.batches([torch.arange(stills.num)]) for part in batch]
    return {str(i): image.permute(1, 2, 0).numpy() for i, image in enumerate(torch.cat(parts))}


# --- the same pixels wherever they are looked at ----------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_prepare_and_evaluate_see_the_same_pixels(tmp_path: Path, seed: int) -> None:
    files = dict(every_kind(seed, SIDE))
    for name, data in files.items():
        put(tmp_path / "source" / name[0] / name, data)
    prepare(tmp_path / "source", tmp_path / "set", resolution=SIDE, workers=0, progress=False)
    sources = [json.loads(line) for line in (tmp_path / "set/sources.jsonl").open()]
    prepared = images_of(tmp_path / "set")
    direct = images_of(tmp_path / "source")
    paths = image_files(tmp_path / "source")
    assert len(prepared) == len(direct) == len(files) == len(sources)
    for number, source in enumerate(sources):
        there = paths.index(tmp_path / "source" / source)
        assert np.array_equal(prepared[str(number)], direct[str(there)]), source
    # What training reads, and the probe of a plain folder.
    sample = draw_sample(tmp_path / "source", len(files), seed=0, resolution=SIDE)
    for name, image in zip(sample.names, sample.images.permute(0, 2, 3, 1).numpy(), strict=True):
        assert np.array_equal(image, read_rgb(tmp_path / "source" / name)), name


# --- depth, polarity, range, transparency -----------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_of_every_depth_its_key_and_its_polarity(bits: int) -> None:
    top = (1 << bits) - 1
    samples = np.random.default_rng(bits).integers(0, top + 1, (9, 11))
    samples[0, :2] = 0, top
    wanted = np.repeat(np.rint(samples * 255 / top).astype(int)[..., None], 3, axis=-1)
    assert np.abs(seen(png(samples, 0, bits)) - wanted).max() <= 1
    for key in (0, top, int(samples[5, 5])):
        clear = np.where((samples == key)[..., None], 255, wanted)
        assert np.abs(seen(png(samples, 0, bits, key_chunk(key))) - clear).max() <= 1
    for deflate in (False, True):
        assert np.abs(seen(tiff(samples, bits, deflate=deflate)) - wanted).max() <= 1
        turned = seen(tiff(samples, bits, white_is_zero=True, deflate=deflate))
        assert np.abs(turned - (255 - wanted)).max() <= 1


def test_colours_and_alpha_of_sixteen_bits() -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (9, 11, 3))
    samples[4, 4] = samples[2, 2] + np.array([0, 0, 1 if samples[2, 2, 2] % 256 < 255 else -1])
    wanted = samples * 255 / 65535
    assert np.abs(seen(png(samples, 2, 16)) - wanted).max() <= 1
    # One colour is transparent, and not its neighbour that has the same high bytes.
    clear = wanted.copy()
    clear[2, 2] = 255
    key = key_chunk(*map(int, samples[2, 2]))
    assert np.abs(seen(png(samples, 2, 16, key)) - clear).max() <= 1
    for channels, colour in ((2, 4), (4, 6)):
        alpha = np.random.default_rng(channels).integers(0, 65536, (9, 11, channels)) / 65535
        on_white = alpha[..., :-1] * alpha[..., -1:] + 1 - alpha[..., -1:]
        made = png(np.rint(alpha * 65535).astype(int), colour, 16)
        assert np.abs(seen(made) - on_white * 255).max() <= 2


def test_alpha_that_is_multiplied_in(tmp_path: Path) -> None:
    alpha = np.dstack([*[np.full((9, 11), 50)] * 3, np.full((9, 11), 128)]).astype(np.uint8)
    file = saved(Image.fromarray(alpha), "TIFF")  # unassociated: grey 50 at one half
    assert np.abs(seen(file) - (50 * 128 + 255 * 127) / 255).max() <= 1
    tag = struct.pack("<HHIHH", 338, 3, 1, 2, 0)
    assert file.count(tag) == 1
    associated = file.replace(tag, struct.pack("<HHIHH", 338, 3, 1, 1, 0))
    assert np.abs(seen(associated) - (50 + 127)).max() <= 2


def test_the_range_is_what_the_file_says_it_is() -> None:
    ramp = np.tile(np.arange(0, 4096, 63), (4, 1))
    wanted = np.repeat(np.rint(ramp * 255 / 4095)[..., None], 3, axis=-1)
    dark = np.repeat(np.rint(ramp * 255 / 65535)[..., None], 3, axis=-1)
    said = {
        "its depth": (tiff(ramp, 12), wanted),
        "its largest sample": (tiff(ramp, 16, t281=4095), wanted),
        "both, white is zero": (tiff(4095 - ramp, 16, white_is_zero=True, t281=4095), wanted),
        "its sign": (tiff((ramp * 8).astype(np.int16), 16, t339=2), np.rint(wanted)),
        "maxval": (b"P5 66 4 4095\n" + ramp.astype(">u2").tobytes(), wanted),
        "one picture's brightest": (tiff(ramp, 16, t281=5000), dark),
        "a range that it exceeds": (tiff(ramp, 16, t281=1023), dark),
        # Significant bits are the upper ones: the samples are scaled.
        "significant bits": (png(ramp, 0, 16, chunk(b"sBIT", b"\x0c")), dark),
    }
    for what, (data, right) in said.items():
        assert np.abs(seen(data) - right).max() <= 1, what


def test_samples_far_below_their_range_are_said(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 65536, 1024), (64, 1))
    rgb = np.repeat(ramp[..., None], 3, axis=-1)
    opaque = np.dstack([rgb >> 4, np.full_like(ramp, 65535)])
    dim = {
        "twelve.tif": tiff(ramp >> 4, 16), "ten.png": png(ramp >> 6, 0, 16),
        "fourteen.png": png(rgb >> 2, 2, 16), "alpha.png": png(opaque, 6, 16),
    }  # fmt: skip
    bright = {
        "sixteen.tif": tiff(ramp, 16), "sixteen.png": png(rgb, 2, 16),
        "said.tif": tiff(ramp >> 4, 12), "black.png": png(ramp * 0, 0, 16),
        "dark8.png": png(ramp >> 12, 0, 8),
    }  # fmt: skip
    for name, data in (dim | bright).items():
        assert store(data, 16, "png", 95, name).dim == (name in dim), name
        put(tmp_path / "source/a" / name, data)
    words = ["prepare", tmp_path / "source", tmp_path / "set", "--resolution", 16, "--workers", 1]
    done = subprocess.run(command(*words), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = "│ of 16 bits, but below 16384 │ 4; perhaps of 10 to 14 bits"
    assert said in done.stdout, done.stdout
    assert json.loads((tmp_path / "set/report.json").read_text())["dim"] == 4


# --- damage that a decoder repairs ------------------------------------------------------------

SCENE = Image.fromarray(smooth(3, 96))
JPEG = saved(SCENE, "JPEG", quality=90)
EOI = b"\xff\xd9"


def cut(data: bytes, share: float = 2 / 3) -> bytes:
    """Make what is left of a JPEG of which the rest is missing, with an end marker put back."""
    return data[: int(len(data) * share)] + EOI


def without_restart(data: bytes, segment: bool) -> bytes:
    """Lose the restart marker D3 in the middle, and the data up to the next one, too."""
    at = data.index(b"\xff\xd3", len(data) // 2)
    return data[:at] + data[data.index(b"\xff\xd4", at) if segment else at + 2 :]


def damaged_jpegs() -> Iterator[tuple[str, bytes]]:
    progressive = saved(SCENE, "JPEG", quality=90, progressive=True)
    restarts = saved(SCENE, "JPEG", quality=90, restart_marker_blocks=2)
    for share in (0.4, 0.9):
        yield f"cut at {share}", cut(JPEG, share)
    yield "progressive, cut", cut(progressive)
    second = progressive.index(b"\xff\xda", progressive.index(b"\xff\xda") + 2)
    yield "progressive, cut between scans", progressive[: progressive.rindex(
        b"\xff\xc4", 0, second)] + EOI  # fmt: skip
    yield "restarts, cut", cut(restarts)
    yield "a restart lost", without_restart(restarts, segment=False)
    yield "a restart and its data lost", without_restart(restarts, segment=True)
    yield "grey, cut", cut(saved(SCENE.convert("L"), "JPEG"))
    yield "CMYK, cut", cut(saved(SCENE.convert("CMYK"), "JPEG"))
    yield "stored as RGB, cut", cut(saved(SCENE, "JPEG", keep_rgb=True))
    yield "an unknown revision, and cut", cut(JPEG.replace(b"JFIF\0\1", b"JFIF\0\7"))
    middle = len(JPEG) // 2
    yield "a hole", JPEG[:middle] + JPEG[middle + 400 :]
    yield "data left over", JPEG[:-2] + bytes(range(1, 250)) + EOI
    yield "zeros for its second half, and more", JPEG[:middle] + bytes(len(JPEG)) + EOI


def whole_jpegs() -> Iterator[tuple[str, bytes]]:
    start, rest = JPEG[:2], JPEG[2:]
    adobe = b"\xff\xee" + struct.pack(">H", 14) + b"Adobe\0\x64\0\0\0\0\7"
    profile = b"\xff\xe2" + struct.pack(">H", 18) + b"ICC_PROFILE\0" + b"\5\2" + bytes(2)
    yield "plain", JPEG
    yield "bytes after the end", JPEG + b"garbage" * 100
    yield "another JPEG after the end", JPEG + cut(JPEG)
    yield "fill bytes", start + b"\xff\xff\xff" + rest
    yield "fill bytes at the end", JPEG[:-2] + b"\xff" * 20 + EOI
    yield "padding at the end", JPEG[:-2] + b"\0" * 300 + EOI
    yield "a comment", start + b"\xff\xfe\0\6hiho" + rest
    yield "JFIF 0.0", JPEG.replace(b"JFIF\0\1\1", b"JFIF\0\0\0")
    yield "JFIF 7.1", JPEG.replace(b"JFIF\0\1", b"JFIF\0\7")
    yield "an unknown Adobe transform", start + adobe + rest
    yield "a broken profile", start + profile + rest
    yield "bytes between headers", JPEG[:20] + b"abcd" + JPEG[20:]
    scan = JPEG.index(b"\xff\xda") + 2
    length = int.from_bytes(JPEG[scan : scan + 2])
    yield "scan parameters zero", JPEG[: scan + length - 3] + bytes(3) + JPEG[scan + length :]
    yield "extended", JPEG.replace(b"\xff\xc0", b"\xff\xc1", 1)
    yield "progressive", saved(SCENE, "JPEG", progressive=True)
    yield "restarts", saved(SCENE, "JPEG", restart_marker_blocks=2)
    yield "CMYK", saved(SCENE.convert("CMYK"), "JPEG")
    yield "stored as RGB", saved(SCENE, "JPEG", keep_rgb=True)
    yield "MPO", saved(SCENE, "MPO", save_all=True, append_images=[SCENE])
    yield "one pixel", saved(SCENE.resize((1, 1)), "JPEG")


def test_a_jpeg_whose_data_is_damaged_is_refused_and_no_other() -> None:
    for what, data in damaged_jpegs():
        Image.open(io.BytesIO(data)).load()  # Pillow says nothing
        with pytest.raises(UnreadableImageError, match=r"^damaged: "):
            decode_rgb(data)
        assert decode_rgb(data, repaired=True).size == SCENE.size, what
    for what, data in whole_jpegs():
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(seen(data), pixels), what


def idat(data: bytes) -> bytes:
    return chunk(b"IDAT", data)


def test_other_decoders_mend_nothing_either() -> None:
    pixels = noise(0, 48, 40)
    good = png(pixels, 2, 8)
    at = good.index(b"IDAT")
    flipped = bytearray(good)
    flipped[at + 4000] ^= 1
    start, raw = good[: at - 4], zlib.decompress(good[at + 4 :])
    half = zlib.compress(raw[: len(raw) // 2])
    coloured = saved(SCENE, "TIFF", compression="jpeg")
    (strip,), (size,) = (open_image(coloured).tag_v2[tag] for tag in (273, 279))  # type: ignore[attr-defined]
    ended = bytearray(coloured)
    ended[strip + size // 2 : strip + size // 2 + 2] = EOI
    damaged = {
        "PNG: a bit": bytes(flipped),
        "PNG: its checksum": good[: at - 4] + idat(zlib.compress(raw))[:-4] + bytes(4) + good[-12:],
        "PNG: half of its rows": start + idat(half) + good[-12:],
        "PNG: half of its chunks": start + idat(good[at + 4 : at + 3000]) + good[-12:],
        "PNG: half of its file": good[: len(good) // 2],
        "TIFF: JPEG data": bytes(ended),
        "TIFF: strips": tiff(pixels[..., 0], 8, t278=2),
        "TIFF: a last strip": tiff(pixels[..., 0], 16, t257=60),
        "GIF: half": saved(SCENE, "GIF")[:2000] + b"\0;",
        "WebP: half": saved(SCENE, "WEBP")[:600],
        "JPEG 2000: half": saved(SCENE, "JPEG2000")[:3000] + EOI,
        "BMP: half": saved(SCENE, "BMP")[:9000],
    }
    for what, data in damaged.items():
        with pytest.raises(UnreadableImageError):
            print(what, decode_rgb(data))
    black = Image.new("RGB", (40, 48))
    for whole in (
        good, good[:-12], saved(black, "PNG"), saved(black.convert("1"), "PNG"), coloured,
        saved(black.quantize(2), "PNG"), saved(black, "PNG", compress_level=0),
    ):  # fmt: skip
        assert decode_rgb(whole).width


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (8, 8), (13, 10), (5, 9)])
def test_an_interlaced_picture_is_whole_or_not(width: int, height: int) -> None:
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
              (0, 1, 1, 2)]  # fmt: skip
    raw = b""
    for x, y, across, down in passes:
        for _ in range(y, height, down):
            columns = len(range(x, width, across))
            raw += b"\0" + bytes(columns * 3) if columns else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1))
    start, end = b"\x89PNG\r\n\x1a\n" + head, chunk(b"IEND", b"")
    assert not seen(start + idat(zlib.compress(raw)) + end).any()  # black, and whole
    with pytest.raises(UnreadableImageError):
        decode_rgb(start + idat(zlib.compress(raw[:-1])) + end)


def test_damage_is_named_and_counted_in_prepare_and_verify(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source / "a/whole.jpg", JPEG)
    put(source / "a/cut.jpg", cut(JPEG))
    options: dict = {"resolution": 96, "image_format": "jpeg", "workers": 0, "progress": False}
    with pytest.raises(DataError, match=r"cut\.jpg: unreadable image \(damaged: premature end"):
        prepare(source, tmp_path / "set", **options)
    done = prepare(source, tmp_path / "set", skip_bad=True, **options)
    assert [(r.source, r.reason) for r in done.report.rejected] == [
        ("a/cut.jpg", "damaged: premature end of data segment")
    ]
    assert done.report.images == 1
    assert image_problem(JPEG, 96, "jpeg") is None
    said = "cannot be decoded (damaged: premature end of data segment)"
    assert image_problem(cut(JPEG), 96, "jpeg") == said
    with pytest.raises(DataError, match=r"cut\.jpg: cannot be decoded \(damaged"):
        images_of(source)


def test_a_set_made_before_damage_was_seen_opens_and_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "source/a/whole.jpg", JPEG)
    put(tmp_path / "source/a/cut.jpg", cut(JPEG))
    monkeypatch.setattr("fastrepa.data.images.jpeg_damage", lambda data: None)
    prepare(
        tmp_path / "source", tmp_path / "set", resolution=96, image_format="jpeg", workers=0,
        progress=False,
    )  # fmt: skip
    monkeypatch.undo()
    assert len(images_of(tmp_path / "set")) == 2
    (problem,) = verify(tmp_path / "set", workers=0, progress=False).problems
    assert "cannot be decoded (damaged: premature end" in str(problem)


# --- what is no image -------------------------------------------------------------------------


def refused(*words: object, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command(*words), env=environment() | (env or {}), capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.isprintable()
    return line


def test_no_program_is_started_for_a_file_and_no_escape_reaches_the_terminal(
    tmp_path: Path,
) -> None:
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\nshowpage\n%%EOF\n"
    put(tmp_path / "set/page.png", page)
    for number in range(3):
        put(tmp_path / f"set/{number}.png", saved(SCENE, "PNG"))
    mark = tmp_path / "ran"
    script = put(tmp_path / "bin/gs", f"#!/bin/sh\ntouch {mark}\nexit 1\n".encode())
    script.chmod(0o755)
    path = {"PATH": f"{script.parent}:{os.environ['PATH']}"}
    how = ["--encoders", "resnet10t=random@32"]
    assert "page.png: cannot be decoded (" in refused(
        "evaluate", tmp_path / "set", tmp_path / "set", *how, env=path
    )
    (tmp_path / "set/page.png").rename(tmp_path / "set/bad\x1b]0;owned\x07.png")
    assert r"bad\x1b]0;owned\x07.png: cannot" in refused(
        "evaluate", tmp_path / "set", tmp_path / "set", *how, env=path
    )
    assert not mark.exists()


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    data = saved(SCENE, "PNG")
    root = tmp_path / ".cache/set"  # where it lies is of no matter
    for name in ("a/0.png", "a/1.PNG", "b/0.png"):
        put(root / name, data)
    for name in (".ipynb_checkpoints/0.png", "a/.thumbs/0.png", "a/._0.png", "b/.hidden.png"):
        put(root / name, data)
    stills = open_stored(root)
    assert isinstance(stills, Stills)
    assert (stills.num, list(stills.classes)) == (3, ["a", "b"])
    assert len(draw_sample(root, 9, seed=0, resolution=16).names) == 3


# --- a sampled folder: by number --------------------------------------------------------------


def sampled(folder: Path, record: str, numbers: range) -> Path:
    for number in numbers:
        put(folder / f"{number:06d}.png", saved(SCENE, "PNG"))
    put(folder / "sampling.json", record.encode())
    return folder


@pytest.mark.parametrize("gone", [[], [0], [2], [0, 1, 5]])
def test_labels_of_samples_are_of_their_numbers(tmp_path: Path, gone: list[int]) -> None:
    folder = sampled(tmp_path / "s", json.dumps({"classes": ["10", "11", "b"]}), range(8))
    for number in gone:
        (folder / f"{number:06d}.png").unlink()
    stills = open_stored(folder)
    assert isinstance(stills, Stills) and stills.labels is not None
    left = [number for number in range(8) if number not in gone]
    assert stills.labels.tolist() == [number % 3 for number in left]
    assert list(stills.classes) == ["10", "11", "b"]


@pytest.mark.parametrize("record", ['{"classes": "all"}', '{"seed": 0}'])
def test_samples_of_all_classes_go_unnamed(tmp_path: Path, record: str) -> None:
    stills = open_stored(sampled(tmp_path / "s", record, range(2)))
    assert (stills.num, stills.labels, list(stills.classes)) == (2, None, [])


@pytest.mark.parametrize(
    "record",
    ["", "{", "[]", "[" * 9000, '{"classes": 3}', '{"classes": {"a": 1}}', "\xff", "9" * 9000],
)
def test_a_broken_record_of_samples_is_one_line(tmp_path: Path, record: str) -> None:
    folder = sampled(tmp_path / "s", record, range(2))
    said = r"s/sampling\.json: not (valid JSON|the record)"
    with pytest.raises(DataError, match=said) as e:
        open_stored(folder)
    assert len(str(e.value)) < 600


# --- fuzz -------------------------------------------------------------------------------------

SMALL = [
    data for name, data in every_kind(5, 12)
    if name.split(".")[0] in ("rgb", "key16", "palettealpha", "rgbkey", "progressive", "clear",
                              "lossy", "alpha", "bmp", "polarity16", "twelve", "jpeg", "tiff_lzw",
                              "mpo")
]  # fmt: skip

mutations: Callable = st.lists(
    st.tuples(
        st.floats(0, 1), st.sampled_from(["flip", "set", "cut", "double"]), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: list[tuple[float, str, int]]) -> bytes:
    raw = bytearray(data)
    for share, how, value in changes:
        at = min(int(share * len(raw)), len(raw) - 1)
        if at < 0:
            break
        if how == "flip":
            raw[at] ^= 1 << value % 8
        elif how == "set":
            raw[at] = value
        elif how == "cut":
            del raw[at : at + value]
        else:
            raw[at:at] = raw[at : at + value]
    return bytes(raw)


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(SMALL), mutations)
def test_a_mutated_picture_is_decoded_or_says_why(
    data: bytes, changes: list[tuple[float, str, int]]
) -> None:
    with suppress(UnreadableImageError):
        store(mutated(data, changes), 8, "png", 95, "x.png")
