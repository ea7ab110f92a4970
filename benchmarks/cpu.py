"""One evaluation of a denoiser on a CPU: prebake beside everything else that a CPU user would take.

    python benchmarks/cpu.py flux-88m                  # or flux-284m, unet; --threads 2; --output FILE.json
    pip install openvino nncf                          # for OpenVINO's lines; without them the table says so
    python benchmarks/cpu.py --attention               # the attention alone, by number of tokens
    python benchmarks/cpu.py --layers                  # the int8 layers alone, against the CPU's measured peak

All ways run in one process and take turns, after a round that is not counted. What is printed is the median of each one's CPU
seconds (so that other programs may run meanwhile), the median over rounds of the time of the fastest other way that is no
less exact than prebake's int8, divided by its own, and its error against eager float32. Weights are random: speed does not
depend on them, and errors are those of rounding, not of a trained model's outliers.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.lower import aoti, load_backend, onnxruntime, w8a8
from prebake.exporter.lower.aoti import kernels, pt2
from prebake.exporter.lower.aoti.kernels.native import NativeKernels
from prebake.exporter.lower.aoti.kernels.operators import GELU, NO_ACTIVATION
from prebake.exporter.lower.onnx.graph import embed_data, onnx_model
from prebake.exporter.passes.attention_dtype import cast_attention
from prebake.exporter.passes.captured_graph import CapturedGraph, run_passes
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.rewrite import rewrite_denoiser

HALF_DTYPE, FLOAT_DTYPE = torch.bfloat16, torch.float32
PREBAKE = "prebake: "
OURS_INT8_BFLOAT16_ATTENTION, HALVES = PREBAKE + "int8, bfloat16 attention", PREBAKE + "int8, bfloat16"
FLOATS = PREBAKE + "int8, float32"
CONVOLUTIONS = PREBAKE + "int8 with convolutions, bfloat16"


class DenoiserProblem(NamedTuple):
    """A denoiser, the names of its inputs, and one example of them."""

    module: nn.Module
    names: tuple[str, ...]
    args: tuple[Tensor, ...]
    denoiser: nn.Module

    def to(self, dtype: torch.dtype) -> DenoiserProblem:
        module: Any = copy.deepcopy(self.module).to(dtype)
        return DenoiserProblem(module, self.names, tuple(a.to(dtype) for a in self.args), module.denoiser)

    def graph(self) -> CapturedGraph:
        return capture_graph("denoiser", self.module, self.args, self.names, ("predicted",))


class NamedDenoiser(nn.Module):
    """A diffusers denoiser with flat inputs."""

    def __init__(self, denoiser: nn.Module, names: tuple[str, ...], **fixed: Any):
        super().__init__()
        self.denoiser, self.names, self.fixed = denoiser, names, fixed

    def forward(self, *args: Tensor) -> Tensor:
        denoiser: Any = self.denoiser
        return denoiser(**dict(zip(self.names, args, strict=True)), **self.fixed, return_dict=False)[0].contiguous()


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def flux_problem(double: int, single: int, side: int, tokens: int) -> DenoiserProblem:
    """FLUX of 16 heads of 64 features, for side x side image tokens and so many of text."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=64,
        num_attention_heads=16,
        joint_attention_dim=512,
        pooled_projection_dim=512,
        guidance_embeds=True,
        axes_dims_rope=(8, 24, 32),
    ).eval()
    image = torch.zeros(side * side, 3)
    image[:, 1], image[:, 2] = torch.arange(side * side) // side, torch.arange(side * side) % side
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
    args = (
        random_tensor(1, side * side, 64),
        random_tensor(1, tokens, 512),
        random_tensor(1, 512),
        torch.tensor([0.5]),
        torch.tensor([3.5]),
    )
    return DenoiserProblem(
        NamedDenoiser(model, names, img_ids=image, txt_ids=torch.zeros(tokens, 3)), names, args, model
    )


def unet_problem() -> DenoiserProblem:
    """SDXL's UNet at half its width, with 1, 2 and 4 transformer layers a level, for a picture of 512 x 512."""
    from diffusers import UNet2DConditionModel

    shape: Any = {
        "sample_size": 64,
        "block_out_channels": (160, 320, 640),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 4),
        "attention_head_dim": (5, 5, 10),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }
    model: Any = UNet2DConditionModel(**shape).eval()
    model.to(memory_format=torch.channels_last)
    names = ("sample", "timestep", "encoder_hidden_states")
    args = (random_tensor(1, 4, 64, 64), torch.tensor([500.0]), random_tensor(1, 77, 1024))
    return DenoiserProblem(NamedDenoiser(model, names), names, args, model)


MODELS: dict[str, Callable[[], DenoiserProblem]] = {
    "flux-88m": lambda: flux_problem(1, 2, 24, 64),
    "flux-284m": lambda: flux_problem(4, 8, 32, 128),
    "unet": unet_problem,
}


# --- ways to run it --------------------------------------------------------------------------------------------------


def problem_ways(problem: DenoiserProblem, threads: int, only: str) -> Iterator[tuple[str, Callable[[], Tensor] | str]]:
    """Each way's name and how to run it, or why it cannot be run."""
    fused: Any = problem.denoiser
    if hasattr(fused, "fuse_qkv_projections"):
        fused.fuse_qkv_projections()
    half = problem.to(HALF_DTYPE)
    table: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "eager float32": lambda: lambda: problem.module(*problem.args),
        "eager bfloat16": lambda: lambda: half.module(*half.args),
        "torch.compile float32": lambda: compile_with_torch(problem),
        "torch.compile bfloat16": lambda: compile_with_torch(half),
        "AOTInductor int8 (torchao)": lambda: compile_with_aoti(problem, threads, "compile.options.kernels=false"),
        PREBAKE + "int8 by ONNX Runtime": lambda: compile_with_onnxruntime(problem, threads),
        FLOATS: lambda: compile_with_aoti(problem, threads),
        OURS_INT8_BFLOAT16_ATTENTION: lambda: compile_with_aoti(problem, threads, "attention.dtype=bfloat16"),
        HALVES: lambda: compile_with_aoti(half, threads),
        CONVOLUTIONS: lambda: compile_with_aoti(half, threads, "quantize.convolutions=true"),
        "OpenVINO bfloat16": lambda: compile_with_openvino(problem, threads, quantized=False),
        "OpenVINO int8 (NNCF)": lambda: compile_with_openvino(problem, threads, quantized=True),
    }
    if not hasattr(fused, "down_blocks"):
        del table[CONVOLUTIONS]
    for way, make in table.items():
        if re.search(only, way):
            try:
                yield way, make()
            except ModuleNotFoundError as e:
                yield way, f"not measured: no {e.name}"


def compile_with_torch(problem: DenoiserProblem) -> Callable[[], Tensor]:
    module = torch.compile(problem.module)
    return lambda: module(*problem.args)


def quantize_problem(problem: DenoiserProblem, *overrides: str) -> tuple[DenoiserProblem, Any]:
    """The denoiser with flux-fast's int8 layers, and the recipe."""
    recipe = resolve("flux-fast", ["cache.method=none", "fuse.qkv=false", *overrides], "shapes")
    made = problem.to(problem.args[0].dtype)
    rewrite_denoiser(
        "unet" if hasattr(made.denoiser, "down_blocks") else "transformer",
        made.denoiser,
        recipe,
        load_backend(recipe.compile.backend),
    )
    return made, recipe


def compile_with_aoti(problem: DenoiserProblem, threads: int, *overrides: str) -> Callable[[], Tensor]:
    from torch._inductor.package import load_package, package_aoti

    made, recipe = quantize_problem(problem, f"compile.threads={threads}", *overrides)
    graph = made.graph()
    if recipe.attention.dtype:
        graph = cast_attention(graph, getattr(torch, recipe.attention.dtype))
    graph = run_passes(graph, aoti.list_passes(recipe.compile))
    inside = {"aot_inductor.package_constants_in_so": True, "aot_inductor.use_consts_asm_build": True}
    folder = Path(tempfile.mkdtemp(dir=os.environ["TMPDIR"]))
    target = aoti.kernel_target(recipe.compile)
    files = aoti.compile_graph(graph, {**aoti.compile_flags(recipe.compile), **inside}, target=target)
    package = package_aoti(str(folder / "graph.pt2"), {"model": pt2.write_files(folder / "model", files)})
    run = load_package(package, "model")
    return lambda: first_tensor(run(*made.args))


def compile_with_onnxruntime(problem: DenoiserProblem, threads: int) -> Callable[[], Tensor]:
    import onnxruntime as ort

    made, recipe = quantize_problem(problem, "compile.backend=onnxruntime")
    graph = run_passes(made.graph(), onnxruntime.list_passes(recipe.compile))
    options: Any = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    model = embed_data(onnx_model(graph), graph.constants()).SerializeToString()
    session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
    given = {name: a.numpy() for name, a in zip(made.names, made.args, strict=True)}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def compile_with_openvino(problem: DenoiserProblem, threads: int, *, quantized: bool) -> Callable[[], Tensor]:
    import openvino

    given = [a.numpy() for a in problem.args]
    model = openvino.convert_model(torch.export.export(problem.module, problem.args, strict=False))
    if quantized:
        import nncf

        model = nncf.quantize(model, nncf.Dataset([given]), model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda: torch.from_numpy(np.asarray(next(iter(compiled(given).values()))))


def first_tensor(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple | list) else result


# --- measuring -------------------------------------------------------------------------------------------------------


def measure_model(name: str, args: argparse.Namespace) -> dict[str, Any]:
    problem = MODELS[name]()
    parameters = sum(p.numel() for p in problem.module.parameters())  # before projections are fused, and there twice
    runs: dict[str, Callable[[], Tensor]] = {}
    missing: dict[str, str] = {}
    for way, run in problem_ways(problem, args.threads, args.only):
        print(f"  {way}", flush=True)
        if isinstance(run, str):
            missing[way] = run
        else:
            runs[way] = run
    truth = problem.module(*problem.args)
    errors = {way: float((run().float() - truth).norm() / truth.norm()) for way, run in runs.items()}
    seconds = time_in_turn(runs, args.repeats)
    return {
        "model": name,
        "parameters": parameters,
        "seconds": seconds,
        "errors": errors,
        "missing": missing,
        "threads": args.threads,
        "cpu": measured_cpu_name(),
        "torch": torch.__version__,
    }


def time_in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each, a figure for each round."""
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(repeats):
        for way, run in runs.items():
            start = time.process_time()
            run()
            seconds[way].append(time.process_time() - start)
    return seconds


def print_figures(figures: dict[str, Any]) -> None:
    seconds, errors = figures["seconds"], figures["errors"]
    medians = {way: statistics.median(s) for way, s in seconds.items()}
    print(
        f"\n{figures['model']}: {figures['parameters'] / 1e6:.0f}M parameters, {figures['threads']} thread(s), ", end=""
    )
    print(f"{figures['cpu']}, torch {figures['torch']}\n")
    peers = [
        w
        for w in medians
        if not w.startswith(PREBAKE) and errors[w] <= 1.5 * errors.get(OURS_INT8_BFLOAT16_ATTENTION, 1)
    ]
    best = min(peers, key=lambda w: medians[w], default=None)
    fastest = min((w for w in medians if not w.startswith(PREBAKE)), key=lambda w: medians[w], default=None)
    print("| | ms | fastest other / this | error against eager float32 |\n| --- | --- | --- | --- |")
    for way, median in medians.items():
        ratio = (
            statistics.median(f / s for f, s in zip(seconds[fastest], seconds[way], strict=True)) if fastest else 1.0
        )
        mark = "**" if way == OURS_INT8_BFLOAT16_ATTENTION else ""
        print(f"| {mark}{way}{mark} | {median * 1e3:.1f} | {ratio:.2f} | {errors[way]:.1e} |")
    for way, why in figures["missing"].items():
        print(f"| {way} | {why} | | |")
    if best and OURS_INT8_BFLOAT16_ATTENTION in seconds:
        ratio = statistics.median(
            b / s for b, s in zip(seconds[best], seconds[OURS_INT8_BFLOAT16_ATTENTION], strict=True)
        )
        print(
            f"\nThe fastest other way that is no less exact is {best}: it takes {ratio:.2f} times as long as {OURS_INT8_BFLOAT16_ATTENTION}."
        )


def measured_cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# --- the kernels alone -----------------------------------------------------------------------------------------------


@contextmanager
def open_native() -> Iterator[Any]:
    """The kernels, callable with tensors."""
    with tempfile.TemporaryDirectory() as folder:
        yield NativeKernels(Path(folder))


PEAK_LOOPS, SUMS = 1_000_000, 20
PEAK_OPERATIONS = PEAK_LOOPS * SUMS * 16 * 4 * 2
"""Of `peak_loop`: each instruction multiplies and adds 4 bytes in 16 lanes."""


@contextmanager
def peak_loop() -> Iterator[Callable[[], Any]]:
    """Nothing but independent VPDPBUSD: what the core can do at most."""
    sums = "".join(f"vpdpbusd %%zmm31, %%zmm30, %%zmm{i}\\n" for i in range(SUMS))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
        used = ", ".join(f'"zmm{i}"' for i in range(SUMS))
        source.write_text(f'void peak(long n) {{ while (n--) __asm__ volatile("{sums}" : : : {used}); }}\n')
        subprocess.run(
            ["gcc", "-O2", "-march=x86-64-v4", "-mavx512vnni", "-shared", "-fPIC", source, "-o", library], check=True
        )
        spin = ctypes.CDLL(str(library)).peak
        yield lambda: spin(ctypes.c_long(PEAK_LOOPS))


def measure_attention(repeats: int) -> None:
    """GFLOP/s of the kernel and of torch's attention, heads of 64 and 128 features, on one thread."""
    print("| heads x features | tokens | torch float32 | torch bfloat16 | kernel | error: torch's bfloat16, kernel |")
    print("| --- | --- | --- | --- | --- | --- |")
    with open_native() as library:
        for heads, features in ((16, 64), (8, 128)):
            for tokens in (256, 640, 1152, 2048, 4096, 8192):
                q, k, v = (random_tensor(1, heads, tokens + i, features)[:, :, i:].to(HALF_DTYPE) for i in range(3))
                wide = [x.float() for x in (q, k, v)]
                runs = {
                    "float": lambda w=wide: scaled_dot_product_attention(*w),
                    "half": lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v),
                    "kernel": lambda q=q, k=k, v=v: library.attention(q, k, v, q.shape[-1] ** -0.5),
                }
                truth = runs["float"]()
                errors = [float((runs[way]().float() - truth).norm() / truth.norm()) for way in ("half", "kernel")]
                rates = [4 * heads * tokens**2 * features / min(s) / 1e9 for s in time_in_turn(runs, repeats).values()]
                print(f"| {heads} x {features} | {tokens} | " + " | ".join(f"{r:.0f}" for r in rates), end="")
                print(f" | {errors[0]:.1e}, {errors[1]:.1e} |", flush=True)


def measure_layers(repeats: int) -> None:
    """GOP/s of int8 layers, quantizing and scales included, against the bare product of torch and the CPU's peak."""
    print(
        "| rows x in x out | torch._int_mm alone | whole layer | with GELU | of the peak |\n| --- | --- | --- | --- | --- |"
    )
    with open_native() as library, peak_loop() as spin:
        for rows, inner, columns in (
            (640, 1024, 3072),
            (640, 1024, 4096),
            (640, 5120, 1024),
            (1152, 1024, 4096),
            (4096, 640, 640),
        ):
            x = random_tensor(rows, inner)
            weight, scale = w8a8.quantize_rows_int8(random_tensor(columns, inner))
            codes, packed = (
                torch.randint(-128, 127, (rows, inner), dtype=torch.int8),
                kernels.operators.pack_columns(weight.t().contiguous()),
            )
            runs = {
                "product": lambda codes=codes, weight=weight: torch._int_mm(codes, weight.t()),
                "layer": lambda x=x, p=packed, s=scale: library.packed_w8a8([x], p, s, s, NO_ACTIVATION),
                "gelu": lambda x=x, p=packed, s=scale: library.packed_w8a8([x], p, s, s, GELU),
                "peak": spin,
            }
            times = time_in_turn(runs, repeats)
            rates = {way: 2 * rows * inner * columns / min(times[way]) / 1e9 for way in ("product", "layer", "gelu")}
            top = PEAK_OPERATIONS / min(times["peak"]) / 1e9
            shown = " | ".join(f"{rates[way]:.0f}" for way in rates)
            print(f"| {rows} x {inner} x {columns} | {shown} | {rates['layer'] / top:.0%} of {top:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", choices=[[], *MODELS], help="what to run (default: flux-88m)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="the ways whose names match this regular expression")
    parser.add_argument("--attention", action="store_true", help="the attention alone, and nothing else")
    parser.add_argument("--layers", action="store_true", help="the int8 layers alone, and nothing else")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    os.environ.setdefault("TMPDIR", tempfile.gettempdir())
    if args.attention:
        return measure_attention(args.repeats)
    if args.layers:
        return measure_layers(args.repeats)
    figures = [measure_model(name, args) for name in args.model or ["flux-88m"]]
    for one in figures:
        print_figures(one)
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", "utf-8")
    return None


if __name__ == "__main__":
    main()
