"""An artifact in a model repository of the Hugging Face Hub, through huggingface_hub: to pull from, see `pull.Origin`, and to
push to, in one commit, so that whoever reads the repository sees the whole artifact or the one before.

huggingface_hub knows where the Hub is (`HF_ENDPOINT`), who is logged in, and how to go on where a connection broke.
"""

from __future__ import annotations

import glob
import hashlib
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..bounds import MAX_MANIFEST_BYTES, parse_json
from ..errors import ArtifactError, RecipeError, error_summary
from ..hub.address import HUB_SCHEME
from ..storage.files import read_plain_file, sha256_of
from .progress import TransferProgress

HUB_EXTRA_HINT = f"{HUB_SCHEME} needs huggingface_hub: pip install 'prebake[hub]'"


class HubRepository:
    """One revision of one repository. It is asked for once, and the commit that it was then is what is read."""

    def __init__(self, uri: str):
        """Raises RecipeError for what names no model repository, or where the package is not installed."""
        try:
            from huggingface_hub import HfApi, parse_hf_uri
            from huggingface_hub.errors import HfUriError
        except ImportError as e:
            raise RecipeError(HUB_EXTRA_HINT) from e
        try:
            parsed = parse_hf_uri(uri)
        except HfUriError as e:
            raise RecipeError(
                f"{uri}: expected {HUB_SCHEME}owner/name or {HUB_SCHEME}owner/name@revision ({e.msg})"
            ) from e
        if parsed.type != "model" or parsed.path_in_repo:
            what = f"the folder {parsed.path_in_repo!r}" if parsed.path_in_repo else f"a {parsed.type}"
            raise RecipeError(
                f"{uri}: an artifact is a whole model repository, and this names {what}; give {HUB_SCHEME}owner/name@revision"
            )
        self.uri, self.repo, self.branch = uri, parsed.id, parsed.revision
        self.api = HfApi(library_name="prebake")

    def __str__(self) -> str:
        return self.uri

    @property
    def revision(self) -> str:
        """The commit that is read, equal to `head`."""
        return self.head

    @cached_property
    def head(self) -> str:
        """The commit. Raises ArtifactError where there is none, or the Hub does not say."""
        with explain_hub_errors(self):
            return str(self.api.repo_info(self.repo, revision=self.branch).sha)

    @cached_property
    def tree(self) -> dict[str, Any]:
        """Path -> `huggingface_hub.RepoFile` of every file. Raises as `head` does."""
        return self.tree_of(self.head)

    def tree_of(self, commit: str) -> dict[str, Any]:
        from huggingface_hub import RepoFile

        with explain_hub_errors(self):
            found = self.api.list_repo_tree(self.repo, recursive=True, revision=commit)
            return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}

    def sizes(self) -> dict[str, int]:
        return {path: entry.size for path, entry in self.tree.items()}

    def fetch(self, files: Mapping[str, int], into: Path, bar: TransferProgress) -> None:
        """Downloads them. Raises ArtifactError for what the repository lacks, and where the Hub is not reached."""
        bar.begin(f"download {len(files)} files")
        for path, size in files.items():
            if path not in self.tree:
                raise ArtifactError(f"{self}: {path} is missing, the manifest lists it; push the artifact again")
            bar.file(path, size)
        commit = self.head
        try:
            with explain_hub_errors(self), show_library_progress(bar.library):
                self.api.snapshot_download(
                    self.repo, revision=commit, local_dir=into, allow_patterns=[glob.escape(path) for path in files]
                )
        finally:
            shutil.rmtree(into / ".cache" / "huggingface", ignore_errors=True)  # its notes are no part of an artifact
            with suppress(OSError):
                (into / ".cache").rmdir()

    # --- pushing ------------------------------------------------------------------------------------------------------

    def prepare(self) -> bool:
        """Whether the revision was there. A repository that was not is made, a private one, and so is a branch."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            self.api.repo_info(self.repo, revision=self.branch)
        except RevisionNotFoundError:  # a repository without a commit of that name
            pass
        except RepositoryNotFoundError:
            with explain_hub_errors(self):
                self.api.create_repo(self.repo, private=True, exist_ok=True)
        except Exception as e:
            raise ArtifactError(f"{self}: {hub_error_reason(e)}") from e
        else:
            return True
        if self.branch is not None:
            with explain_hub_errors(self):
                self.api.create_branch(self.repo, branch=self.branch, exist_ok=True)
        return False

    def commit(
        self, folder: Path, paths: Sequence[str], gone: Sequence[str], message: str, bar: TransferProgress
    ) -> str:
        """Uploads the folder's files, removes those in `gone`, all in one commit after `head`; its name.

        Files that a push before this one has brought to the Hub, and that no commit has yet, are not sent again.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        bar.begin(f"upload {len(paths)} files")
        for path in paths:
            bar.file(path, (folder / path).stat().st_size)
        with explain_hub_errors(self), show_library_progress(bar.library):
            operations = [
                *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path) for path in paths),
                *(CommitOperationDelete(path_in_repo=path, is_folder=False) for path in gone),
            ]
            made = self.api.create_commit(
                self.repo, operations, commit_message=message, revision=self.branch, parent_commit=self.head
            )
        return made.oid

    def artifact_paths(self) -> set[str]:
        """The files of the artifact that the repository holds, as its manifest says; none, where that cannot be read."""
        with tempfile.TemporaryDirectory(prefix="prebake-") as temporary:
            self.fetch({"manifest.json": 0}, Path(temporary), TransferProgress())
            try:
                files = parse_json(read_plain_file(Path(temporary), "manifest.json", MAX_MANIFEST_BYTES + 1))["files"]
                return {str(entry["path"]) for entry in files}
            except (OSError, ValueError, KeyError, TypeError):
                return set()


def hub_differences(
    folder: Path, paths: Sequence[str], hashes: Mapping[str, str], tree: Mapping[str, Any]
) -> Iterator[str]:
    """Files of the folder that the Hub has not, or not so. `hashes` are their sha256, where these are known."""
    for path in paths:
        file = tree.get(path)
        if file is None:
            yield f"{path} is not there"
        elif file.size != (folder / path).stat().st_size or not has_content(file, folder / path, hashes.get(path)):
            yield f"{path} is there with another content"


def has_content(file: Any, path: Path, sha256: str | None) -> bool:
    """Whether the Hub's file, which is named by its hash, has the content of the one at `path`, whose `sha256` may be known."""
    if file.lfs is None:  # git's own name for a file
        data = path.read_bytes()
        return file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if sha256 is None:
        with path.open("rb") as opened:
            sha256 = sha256_of(opened.fileno())
    return file.lfs.sha256 == sha256


@contextmanager
def show_library_progress(shown: bool) -> Iterator[None]:
    """huggingface_hub's own bars and warnings (such as that a connection broke and is taken up), or none, in the block."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
        tqdm,
    )

    if shown:
        yield
        for left in list(
            getattr(tqdm, "_instances", ())
        ):  # it leaves its last bars open, to be drawn at exit once more
            left.close()
        return
    disabled, verbosity = are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not disabled:
            enable_progress_bars()


# --- what the Hub says ------------------------------------------------------------------------------------------------


@contextmanager
def explain_hub_errors(hub: HubRepository) -> Iterator[None]:
    """Raises ArtifactError for whatever the Hub, its library or the network raises in the block."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as e:
        raise ArtifactError(f"{hub}: {hub_error_reason(e)}") from e


def hub_error_reason(error: BaseException) -> str:
    """One clause that says why the Hub did not do as it was asked, and the way out."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    among = partial(is_caused_by, error)
    status = next(
        (cause.response.status_code for cause in error_chain(error) if isinstance(cause, HfHubHTTPError)), None
    )
    if among(OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked; unset it"
    if among(GatedRepoError):  # is a RepositoryNotFoundError too
        return "its owner asks for a licence to be accepted; do so on its page, and log in with `hf auth login`"
    if among(RevisionNotFoundError):
        return "there is no such revision; give a branch, a tag or a commit that is there, or none"
    if among(RepositoryNotFoundError):
        return "there is no such repository, or it is private; check the name, or log in with `hf auth login`"
    if status in (401, 403):
        return f"the Hub refuses ({error_summary(error)}); log in with a token that may do this, with `hf auth login`"
    # whatever library speaks HTTP, a network that is not there ends in one of Python's own errors
    if among(LocalEntryNotFoundError, ConnectionError, TimeoutError, socket.gaierror):
        return f"the Hub cannot be reached ({error_summary(error)}); try again, and what has arrived is not sent again"
    return f"the Hub or the way to it fails ({error_summary(error)}); try again, and what has arrived is not sent again"


def is_caused_by(error: BaseException, *types: type[BaseException]) -> bool:
    """Whether the error, or one that led to it, is of these types."""
    return any(isinstance(cause, types) for cause in error_chain(error))


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
