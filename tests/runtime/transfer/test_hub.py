"""`push` and `pull` with a Hub that `hub_stub.py` plays on this machine; huggingface_hub is the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'prebake[hub]'")

from huggingface_hub import constants

from prebake.exporter.cli.main import main
from support.hub_stub import Stub, serving, sha256
from support.transfer_artifacts import FILES, PACKAGE, PLAN, REPORT, WEIGHTS, another, artifact_in, held, paper

REPO = "owner/shapes"
PLACE = f"hf://{REPO}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that is empty. Large files go as LFS, since the stub speaks no Xet."""
    stub = Stub()
    with serving(stub) as endpoint:
        stub.environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_of_a_test",
            "HF_HOME": str(tmp_path / "home"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN", "XDG_CACHE_HOME"):
            monkeypatch.setenv(name, stub.environment[name])
        yield stub


@pytest.fixture
def pushed(hub, artifact):
    """The Hub, with the artifact; what was asked of it so far is forgotten."""
    assert main(["push", str(artifact), PLACE, "--quiet"]) == 0
    hub.log.clear()
    return hub


def said(capsys) -> list[str]:
    """The lines on stderr, without what begins each."""
    return [line.removeprefix("prebake: error: ") for line in capsys.readouterr().err.splitlines()]


def fetched(hub) -> list[str]:
    """The files whose contents were asked for."""
    return sorted(
        {
            path.split("/", 5)[-1] if "resolve" in path else path.split("/", 3)[-1]
            for path in hub.sent("GET", "/(resolve|stored)/")
        }
    )


# --- there and back ---------------------------------------------------------------------------------------------------


def test_there_and_back(hub, artifact, target, capsys):
    assert main(["push", str(artifact), PLACE, "--json"]) == 0
    commit = hub.branches[REPO]["main"]
    size = sum(len(held(artifact)[path]) for path in FILES)
    told = {"place": PLACE, "revision": commit, "files": 3, "size": size, "fetched": None, "fetched_bytes": None}
    assert json.loads(capsys.readouterr().out) == told
    assert main(["pull", PLACE, str(target), "--json"]) == 0
    told = told | {"place": str(target), "fetched": 4, "fetched_bytes": size + len("it went well")}
    assert json.loads(capsys.readouterr().out) == told
    assert held(target) == held(artifact)
    assert [p.name for p in target.parent.iterdir()] == ["pulled"]


def test_a_push_is_one_commit_to_a_private_repository(hub, artifact):
    assert main(["push", str(artifact), PLACE, "--quiet"]) == 0
    assert hub.private == {REPO}
    assert hub.messages == ["Artifact of m"]
    assert hub.files(REPO) == held(artifact) | {".gitattributes": b"*.safetensors lfs\n"}
    assert sorted(hub.large) == sorted(sha256(held(artifact)[path]) for path in (PACKAGE, WEIGHTS))


def test_the_same_push_again_sends_nothing(pushed, artifact):
    assert main(["push", str(artifact), PLACE, "--quiet"]) == 0
    assert {method for method, *_ in pushed.log} == {"GET"}
    assert len(pushed.messages) == 1


def test_a_branch_of_its_own(pushed, artifact, tmp_path, target):
    """It begins as a copy of main, which holds another artifact; that is no reason to ask for --force."""
    newer = another(artifact, tmp_path / "newer")
    assert main(["push", str(newer), f"{PLACE}@v2", "--quiet"]) == 0
    assert main(["pull", f"{PLACE}@v2", str(target), "--quiet"]) == 0
    assert held(target) == held(newer)
    commit = pushed.branches[REPO]["main"]
    assert main(["pull", f"{PLACE}@{commit}", str(target), "--force", "--quiet"]) == 0
    assert held(target)[PLAN] == pushed.files(REPO)[PLAN] != held(newer)[PLAN]


def test_what_is_not_the_artifacts_stays_and_does_not_travel(hub, artifact, target):
    """A model card, say; but the files of the artifact before go, its reports and signature included."""
    hub.create(REPO, {"README.md": b"# shapes", "manifest.json": b'{"files": [{"path": "graphs/old.pt2"}]}'})
    hub.files(REPO).update({"graphs/old.pt2": b"old", "signature.json": b"{}", "reports/old.txt": b"old"})
    assert main(["push", str(artifact), PLACE, "--force", "--quiet"]) == 0
    stays = {"README.md": b"# shapes", ".gitattributes": b"*.safetensors lfs\n"}
    assert hub.files(REPO) == held(artifact) | stays
    assert main(["pull", PLACE, str(target), "--quiet"]) == 0
    assert held(target) == held(artifact)


def test_another_artifact_takes_force(pushed, artifact, tmp_path, capsys):
    before = pushed.branches[REPO]["main"]
    newer = another(artifact, tmp_path / "newer")
    assert main(["push", str(newer), PLACE, "--quiet"]) == 2
    assert said(capsys) == [f"{PLACE}: holds another artifact; replace it with --force, or give another revision"]
    assert pushed.branches[REPO]["main"] == before
    assert main(["push", str(newer), PLACE, "--force", "--quiet"]) == 0
    assert pushed.files(REPO) == held(newer) | {".gitattributes": b"*.safetensors lfs\n"}
    assert pushed.sent("PUT", ".") == []  # the large files are the same


@pytest.mark.parametrize("manifest", [b"not JSON", b"[]", b'{"files": [1]}'])
def test_a_manifest_that_cannot_be_read_is_replaced_too(hub, artifact, manifest):
    hub.create(REPO, {"manifest.json": manifest})
    assert main(["push", str(artifact), PLACE, "--force", "--quiet"]) == 0
    assert hub.files(REPO).keys() == held(artifact).keys() | {".gitattributes"}


# --- interrupted, and damaged on the way ------------------------------------------------------------------------------


def test_an_interrupted_push_shows_nothing_and_goes_on(hub, artifact, capsys):
    hub.refused_after = 1
    assert main(["push", str(artifact), PLACE, "--quiet"]) == 5
    (line,) = said(capsys)
    assert line.startswith(f"{PLACE}: the Hub or the way to it fails (")
    assert line.endswith("; try again, and what has arrived is not sent again")
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert len(hub.large) == 1
    hub.refused_after = None
    hub.log.clear()
    assert main(["push", str(artifact), PLACE, "--quiet"]) == 0
    assert len(hub.sent("PUT", "/large/")) == 1
    assert hub.files(REPO).keys() == held(artifact).keys() | {".gitattributes"}


def test_a_connection_that_breaks_is_taken_up_in_the_middle_of_the_file(pushed, artifact, target, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # bytes that come or are lost together, of 10 MB else
    pushed.cuts[PACKAGE] = 1000
    assert main(["pull", PLACE, str(target), "--quiet"]) == 0
    ranges = [r for method, path, r in pushed.log if method == "GET" and path.endswith(PACKAGE)]
    assert ranges == [None, "bytes=1000-"]
    assert held(target) == held(artifact)


def test_a_pull_that_is_killed_goes_on(pushed, artifact, target):
    """kill -9, while the weights do not come."""
    command = [sys.executable, "-m", "prebake.runtime", "pull", PLACE, str(target), "--quiet"]
    with pushed.stalling(WEIGHTS):
        process = subprocess.Popen(command, env=pushed.environment)
        stage = target.with_name(".pulled.pull")
        try:
            others = [stage / path for path in (PACKAGE, PLAN, REPORT)]
            waits(lambda: all(path.exists() for path in others) and pushed.sent("GET", f"/stored/.*{WEIGHTS}"))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert not target.exists()
    pushed.log.clear()
    subprocess.run(command, env=pushed.environment, check=True)
    assert fetched(pushed) == ["manifest.json", REPORT, WEIGHTS]
    assert held(target) == held(artifact)


def waits(happened, seconds: float = 60) -> None:
    """Until it has happened. A minute is many times what a start of Python takes on a busy machine."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("path", FILES)
def test_a_byte_that_changes_on_the_way(pushed, artifact, target, capsys, path):
    pushed.flips.add(path)
    assert main(["pull", PLACE, str(target), "--quiet"]) == 5
    lines = said(capsys)
    assert lines[0].startswith(f"{PLACE}: {path}: sha256 is ")
    assert lines[1:] == [f"{PLACE}: {target} is as it was; pull again, and only what is wrong is fetched"]
    assert not target.exists()
    pushed.flips.clear()
    pushed.log.clear()
    assert main(["pull", PLACE, str(target), "--quiet"]) == 0
    assert fetched(pushed) == sorted(["manifest.json", REPORT, path])
    assert held(target) == held(artifact)


def test_a_manifest_that_changes_on_the_way(pushed, target, capsys):
    pushed.flips.add("manifest.json")
    assert main(["pull", PLACE, str(target), "--quiet"]) == 5
    assert said(capsys)[0].startswith(f"{PLACE}/manifest.json: expected JSON, but ")


def test_what_does_not_arrive_by_a_push_is_said(hub, artifact, capsys):
    hub.loses.add(WEIGHTS)
    assert main(["push", str(artifact), PLACE, "--quiet"]) == 5
    assert said(capsys) == [f"{PLACE}: {WEIGHTS} is not there after the push; push again with --force"]
    hub.loses.clear()
    assert main(["push", str(artifact), PLACE, "--force", "--quiet"]) == 0


@pytest.mark.parametrize("path", [PLAN, WEIGHTS], ids=["git", "lfs"])
def test_what_arrives_otherwise_by_a_push_is_said(hub, artifact, capsys, path):
    hub.spoils.add(path)
    assert main(["push", str(artifact), PLACE, "--quiet"]) == 5
    assert said(capsys) == [f"{PLACE}: {path} is there with another content after the push; push again with --force"]


def test_somebody_who_pushes_at_the_same_time(hub, artifact, capsys):
    """Their commit stays, and ours is refused: an artifact is never made of two."""
    hub.create(REPO)
    hub.meanwhile = {"theirs.txt": b"theirs"}
    assert main(["push", str(artifact), PLACE, "--quiet"]) == 5
    assert said(capsys)[0].startswith(f"{PLACE}: the Hub or the way to it fails (HfHubHTTPError: Client error '412 ")
    assert hub.files(REPO) == {"theirs.txt": b"theirs"}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (
            "hf://owner/absent",
            "there is no such repository, or it is private; check the name, or log in with `hf auth login`",
        ),
        (f"{PLACE}@absent", "there is no such revision; give a branch, a tag or a commit that is there, or none"),
        ("hf://owner/empty", "expected an artifact, which has a manifest.json, and there is none"),
    ],
)
def test_nothing_to_pull(pushed, target, capsys, place, sentence):
    pushed.create("owner/empty")
    assert main(["pull", place, str(target), "--quiet"]) == 5
    assert said(capsys) == [f"{place}: {sentence}"]
    assert not target.parent.exists()


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("hf://shapes", "hf://shapes: expected hf://owner/name or hf://owner/name@revision ("),
        ("hf://", "hf://: expected hf://owner/name or hf://owner/name@revision ("),
        ("hf://owner/shapes@", "hf://owner/shapes@: expected hf://owner/name or hf://owner/name@revision ("),
        (
            "hf://owner/shapes/int8",
            "hf://owner/shapes/int8: an artifact is a whole model repository, and this names the folder 'int8'; ",
        ),
        (
            "hf://datasets/owner/shapes",
            "hf://datasets/owner/shapes: an artifact is a whole model repository, and this names a dataset; ",
        ),
    ],
)
@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_place_that_is_none(hub, artifact, capsys, command, place, sentence):
    assert main([command, *([str(artifact), place] if command == "push" else [place, "x"]), "--quiet"]) == 2
    (line,) = said(capsys)
    assert line.startswith(sentence)
    assert hub.log == []


def test_no_network(monkeypatch, hub, artifact, target, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of `discard`, where nothing listens
    for arguments in (["pull", PLACE, str(target)], ["push", str(artifact), PLACE]):
        assert main([*arguments, "--quiet"]) == 5
        (line,) = said(capsys)
        assert line.startswith(f"{PLACE}: the Hub cannot be reached (")


def test_offline(monkeypatch, hub, target, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["pull", PLACE, str(target), "--quiet"]) == 5
    assert said(capsys) == [f"{PLACE}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it"]
    assert hub.log == []


def test_a_token_that_may_not_write(hub, artifact, capsys):
    hub.create(REPO)
    hub.forbidden = True
    assert main(["push", str(artifact), PLACE, "--quiet"]) == 5
    (line,) = said(capsys)
    assert line.startswith(f"{PLACE}: the Hub refuses (")
    assert line.endswith("; log in with a token that may do this, with `hf auth login`")


def test_without_the_package(monkeypatch, artifact, target, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["pull", PLACE, str(target), "--quiet"]) == 2
    assert said(capsys) == ["hf:// needs huggingface_hub: pip install 'prebake[hub]'"]


def test_a_repository_that_lacks_a_file(pushed, target, capsys):
    del pushed.files(REPO)[WEIGHTS]
    assert main(["pull", PLACE, str(target), "--quiet"]) == 5
    assert said(capsys) == [f"{PLACE}: {WEIGHTS} is missing, the manifest lists it; push the artifact again"]


@pytest.mark.parametrize("name", ["reports/../../outside", "reports/..\\outside", "reports//etc/outside"])
def test_names_that_lead_elsewhere_are_not_asked_for(pushed, artifact, target, capsys, name):
    pushed.files(REPO)[name] = b"outside"
    assert main(["pull", PLACE, str(target)]) == 0
    assert any(f"{name!r} is left out: it is not a plain name inside the folder" in line for line in said(capsys))
    assert held(target) == held(artifact)
    assert not any("outside" in path for path in fetched(pushed))


def test_names_of_files_with_signs_that_patterns_have(hub, tmp_path, target):
    artifact = artifact_in(tmp_path / "artifact")
    (artifact / "plans" / "[2]*?.json").write_text("{}")
    paper.relist(artifact)
    paper.edit(artifact, lambda raw: raw.update(files=[f for f in raw["files"] if not f["path"].startswith("reports")]))
    assert main(["push", str(artifact), PLACE, "--quiet"]) == 0
    assert main(["pull", PLACE, str(target), "--quiet"]) == 0
    assert held(target) == held(artifact)


def test_an_artifact_of_another_machine_costs_no_download(hub, artifact, target, capsys):
    paper.edit(artifact, lambda raw: raw["requires"].update(machine="sparc64"))
    assert main(["push", str(artifact), PLACE, "--quiet"]) == 0
    hub.log.clear()
    assert main(["pull", PLACE, str(target), "--quiet"]) == 5
    assert said(capsys)[0].startswith(f"{PLACE}: was compiled for Linux sparc64, this machine is ")
    assert fetched(hub) == ["manifest.json"]
    assert main(["pull", PLACE, str(target), "--any-machine", "--quiet"]) == 0
    assert held(target) == held(artifact)


# --- by the environment, as a user has it -----------------------------------------------------------------------------


def test_the_library_reads_the_environment(hub, artifact, target):
    """HF_ENDPOINT and HF_TOKEN, in processes of their own; without a terminal there are no control codes, and no bars."""
    for arguments in (["push", str(artifact), PLACE], ["pull", PLACE, str(target)]):
        done = subprocess.run(
            [sys.executable, "-m", "prebake.runtime", *arguments],
            env=hub.environment | {"FORCE_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f", all as the manifest says, commit {hub.branches[REPO]['main']}\n")
        assert "\x1b" not in done.stdout + done.stderr
        assert all(line.startswith("[") for line in done.stderr.splitlines())
    assert held(target) == held(artifact)
    assert set(hub.tokens) == {"Bearer hf_of_a_test"}
