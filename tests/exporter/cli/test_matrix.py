"""`prebake export` of several recipes: all are tried, and the report says what became of each. The export is a stub."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest

from prebake.exporter.cli.main import main
from prebake.exporter.cli.matrix import WORST_FIRST, ExportRow, RowOutcome, junit_xml, worst_code
from prebake.runtime.errors import ArtifactError, ExportError, QualityError, RecipeError


class Stub:
    """`exporter/pipeline.py`, whose `export` notes its calls and raises what `errors` has for the recipe's name."""

    def __init__(self):
        self.calls: list[tuple[str, str, str]] = []
        self.errors: dict[str, BaseException] = {}

    def export(self, recipe, output, options, progress):
        self.calls.append((recipe.name, recipe.model.id, str(output)))
        if error := self.errors.get(recipe.name):
            raise error
        return output


@pytest.fixture
def stub(monkeypatch, tmp_path):
    made = Stub()
    module = types.ModuleType("prebake.exporter.pipeline")
    module.ExportOptions, module.export, module.prepare = types.SimpleNamespace, made.export, None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    return made


def printed(capsys) -> list[str]:
    """stdout's lines, every time as 0.0."""
    return [re.sub(r"\d+\.\d", "0.0", line) for line in capsys.readouterr().out.splitlines()]


def test_all_are_tried_and_the_worst_decides(stub, capsys):
    stub.errors = {"baseline": QualityError("psnr is 12 dB"), "flux-fast": ExportError("it has a hook\nand another")}
    names = ["baseline", "flux-fast", "sd-fast"]
    assert main(["export", *(f"--recipe={n}" for n in names), "--model", "shapes"]) == 3
    assert [name for name, *_ in stub.calls] == names
    assert printed(capsys) == [
        "[1/3] baseline shapes",
        "[2/3] flux-fast shapes",
        "[3/3] sd-fast shapes",
        "recipe     model   result         seconds",
        "baseline   shapes  misses             0.0  psnr is 12 dB",
        "flux-fast  shapes  cannot export      0.0  it has a hook",
        "sd-fast    shapes  done               0.0  artifacts/sd-fast-shapes",
    ]


def test_json_has_a_result_for_each(stub, capsys):
    stub.errors = {"baseline": ArtifactError("refused")}
    assert main(["export", "--recipe", "baseline", "--recipe", "flux-fast", "--model", "shapes", "--json"]) == 5
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == 5
    first, second = report["exports"]
    assert first.pop("elapsed_s") >= 0
    assert first == {
        "recipe": "baseline",
        "model": "shapes",
        "set": [],
        "exit_code": 5,
        "errors": ["refused"],
        "result": None,
    }
    assert second["exit_code"] == 0
    assert second["result"] == {"artifact": "artifacts/flux-fast-shapes", "graphs": {}, "seconds": {}}


def test_a_recipe_that_does_not_resolve_stops_nobody_else(stub, capsys):
    assert main(["export", "--recipe", "nope", "--recipe", "baseline", "--quiet"]) == 2
    assert [name for name, *_ in stub.calls] == ["baseline"]
    err = capsys.readouterr().err
    assert err.startswith("prebake: error: unknown recipe 'nope'; known recipes: ")


def test_a_missing_extra_is_bad_input_of_each(stub, capsys):
    stub.errors = {"baseline": ModuleNotFoundError("No module named 'torchao'", name="torchao")}
    assert main(["export", "--recipe", "baseline", "--recipe", "flux-fast", "--quiet"]) == 2
    assert capsys.readouterr().err == "prebake: error: `prebake export` needs torchao: pip install 'prebake[export]'\n"


def test_a_bug_is_told_with_its_traceback_and_stops_nobody_else(stub, capsys):
    stub.errors = {"baseline": ZeroDivisionError("division by zero"), "flux-fast": RecipeError("no")}
    assert main(["export", "--recipe", "baseline", "--recipe", "flux-fast", "--recipe", "sd-fast", "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("ZeroDivisionError: division by zero\nprebake: error: no\n")
    assert len(stub.calls) == 3


def test_an_interrupt_ends_the_run_and_keeps_the_report(stub, capsys):
    stub.errors = {"flux-fast": KeyboardInterrupt()}
    assert main(["export", "--recipe", "baseline", "--recipe", "flux-fast", "--recipe", "sd-fast", "--json"]) == 130
    out, err = capsys.readouterr()
    assert "prebake: interrupted; what was exported before is in place\n" in err
    report = json.loads(out)
    assert report["exit_code"] == 130
    assert [one["recipe"] for one in report["exports"]] == ["baseline"]
    assert len(stub.calls) == 2


def test_the_worst_is_the_first_in_a_fixed_order():
    assert WORST_FIRST == (1, 2, 3, 5, 4, 0)
    assert worst_code([0, 4, 0]) == 4
    assert worst_code([4, 5]) == 5
    assert worst_code([5, 3, 4]) == 3
    assert worst_code([3, 2, 0]) == 2
    assert worst_code([2, 1]) == 1
    assert worst_code([0]) == 0


# matrix files

MATRIX = """
[[export]]
recipe = "baseline"

[[export]]
recipe = "flux-fast"
model = "tiny:flux"
set = ["sampler.steps=6"]
output = "there"
"""


def test_a_matrix_says_what_command_lines_could(stub, capsys, tmp_path):
    (tmp_path / "matrix.toml").write_text(MATRIX)
    arguments = ["--matrix", "matrix.toml", "--model", "shapes", "--set", "verify.seeds=1", "--json"]
    assert main(["export", *arguments]) == 0
    assert stub.calls == [("baseline", "shapes", "artifacts/baseline-shapes"), ("flux-fast", "tiny:flux", "there")]
    sets = [one["set"] for one in json.loads(capsys.readouterr().out)["exports"]]
    assert sets == [["verify.seeds=1"], ["verify.seeds=1", "sampler.steps=6"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = [", "not valid TOML: "),
        ("", "expected one [[export]] table or more, and nothing else; it has none"),
        ("export = []", "expected one [[export]] table or more, and nothing else; it has 'export'"),
        ("[other]", "expected one [[export]] table or more, and nothing else; it has 'other'"),
    ],
)
def test_a_matrix_that_is_none_is_refused(stub, capsys, tmp_path, text, said):
    (tmp_path / "m.toml").write_text(text)
    assert main(["export", "--matrix", "m.toml"]) == 2
    assert capsys.readouterr().err.startswith(f"prebake: error: --matrix m.toml: {said}")
    assert stub.calls == []


def test_every_problem_of_a_matrix_is_told_before_the_first_export(stub, capsys, tmp_path):
    (tmp_path / "m.toml").write_text(
        'export = [{recipe = "baseline"}, {model = "shapes"}, {recipe = 3, sett = []}, {recipe = "a", set = [1]}, 7]'
    )
    assert main(["export", "--matrix", "m.toml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "prebake: error: --matrix m.toml [export.1]: expected a recipe, found none",
        "prebake: error: --matrix m.toml [export.2]: unknown key 'sett'; known keys: recipe, model, set, output",
        "prebake: error: --matrix m.toml [export.2]: expected a text for recipe, got 3",
        "prebake: error: --matrix m.toml [export.3]: expected a list of texts for set, got [1]",
        "prebake: error: --matrix m.toml [export.4]: expected a table, got 7",
    ]
    assert stub.calls == []


def test_a_matrix_that_is_not_there_is_named(stub, capsys):
    assert main(["export", "--matrix", "absent.toml"]) == 2
    assert capsys.readouterr().err == (
        "prebake: error: --matrix absent.toml: expected a TOML file, but No such file or directory; see docs/how-to/ci.md\n"
    )


def test_one_output_for_two_exports_is_refused(stub, capsys):
    assert main(["export", "--recipe", "baseline", "--recipe", "flux-fast", "--output", "x"]) == 2
    assert capsys.readouterr().err == (
        "prebake: error: --output x: is one folder, for one --recipe; a --matrix gives each export its own\n"
    )
    assert main(["export", "--recipe", "baseline", "--recipe", "baseline", "--model", "shapes"]) == 2
    assert capsys.readouterr().err == (
        "prebake: error: artifacts/baseline-shapes: two exports would be written there; give each an output of its own "
        "in a --matrix\n"
    )
    assert stub.calls == []


def test_recipe_and_matrix_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as e:
        main(["export", "--recipe", "baseline", "--matrix", "m.toml"])
    assert e.value.code == 2
    assert "--matrix: not allowed with argument --recipe" in capsys.readouterr().err


# JUnit


def test_junit_has_a_case_for_each(stub, tmp_path):
    stub.errors = {
        "baseline": QualityError("psnr < 30"),
        "flux-fast": ExportError("a \x1b[31mhook\x1b[0m\nand another"),
    }
    names = ["baseline", "flux-fast", "sd-fast"]
    assert main(["export", *(f"--recipe={n}" for n in names), "--model", "shapes", "--junit", "j.xml", "--quiet"]) == 3
    suite = ElementTree.parse(tmp_path / "j.xml").getroot().find("testsuite")
    assert {k: suite.attrib[k] for k in ("tests", "failures", "errors")} == {
        "tests": "3",
        "failures": "1",
        "errors": "1",
    }
    missed, hooked, done = suite
    assert [case.attrib["name"] for case in suite] == [f"{name} shapes" for name in names]
    assert missed.find("failure").attrib == {"type": "misses", "message": "psnr < 30"}
    assert hooked.find("error").attrib == {"type": "cannot export", "message": "a �[31mhook�[0m"}
    assert hooked.find("error").text == "a �[31mhook�[0m\nand another"
    assert len(missed) == len(hooked) == 1
    assert json.loads(done.find("system-out").text)["artifact"] == "artifacts/sd-fast-shapes"


def test_junit_of_one_recipe(stub, tmp_path):
    assert main(["export", "--recipe", "baseline", "--junit", "j.xml", "--quiet"]) == 0
    assert len(ElementTree.parse(tmp_path / "j.xml").getroot().find("testsuite")) == 1


def test_junit_that_cannot_be_written_is_refused_before_the_first_export(stub, capsys):
    assert main(["export", "--recipe", "baseline", "--junit", "absent/j.xml"]) == 2
    assert capsys.readouterr().err == (
        "prebake: error: --junit absent/j.xml: cannot be written (No such file or directory); choose another file\n"
    )
    assert stub.calls == []


def test_junit_is_xml_whatever_is_said():
    text = junit_xml([RowOutcome(ExportRow("a<&\"'>"), 1, 0.5, errors=("\x00\x08\ud800 ]]> &",))])
    (case,) = ElementTree.fromstring(text.encode()).find("testsuite")
    assert case.attrib["name"] == "a<&\"'>"
    assert case.find("error").text == "��� ]]> &"


def test_paths_of_a_matrix_are_as_on_the_command_line(stub, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/m.toml").write_text('[[export]]\nrecipe = "baseline"\nmodel = "shapes"\noutput = "out"')
    assert main(["export", "--matrix", "sub/m.toml", "--quiet"]) == 0
    assert Path(stub.calls[0][2]) == Path("out")
