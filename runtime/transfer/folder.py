"""An artifact in a folder of this machine, or one that is mounted, as a place to pull from: see `pull.Origin`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..check.artifact import MANIFEST_FILE, UNCHECKED_FOLDER, UNLISTED_FILES
from ..errors import ArtifactError
from ..hub.address import link_way_out
from ..storage.files import BLOCK_BYTES, open_plain_file
from .progress import TransferProgress


class FolderOrigin:
    """Its files are read by descriptor, following no link below the folder."""

    revision: str | None = None

    def __init__(self, folder: Path):
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def sizes(self) -> dict[str, int]:
        """Path -> bytes of the files that no manifest lists. Links count, so that they are refused when they are fetched.

        Raises ArtifactError where there is no such folder.
        """
        if not self.folder.is_dir():
            found = "a file" if self.folder.exists() else "nothing"
            raise ArtifactError(f"{self.folder}: expected an artifact folder, found {found}")
        if (self.folder / MANIFEST_FILE).is_symlink():
            raise ArtifactError(f"{self.folder}: {MANIFEST_FILE} is a symbolic link; {link_way_out(self.folder)}")
        free = [path for path in (self.folder / UNCHECKED_FOLDER).rglob("*") if path.is_symlink() or not path.is_dir()]
        named = [path for name in sorted(UNLISTED_FILES) if (path := self.folder / name).is_file()]
        return {p.relative_to(self.folder).as_posix(): p.lstat().st_size for p in (*named, *sorted(free))}

    def fetch(self, files: Mapping[str, int], into: Path, bar: TransferProgress) -> None:
        """Copies them. Raises ArtifactError for what is no plain file (any more), and OSError where the disk refuses."""
        bar.begin("copy", sum(files.values()))
        for path, size in files.items():
            bar.file(path, size)
            (into / path).parent.mkdir(parents=True, exist_ok=True)
            with open(open_plain_file(self.folder, path), "rb") as source, open(into / path, "xb") as target:
                if (there := os.fstat(source.fileno()).st_size) != size:
                    raise ArtifactError(
                        f"{self.folder}: {path} has {there} bytes, {size} were expected; restore the file, or push it again"
                    )
                left = size
                while block := source.read(
                    min(BLOCK_BYTES, left)
                ):  # a file that grows meanwhile ends here all the same
                    left -= target.write(block)
                    bar.advance(len(block))
