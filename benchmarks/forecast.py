"""Does a forecast hold at real size? The denoiser of a pipeline alone: predicted and measured time of each variant.

    python benchmarks/real_models.py sd15 sd15
    python benchmarks/forecast.py sd-fast sd15 --set precision.denoiser=float32 --set precision.vae=float32
    python benchmarks/forecast.py sd-fast sd15 --set compile.backend=onnxruntime

`cost.py` does the same with an artifact that is there; here encoders and decoder are neither compiled nor captured. One thread;
the time of the process, so that other processes count little. The median of all runs but the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prebake.exporter.cli.quiet import silence_libraries
from prebake.exporter.cost.forecast import build_rates
from prebake.exporter.lower.graphs import rewrite_graphs
from prebake.exporter.passes.captured_graph import CapturedGraph
from prebake.exporter.pipeline import prepare
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.whole_pipeline import WholePipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("model")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    silence_libraries()
    WholePipeline.other_components = lambda *_: ()  # encoders and decoder
    with open_progress("rich") as shown:
        prepared = prepare(resolve(args.recipe, args.set, args.model), shown)
        rates = build_rates(prepared.recipe.compile, prepared.backend, shown)
        predicted = {
            name: rates.forecast(census, prepared.costs[name].constants_bytes).ms
            for name, census in prepared.censuses.items()
        }
        found = {}
        for graph in rewrite_graphs(prepared).graphs["denoiser"]:
            shown.announce(graph.name)
            measured = time_graph(graph, prepared.recipe.compile, args.repeats)
            found[graph.name] = {"predicted_ms": predicted[graph.name], "measured_ms": measured}
    print(f"{'variant':16s}{'measured ms':>12s}{'predicted':>11s}{'off by':>8s}")
    for name, f in found.items():
        off = f["predicted_ms"] / f["measured_ms"] - 1
        print(f"{name:16s}{f['measured_ms']:12.1f}{f['predicted_ms']:11.1f}{off:8.1%}")
    if args.output:
        args.output.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", "utf-8")


def time_graph(graph: CapturedGraph, config: Any, repeats: int) -> float:
    """Median milliseconds of one run, on random inputs."""
    run = {"aoti": open_package, "onnxruntime": open_onnx}[config.backend](graph, config)
    inputs = [torch.randn(t.shape).to(t.dtype) if t.is_floating_point() else t for t in graph.args]
    taken = []
    for _ in range(repeats + 1):
        start = time.process_time()
        run(inputs)
        taken.append((time.process_time() - start) * 1e3)
    return statistics.median(taken[1:])


def open_package(graph: CapturedGraph, config: Any) -> Callable[[Sequence[Tensor]], Any]:
    from prebake.exporter.lower.aoti import compile_flags, compile_graph, kernel_target
    from prebake.runtime.backends.aoti import open_model

    with tempfile.TemporaryDirectory() as folder:
        for name, data in compile_graph(graph, compile_flags(config), target=kernel_target(config)).items():
            (Path(folder) / name).write_bytes(data)
        model = open_model(next(Path(folder).glob("*.so")), torch.device("cpu"))
    model.bind({name: t.detach() for name, t in graph.constants().items()})
    return model


def open_onnx(graph: CapturedGraph, config: Any) -> Callable[[Sequence[Tensor]], Any]:
    from prebake.exporter.lower.onnx.graph import onnx_model
    from prebake.exporter.lower.onnxruntime import OnnxRuntimeOptions
    from prebake.exporter.lower.options import read_options
    from prebake.runtime.backends.onnxruntime import open_session, ort_value

    options = read_options(config, OnnxRuntimeOptions)
    model = onnx_model(graph, options.opset).SerializeToString()
    values = {name: ort_value(t.detach().contiguous()) for name, t in graph.constants().items()}
    session = open_session(model, Path(), values, torch.device("cpu"), 1, prepack=bool(options.prepack))

    def run(inputs: Sequence[Tensor]) -> None:
        binding = session.io_binding()
        for spec, value in zip(graph.inputs, inputs, strict=True):
            binding.bind_ortvalue_input(spec.name, ort_value(value.contiguous()))
        for spec in graph.outputs:
            binding.bind_output(spec.name)
        session.run_with_iobinding(binding)

    return run


if __name__ == "__main__":
    main()
