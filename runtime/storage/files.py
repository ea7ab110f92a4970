"""An artifact's files by descriptor, so that what was hashed is what is read or mapped, whatever happens to names meanwhile.

A folder and a plain name in it come in; a descriptor, or bytes whose hash is the manifest's, come out.
"""

from __future__ import annotations

import _thread
import errno
import hashlib
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import ArtifactError, describe_read_error

if TYPE_CHECKING:
    from ..manifest import Manifest

T = TypeVar("T")
TRUST_WARNING = "an artifact holds machine code, so take it only from someone you trust"
BLOCK_BYTES = 1 << 20  # bytes read at a time: no file is ever whole in memory to be hashed
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe in a file's place is not waited for


def open_plain_file(folder: Path, path: str) -> int:
    """A descriptor of the plain file of that plain name. Below `folder` no link is followed, neither a file nor a folder.

    Raises ArtifactError for what is no such file (any more).
    """
    try:
        return _open_plain(folder, path)
    except OSError as e:
        if isinstance(e, PermissionError):
            raise ArtifactError(f"{folder}: {path}: {describe_read_error(e, folder)}") from e
        if e.errno in (errno.EINVAL, errno.EISDIR, errno.ENXIO):
            raise ArtifactError(f"{folder}: {path} is not a plain file; restore the file or export again") from e
        raise ArtifactError(
            f"{folder}: {path} cannot be opened as a plain file ({e.strerror}); restore the file or export again"
        ) from e


def read_plain_file(folder: Path, path: str, most: int) -> bytes:
    """The first `most` bytes of such a file. Raises OSError: with ELOOP for a link, EISDIR for a folder, EINVAL for what is
    neither that nor a file."""
    with open(_open_plain(folder, path), "rb") as file:
        return file.read(most)


def _open_plain(folder: Path, path: str) -> int:
    *parents, name = path.split("/")
    with ExitStack() as stack:
        at = _close_with(stack, os.open(folder, FOLDER_FLAGS))
        for parent in parents:
            at = _close_with(stack, os.open(parent, FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=at))
        file = os.open(name, FILE_FLAGS, dir_fd=at)
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, os.strerror(number), path)
    return file


def _close_with(stack: ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


@contextmanager
def open_files(folder: Path, paths: Iterable[str]) -> Iterator[dict[str, int]]:
    """Path -> descriptor, for the length of the block. Raises ArtifactError, see `open_plain_file`."""
    with ExitStack() as stack:
        yield {path: _close_with(stack, open_plain_file(folder, path)) for path in paths}


def descriptor_path(descriptor: int) -> Path:
    """A name of exactly the open file, for libraries that want a name."""
    return Path(f"/proc/self/fd/{descriptor}")


def read_listed_file(folder: Path, manifest: Manifest, path: str, most: int | None = None) -> bytes:
    """The bytes of a listed file, read once: what was hashed is what comes back. Raises ArtifactError where they are others,
    or more than `most`."""
    expected = next(entry for entry in manifest.files if entry.path == path)
    if most is not None and expected.size > most:
        raise ArtifactError(
            f"{folder}: {path} has {expected.size} bytes, at most {most} are read of such a file; export again"
        )
    with open_files(folder, [path]) as files, open(files[path], "rb", closefd=False) as file:
        try:
            data = file.read(expected.size + 1)
        except OSError as e:
            raise ArtifactError(f"{folder}: {path}: {describe_read_error(e, folder)}") from e
    came = hashlib.sha256(data).hexdigest()
    if came != expected.sha256:
        raise ArtifactError(f"{folder}: {hash_problem(path, came, expected.sha256)}")
    return data


def hash_problem(path: str, came: str, expected: str) -> str:
    return f"{path}: sha256 is {came[:12]}.., the manifest says {expected[:12]}..; restore the file or export again ({TRUST_WARNING})"


def sha256_of(descriptor: int) -> str:
    """The file's sha256 in hexadecimal. Several threads may hash at once: hashlib and the system call both release Python's lock."""
    digest, block, at = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES)), 0
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    while count := os.preadv(descriptor, [block], at):
        digest.update(block[:count])
        at += count
    return digest.hexdigest()


def file_hashes(files: Mapping[str, int]) -> dict[str, str]:
    """Path -> sha256 of all these files. Raises OSError, with the path as its `filename`, for a file that cannot be read."""
    return work_on_files(files, lambda path: sha256_of(files[path]))


def work_on_files(files: Mapping[str, int], work: Callable[[str], T]) -> dict[str, T]:
    """Path -> `work(path)` of all these files, largest first, in as many threads as there are cores for this process.

    One file is the work of one thread: SHA-256, for one, goes through it in order. The caller's thread works too, and does again
    what failed: where memory is short, `threading.Thread.start` waits for ever for a thread that could not begin (CPython
    3.11), and so does a pool of them. Raises what `work` raises then, an OSError with the path as its `filename`.
    """
    waiting = deque(sorted(files, key=lambda path: -os.fstat(files[path]).st_size))
    found: dict[str, T] = {}
    busy: set[str] = set()

    def take_all() -> None:
        with suppress(IndexError):  # somebody else took the last one
            while True:
                path = waiting.popleft()
                busy.add(path)
                try:
                    found[path] = work(path)
                finally:
                    busy.discard(path)

    def help_out() -> None:
        with suppress(Exception):  # of which the last loop will tell
            take_all()

    for _ in range(min(len(files), len(os.sched_getaffinity(0))) - 1):
        with suppress(RuntimeError, MemoryError):  # one thread fewer
            _thread.start_new_thread(help_out, ())
    help_out()
    while busy:
        time.sleep(0.001)
    for path in files.keys() - found.keys():
        try:
            found[path] = work(path)
        except OSError as e:
            raise OSError(e.errno, e.strerror, path) from e
    return found


def read_into_page_cache(files: Mapping[str, int]) -> None:
    """Reads these files once, so that pages of them that are mapped come from memory. Raises OSError as `work_on_files` does."""

    def read(path: str) -> None:
        block, at = memoryview(bytearray(BLOCK_BYTES)), 0
        os.posix_fadvise(files[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := os.preadv(files[path], [block], at):
            at += count

    work_on_files(files, read)
