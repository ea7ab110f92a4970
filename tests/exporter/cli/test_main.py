"""The command `prebake`: what it prints, where, and its exit codes."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from prebake.exporter.cli import export as cli_export
from prebake.exporter.cli import main as cli
from prebake.exporter.export_cache.store import Store, default_store_folder
from prebake.exporter.recipe.resolve import recipe_names, recipe_schema, resolve
from prebake.exporter.sites.actions import Variant
from prebake.runtime.errors import ExportError
from prebake.runtime.manifest import Cost
from prebake.runtime.plan import Evaluation, Plan, Update
from support.paths import ROOT

PLAN = Plan(
    name="1",
    steps=1,
    scheduler="x",
    evaluations=(Evaluation(step=0, variant="full", timestep=1.0, update=Update(latents=(1.0,), outputs=(0.0,))),),
)


@pytest.fixture
def fake_pipeline(monkeypatch):
    """`exporter/pipeline.py` with an `export` that records its calls; `fake.error` is what it raises, if anything."""
    fake = types.ModuleType("prebake.exporter.pipeline")
    fake.calls, fake.error = [], None

    def export(recipe, output, options, progress):
        fake.calls.append((recipe, output, options))
        if fake.error:
            raise fake.error
        return output

    def prepare(recipe, progress, **kwargs):
        cost = Cost(flops=2_500_000_000, ops=7, constants=1, constants_bytes=1_000_000)
        decoder = Cost(flops=10_000_000_000, ops=9, constants=1, constants_bytes=2_000_000)
        return types.SimpleNamespace(
            costs={"full": cost, "vae_decoder": decoder},
            planned=types.SimpleNamespace(plans=(PLAN,), variants=(Variant("full", ()),)),
        )

    fake.ExportOptions, fake.export, fake.prepare = types.SimpleNamespace, export, prepare
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return fake


def subcommands() -> list[str]:
    actions = cli._parser()._subparsers._group_actions
    return list(actions[0].choices)


def test_help_lists_every_command_and_says_what_it_does(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["--help"])
    assert e.value.code == 0
    printed = capsys.readouterr().out
    assert {"export", "verify", "recipes"} <= set(subcommands())
    for name in subcommands():
        assert re.search(rf"^    {name}\s+\w", printed, re.MULTILINE)


def test_readme_shows_every_command():
    readme = (ROOT / "README.md").read_text("utf-8")
    if readme:
        assert [name for name in subcommands() if f"prebake {name}" not in readme] == []


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["recipes", "flux-fast"], ["export", "--help"]])
def test_light_commands_import_no_torch(arguments):
    code = (
        "import sys\nfrom prebake.exporter.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'torchao') if m in sys.modules], file=sys.stderr)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.strip() == "[]"
    )


@pytest.mark.parametrize(
    "how",
    [["-m", "prebake.exporter"], ["-c", "import sys; from prebake.exporter.cli.main import main; sys.exit(main())"]],
)
def test_module_is_the_command(how):
    done = subprocess.run([sys.executable, *how, "recipes", "nope"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("prebake: error: unknown recipe 'nope'; known recipes: ")


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert re.fullmatch(r"prebake \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# recipes


def test_recipes_lists_plain_lines_where_there_is_no_terminal(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == list(recipe_names())
    assert f"flux-fast\t{resolve('flux-fast').description}" in lines


def test_loras_of_the_command_line_are_the_recipes(capsys):
    assert cli.main(["recipes", "flux-fast", "--lora", "style.safetensors:0.5", "--lora", "owner/other"]) == 0
    shown = capsys.readouterr().out
    assert 'lora = [{ path = "style.safetensors", scale = 0.5 }, { path = "owner/other", scale = 1.0 }]' in shown


def test_recipes_draws_a_table_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich", reason="rich is not installed: it comes with the export extra")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert "what it does" in printed
    assert "\t" not in printed


def test_recipes_without_rich_stays_plain_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["recipes"]) == 0
    assert "flux-fast\t" in capsys.readouterr().out


def test_recipes_json(capsys):
    assert cli.main(["recipes", "--json"]) == 0
    assert [r["name"] for r in json.loads(capsys.readouterr().out)] == list(recipe_names())


def test_recipes_name_prints_a_recipe_that_resolves_to_itself(capsys, tmp_path):
    changes = ["cache.method=pab", "sampler.steps=8"]
    assert cli.main(["recipes", "flux-fast", "--model", "shapes", "--set", changes[0], "--set", changes[1]]) == 0
    printed = capsys.readouterr().out
    for line in (ROOT / "recipes" / "flux-fast.toml").read_text("utf-8").splitlines():
        assert f"# {line}".rstrip() in printed.splitlines()
    (tmp_path / "mine.toml").write_text(printed, "utf-8")
    assert resolve(tmp_path / "mine.toml") == resolve("flux-fast", changes, "shapes")


def test_recipes_name_json_is_the_resolved_recipe(capsys):
    assert cli.main(["recipes", "baseline", "--json", "--set", "verify.seeds=1"]) == 0
    assert json.loads(capsys.readouterr().out) == resolve("baseline", ["verify.seeds=1"]).model_dump(mode="json")


def test_recipes_schema(capsys):
    assert cli.main(["recipes", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()


def test_each_problem_is_one_line_on_stderr(capsys):
    assert cli.main(["recipes", "flux-fast", "--set", "cache.bugdet=1", "--set", "x"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "prebake: error: --set x: expected table.key=value, such as cache.method=none\n"
        "prebake: error: --set cache.bugdet=1: unknown key 'bugdet'; did you mean 'budget'? known keys: beam, budget, calibration, candidates, fit_runs, judge_runs, max_variants, method, otherwise, search_budget, slots\n"
    )


def test_set_without_a_recipe_is_refused_with_an_example(capsys):
    assert cli.main(["recipes", "--set", "cache.order=0"]) == 2
    assert "needs the name of a recipe: prebake recipes flux-fast --set cache.method=none" in capsys.readouterr().err


# export


def test_export_resolves_and_hands_over(fake_pipeline, capsys):
    assert cli.main(["export", "--recipe", "flux-fast", "--set", "sampler.steps=8", "--force", "--quiet"]) == 0
    recipe, output, options = fake_pipeline.calls[0]
    assert recipe == resolve("flux-fast", ["sampler.steps=8"])
    assert output == Path("artifacts/flux-fast-FLUX.1-dev")
    store = Store(default_store_folder())
    assert vars(options) == {"force": True, "keep_failed": False, "verify": True, "near": None, "store": store}
    assert capsys.readouterr().out == ""


def test_export_main_is_prebake_export(fake_pipeline, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        sys, "argv", ["export", "--recipe", "baseline", "--output", str(tmp_path), "--no-verify", "--json"]
    )
    assert cli.export_main() == 0
    _, output, options = fake_pipeline.calls[0]
    assert output == tmp_path
    assert not options.verify
    assert json.loads(capsys.readouterr().out) == {"artifact": str(tmp_path), "graphs": {}, "seconds": {}}


@pytest.mark.parametrize(
    ("chosen", "verifies"),
    [((), True), (("--verify", "now"), True), (("--verify", "later"), False), (("--no-verify",), False)],
)
def test_the_comparison_can_be_left_for_later(fake_pipeline, capsys, chosen, verifies):
    assert cli.main(["export", "--recipe", "baseline", "--model", "shapes", *chosen]) == 0
    _, _, options = fake_pipeline.calls[0]
    assert options.verify is verifies


def test_export_prints_where_the_artifact_is(fake_pipeline, capsys):
    assert cli.main(["export", "--recipe", "baseline", "--model", "shapes"]) == 0
    assert capsys.readouterr().out == f"{Path('artifacts/baseline-shapes')}\n"


@pytest.fixture
def forecast_of_a_second(monkeypatch):
    """Every graph is predicted to take a second: nothing is timed."""
    from prebake.exporter.cost import forecast
    from prebake.exporter.cost.machine_rates import GraphForecast

    predicted = GraphForecast({"matmul float32": 900.0}, 100.0)
    monkeypatch.setattr(
        forecast, "forecast_graphs", lambda prepared, progress: dict.fromkeys(prepared.costs, predicted)
    )


def test_dry_run_says_what_would_be_compiled_and_exports_nothing(fake_pipeline, forecast_of_a_second, capsys):
    assert cli.main(["export", "--recipe", "baseline", "--dry-run"]) == 0
    assert fake_pipeline.calls == []
    assert capsys.readouterr().out.splitlines() == [
        "graph        FLOPs  moved  ops  weights    ms   share",
        "full          2.5G     0B    7      1MB  1000  100.0%",
        "vae_decoder    10G     0B    9      2MB  1000",
        "",
        "plan   FLOPs    time  speed-up  of an image  evaluations",
        "1     100.0%  100.0%     1.00x        1.00x  1 full       █",
        "█ = full",
    ]


def test_dry_run_json(fake_pipeline, forecast_of_a_second, capsys):
    assert cli.main(["export", "--recipe", "baseline", "--dry-run", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    plan = printed["plans"]["1"]
    assert (plan["evaluations"], plan["calls"], plan["strip"]) == (1, {"full": 1}, "1")
    assert (plan["flops_share"], plan["time_share"], plan["image_ms"]) == (1.0, 1.0, 2000.0)
    assert printed["graphs"]["full"]["ops"] == 7
    assert printed["graphs"]["full"]["predicted_ms_by_class"] == {"loops": 100.0, "matmul float32": 900.0}
    assert printed["variants"] == {"full": "1"}


@pytest.mark.parametrize(
    ("model", "folder"),
    [("shapes", "baseline-shapes"), ("org/FLUX.1-schnell", "baseline-FLUX.1-schnell"), ("/models/mine/", "baseline-mine"), (".", "baseline-here"), ("..", "baseline-up")],
)  # fmt: skip
def test_default_output_is_named_after_recipe_and_model(model, folder, tmp_path, monkeypatch):
    (tmp_path / "up" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "up" / "here")
    assert cli_export.default_output(resolve("baseline", model=model)) == Path("artifacts") / folder


def test_misspelt_flags_and_schedulers_are_refused_before_anything_is_loaded(fake_pipeline, capsys):
    assert cli.main(["export", "--recipe", "flux-fast", "--set", "compile.inductor.max_autotun=true"]) == 2
    assert "no flag 'max_autotun'; did you mean 'max_autotune'?" in capsys.readouterr().err
    assert cli.main(["export", "--recipe", "flux-fast", "--set", "sampler.scheduler=DDIMSchedulr"]) == 2
    assert "got 'DDIMSchedulr'" in capsys.readouterr().err
    assert fake_pipeline.calls == []


def test_what_cannot_be_exported_is_exit_code_3(fake_pipeline, capsys):
    fake_pipeline.error = ExportError("the model carries a hook")
    assert cli.main(["export", "--recipe", "baseline", "--quiet"]) == 3
    assert capsys.readouterr().err == "prebake: error: the model carries a hook\n"


def test_interrupted_is_exit_code_130(fake_pipeline, capsys):
    fake_pipeline.error = KeyboardInterrupt()
    assert cli.main(["export", "--recipe", "baseline", "--quiet"]) == 130
    assert capsys.readouterr().err == "prebake: interrupted; nothing was written\n"


@pytest.mark.parametrize("package", ["diffusers", "torchao", "transformers"])
def test_a_missing_extra_is_named_with_its_install_command(fake_pipeline, capsys, package):
    fake_pipeline.error = ModuleNotFoundError(f"No module named '{package}.x'", name=f"{package}.x")
    assert cli.main(["export", "--recipe", "baseline", "--quiet"]) == 2
    assert (
        capsys.readouterr().err == f"prebake: error: `prebake export` needs {package}: pip install 'prebake[export]'\n"
    )


@pytest.mark.parametrize(
    "bug", [ModuleNotFoundError("No module named 'prebake.x'", name="prebake.x"), ZeroDivisionError()]
)
def test_a_bug_keeps_its_traceback(fake_pipeline, bug):
    fake_pipeline.error = bug
    with pytest.raises(type(bug)):
        cli.main(["export", "--recipe", "baseline", "--quiet"])


def test_quiet_and_json_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["export", "--recipe", "baseline", "--quiet", "--json"])
    assert e.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err
