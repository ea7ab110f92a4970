"""A command line, whatever becomes of it: failures as JSON, options in full, streams that cannot be written, signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import types

import pytest

from prebake.exporter.cli import main as cli
from prebake.runtime.__main__ import main as slim
from prebake.runtime.cli.command import problem_key
from prebake.runtime.errors import ArtifactError, ExportError

PREBAKE = f"{sys.executable} -m prebake.exporter"


@pytest.fixture
def exporting(monkeypatch):
    """A function that puts another one in the place of the export itself."""

    def arrange(export) -> None:
        stub = types.ModuleType("prebake.exporter.pipeline")
        stub.ExportOptions, stub.export, stub.prepare = types.SimpleNamespace, export, None
        monkeypatch.setitem(sys.modules, stub.__name__, stub)

    return arrange


def raiser(error: BaseException):
    def export(*_):
        print("a library that prints")
        raise error

    return export


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)


# --- a failure is JSON ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ExportError("graph 'x': too large\nit is"), (3, "ExportError", ["graph 'x'", None])),
        (ArtifactError("a/b: is cut"), (5, "ArtifactError", ["a/b"])),
        (KeyboardInterrupt(), (130, "KeyboardInterrupt", [None])),
        (ModuleNotFoundError("no", name="torchao"), (2, "ModuleNotFoundError", ["`prebake export` needs torchao"])),
    ],
)
def test_a_failure_is_one_json_document_with_code_kind_key_and_sentence(exporting, capsys, error, expected):
    exporting(raiser(error))
    code = cli.main(["export", "--recipe", "baseline", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["exit_code"], told["kind"], [each["key"] for each in told["problems"]]) == expected
    assert code == told["exit_code"]
    assert all(each["sentence"] for each in told["problems"])


def test_a_bug_is_json_too_and_keeps_its_traceback(exporting, capsys):
    exporting(raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["export", "--recipe", "baseline", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "exit_code": 1,
        "kind": "ZeroDivisionError",
        "problems": [{"key": None, "sentence": "ZeroDivisionError"}],
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "--json"],
        ["export", "--recipe", "x", "--nothing", "--json"],
        ["expotr", "--json"],
        ["check", "--json"],
    ],
)
def test_a_wrong_command_line_is_json_too(capsys, arguments):
    with pytest.raises(SystemExit) as e:
        cli.main(arguments)
    assert e.value.code == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["kind"] == "UsageError"
    assert printed.err.startswith("usage: ")


@pytest.mark.parametrize("command", ["run", "inspect", "check", "pull", "push"])
def test_so_it_is_in_the_slim_runtime(capsys, tmp_path, command):
    more = {"run": ["red"], "pull": [str(tmp_path / "new")], "push": [str(tmp_path / "new")]}.get(command, [])
    code = slim([command, str(tmp_path / "absent"), *more, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code in (2, 5)
    assert told["problems"][0]["sentence" if command != "check" else "problem"]


def test_what_is_written_after_the_result_and_fails_leaves_one_document(monkeypatch, capsys):
    def listing(args):
        print('{"recipes": []}')
        raise ExportError("reports: cannot be written")

    monkeypatch.setattr(cli, "_recipes", listing)
    assert cli.main(["recipes", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["problems"][0]["key"] == "reports"


@pytest.mark.parametrize(
    ("sentence", "key"),
    [
        ("--set cache.order=x: expected a number, got 'x'", "--set cache.order=x"),
        ("/a b/manifest.json [plans]: '../x' is not a plain name", "/a b/manifest.json [plans]"),
        ("unknown recipe 'nope'; known recipes: baseline", None),
        ("interrupted", None),
    ],
)
def test_the_key_is_what_the_sentence_is_about(sentence, key):
    assert problem_key(sentence) == key


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipes", "--schem"], "unrecognized arguments: --schem; did you mean --schema?"),
        (["export", "--recipe", "baseline", "--dry"], "--dry; did you mean --dry-run?"),
        (["run", "a", "b", "--stepz=4"], "--stepz=4; did you mean --steps?"),
        (["run", "a", "b", "--zzz"], "unrecognized arguments: --zzz\n"),
        (["exprot"], "invalid choice: 'exprot'; did you mean export?"),
        (["verify", "a", "--prompt-set", "acuracy"], "invalid choice: 'acuracy'; did you mean accuracy?"),
    ],
)
def test_an_option_is_written_in_full_and_a_wrong_one_has_a_nearest(capsys, arguments, words):
    with pytest.raises(SystemExit) as e:
        cli.main(arguments)
    assert e.value.code == 2
    assert words in capsys.readouterr().err


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", "--json"])
def test_a_reader_that_is_gone_is_no_bug(how):
    done = shell(f"set -o pipefail; {PREBAKE} recipes flux-fast {how} | true")
    assert (done.returncode, done.stderr) in ((141, ""), (0, ""))  # 0: all was written before it was gone
    done = shell(f"({PREBAKE} recipes --schema {how}; echo $? >&2) | true")
    assert done.stderr == "141\n"


@pytest.mark.parametrize("how", ["", "--schema", "nope --json"])
def test_a_full_disk_behind_stdout_is_one_sentence(how):
    done = shell(f"{PREBAKE} recipes {how} > /dev/full")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("prebake: error: stdout: cannot be written (No space left")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", ">&-", ">&- 2>&- <&-"])
def test_a_stream_that_is_closed_changes_no_exit_code(closed):
    done = shell(f"{PREBAKE} recipes nope {closed}")
    assert (done.returncode, done.stdout) == (2, "")
    assert shell(f"{PREBAKE} recipes {closed}").returncode == 0


def test_an_export_goes_on_where_its_progress_cannot_be_written(exporting, tmp_path):
    """A file that is opened gets no descriptor of a stream that was closed."""
    program = tmp_path / "export.py"
    program.write_text(
        f"""
import sys, types
stub = types.ModuleType("prebake.exporter.pipeline")
def export(recipe, output, options, progress):
    with open({str(tmp_path / "written")!r}, "w") as file:
        assert file.fileno() > 2
        for _ in range(3):
            with progress.stage("load"):
                progress.note("x" * 10000)
        file.write("whole")
    return output
stub.ExportOptions, stub.export, stub.prepare = types.SimpleNamespace, export, None
sys.modules[stub.__name__] = stub
from prebake.exporter.cli import export as shell, quiet
quiet.silence_libraries = lambda: None
import prebake.exporter.recipe.resolve as resolve
resolve.check_inductor_flags = resolve.check_scheduler = lambda *_: None
from prebake.exporter.cli.main import main
sys.exit(main(["export", "--recipe", "baseline"]))
"""
    )
    for closed in ("2>&-", "2>/dev/full", "2> >(true)", "<&- >&- 2>&-"):
        done = shell(f"{sys.executable} {program} {closed}")
        printed = "" if ">&- 2" in closed else "artifacts/baseline-FLUX.1-dev\n"
        assert (done.returncode, done.stdout) == (0, printed), (closed, done.stderr)
        assert (tmp_path / "written").read_text() == "whole"
        (tmp_path / "written").unlink()


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_as_ctrl_c_does(exporting, capsys, number, code):
    cleared = []

    def export(*_):
        try:
            signal.raise_signal(number)  # to this thread: one that the process gets may come to any
        finally:
            cleared.append(True)

    exporting(export)
    before = signal.signal(number, signal.SIG_DFL)  # whoever began the tests may ignore it, as nohup does
    try:
        assert cli.main(["export", "--recipe", "baseline", "--quiet"]) == code
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == f"prebake: ended by {number.name}; nothing was written\n"
    assert cleared


def test_a_signal_that_nohup_ignores_stays_ignored(exporting):
    def export(recipe, output, *_):
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        return output

    exporting(export)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["export", "--recipe", "baseline", "--quiet"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
