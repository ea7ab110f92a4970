#!/usr/bin/env python
"""Denoisers on a GPU, side by side: eager, torch.compile, flux-fast's recipe and prebake, each with and without caches.

    python benchmarks/gpu.py --work gpu-bench          # again and again, until it says that no stage is left
    python benchmarks/gpu.py --work gpu-bench --stages 'flux-dev/*/off,sdxl/prebake-*'
    python benchmarks/gpu.py --table gpu-bench/results.json
    python benchmarks/gpu.py --smoke                   # tiny models on the CPU: shows that everything runs

FLUX.1-dev and schnell, SDXL and CogVideoX-5B by their published configurations, with random weights (`gpu_models.py`); no
network. A stage is a model, a way and a cache, in a process of its own. One call ends within `--budget` seconds; stages
that are done, or that lack something of this machine, are kept in `results.json` and not run again, and what was compiled
lies in `--work` too. A stage that fails is on record with its error, and the others go on. Works from a checkout with
torch 2.11 to 2.13, whether prebake is installed or not.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_models import GPU_MODELS, GpuModel, shrink_model
from gpu_times import StagePlace
from gpu_ways import WAY_QUANTIZE_METHODS, Stage, evaluate_once, measure_stage, missing_requirement

ROOT = Path(__file__).resolve().parents[1]
CACHES = ("off", "mask", "pab", "deepcache")
MIN_STAGE_S = 60
"""A stage is not begun with less time left: it would hardly load its model."""
ATTEMPTS = 4
"""How often a stage is begun that did not end in time; each goes on from what the one before has compiled."""
FINAL_STATUSES = ("done", "skipped", "failed")
VERSIONED_PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "torchao",
    "transformers",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)
NOT_MEASURED = "not measured yet"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("gpu-bench"), help="results, compiled code and artifacts")
    parser.add_argument("--stages", default="*", help="names such as flux-dev/eager/off, with *, separated by commas")
    parser.add_argument("--budget", type=float, default=520, help="seconds in which this call ends")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--compile", action="store_true", help="with --smoke: prebake-bf16 too, compiled for the CPU")
    parser.add_argument("--retry", action="store_true", help="run stages again that have failed or were skipped")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of a file of results, and end")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    make_importable()
    if args.table:
        print(results_table(json.loads(args.table.read_text("utf-8"))))
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    if args.open:
        evaluate_once(args.open, build_place(args))
        return 0
    if args.one:
        print(json.dumps(measure_stage(choose_stages(args)[args.one], build_place(args))), flush=True)
        return 0
    return run_stages(args)


def make_importable() -> None:
    """Lets a checkout stand in for an installed prebake: its folders are the package's."""
    if importlib.util.find_spec("prebake") is None:
        module = types.ModuleType("prebake")
        module.__path__ = [str(ROOT)]
        sys.modules["prebake"] = module


def build_place(args: argparse.Namespace) -> StagePlace:
    on_gpu = torch.cuda.is_available() and not args.smoke
    return StagePlace(torch.device("cuda", 0) if on_gpu else torch.device("cpu"), args.work.resolve(), args.repeats)


def choose_stages(args: argparse.Namespace) -> dict[str, Stage]:
    """The stages that were asked for, by name, those without a cache first."""
    models: Sequence[GpuModel] = [shrink_model(m) if args.smoke else m for m in GPU_MODELS.values()]
    every = [
        Stage(m, way, cache)
        for cache in CACHES
        for m in models
        if cache in m.caches
        for way in (*m.peers, *WAY_QUANTIZE_METHODS)
    ]
    patterns = args.stages.split(",")
    chosen = {s.name: s for s in every if any(fnmatch.fnmatch(s.name, p) for p in patterns)}
    if not chosen:
        sys.exit(f"--stages {args.stages}: none of that name; there are {', '.join(s.name for s in every)}")
    return chosen


# --- stages -----------------------------------------------------------------------------------------------------------


def run_stages(args: argparse.Namespace) -> int:
    """Runs what is left, within the budget; 0, also where stages failed, which the table says."""
    ends = time.monotonic() + args.budget
    path, here = args.work / "results.json", gpu_machine_facts(build_place(args))
    results = read_results(path, here)
    begun = {n: r.get("attempts", 0) for n, r in results["stages"].items()}
    # what has taken too long already waits until everything else had its turn
    for name, stage in sorted(choose_stages(args).items(), key=lambda item: begun.get(item[0], 0)):
        before = results["stages"].get(name, {})
        again = args.retry and before.get("status") in ("skipped", "failed")
        if before.get("status") in FINAL_STATUSES and not again:
            continue
        left = ends - time.monotonic()
        if why := missing_requirement(stage, build_place(args).device.type == "cuda", compile_on_cpu=args.compile):
            record = {"status": "skipped", "why": why}
        elif left < MIN_STAGE_S:
            continue
        else:
            print(f"[{args.budget - left:5.0f} s] {name}", file=sys.stderr, flush=True)
            record = try_stage(stage, args) if args.smoke else run_stage_apart(name, args, left - 10)
            if record["status"] == "unfinished":
                attempts = before.get("attempts", 0) + 1
                record = {**record, "attempts": attempts, "status": "failed" if attempts >= ATTEMPTS else "unfinished"}
        results["stages"][name] = record
        write_results(path, results)
    print(results_table(results))
    unfinished = [n for n in choose_stages(args) if results["stages"].get(n, {}).get("status") not in FINAL_STATUSES]
    print(f"{path}: {len(unfinished)} stages left" + (", run this again" if unfinished else ""))
    return 0


def try_stage(stage: Stage, args: argparse.Namespace) -> dict[str, Any]:
    """The stage in this process."""
    try:
        return {"status": "done", "figures": measure_stage(stage, build_place(args))}
    except Exception as e:
        return failure_record(f"{type(e).__name__}: {e}")


def run_stage_apart(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The stage in a process of its own, which ends with all that it has started after `seconds`."""
    command = [sys.executable, __file__, "--one", name, "--work", str(args.work), "--repeats", str(args.repeats)]
    work = args.work.resolve()
    (work / "tmp").mkdir(mode=0o700, exist_ok=True)
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton")}
    env = {**os.environ, **kept, "TMPDIR": str(work / "tmp"), "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a compiler in a session of its own may hold the pipes
            child.communicate(timeout=5)
        return {"status": "unfinished", "why": f"not done after {seconds:.0f} s"}
    if child.returncode:
        last = next((line for line in reversed(err.splitlines()) if line.strip()), "it does not say why")
        return failure_record(
            last if child.returncode > 0 else f"ended by {signal.Signals(-child.returncode).name}: {last}"
        )
    for line in reversed(out.splitlines()):  # libraries print too, some of them as they end
        with contextlib.suppress(ValueError):
            if isinstance(made := json.loads(line), dict):
                return {"status": "done", "figures": made}
    return failure_record("it ended without figures")


def failure_record(error: str) -> dict[str, Any]:
    """What is on record of an error: a package that is missing makes no failure."""
    line = (error.strip().splitlines() or ["it does not say why"])[0][:300]
    return {"status": "skipped" if line.startswith(("ModuleNotFoundError", "ImportError")) else "failed", "why": line}


# --- the file of results ------------------------------------------------------------------------------------------------


def gpu_machine_facts(where: StagePlace) -> dict[str, Any]:
    """What the figures depend on; without host names and times."""
    gpu: dict[str, Any] = {}
    if where.device.type == "cuda":
        properties = torch.cuda.get_device_properties(where.device)
        gpu = {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }
    return {
        "device": where.device.type,
        **gpu,
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {n: v for n in VERSIONED_PACKAGES if (v := installed_version(n))},
    }


def driver_version() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_results(path: Path, here: Mapping[str, Any]) -> dict[str, Any]:
    """The results so far. Ends the program where they are another machine's: figures of two are no comparison."""
    if not path.exists():
        return {"date": datetime.now(UTC).date().isoformat(), "machine": dict(here), "stages": {}}
    results = json.loads(path.read_text("utf-8"))
    if differing := sorted(
        k for k in here.keys() | results["machine"].keys() if here.get(k) != results["machine"].get(k)
    ):
        sys.exit(f"{path}: was measured where {', '.join(differing)} differ from here; give another --work")
    return results


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")
    partial.replace(path)


# --- the table ------------------------------------------------------------------------------------------------------------

TABLE_HEAD = ("stage", "step ms", "picture s", "x eager", "of matmul", "launches", "load s", "cold s", "GiB")


def results_table(results: Mapping[str, Any]) -> str:
    """Markdown: the step that computes everything, the whole picture (~ where it is a sum of evaluations) and its ratio to eager without a cache, the step's share
    of the matmul rate, launches per step, loading, a new process until its first evaluation, device memory; or why there is none."""
    lines = [f"| {' | '.join(TABLE_HEAD)} |", f"|{' --- |' * len(TABLE_HEAD)}"]
    stages = results["stages"]
    for name, record in stages.items():
        if record["status"] != "done":
            lines.append(f"| {name} | {NOT_MEASURED}: {record['why']} |{' |' * (len(TABLE_HEAD) - 2)}")
            continue
        made, base = record["figures"], stages.get(f"{name.split('/')[0]}/eager/off", {}).get("figures")
        full = made["variants"]["full"]
        cells = [
            f"{full['ms']:.2f}",
            f"{'' if made['picture_is'] == 'measured' else '~'}{made['picture_s']:.3f}",
            f"{base['picture_s'] / made['picture_s']:.2f}" if base else "",
            f"{full['of_matmul_rate']:.0%}",
            format_value(made.get("launches_per_step"), "{:.0f}"),
            format_value(made.get("load_s"), "{:.1f}"),
            format_value(made.get("cold_start_s"), "{:.1f}"),
            format_value(made["device_memory_bytes"] and made["device_memory_bytes"] / 2**30, "{:.1f}"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_value(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


if __name__ == "__main__":
    sys.exit(main())
