"""Sets at an address (https://, s3://, gs://): files of which byte ranges are read, by fsspec.

`RemotePath` stands where a `Path` does, so that a set is opened, checked and read as on a disk.
What is transient (5xx, a reset, a timeout) is tried again with growing pauses; the rest is an
OSError whose words say why, as a disk's errors are. Credentials are the libraries' own matter: the
environment and ~/.netrc; an address holds none (reading/text.py).
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import random
import re
import stat
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PosixPath
from typing import Any

from fastrepa.data.format.block_cache import BlockCache
from fastrepa.errors import DataError, worded
from fastrepa.reading.text import address

MANIFEST = "manifest.json"  # always read anew: it says what the rest must be
BLOCK = 4 << 20  # bytes of a block of the cache
DEFAULT_CACHE_GB = 32.0
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries
_KNOWN_FOR = 60.0  # seconds for which a file is what it was found to be
_AHEAD = 32  # requests at a time when a set is opened
_BUFFER = 1 << 20
_EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


class RemotePath(PosixPath):
    """A file or folder at an address, of which `str` is that address; only read."""

    __slots__ = ()

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        size = _remote().info(self)["size"]
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, size, 0, 0, 0))

    def exists(self, **_: Any) -> bool:
        """Tell whether it is there; DataError where that cannot be known."""
        try:
            _remote().info(self)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise DataError(f"{self}: cannot be read ({error.strerror})") from None
        return True

    def is_file(self, **_: Any) -> bool:
        return self.exists()

    def is_dir(self, **_: Any) -> bool:
        """Tell whether it may be a folder, which no server says."""
        return True

    def open(self, mode: str = "r", buffering: int = -1, *_: Any, **how: Any) -> Any:
        if mode not in ("r", "rb"):
            raise _only_read(self)
        raw = _Ranges(self, _remote().info(self, fresh=True)["size"])
        if buffering == 0:
            return raw
        binary = io.BufferedReader(raw, _BUFFER)
        return binary if mode == "rb" else io.TextIOWrapper(binary, **how)

    def read_bytes(self) -> bytes:
        with self.open("rb") as file:
            return bytes(file.read())

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """Yield none: what a set's manifest does not list is not known."""
        yield from ()

    def glob(self, *_: Any, **__: Any) -> Generator[RemotePath, None, None]:
        """Yield none, as `iterdir`."""
        yield from ()

    rglob = glob

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    def absolute(self) -> RemotePath:
        return self

    def mkdir(self, *_: Any, **__: Any) -> None:
        raise _only_read(self)

    unlink = touch = rename = replace = rmdir = mkdir  # type: ignore[assignment]


class RangeFiles:
    """Reads of a store (store.py) at addresses, by any number of threads."""

    def __init__(self) -> None:
        self._again: set[tuple[Path, int]] = set()

    def read(
        self, path: Path, parts: Sequence[memoryview], offset: int, named: Callable[[], str]
    ) -> bool:
        """Fill byte buffers from `offset` on; False: the file ends before. DataError otherwise."""
        assert isinstance(path, RemotePath)
        try:
            data = _remote().read(path, offset, sum(map(len, parts)))
        except OSError as error:
            raise DataError(f"{named()}: cannot be read ({error.strerror})") from None
        if len(data) < sum(map(len, parts)):
            return False
        for part in parts:
            part[:], data = data[: len(part)], data[len(part) :]
        return True

    def once_more(self, path: Path, offset: int, size: int) -> bool:
        """Forget the blocks of bytes that are damaged; False: they were fetched anew before."""
        assert isinstance(path, RemotePath)
        if (path, offset) in self._again:
            return False
        self._again.add((path, offset))
        return _remote().forget(path, offset, size)

    def close(self) -> None:
        """Do nothing: no file is held open."""


def use_cache(folder: str | None, gigabytes: float) -> None:
    """Keep blocks in a folder, of at most so many 1e9 bytes; None: in the user's cache."""
    _remote().use_cache(Path(folder) if folder else default_cache(), int(min(gigabytes, 1e9) * 1e9))


def default_cache() -> Path:
    """Return the folder of blocks where none is given."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fastrepa" / "blocks"


def look_ahead(files: Iterable[Path], whole: Iterable[Path]) -> None:
    """Ask for files' sizes, and read those of `whole`, many at a time; errors are found later."""

    def look(path: Path, read: bool) -> None:
        try:
            path.stat()
            if read:
                path.read_bytes()
        except OSError:
            pass

    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="fastrepa-open") as pool:
        for path in files:
            pool.submit(look, path, False)
        for path in whole:
            pool.submit(look, path, True)


class _Ranges(io.RawIOBase):
    def __init__(self, path: RemotePath, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        data = _remote().read(self._path, self._at, max(0, min(len(into), self._size - self._at)))
        into[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Remote:
    """One process's connections, its cache, and sizes and versions of files at addresses."""

    def __init__(self) -> None:
        self._systems: dict[str, Any] = {}
        self._infos: dict[str, tuple[float, dict[str, Any]]] = {}
        self._met: set[str] = set()  # hosts and buckets that have answered
        self._cache: BlockCache | None = None
        self._lock = threading.RLock()

    def use_cache(self, folder: Path, limit: int) -> None:
        limit = limit if limit >= BLOCK else 0  # or each sample would fetch a block, kept nowhere
        with self._lock:
            known = self._cache
            if known is None or (known.folder, known.limit) != (folder, limit):
                self._cache = BlockCache(folder, limit)

    @property
    def cache(self) -> BlockCache:
        with self._lock:
            if self._cache is None:
                self.use_cache(default_cache(), int(DEFAULT_CACHE_GB * 1e9))
            assert self._cache is not None
            return self._cache

    def info(self, path: RemotePath, *, fresh: bool = False) -> dict[str, Any]:
        """Return size (bytes) and key (of these contents; "": they are not kept)."""
        name = str(path)
        at, known = self._infos.get(name, (0.0, {}))
        if known and not fresh and time.monotonic() - at < _KNOWN_FOR:
            return known
        told = self._patiently(path, lambda system: system.info(name))
        if not isinstance(told.get("size"), int):
            raise OSError(errno.EIO, "the server does not say its size")
        marks = sorted((k, str(v)) for k, v in told.items() if k.lower() in _MARKS)
        key = ""  # where nothing tells two versions apart, nothing is kept
        if len(marks) > 1 and path.name != MANIFEST:
            key = hashlib.sha256(repr((name, marks)).encode()).hexdigest()[:32]
        known = {"size": told["size"], "key": key}
        self._infos[name] = (time.monotonic(), known)
        return known

    def read(self, path: RemotePath, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer where the file ends."""
        known = self._infos.get(str(path))  # whatever its age: what changes is found by its CRC
        info = known[1] if known else self.info(path)
        size = max(0, min(size, info["size"] - offset))
        if not size:
            return b""
        if not info["key"] or not self.cache.keeps:
            return self._range(path, offset, size)
        parts = []
        for number in range(offset // BLOCK, (offset + size - 1) // BLOCK + 1):
            first = number * BLOCK
            begin, end = max(offset, first), min(offset + size, first + BLOCK)
            parts.append(self._of_block(path, info, number, begin - first, end - begin))
        return b"".join(parts)

    def _of_block(
        self, path: RemotePath, info: dict[str, Any], number: int, offset: int, size: int
    ) -> bytes:
        name, first = f"{info['key']}-{number}", number * BLOCK
        found = self.cache.read(name, offset, size)
        if found is not None and len(found) == size:
            return found
        if found is not None:  # torn by a power cut
            self.cache.drop(name)
        length = min(BLOCK, info["size"] - first)
        return self.cache.fetch(
            name, offset, size, length, lambda: self._range(path, first, length)
        )

    def forget(self, path: RemotePath, offset: int, size: int) -> bool:
        info = self.info(path)
        numbers = range(offset // BLOCK, (offset + max(size, 1) - 1) // BLOCK + 1)
        dropped = [self.cache.drop(f"{info['key']}-{number}") for number in numbers]
        return any(dropped)

    def _range(self, path: RemotePath, offset: int, size: int) -> bytes:
        name = str(path)

        def get(system: Any) -> bytes:
            found: bytes = system.cat_file(name, start=offset, end=offset + size)
            if len(found) > size:
                raise _whole_only()
            return found

        found = self._patiently(path, get)
        # A body that ends early, of a server that did not say how long it would be.
        return found if len(found) == size else self._patiently(path, get)

    def _patiently(self, path: RemotePath, do: Callable[[Any], Any]) -> Any:
        """Do something with the file's system, again while what hinders it may pass."""
        protocol, _, rest = str(path).partition("://")
        place = f"{protocol}://{rest.partition('/')[0]}"
        # One that never answered is rather misspelt than busy.
        waits = [*(_WAITS if place in self._met else _WAITS[:2]), None]
        for wait in waits:
            try:
                found = do(self._system(protocol))
                self._met.add(place)
                return found
            except DataError:
                raise
            except Exception as error:
                number, words, passes = problem_of(error)
                if number == errno.ENOENT:
                    self._met.add(place)
                if not passes or wait is None:
                    raise OSError(number, words) from None
            logging.getLogger("fastrepa").warning(f"{path}: {words}; once more in {wait:g} s")
            time.sleep(wait * random.uniform(0.75, 1.25))
        raise AssertionError("the last wait is None")

    def _system(self, protocol: str) -> Any:
        with self._lock:
            if protocol not in self._systems:
                self._systems[protocol] = _connect(protocol)
            return self._systems[protocol]


# Of what a server tells of a file: what differs when the file does.
_MARKS = ("size", "etag", "last-modified", "lastmodified", "content-md5", "digest", "md5hash",
          "generation", "mtime", "updated")  # fmt: skip
_remotes: dict[int, _Remote] = {}


def _remote() -> _Remote:
    """This process's own: connections do not outlive a fork."""
    return _remotes.get(os.getpid()) or _remotes.setdefault(os.getpid(), _Remote())


def _connect(protocol: str) -> Any:
    try:
        import fsspec

        if not protocol.startswith("http"):
            return fsspec.filesystem(protocol, skip_instance_cache=True)
        import aiohttp

        async def before_the_body(session: Any, context: Any, told: Any) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", told.headers.get("Range", ""))
            if asked is None or told.response.status != 200:
                return
            first, last = map(int, asked.groups())
            if first or (told.response.content_length or 0) > last + 1:
                told.response.close()  # all of a file may be more than the memory
                raise _whole_only()

        looks = aiohttp.TraceConfig()
        looks.on_request_end.append(before_the_body)
        limits = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
        session = {"timeout": limits, "trace_configs": [looks]}
        return fsspec.filesystem(
            protocol,
            skip_instance_cache=True,
            client_kwargs={**session, "trust_env": True},  # proxies, ~/.netrc
            headers={"Accept-Encoding": "identity"},
        )
    except ImportError:
        raise DataError(
            f"{protocol}://: {_EXTRAS[protocol]} is not installed: pip install 'fastrepa[remote]'"
        ) from None


def problem_of(error: BaseException) -> tuple[int, str, bool]:
    """Return (errno, words, whether it may pass) of what a library raised; the words hold no query
    of an address, which may be signed.
    """
    if isinstance(error, FileNotFoundError):
        if error.__cause__ is None:  # fsspec says so of everything that HEAD and GET raise
            return errno.ENOENT, "no such file", False
        error = error.__cause__
    answer = getattr(error, "response", None)
    of_boto = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
    status = (
        getattr(error, "status", None)
        or of_boto.get("HTTPStatusCode")
        or getattr(error, "code", None)
    )
    name = type(error).__name__
    if status in (404, 410) or name in ("NoSuchKey", "NoSuchBucket"):
        return errno.ENOENT, f"no such file ({status or name})", False
    if status in (401, 403) or isinstance(error, PermissionError):
        words = f"refused ({status or worded(error)}): it is not there, or needs credentials"
        return errno.EACCES, words, False
    if "Credential" in name:
        return errno.EACCES, "no credentials found for it in the environment", False
    if isinstance(status, int):
        return errno.EIO, f"the server says {status}", status >= 500 or status in (408, 429)
    if isinstance(error, TimeoutError):
        return errno.ETIMEDOUT, "no answer in time", True
    words = re.sub(r"\?\S+", "?...", worded(error))
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, ConnectionError) or library in ("aiohttp", "aiobotocore", "botocore"):
        return errno.EIO, words, True
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return number, words, number in (errno.ECONNRESET, errno.EPIPE)


def _whole_only() -> OSError:
    return OSError(
        errno.ENOTSUP,
        "the server gives whole files only, and no byte ranges; take the set from another one, or "
        "copy it",
    )


def _only_read(path: Path) -> OSError:
    return OSError(errno.EROFS, "an address is only read", str(path))


def remote_path(text: object) -> RemotePath:
    """Return the path of an address, as it was written; ConfigError for one that is not taken."""
    return RemotePath(address(str(text)))
