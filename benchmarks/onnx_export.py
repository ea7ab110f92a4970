"""CPU seconds that a graph's way to ONNX takes at depth, beside torch.export's own time for the module.

python benchmarks/onnx_export.py --double 19 --single 38      # FLUX.1's blocks, in the widths of tiny:flux
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.cli.quiet import silence_libraries
from prebake.exporter.families import flux
from prebake.exporter.lower.onnx.graph import onnx_model
from prebake.exporter.lower.onnx.rewrite import rewrite_graph
from prebake.exporter.tiny.flux import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    args = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    pipe = build()
    config = {**pipe.transformer.config, "num_layers": args.double, "num_single_layers": args.single}
    transformer: Any = FluxTransformer2DModel.from_config(config)
    pipe.transformer = transformer.eval()
    c = flux.denoiser(pipe, flux.Size(64, 64, 8))
    time_run(
        "first calls of all",
        lambda: onnx_model(rewrite_graph(capture_graph("warm", torch.nn.ReLU(), c.args[:1], ("x",), ("y",)))),
    )
    time_run("torch.export alone", lambda: torch.export.export(c.module, c.args, strict=False))
    graph = time_run("capture", lambda: capture_graph("denoiser", c.module, c.args, c.inputs, c.outputs))
    graph = time_run("rewritten", lambda: rewrite_graph(graph))
    model = time_run("onnx_model", lambda: onnx_model(graph))
    print(f"{len(graph.gm.graph.nodes)} nodes of ATen, {len(model.graph.node)} of ONNX")


def time_run(name: str, run: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = run()
    print(f"{name:20s}{time.process_time() - start:8.1f} s", flush=True)
    return result


if __name__ == "__main__":
    main()
