"""`prebake inspect --machine`: what is known of this machine, without an artifact."""

from __future__ import annotations

import json

import pytest

from prebake.runtime.__main__ import main
from prebake.runtime.rates.rates_file import Machine, Rates, RateTable, rates_folder, rates_path, write_rates

MACHINE = Machine(cpu="A CPU", flags="f", threads=2, torch="2.13", kernels="k1", backend="aoti", isa="host")
TABLE = RateTable(axes={"rows": (1, 16), "inner": (64, 128)}, gflops=(2.5, 3.0, 40.0, 20.0))


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def known() -> Rates:
    rates = Rates(machine=MACHINE, tables={"matmul float32": TABLE}, bandwidth={1 << 20: 2e7}, call_ms=0.002)
    write_rates(rates)
    return rates


def test_it_shows_each_table_and_where_it_is_fastest(known, capsys):
    assert main(["inspect", "--machine"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "machine A CPU, 2 threads, torch 2.13" in lines
    assert "code aoti, isa host, kernels k1" in lines
    assert "matmul float32 4 2.5 40 rows 16, inner 64" in lines
    assert "a loop that moves 1.05MB 20" in lines
    assert "a call 2 us" in lines


def test_json_has_the_files_as_they_are(known, capsys):
    assert main(["inspect", "--machine", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (rates,) = said["rates"]
    assert rates.pop("path") == str(rates_path(MACHINE))
    assert Rates.model_validate(rates) == known
    assert rates == json.loads(rates_path(MACHINE).read_text())


def test_where_nothing_is_known_it_says_what_measures(capsys):
    assert main(["inspect", "--machine"]) == 0
    said = capsys.readouterr().out
    assert str(rates_folder()) in said
    assert "--dry-run" in said
    assert main(["inspect", "--machine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(rates_folder()), "rates": []}


@pytest.mark.parametrize(
    ("asked", "words"),
    [(["inspect"], "ARTIFACT --machine is required"), (["inspect", "x", "--machine"], "not allowed with argument")],
)
def test_it_is_an_artifact_or_the_machine(asked, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(asked)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
