"""`prebake completion`: scripts that the shells themselves read, with every command and option in them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from prebake.exporter.cli import main as cli
from prebake.exporter.cli.completion import SHELLS

pytest.importorskip("shtab", reason="shtab is not installed: it comes with the export extra")


@pytest.fixture(params=SHELLS)
def script(request, capsys) -> tuple[str, str]:
    assert cli.main(["completion", request.param]) == 0
    return request.param, capsys.readouterr().out


def test_every_command_is_completed(script):
    _, text = script
    for name in cli._parser()._subparsers._group_actions[0].choices:
        assert name in text
    assert "--keep-failed" in text.replace("\\", "")


def test_the_shell_reads_it(script, tmp_path):
    shell, text = script
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(text)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_bash_completes_commands_and_options(tmp_path, capsys):
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def complete(*words: str) -> list[str]:
        function = r"$(complete -p prebake | grep -o '_\S*' | head -1)"
        asked = f"source ./script; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; {function}; "
        done = subprocess.run(
            ["bash", "-c", asked + 'echo "${COMPREPLY[@]}"'], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert complete("prebake", "calib") == ["calibrate"]
    assert complete("prebake", "export", "--keep") == ["--keep-failed"]
