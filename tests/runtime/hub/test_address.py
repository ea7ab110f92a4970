"""A place that is no folder of an artifact, and the command that makes one of it."""

import shutil
from pathlib import Path

import pytest

from prebake.runtime import ArtifactError, load
from prebake.runtime.__main__ import main
from prebake.runtime.hub.address import pull_command
from prebake.runtime.manifest import read_manifest


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("hf://owner/name", "prebake pull hf://owner/name name"),
        ("hf://owner/name@v1", "prebake pull hf://owner/name@v1 name"),
        ("/somewhere/hf:/owner/name", "prebake pull hf://owner/name name"),
        (
            "/cache/hub/models--owner--a-name/snapshots/0123abcd",
            "prebake pull hf://owner/a-name@0123abcd a-name",
        ),
        ("hf://owner", ""),
        ("artifacts/flux", ""),
        ("artifacts/hf:nothing/x", ""),
    ],
)
def test_the_command_is_for_what_the_path_names(place, command):
    assert pull_command(Path(place)) == command


@pytest.mark.parametrize("act", [load, lambda place: read_manifest(Path(place))])
def test_an_address_of_the_hub_is_answered_with_the_command_that_fetches_it(act):
    with pytest.raises(ArtifactError, match=r"`prebake pull hf://owner/name@v1 name`, and open that$"):
        act("hf://owner/name@v1")


@pytest.mark.parametrize("command", [["check"], ["inspect"], ["run"]])
def test_so_it_is_in_the_shell(command, capsys):
    assert main([*command, "hf://owner/name", *(["red"] if command == ["run"] else [])]) == 5
    told = capsys.readouterr()
    assert "`prebake pull hf://owner/name name`" in told.out + told.err


def linked(paper: Path, place: Path) -> Path:
    """A folder with a link to each file of the artifact, as the Hub's cache has them."""
    for file in [p for p in paper.rglob("*") if p.is_file()]:
        (place / file.relative_to(paper)).parent.mkdir(parents=True, exist_ok=True)
        (place / file.relative_to(paper)).symlink_to(file)
    return place


@pytest.mark.parametrize(
    ("name", "command"),
    [("of links", r"cp -rL '.+of links' COPY"), ("models--a--b/snapshots/12ab", r"prebake pull hf://a/b@12ab b")],
)
def test_a_folder_of_links_is_answered_in_one_sentence_with_the_way_out(paper, tmp_path, name, command, capsys):
    folder = linked(paper, tmp_path / name)
    told = rf"4 of its files are symbolic links, such as manifest.json, .+`{command}`, and open that$"
    with pytest.raises(ArtifactError, match=told):
        load(folder)
    assert main(["check", str(folder)]) == 5
    assert "1 problem" in capsys.readouterr().out
    assert main(["pull", str(folder), str(tmp_path / "pulled")]) == 5
    assert "manifest.json is a symbolic link; make a folder of its own with `" in capsys.readouterr().err


def test_the_copy_that_is_proposed_is_an_artifact(paper, tmp_path):
    folder = shutil.copytree(linked(paper, tmp_path / "links"), tmp_path / "copy")
    assert read_manifest(folder) == read_manifest(paper)
