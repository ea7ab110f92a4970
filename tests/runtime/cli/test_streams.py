"""A stranger's names on a terminal: what they hold is shown, and not obeyed."""

import json

import pytest

from prebake.runtime import ArtifactError
from prebake.runtime.__main__ import main
from prebake.runtime.artifact import open_artifact
from prebake.runtime.cli.streams import json_text
from prebake.runtime.errors import printable_line
from support.paper_artifact import edit

CLEAR = "\x1b[2J\x9b1m\u202e"  # clears the screen, makes bold, turns the direction of writing
FORGED = "x\nall is well"


def shown(capsys, *argv):
    code = main([*map(str, argv)])
    output = capsys.readouterr()
    return code, output.out + output.err


def obeys_nothing(text):
    return all(line.isprintable() for line in text.split("\n"))


def in_the_manifest(folder):
    def change(raw):
        raw["graphs"][0]["name"] = f"full{CLEAR}"
        raw["source"]["model"] = f"m{CLEAR}{FORGED}"
        raw["layers"] = {f"layer{CLEAR}": ["int8", FORGED]}
        raw["requires"]["isa"] = [f"avx{CLEAR}", FORGED]

    edit(folder, change)


@pytest.mark.parametrize("command", ["check", "inspect", "run", "pull"])
@pytest.mark.parametrize("json_too", [False, True])
def test_names_move_no_cursor_and_begin_no_line(paper, never_opened, capsys, command, json_too, tmp_path):
    in_the_manifest(paper)
    (paper / f"weights/{CLEAR}{FORGED}").write_text("")
    more = {"run": ["a cat"], "pull": [tmp_path / "here"]}.get(command, [])
    options = {"inspect": ["--layers"]}.get(command, [])
    if command == "inspect":
        edit(paper, lambda m: m["graphs"][0].update(name="full"))
    _, text = shown(capsys, command, paper, *more, *options, *(["--json"] if json_too else []))
    assert obeys_nothing(text)
    assert "all is well" not in text.split("\n")
    if json_too and command in ("check", "inspect"):
        assert CLEAR in json.dumps(json.loads(text), ensure_ascii=False).replace("\\u001b", "\x1b")


def test_an_error_has_a_line_for_each_problem_and_no_other(paper, never_opened):
    (paper / f"weights/{FORGED}").write_text("")
    with pytest.raises(ArtifactError) as caught:
        open_artifact(paper)
    (line,) = str(caught.value).splitlines()
    assert r"weights/x\nall is well is not in the manifest" in line


def test_what_a_terminal_shows_stays_as_it_is():
    said = "un café\u00a0: ☕ 模型 🎨 \u05e9\u05dc\u05d5\u05dd"
    assert printable_line(said) == said
    assert printable_line("a\x1b[1m\n\x7f\ud800") == r"a\x1b[1m\n\x7f\ud800"


def test_json_stays_what_it_says():
    said = {"a\x7f": ["é\x9b", "\u202e", "🎨", "\U000e0001", "\n"]}
    assert json.loads(json_text(said, indent=2)) == said
    assert obeys_nothing(json_text(said, indent=2))
    assert "🎨" in json_text(said)
