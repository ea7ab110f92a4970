"""The machine code of a `.pt2`, unpacked once per content into a private cache folder.

The bytes of a package come in whose sha256 is the manifest's; paths of `.so` files come out. dlopen needs a real
file, and a content-addressed folder lets many processes share it. An entry is compared with the package's bytes at
every load, so a half-written or tampered one is replaced, never opened.
"""

from __future__ import annotations

import errno
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path

from ..errors import ArtifactError
from .private_folder import default_cache_folder, is_private_folder
from .rename import rename_if_free, replace_folder
from .scratch import remove_abandoned, scratch_folder

MEMBER_SUFFIXES = (".so", ".json", ".cubin")
MAX_NAME_BYTES = 255  # of one file or folder, on every file system that Linux has
ARCHIVE_VERSION = b"0"  # of torch's archive format
ARCHIVE_ERRORS = (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError, struct.error)
"""What zipfile raises of an archive whose tables say nonsense."""


@contextmanager
def unpack_members(
    members: Mapping[str, Mapping[str, bytes]], sha256: str, cache_dir: Path | None = None
) -> Iterator[dict[str, Path]]:
    """Model name -> its `.so`, for the length of the block (a mapped file outlives its name on Linux).

    `members` are those of `read_members`. Files go to `<cache_dir>/<sha256>/<model>/`; when that place cannot be written or
    does not belong to this user, to a temporary folder that is removed at the end. Raises ArtifactError where neither can be.
    """
    with _members_folder(members, sha256, cache_dir or default_cache_folder()) as folder:
        yield {model: folder / model / _so_name(files) for model, files in members.items()}


def read_members(package: str, data: bytes) -> dict[str, dict[str, bytes]]:
    """Model -> file name -> bytes, of everything under `<stem>/data/aotinductor/`; nothing is written yet.

    Raises ArtifactError for a name that could leave the folder, a duplicate, a symlink, compression, C++ source or
    compile flags (torch's loader would run a shell command made of them), an archive of another version, and for a model
    without exactly one `.so`.
    """
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            infos = archive.infolist()
            _refuse_hostile_members(package, infos)
            if sum(info.file_size for info in infos) > len(data):  # much could be read out of little
                raise zipfile.BadZipFile("its members overlap")
            found: dict[str, dict[str, bytes]] = {}
            for info in infos:
                if info.filename.endswith("/archive_version"):
                    _refuse_other_version(package, archive.read(info))
                if model_file := _model_file(info.filename):
                    found.setdefault(model_file[0], {})[model_file[1]] = archive.read(info)
    except ARCHIVE_ERRORS as e:
        raise ArtifactError(f"{package}: expected a .pt2 package, but {e}; restore the file or export again") from e
    for model, files in found.items():
        libraries = sum(name.endswith(".so") for name in files)
        if libraries != 1:
            raise ArtifactError(f"{package}: model {model!r} must have one .so, it has {libraries}; export again")
    return found


def _refuse_hostile_members(package: str, infos: list[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for info in infos:
        if reason := _refusal_reason(info, seen):
            raise ArtifactError(f"{package}: member {info.orig_filename!r} {reason}; do not open this package")
        seen.add(info.filename)


def _refuse_other_version(package: str, version: bytes) -> None:
    if version != ARCHIVE_VERSION:
        raise ArtifactError(
            f"{package}: archive_version is {version.decode(errors='replace')!r:.40}, this runtime reads {ARCHIVE_VERSION.decode()!r}; "
            "export again with this prebake, or install the one that wrote it"
        )


def _refusal_reason(info: zipfile.ZipInfo, seen: set[str]) -> str | None:
    name = info.orig_filename
    parts = name.split("/")
    if name != info.filename or "\\" in name or name.startswith("/") or ".." in parts or "" in parts[:-1]:
        return "has a name that could leave the package's folder"
    if "." in parts or not name.isprintable() or max(len(part.encode()) for part in parts) > MAX_NAME_BYTES:
        return "has a name that no file can have"
    if name in seen:
        return "occurs twice"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a symbolic link"
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
        return "is compressed or encrypted; torch's packages are stored plainly"
    if name.endswith((".cpp", "compile_flags.json")):
        return "is source code or compile flags, which a loader would compile and run"
    if _model_file(name) and not name.endswith(MEMBER_SUFFIXES):
        return f"is not one of {', '.join(MEMBER_SUFFIXES)}"
    return None


def _model_file(name: str) -> tuple[str, str] | None:
    """(model, file) of `<stem>/data/aotinductor/<model>/<file>`; None for torch's own bookkeeping members."""
    parts = name.split("/")
    if len(parts) == 5 and parts[1:3] == ["data", "aotinductor"] and parts[4]:
        return parts[3], parts[4]
    return None


def _so_name(files: Mapping[str, bytes]) -> str:
    return next(name for name in files if name.endswith(".so"))


@contextmanager
def _members_folder(members: Mapping[str, Mapping[str, bytes]], sha256: str, cache: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            folder = _shared_folder(members, cache / sha256)
        except OSError as e:
            folder = stack.enter_context(_temporary_folder(members, cache, e))
        yield folder


def _shared_folder(members: Mapping[str, Mapping[str, bytes]], folder: Path) -> Path:
    """The folder, holding these files, and nothing beside it that a killed process has left of its own.

    Raises OSError where its parent is no place for that.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private_folder(folder.parent):
        raise PermissionError(errno.EPERM, "other users can write there", str(folder.parent))
    remove_abandoned(folder.parent, f".{folder.name}.")
    if not _has_members(folder, members):
        _replace_members(folder, members)
    return folder


@contextmanager
def _temporary_folder(members: Mapping[str, Mapping[str, bytes]], cache: Path, why: OSError) -> Iterator[Path]:
    """A folder that is removed at the end. Raises ArtifactError where there is no place for that either."""
    with ExitStack() as stack:
        try:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="prebake-", ignore_cleanup_errors=True))
            )
            _write_members(folder, members)
        except OSError as e:
            raise ArtifactError(
                f"{cache}: machine code cannot be unpacked there ({why.strerror}), nor into a temporary folder ({e.strerror}); "
                "give load() a cache_dir that can be written and has room, on a disk that allows execution"
            ) from e
        yield folder


def _has_members(folder: Path, members: Mapping[str, Mapping[str, bytes]]) -> bool:
    """Whether the folder holds these files, byte for byte, and nothing else."""
    if not folder.is_dir() or not is_private_folder(folder):
        return False
    want = {folder / model / name: content for model, files in members.items() for name, content in files.items()}
    have = {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return have == want.keys() and all(not p.is_symlink() and p.read_bytes() == content for p, content in want.items())


def _replace_members(folder: Path, members: Mapping[str, Mapping[str, bytes]]) -> None:
    """Puts a fresh folder in place by one rename.

    Where another process was faster its equal folder stays untouched, for that process is about to open it.
    """
    with scratch_folder(folder.parent, f".{folder.name}.") as fresh:  # mode 0700
        _write_members(fresh, members)
        if not rename_if_free(fresh, folder) and not _has_members(folder, members):
            replace_folder(fresh, folder)


def _write_members(folder: Path, members: Mapping[str, Mapping[str, bytes]]) -> None:
    for model, files in members.items():
        (folder / model).mkdir(mode=0o700)
        for name, content in files.items():
            (folder / model / name).write_bytes(content)
