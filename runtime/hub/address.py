"""Where on the Hugging Face Hub a path leads to: `hf://owner/name` in place of a folder, or a folder of the Hub's own cache, whose
files are links. Neither is an artifact's folder; `prebake pull` makes one of it."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote

HUB_SCHEME = "hf://"
WRITTEN_ADDRESS = re.compile(r"(?:^|/)hf:/+(?P<repo>[^/]+/[^/@]+)(?P<revision>@[^/]+)?$")  # a Path has one slash of two
CACHE_FOLDER = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")


def pull_command(folder: Path) -> str:
    """The command that makes a folder of what the path names on the Hub; '' where it names nothing there."""
    if written := WRITTEN_ADDRESS.search(str(folder)):
        repo, revision = written["repo"], written["revision"] or ""
    elif cached := CACHE_FOLDER.search(str(folder.absolute())):
        repo, revision = f"{cached['owner']}/{cached['name']}", f"@{cached['revision']}"
    else:
        return ""
    return f"prebake pull {quote(f'{HUB_SCHEME}{repo}{revision}')} {quote(repo.partition('/')[2])}"


def describe_links(folder: Path, count: int) -> str:
    """What a folder is refused for whose manifest, and so probably all else, is a link: somebody's cache or store."""
    counted = (
        f"{count} of its files are symbolic links, such as manifest.json"
        if count > 1
        else "manifest.json is a symbolic link"
    )
    return f"{counted}, and an artifact holds plain files only; {link_way_out(folder)}"


def link_way_out(folder: Path) -> str:
    """What makes an artifact of a folder whose files are links."""
    return (
        f"make a folder of its own with `{pull_command(folder) or f'cp -rL {quote(str(folder))} COPY'}`, and open that"
    )
