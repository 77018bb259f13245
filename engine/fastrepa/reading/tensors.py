"""Weights: safetensors and torch's files, read as tensors alone and checked once, here.

A file can ask for no code: safetensors hold none, and torch's unpickler of weights makes tensors,
plain containers and the few plain classes that a caller names. Whatever else it raises becomes one
line of the caller's error, which names the file and what was expected. What comes out are tensors
on the CPU that hold real numbers, every one of them in the file.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastrepa.errors import FastrepaError, shown, worded

REAL = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
COMPILED = "_orig_mod."  # torch.compile's, before what it wraps: the model, or each block
WRAPPERS = (COMPILED, "module.")  # and that of data parallel
MOST = 2**40  # of what is counted: what is computed of it stays below 2^63
DEEPEST = 64  # containers in one another


def read_weights(
    path: Path,
    kind: type[FastrepaError],
    *,
    classes: Sequence[type] = (),
    content: str = "tensors",
) -> Any:
    """Return a weights file's plain containers and checked tensors, on the CPU.

    .safetensors by its suffix, a file of torch.save otherwise. `classes` are let through beside
    torch's own; they must be plain values. `content` says in the refusal what may be in the file.
    Raises `kind`, naming the file.
    """
    try:
        if path.suffix == ".safetensors":
            stored = load_file(path)
        else:
            # The warnings are torch's advice on how to load what is then refused.
            with torch.serialization.safe_globals(list(classes)), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # of a damaged file torch's readers raise almost anything
        wanted = _foreign(e)
        if wanted is not None:
            raise kind(
                f"{path}: holds more than {content}, refused ({wanted}): not a checkpoint of plain "
                f"tensors; save the state dict as safetensors"
            ) from None
        raise kind(_unreadable(path, e)) from None
    return _Checked(path, kind).value(stored, "", 0)


class SafeTensors(Mapping[str, Tensor]):
    """A safetensors file whose tensors are read one at a time, by name, each checked as above.

    metadata: what its header says beside them.
    Raises `kind`, naming the file, when it is opened or a tensor in it is not to be had.
    """

    def __init__(self, path: Path, kind: type[FastrepaError]) -> None:
        self.path, self._kind = path, kind
        try:
            self._file: Any = safe_open(path, framework="pt")
            self._names = dict.fromkeys(self._file.keys())  # in their order
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
        except Exception as e:
            raise kind(_unreadable(path, e)) from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            stored = self._file.get_tensor(name)
        except Exception as e:
            raise self._kind(_unreadable(self.path, e)) from None
        return _Checked(self.path, self._kind).tensor(stored, name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def state_dict(stored: Any, source: object, kind: type[FastrepaError]) -> dict[str, Tensor]:
    """Return what must be tensors [...] by name, in their order, without wrappers' prefixes.

    Raises `kind`, naming `source` and the first entry that is none.
    """
    expected = "a state dict of tensors was expected"
    if not isinstance(stored, Mapping) or not stored:
        got = "nothing" if isinstance(stored, Mapping) else f"a {type(stored).__name__}"
        raise kind(f"{source}: holds {got}; {expected}")
    for name, value in stored.items():
        if not isinstance(name, str):
            raise kind(f"{source}: a name is {_described(name)}, not text; {expected}")
        if not isinstance(value, Tensor):
            raise kind(f"{source}: {name[:120]} is {_described(value)}; {expected}")
    return without_wrappers(stored, source, kind)


def without_wrappers(
    state: Mapping[str, Tensor], source: object, kind: type[FastrepaError]
) -> dict[str, Tensor]:
    """Return `state`, [...] by name, by the names inside of data parallel and torch.compile.

    `module.` and `_orig_mod.` go from the front, in any order, while every name has them: a part of
    a model may be called module. Inside a name, before a block that was compiled by itself,
    `_orig_mod.` always goes. Raises `kind` where two names become one.
    """
    names = [name.replace(f".{COMPILED}", ".") for name in state]
    while names:
        prefix = next((p for p in WRAPPERS if all(n.startswith(p) for n in names)), None)
        if prefix is None:
            break
        names = [name.removeprefix(prefix) for name in names]
    found = dict(zip(names, state.values(), strict=True))
    if len(found) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise kind(f"{source}: {twice[:120]} is there twice, with and without {COMPILED}")
    return found


def whole_number(value: Any, source: object, kind: type[FastrepaError]) -> int:
    """Return a count out of a file: an int from 0 to 2^40, not a bool. Raises `kind`."""
    if type(value) is not int or not 0 <= value <= MOST:
        raise kind(f"{source}: expected a whole number from 0 to 2^40, got {_described(value)}")
    return value


def sized(state: Mapping[str, Tensor], name: str, form: str, source: object, kind: Any) -> Tensor:
    """Return a tensor that has as many dimensions as `form`, "[1, T, D]", says, none of them 0.

    Raises `kind`, naming it and the form.
    """
    if name not in state:
        raise kind(f"{source}: {name} {form} is missing")
    tensor = state[name]
    if tensor.dim() != form.count(",") + 1:
        many = "1 dimension" if tensor.dim() == 1 else f"{tensor.dim()} dimensions"
        raise kind(f"{source}: {name} has {many}, expected {form}")
    if not tensor.numel():
        raise kind(f"{source}: {name} is {list(tensor.shape)}, expected {form}")
    return tensor


def reason(error: BaseException) -> str:
    """Return in a short line why weights were not read, without torch's advice to read them anyhow.

    `error` is what torch, safetensors or a library that calls them raised.
    """
    text = " ".join(str(error).split())
    if wanted := _foreign(error):
        return f"holds more than tensors: {wanted}"
    if "TorchScript" in text:
        return "a TorchScript archive, which is a program"
    if "PytorchStreamReader" in text:
        return "its zip archive is damaged or cut short"
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "says to hold more than there is memory for"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if re.search("weights_only|safe_globals|torch\\.load", text):
        return "not a file of plain tensors"
    if isinstance(error, OSError):
        return worded(error, 160) if text else "it cannot be opened"
    if isinstance(error, RuntimeError | SafetensorError | ValueError) and text:
        return worded(error, 160)
    return "cut short" if isinstance(error, EOFError) else "damaged, or of another kind"


def _described(value: Any) -> str:
    """Return a plain value itself, of others the kind: to write them out may cost anything."""
    plain = value is None or isinstance(value, bool | int | float | str)
    return shown(value) if plain else f"a {type(value).__name__}"


def _unreadable(path: Path, error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"{path}: not a checkpoint of plain tensors, or a damaged one; save the state dict as "
            f"safetensors"
        )
    expected = "safetensors were" if path.suffix == ".safetensors" else "a file of torch.save was"
    return f"{path}: not readable as weights ({reason(error)}); {expected} expected"


def _foreign(error: BaseException) -> str | None:
    """Return what torch's unpickler of weights would not make, from its error; None: no such."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is None:
        return None
    name = found[1][:120]
    if name.startswith("numpy."):
        what = {"scalar": "a numpy scalar", "_reconstruct": "a numpy array"}
        return f"{what.get(name.rpartition('.')[2], 'a numpy value')}, {name}"
    return name


class _Checked:
    """Makes anew what a file held, of dicts, lists, tuples and checked tensors."""

    def __init__(self, path: Path, kind: type[FastrepaError]) -> None:
        self.path, self.kind = path, kind
        self._made: dict[int, Any] = {}  # what is there twice is looked at once

    def value(self, stored: Any, name: str, depth: int) -> Any:
        """Return one value; `name` is its dotted place. None of its containers holds itself."""
        if isinstance(stored, Tensor):
            return self.tensor(stored, name)
        if not isinstance(stored, dict | list | tuple):
            return stored
        if depth > DEEPEST:
            raise self.kind(
                f"{self.path}: nested more than {DEEPEST} deep; a state dict was expected"
            )
        if id(stored) in self._made:
            return self._made[id(stored)]
        made: Any
        if isinstance(stored, dict):
            made = {k: self.value(v, _place(name, k), depth + 1) for k, v in stored.items()}
        else:
            values = [self.value(v, _place(name, i), depth + 1) for i, v in enumerate(stored)]
            made = values if isinstance(stored, list) else tuple(values)
        self._made[id(stored)] = made
        return made

    def tensor(self, tensor: Tensor, name: str) -> Tensor:
        """Return a tensor without gradient, subclass and attributes of its own."""
        if tensor.is_nested:
            problem = "nested"
        elif tensor.is_quantized:
            problem = "quantised"
        elif tensor.layout is not torch.strided:
            problem = f"sparse ({str(tensor.layout).removeprefix('torch.')})"
        elif tensor.device.type != "cpu":
            problem = f"on the {tensor.device.type} device, without values"
        elif tensor.dtype not in REAL:
            problem = str(tensor.dtype).removeprefix("torch.")
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            problem = f"{list(tensor.shape)} and has fewer values than that stored"
        else:
            # Unbound: a pickle can give a tensor attributes, `detach` among them.
            return Tensor.detach(tensor)
        raise self.kind(
            f"{self.path}: {name or 'the tensor'} is {problem}; dense tensors of real numbers are "
            f"expected"
        )


def _place(name: str, key: object) -> str:
    word = key[:120] if isinstance(key, str) else _described(key)
    return f"{name}.{word}" if name else word
