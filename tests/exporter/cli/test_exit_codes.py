"""Exit codes of `prebake` and of `python -m prebake.runtime`: from the kind of error, and as the help and docs/how-to/ci.md say."""

from __future__ import annotations

import re
import subprocess
import sys
import types

import pytest

from prebake.exporter.cli import main as cli
from prebake.exporter.cli.matrix import WORST_FIRST
from prebake.exporter.progress import ProgressBar, open_progress
from prebake.runtime import errors
from support.paths import ROOT

CODES = {
    errors.RecipeError: 2,
    errors.RequestError: 2,
    errors.ExportError: 3,
    errors.QualityError: 4,
    errors.ArtifactError: 5,
    errors.Cancelled: 130,
}


@pytest.fixture
def raising(monkeypatch):
    """A function that makes every export raise an error."""

    def arrange(error: BaseException) -> None:
        def export(recipe, output, options, shown):
            with shown.stage("load"):
                shown.announce("a model")
                shown.note("this is a stub")
                raise error

        stub = types.ModuleType("prebake.exporter.pipeline")
        stub.ExportOptions, stub.export, stub.prepare = types.SimpleNamespace, export, None
        monkeypatch.setitem(sys.modules, stub.__name__, stub)

    return arrange


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_a_kind_of_error_has_a_code(raising, capsys, kind, code):
    raising(kind("first\nsecond"))
    assert cli.main(["export", "--recipe", "baseline", "--quiet"]) == code
    assert capsys.readouterr().err == "prebake: error: first\nprebake: error: second\n"


def test_every_kind_has_a_code_and_a_parent():
    parents = {errors.PrebakeError, errors.CallerError, errors.ResourceError}
    raised = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PrebakeError)
    }
    assert raised - parents == set(CODES)
    assert {kind for kind in CODES if CODES[kind] == 2} == {k for k in CODES if issubclass(k, errors.CallerError)}
    assert {kind for kind in CODES if CODES[kind] in (3, 4, 5)} == {
        k for k in CODES if issubclass(k, errors.ResourceError)
    }


def test_interrupted_is_130(raising, capsys):
    raising(KeyboardInterrupt())
    assert cli.main(["export", "--recipe", "baseline", "--quiet"]) == 130
    assert capsys.readouterr().err == "prebake: interrupted; nothing was written\n"


def test_a_refused_artifact_is_5_from_either_command(tmp_path):
    said = f"{tmp_path}: expected manifest.json in an artifact folder, found none; make one with `prebake export`\n"
    for module, prefix in (("prebake.exporter", "prebake: error: "), ("prebake.runtime", "error: ")):
        done = subprocess.run(
            [sys.executable, "-m", module, "inspect", str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (5, "", prefix + said)


def test_a_command_line_that_does_not_parse_is_2(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["export"])
    assert e.value.code == 2
    assert "one of the arguments --recipe --matrix is required" in capsys.readouterr().err


def test_a_missed_threshold_of_verify_is_4(monkeypatch, tmp_path, capsys):
    from prebake.exporter.cli import quiet as hush
    from prebake.exporter.verify import verify

    outcome = types.SimpleNamespace(missed=["plan '4': psnr is 12 dB, 30 are asked for"])
    monkeypatch.setattr(hush, "silence_libraries", lambda: None)
    monkeypatch.setattr(verify, "verify_artifact", lambda *args: (None, outcome))
    assert cli.main(["verify", str(tmp_path), "--quiet"]) == 4
    assert capsys.readouterr().err == "plan '4': psnr is 12 dB, 30 are asked for\n"
    outcome.missed = []
    assert cli.main(["verify", str(tmp_path), "--quiet"]) == 0


def test_the_help_ends_with_the_codes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert capsys.readouterr().out.endswith(
        """
exit codes:
    0  done
    1  a bug in prebake, with its traceback
    2  bad input: the arguments of a command or a call, the recipe or a matrix, or a package that is not installed
    3  this model cannot be exported so
    4  a threshold of the recipe is missed
    5  the artifact is refused: it is damaged, or not for this machine
  130  interrupted
  141  whoever read its output is gone
  143  ended by SIGTERM
"""
    )


def test_the_page_has_the_same_table():
    page = (ROOT / "docs/how-to/ci.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", page, re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == dict(errors.EXIT_CODES)
    order = re.search(r"worst first: ([\d, ]+)\.", page)
    assert tuple(map(int, order[1].split(","))) == WORST_FIRST


# logs


def test_no_control_codes_where_there_is_no_terminal(raising, capsys, monkeypatch):
    """FORCE_COLOR, which CI services set, makes rich write them into files as well."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    raising(errors.ExportError("cannot"))
    assert cli.main(["export", "--recipe", "baseline", "--recipe", "flux-fast"]) == 3
    printed = capsys.readouterr()
    assert re.sub(r"\d+\.\d s", "0.0 s", printed.err) == 2 * (
        "[    0.0 s] load\n[    0.0 s] load: a model\n[    0.0 s] note: this is a stub\nprebake: error: cannot\n"
    )
    assert "\x1b" not in printed.out
    with ProgressBar() as bar, bar.stage("load"):  # the canary: what would be printed without the check
        bar.announce("a model")
    assert "\x1b" in capsys.readouterr().err


def test_a_terminal_gets_the_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(open_progress("rich"), ProgressBar)


def test_tables_have_no_control_codes_in_a_file(tmp_path, monkeypatch):
    from prebake.exporter.verify.text_table import print_cells

    monkeypatch.setenv("FORCE_COLOR", "1")
    with (tmp_path / "report.txt").open("w+", encoding="utf-8") as file:
        print_cells("figures", [("plan", "psnr"), ("4", "40.0")], file)
        file.seek(0)
        text = file.read()
    assert "40.0" in text
    assert "\x1b" not in text
