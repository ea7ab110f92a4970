"""The workflows and the shell script say what is so: they parse, are pinned, agree, and the script does what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from prebake.exporter.cli.main import _parser, main
from support.paths import ROOT

SCRIPT = ROOT / ".ci/artifacts"
FOLDER = ROOT / ".github/workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))
TEXTS = {path.name: path.read_text("utf-8") for path in WORKFLOWS}


def loaded(name: str) -> dict:
    """The workflow. YAML 1.1 reads its `on` as true."""
    workflow = yaml.safe_load(TEXTS[name])
    return workflow | {"on": workflow.pop(True)}


def steps(name: str) -> list[dict]:
    return [step for job in loaded(name)["jobs"].values() for step in job["steps"]]


def runs(name: str) -> list[str]:
    return [step["run"] for step in steps(name) if "run" in step]


def prebake_lines(shell: str) -> list[list[str]]:
    """The arguments of each `prebake` in a script, without what is redirected."""
    lines = (line.strip() for line in shell.replace("\\\n", " ").splitlines())
    commands = (line.partition(" > ")[0] for line in lines if line.startswith("prebake "))
    return [shlex.split(command)[1:] for command in commands]


SHELLS = {SCRIPT.name: SCRIPT.read_text("utf-8"), "artifacts.yml": "\n".join(runs("artifacts.yml"))}


# --- what can be known without running them ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_every_action_is_pinned_by_commit_and_says_its_version(name):
    used = re.findall(r"uses: (.*)", TEXTS[name])
    assert used
    for each in used:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each)


def test_an_action_has_one_commit_in_all_workflows():
    used = {each.partition("@")[::2] for text in TEXTS.values() for each in re.findall(r"uses: (.*)", text)}
    assert len({action for action, _ in used}) == len(used)


@pytest.mark.parametrize("name", TEXTS)
def test_no_workflow_may_write_or_keeps_its_token(name):
    workflow = loaded(name)
    assert workflow["permissions"] == {"contents": "read"}
    for step in steps(name):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name", TEXTS)
def test_no_script_has_expressions_in_it(name):
    """What a caller or a branch's name says would run as code; it comes by the environment instead."""
    assert [run for run in runs(name) if "${{" in run] == []


@pytest.mark.parametrize("shell", [*SHELLS.values(), *runs("tests.yml")])
def test_bash_can_read_the_scripts(shell):
    done = subprocess.run(["bash", "-n"], input=shell, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SHELLS)
def test_every_command_is_one_that_the_parser_takes(name):
    commands = prebake_lines(SHELLS[name])
    assert [arguments[0] for arguments in commands] == ["export", "check", "verify", "sign", "verify", "push"]
    for arguments in commands:
        _parser().parse_args(arguments)


def test_a_command_that_the_parser_does_not_take_would_be_noticed():
    (arguments,) = prebake_lines('  prebake push "$artifact" --to "$place" > log')
    with pytest.raises(SystemExit):
        _parser().parse_args(arguments)


def test_the_workflow_and_the_script_run_the_same_commands():
    workflow, script = (prebake_lines(SHELLS[name]) for name in ("artifacts.yml", SCRIPT.name))
    workflow[0] = [
        a for a in workflow[0] if a not in ("--cache-dir", "$COMPILED")
    ]  # a runner begins with an empty disk
    assert workflow == script


def test_what_the_workflow_uses_is_declared_and_the_other_way_round():
    called = loaded("artifacts.yml")["on"]["workflow_call"]
    text = TEXTS["artifacts.yml"]
    for kind in ("inputs", "secrets"):
        assert set(re.findall(rf"\b{kind}\.([\w-]+)", text)) == set(called[kind])
    assert {name for name, each in called["inputs"].items() if "default" not in each} == {"matrix", "destination"}
    assert all("description" in each for each in (called["inputs"] | called["secrets"]).values())


def test_the_secrets_are_where_they_are_needed_alone():
    holders = [step["name"] for step in steps("artifacts.yml") if "secrets." in json.dumps(step)]
    assert holders == ["sign", "push"]
    assert "secrets." not in json.dumps(loaded("artifacts.yml")["jobs"]["artifacts"].get("env"))


def test_what_is_installed_by_default_is_there():
    import tomllib

    install = loaded("artifacts.yml")["on"]["workflow_call"]["inputs"]["install"]["default"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert set(re.fullmatch(r"prebake\[(.*)\]", install)[1].split(",")) <= set(extras)


def test_the_example_in_the_docs_is_a_call_of_the_workflow():
    page = (ROOT / "docs/how-to/ci.md").read_text("utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (job,) = yaml.safe_load(example)["jobs"].values()
    called = loaded("artifacts.yml")["on"]["workflow_call"]
    assert ".github/workflows/artifacts.yml@" in job["uses"]
    assert {"matrix", "destination"} <= set(job["with"]) <= set(called["inputs"])
    assert set(job["secrets"]) <= set(called["secrets"])


def test_the_tests_workflow_does_what_ci_does():
    targets = re.findall(r"timed (make .*)", (ROOT / ".ci/run").read_text("utf-8"))
    jobs = loaded("tests.yml")["jobs"]
    assert commands(jobs["tests"]) == commands(jobs["latest"]) == targets


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if step.get("run", "").startswith("make")]


def test_every_week_the_tests_that_take_minutes_run_with_the_lock():
    slow = loaded("tests.yml")["jobs"]["slow"]
    assert commands(slow) == ["make install", "make test-all"]
    assert slow["if"].startswith("github.event_name == 'schedule'")
    assert "env" not in slow


def test_every_week_the_newest_of_everything_is_tried():
    """Which is what `make` installs with neither a lock nor a torch, and every other day with both."""
    workflow = loaded("tests.yml")
    latest, locked = (workflow["jobs"][name] for name in ("latest", "tests"))
    assert workflow["on"]["schedule"]
    assert latest["env"] == {"LOCK": "", "TORCH": ""}
    assert "env" not in locked
    assert (locked["if"], latest["if"].partition(" || ")[0]) == (
        "github.event_name != 'schedule'",
        "github.event_name == 'schedule'",
    )


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def artifacts(tmp_path):
    """Runs the script in an empty folder, with the `prebake` of this interpreter."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "prebake").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m prebake.exporter "$@"\n')
    (bin / "prebake").chmod(0o755)
    (tmp_path / "work").mkdir()

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{bin}:{os.environ['PATH']}"
        own = {"PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [str(SCRIPT), *arguments],
            cwd=tmp_path / "work",
            env=os.environ | own | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def matrix(folder: Path, *rows: str) -> None:
    (folder / "matrix.toml").write_text("".join(f"[[export]]\n{row}\n" for row in rows))


@pytest.mark.parametrize("arguments", [(), ("matrix.toml",), ("a", "b", "c", "d")])
def test_a_call_that_is_none(artifacts, arguments):
    done = artifacts(*arguments)
    assert (done.returncode, done.stderr) == (2, "usage: .ci/artifacts MATRIX DESTINATION [REPORTS]\n")


def test_half_of_a_key_pair(artifacts, tmp_path):
    done = artifacts("matrix.toml", "there", SIGNING_KEY="key")
    assert done.returncode == 2
    assert done.stderr.startswith("SIGNING_KEY and PUBLIC_KEY: expected both or neither, ")
    assert list((tmp_path / "work").iterdir()) == []


def test_an_export_that_fails_ends_it_with_its_code(artifacts, tmp_path):
    matrix(tmp_path / "work", 'recipe = "baseline"\nmodel = "absent/folder/of/nobody"')
    done = artifacts("matrix.toml", "there")
    assert done.returncode == 3
    assert "== verify" not in done.stderr
    assert not (tmp_path / "work/there").exists()
    assert ElementTree.parse(tmp_path / "work/reports/export.xml").getroot().get("errors") == "1"


@pytest.mark.slow
def test_two_artifacts_are_built_verified_signed_and_pushed(artifacts, tmp_path):
    """By ONNX Runtime, which needs no C++ compiler, so that it takes a minute and not ten."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'prebake[ort]'")
    pytest.importorskip("model_signing", reason="model-signing is not installed: pip install 'prebake[sign]'")
    work = tmp_path / "work"
    row = 'recipe = "baseline"\nmodel = "tiny:flux"\noutput = "built/{0}"\nset = ["compile.backend=onnxruntime", "sampler.steps={0}"]'
    matrix(work, row.format(1), row.format(2))
    for command in (
        "openssl ecparam -name prime256v1 -genkey -noout -out mine.key",
        "openssl ec -in mine.key -pubout -out mine.pub",
        "openssl ecparam -name prime256v1 -genkey -noout -out other.key",
    ):
        subprocess.run(shlex.split(command), cwd=work, check=True, capture_output=True)

    one_place = artifacts("matrix.toml", "there", "early")
    assert one_place.returncode == 2
    assert one_place.stderr.endswith("there: is one place, for one artifact, and there are 2; put {name} into it\n")
    assert not (work / "there").exists()

    for name in ("1", "2"):  # what is exported is exported anew, and refuses to be written over
        (work / "built" / name).rename(work / f"kept-{name}")
    mismatch = artifacts("matrix.toml", "there/{name}", SIGNING_KEY="other.key", PUBLIC_KEY="mine.pub")
    assert mismatch.returncode == 5
    assert "signature.json is no signature by mine.pub" in mismatch.stderr
    assert not (work / "there").exists()

    for name in ("1", "2"):
        (work / "built" / name).rename(work / f"again-{name}")
    done = artifacts("matrix.toml", "there/{name}", "reports", SIGNING_KEY="mine.key", PUBLIC_KEY="mine.pub")
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^== (\w+)", done.stderr, re.MULTILINE)
    assert stages == ["export", "verify", "verify", "sign", "sign", "push", "push"]
    for name in ("1", "2"):
        assert main(["verify", str(work / "there" / name), "--signature", "--public-key", str(work / "mine.pub")]) == 0
        told = json.loads((work / f"reports/push-{name}.json").read_text("utf-8"))
        assert told["place"] == str(work / "there" / name)
        assert json.loads((work / f"reports/verify-{name}.json").read_text("utf-8"))
    assert ElementTree.parse(work / "reports/export.xml").getroot().attrib.items() >= {
        ("tests", "2"),
        ("failures", "0"),
    }
