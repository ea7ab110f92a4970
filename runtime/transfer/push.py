"""Pushes an artifact: a folder and a place come in, and the place holds that artifact, whole and compared with the manifest.

What is not right here is not sent. A folder gets it as `pull` brings one; the Hub in one commit, whose hashes are asked for
afterwards. The files that the manifest lists travel, the manifest, the signature and what lies in `reports/`; nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..check.artifact import UNCHECKED_FOLDER
from ..check.signature import SIGNATURE_FILE as SIGNATURE
from ..errors import ArtifactError, RecipeError, raise_problems
from ..hub.address import HUB_SCHEME
from ..manifest import Manifest, read_manifest
from ..problems import artifact_problems
from .folder import FolderOrigin
from .hub import HubRepository, hub_differences
from .progress import TransferProgress
from .pull import MANIFEST_FILE, Origin, PullOptions, TransferResult, pull, report_sizes


def origin_of(place: str) -> Origin:
    """What is at `hf://owner/name[@revision]`, a path or `file://` and a path. Raises RecipeError for any other place."""
    return HubRepository(place) if place.startswith(HUB_SCHEME) else FolderOrigin(place_path(place))


def place_path(place: str) -> Path:
    url = urlsplit(place)
    if "://" not in place:
        return Path(place)
    if url.scheme != "file" or url.netloc not in ("", "localhost"):
        raise RecipeError(f"{place}: expected a folder, file:///folder, or {HUB_SCHEME}owner/name@revision")
    return Path(unquote(url.path))


def push(folder: Path, destination: str, *, force: bool, bar: TransferProgress) -> TransferResult:
    """Checks the artifact and sends it. Raises ArtifactError for an artifact that is not right, or a place that does not take it, and RecipeError for a place
    that is none, or holds something else and `force` is not given."""
    target = HubRepository(destination) if destination.startswith(HUB_SCHEME) else place_path(destination)
    bar.begin("check")
    manifest = read_manifest(folder)
    raise_problems(folder, push_problems(folder, manifest))
    if isinstance(target, HubRepository):
        return push_to_hub(folder, manifest, target, force, bar)
    if target.resolve() == folder.resolve():
        raise RecipeError(f"{destination}: is the artifact itself; give another folder")
    return pull(FolderOrigin(folder), target, PullOptions(any_machine=True, force=force), bar)


def push_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Why the artifact should reach nobody. That this machine cannot run it is no reason; its code is then not looked at."""
    if manifest.status == "failed":
        yield "missed its thresholds, and its manifest says so; push one that holds"
    found = list(artifact_problems(folder))
    elsewhere = {"machine", "code"} if any(kind == "machine" for kind, _ in found) else set()
    yield from (problem for kind, problem in found if kind not in elsewhere)


def push_to_hub(
    folder: Path, manifest: Manifest, hub: HubRepository, force: bool, bar: TransferProgress
) -> TransferResult:
    """Sends the artifact in one commit, in none where it is there already. What was sent of it, the Hub's library does not tell."""
    free = FolderOrigin(folder)
    entries = {entry.path: entry for entry in manifest.files}
    signature = [SIGNATURE] if (folder / SIGNATURE).is_file() else []
    paths = [*entries, MANIFEST_FILE, *signature, *report_sizes(free, bar)]
    hashes = {path: entry.sha256 for path, entry in entries.items()}

    there = hub.prepare()
    if any(hub_differences(folder, paths, hashes, hub.tree)):
        if there and MANIFEST_FILE in hub.tree and not force:
            raise RecipeError(f"{hub}: holds another artifact; replace it with --force, or give another revision")
        gone = sorted(path for path in earlier_files(hub) if path not in paths)
        commit = hub.commit(folder, paths, gone, f"Artifact of {manifest.source.model}", bar)
    else:
        commit = hub.revision
    bar.begin("verify")
    if lost := list(hub_differences(folder, paths, hashes, hub.tree_of(commit))):
        raise ArtifactError("\n".join(f"{hub}: {line} after the push; push again with --force" for line in lost))
    size = sum(entry.size for entry in manifest.files)
    return TransferResult(str(hub), commit, len(entries), size, None, None)


def earlier_files(hub: HubRepository) -> set[str]:
    """The files in the repository that are of an earlier artifact, and not of the repository, such as its README.md."""
    if MANIFEST_FILE not in hub.tree:
        return set()
    listed = hub.artifact_paths() | {SIGNATURE}
    return {path for path in hub.tree if path in listed or path.startswith(f"{UNCHECKED_FOLDER}/")}
