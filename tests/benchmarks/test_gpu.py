"""`benchmarks/gpu.py` without a GPU: its tiny run, what it records, and the models that it would time on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


def gpu_py(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def smoke(work: Path, stages: str, *more: str) -> tuple[str, dict[str, Any]]:
    done = gpu_py("--smoke", "--repeats", "1", "--work", work, "--stages", stages, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((work / "results.json").read_text())["stages"]


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's modules, from its folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    import gpu_models
    import gpu_times
    import gpu_ways

    return gpu, gpu_models, gpu_ways, gpu_times


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str, dict[str, Any]]:
    work = tmp_path_factory.mktemp("gpu-bench")
    return work, *smoke(work, "flux-dev/*,sdxl/*/deepcache")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_smoke_run_measures_what_it_can_and_says_what_lacks(run):
    _, said, stages = run
    done = {n: r["figures"] for n, r in stages.items() if r["status"] == "done"}
    assert set(done) == {"flux-dev/eager/off", "flux-dev/eager/mask", "flux-dev/eager/pab", "sdxl/eager/deepcache"}
    skipped = {n: r for n, r in stages.items() if n not in done}
    assert {r["status"] for r in skipped.values()} == {"skipped"}
    assert {r["why"] for r in skipped.values()} == {"no CUDA device that this torch can use"}
    assert {n.split("/")[1] for n in skipped} == {"compile", "flux-fast", "prebake-bf16", "prebake-int8", "prebake-fp8"}
    for name in stages:
        assert f"| {name} |" in said
    assert said.count("| not measured yet: no CUDA device") == len(skipped)
    assert said.strip().endswith("0 stages left")


def test_figures_are_of_the_plan_that_was_asked_for(run):
    _, _, stages = run
    off, pab = (stages[f"flux-dev/eager/{cache}"]["figures"] for cache in ("off", "pab"))
    assert off["variants"].keys() == {"full"}
    assert off["flops_of_uncached"] == 1.0 > pab["flops_of_uncached"] > 0.5
    assert pab["variants"]["reuse"]["flops"] < pab["variants"]["full"]["flops"] == off["variants"]["full"]["flops"]
    assert all(f["picture_s"] > 0 and f["matmul_flops_per_s"] > 0 for f in (off, pab))


def test_what_is_done_is_not_run_again_and_what_failed_is_on_record(run, tmp_path):
    work, _, stages = run
    again, kept = smoke(work, "flux-dev/eager/*")
    assert kept == stages
    assert "0 stages left" in again
    broken = json.loads((work / "results.json").read_text())
    broken["stages"]["flux-dev/eager/off"] = {"status": "failed", "why": "RuntimeError: out of luck"}
    (tmp_path / "results.json").write_text(json.dumps(broken))
    said, kept = smoke(tmp_path, "flux-dev/eager/off")
    assert kept["flux-dev/eager/off"]["status"] == "failed"
    assert "| flux-dev/eager/off | not measured yet: RuntimeError: out of luck |" in said


def test_results_of_another_machine_are_not_mixed_with_these(run, tmp_path):
    work, _, _ = run
    other = json.loads((work / "results.json").read_text())
    other["machine"]["gpu"] = "NVIDIA H200"
    (tmp_path / "results.json").write_text(json.dumps(other))
    done = gpu_py("--smoke", "--work", tmp_path)
    assert done.returncode == 1
    assert "was measured where gpu differ from here; give another --work" in done.stderr


def test_a_stage_that_fails_leaves_the_others_alone(modules, monkeypatch, tmp_path, capsys):
    gpu = modules[0]

    def figures(stage, place):
        if stage.cache == "mask":
            raise ValueError("no such thing\nand more")
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "measure_stage", figures)
    arguments = ["gpu.py", "--smoke", "--work", str(tmp_path), "--stages", "flux-dev/eager/mask,flux-dev/eager/pab"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(KeyboardInterrupt):  # what was before is kept all the same
        gpu.main()
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert stages == {"flux-dev/eager/mask": {"status": "failed", "why": "ValueError: no such thing"}}


def test_a_stage_apart_that_takes_too_long_is_ended_and_begun_again(modules, monkeypatch, tmp_path):
    gpu = modules[0]
    sleeps = tmp_path / "sleeps.py"
    sleeps.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(gpu, "__file__", str(sleeps))
    args = gpu.argparse.Namespace(work=tmp_path, repeats=1)
    assert gpu.run_stage_apart("flux-dev/eager/off", args, 0.5) == {"status": "unfinished", "why": "not done after 0 s"}
    sleeps.write_text("import sys\nprint('first')\nsys.exit('it is broken')\n")
    assert gpu.run_stage_apart("x", args, 60) == {"status": "failed", "why": "it is broken"}
    sleeps.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    assert gpu.run_stage_apart("x", args, 60)["why"].startswith("ended by SIGSEGV")
    sleeps.write_text("import torchao_of_another_name\n")
    missing = "ModuleNotFoundError: No module named 'torchao_of_another_name'"
    assert gpu.run_stage_apart("x", args, 60) == {"status": "skipped", "why": missing}
    sleeps.write_text("print('a library says')\nprint('{\"picture_s\": 1}')\n")
    assert gpu.run_stage_apart("x", args, 60) == {"status": "done", "figures": {"picture_s": 1}}
    sleeps.write_text("print('{\"picture_s\": 2}')\nprint('0')\nprint('a library ends')\n")
    assert gpu.run_stage_apart("x", args, 60) == {"status": "done", "figures": {"picture_s": 2}}
    sleeps.write_text("print('0')\n")
    assert gpu.run_stage_apart("x", args, 60) == {"status": "failed", "why": "it ended without figures"}


def test_a_stage_that_took_too_long_waits_for_the_others(modules, monkeypatch, tmp_path):
    gpu = modules[0]
    ran = []

    def apart(name, args, seconds):
        ran.append(name)
        return (
            {"status": "unfinished", "why": "not done"} if name.endswith("off") else {"status": "done", "figures": {}}
        )

    monkeypatch.setattr(gpu, "run_stage_apart", apart)
    monkeypatch.setattr(gpu, "missing_requirement", lambda *_, **__: None)
    monkeypatch.setattr(gpu, "results_table", lambda results: "")
    stages = "flux-dev/eager/off,flux-dev/eager/mask"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--work", str(tmp_path), "--stages", stages])
    results = tmp_path / "results.json"
    assert gpu.main() == 0
    assert ran == ["flux-dev/eager/off", "flux-dev/eager/mask"]
    kept = json.loads(results.read_text())
    del kept["stages"]["flux-dev/eager/mask"]
    results.write_text(json.dumps(kept))
    for _ in range(gpu.ATTEMPTS):
        assert gpu.main() == 0
    assert ran[2:] == ["flux-dev/eager/mask"] + ["flux-dev/eager/off"] * (gpu.ATTEMPTS - 1)
    assert json.loads(results.read_text())["stages"]["flux-dev/eager/off"]["status"] == "failed"


def test_a_disk_holds_one_artifact_at_a_time(modules, tmp_path, monkeypatch):
    ways, times = modules[2], modules[3]
    place, folder = times.StagePlace(torch.device("cpu"), tmp_path, 1), tmp_path / "artifacts/this"
    for name in ("this", "other", ".this.partial"):
        (tmp_path / "artifacts" / name / "weights").mkdir(parents=True)
    ways.make_room(place, folder, 1)
    assert [p.name for p in folder.parent.iterdir()] == ["this"]
    with pytest.raises(OSError, match=r"1048576 GiB does not fit on its disk, \d+ are free"):
        ways.make_room(place, folder, 1 << 50)


def test_a_cold_start_that_fails_costs_no_other_figure(modules, tmp_path):
    ways, times = modules[2], modules[3]
    made = ways.time_cold_start(tmp_path / "nothing", times.StagePlace(torch.device("cpu"), tmp_path, 1))
    assert made.keys() == {"no_cold_start"}
    assert "expected an artifact folder, found nothing" in made["no_cold_start"]


def test_a_gpu_that_cannot_be_profiled_costs_no_other_figure(modules, monkeypatch):
    import torch.profiler

    times = modules[3]
    assert times.count_launches(lambda: torch.ones(2) + 1, 2) == {
        "not_profiled": "the profiler saw no launch"
    }  # on a CPU

    def refused(**_):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nand more")

    monkeypatch.setattr(torch.profiler, "profile", refused)
    assert times.count_launches(lambda: None, 2) == {"not_profiled": "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"}


def test_what_is_not_installed_is_named(modules, monkeypatch):
    _, models, ways, _ = modules
    stage = ways.Stage(models.GPU_MODELS["flux-dev"], "flux-fast", "off")
    found = ways.importlib.util.find_spec
    monkeypatch.setattr(ways.importlib.util, "find_spec", lambda n: None if n in ("torchao", "diffusers") else found(n))
    assert ways.missing_requirement(stage, cuda=True) == "diffusers, torchao not installed"


def test_the_real_models_are_for_a_gpu(modules):
    _, models, ways, _ = modules
    for model in models.GPU_MODELS.values():
        small, large = ways.Stage(models.shrink_model(model), "eager", "off"), ways.Stage(model, "eager", "off")
        assert ways.missing_requirement(small, cuda=False) is None
        assert ways.missing_requirement(large, cuda=False) == "no CUDA device that this torch can use"


@pytest.mark.parametrize(
    ("name", "cls", "billions"),
    [
        ("flux-dev", "FluxTransformer2DModel", 11.9),
        ("flux-schnell", "FluxTransformer2DModel", 11.9),
        ("sdxl", "UNet2DConditionModel", 2.57),
        ("cogvideox-5b", "CogVideoXTransformer3DModel", 5.57),
    ],
)
def test_models_have_the_published_number_of_parameters(modules, name, cls, billions):
    import diffusers

    module = modules[1].meta_module(getattr(diffusers, cls), modules[1].GPU_MODELS[name].config)
    # what the model cards say, to the digits that they give
    assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


NARROW = {
    "flux-dev": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
    "flux-schnell": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
    "sdxl": {
        "transformer_layers_per_block": (1, 1, 1),
        "block_out_channels": (32, 64, 64),
        "attention_head_dim": (1, 2, 2),
    },
    "cogvideox-5b": {"num_layers": 1, "num_attention_heads": 1},
}
"""What of a configuration says how wide and deep it is, and not what goes in and out."""


def narrow(modules, name: str, folder: Path) -> tuple[Any, Any]:
    """The model at the published sizes, and its denoiser and plan; what goes through is followed, and nothing computed."""
    _, models, ways, times = modules
    model = replace(models.GPU_MODELS[name], config={**models.GPU_MODELS[name].config, **NARROW[name]})
    stage = ways.Stage(model, "eager", model.caches[-1])
    return model, ways.prepare_subject(stage, times.StagePlace(torch.device("cpu"), folder, 1), on_device=True)


@pytest.mark.parametrize("name", NARROW)
def test_what_goes_into_a_published_configuration_fits_it(modules, name, tmp_path):
    model, subject = narrow(modules, name, tmp_path)
    given = dict(zip(subject.denoiser.inputs, (tuple(a.shape) for a in subject.denoiser.args), strict=True))
    if name.startswith("flux"):
        assert given["hidden_states"] == (1, 4096, 64)
        assert given["encoder_hidden_states"] == (1, model.tokens, 4096)
    elif name == "sdxl":
        assert (given["hidden_states"], given["text_embeds"]) == ((1, 4, 128, 128), (1, 2, 1280))
    else:
        assert given["hidden_states"] == (1, 13, 16, 60, 90)


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW)
def test_published_configurations_are_captured(modules, name, tmp_path):
    _, subject = narrow(modules, name, tmp_path)
    made = {v.name: modules[2].captured(subject, v)[1] for v in subject.planned.variants}
    assert made.keys() == {"full", "reuse"}
    shapes = {s.name: s.shape for s in made["full"].inputs}
    assert made["full"].outputs[0].shape[1:] == shapes["hidden_states"][1:]


def test_random_weights_keep_their_scale(modules):
    from diffusers import FluxTransformer2DModel

    config = {
        **modules[1].FLUX_CONFIG,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 1,
        "guidance_embeds": True,
    }
    model = modules[1].random_module(FluxTransformer2DModel, config, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        y = model.proj_out(torch.randn(50, 128))
    assert float(y.std()) == pytest.approx(1.0, abs=0.1)  # 3200 values: a deviation's own error is 0.013
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_beginning_has_every_variant_twice_where_it_runs_twice(modules):
    beginning = modules[3].warm_prefix_length
    assert beginning(["full"] * 28) == 2
    assert beginning(["full", "full", "reuse", "full", "reuse", "reuse"]) == 5
    assert beginning(["full", "reuse", "full"]) == 3
    assert beginning(["full"]) == 1


@pytest.mark.slow
def test_an_artifact_is_exported_opened_and_timed(tmp_path):
    _, stages = smoke(tmp_path, "flux-dev/prebake-bf16/pab", "--compile")
    made = stages["flux-dev/prebake-bf16/pab"]["figures"]
    assert made["variants"].keys() == {"full", "reuse"}
    assert made["export_s"] > made["load_s"] > 0
    assert made["cold_start_s"] > made["load_s"]
    assert made["artifact_bytes"] > 0


def test_a_checkout_stands_in_for_an_installation(tmp_path):
    """Where no prebake is installed, as after this editable one's finders are taken away."""
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "sys.path[:] = [p for p in sys.path if 'editable' not in p]\n"
        "import importlib.util, gpu\n"
        "assert importlib.util.find_spec('prebake') is None\n"
        "gpu.make_importable()\n"
        "import prebake.runtime.gpu.capability as found\n"
        "print(found.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == str(ROOT / "runtime/gpu/capability.py"), done.stderr


def test_the_page_claims_nothing_that_was_not_measured(modules):
    _, models, ways, _ = modules
    page = (ROOT / "docs/benchmarks/gpu.md").read_text("utf-8")
    assert not (BENCHMARKS / "results/gpu.json").exists(), "there are results: write them into docs/benchmarks/gpu.md"
    for name, model in models.GPU_MODELS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        cells = [c.strip() for c in row.strip("|").split("|")][1:]
        assert set(cells) <= {"not measured yet", ""}
        assert cells.count("not measured yet") == len(model.peers) + len(ways.WAY_QUANTIZE_METHODS)


def test_pictures_of_a_recorded_loop_are_timed_without_its_first_two_calls(modules, monkeypatch):
    times = modules[3]
    place = times.StagePlace(torch.device("cpu"), Path(), 3)
    spans = iter([90.0, 80.0, 2.0, 1.0, 3.0])
    monkeypatch.setattr(times, "time_replay", lambda *_: next(spans))
    subject = times.StageSubject(*[None] * 8)
    assert times.time_loop(subject, {}, place, "loop") == {"recorded_picture_s": 2.0}

    def refused(*_):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(times, "time_replay", refused)
    assert times.time_loop(subject, {}, place, "loop") == {"not_recorded": "operation not permitted"}
