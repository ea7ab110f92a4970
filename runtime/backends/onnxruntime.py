"""ONNX Runtime: an `.onnx` file for each graph, without weights; the twin of `exporter/lower/onnxruntime.py`.

A session reads the artifact's mapped weights, the caller's inputs, and writes into outputs that torch has allocated: nothing
is copied on the way in or out. The provider that the artifact was exported for is the one that runs, or opening fails:
ONNX Runtime itself goes on with another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from ..contract import torch_dtype
from ..errors import ArtifactError
from ..extras import install_command
from ..manifest import Graph, Manifest, Requires
from . import OpenContext

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ONNXRUNTIME_PACKAGES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}
"""Builds of one package: only one of them can be installed at a time."""
DENOISER_OUTPUT = "sample"
"""The output that a graph of the denoiser has, and no other graph."""
MERGING_OPTIMIZER = "CommonSubexpressionElimination"
"""It would make one of the quantizing nodes that each int8 product has to itself, and then not all products are int8."""


def problems(requires: Requires) -> Iterator[str]:
    """An ONNX Runtime that is older than the one the artifact was exported and verified with, or without its provider."""
    needed = requires.packages.get("onnxruntime", "0")
    if parse_version(onnxruntime.__version__) < parse_version(needed):
        yield (
            f"was exported with onnxruntime {needed}, this is {onnxruntime.__version__}; "
            f"pip install '{ONNXRUNTIME_PACKAGES[requires.device]}>={needed}', or export again"
        )
    if PROVIDERS[requires.device] not in onnxruntime.get_available_providers():
        yield (
            f"runs on {PROVIDERS[requires.device]}, this onnxruntime has {', '.join(onnxruntime.get_available_providers())}; "
            f"pip uninstall onnxruntime, then {install_command('onnxruntime-gpu')}; or export for the cpu"
        )


def parse_version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def package_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """None: only the library itself can read its files, and to read them there is to open them."""
    return iter(())


def open_models(opening: OpenContext) -> dict[str, SessionModel]:
    """A session for every graph. All sessions read the same weights; what they pack them into is their own."""
    compiled = opening.manifest.recipe.get("compile", {})
    threads = compiled.get("threads") or torch.get_num_threads()
    packs = graphs_to_prepack(opening.manifest, compiled.get("options", {}).get("prepack"))
    models = {}
    for graph in opening.manifest.graphs:
        data, file = opening.code(graph.package), opening.folder / graph.package
        values = {name: ort_value(tensor) for name, tensor in opening.constants[graph.name].items()}
        try:
            session = open_session(data, opening.folder, values, opening.device, threads, prepack=graph.name in packs)
        except Exception as e:
            raise ArtifactError(
                f"{file}: ONNX Runtime could not open it ({type(e).__name__}: {e}); export again"
            ) from e
        models[graph.name] = SessionModel(graph, session, values, opening.device)
    return models


def graphs_to_prepack(manifest: Manifest, asked: bool | None) -> set[str]:
    """The graphs whose sessions keep their weights once more, in the order in which kernels read them: as the recipe asks,
    and where it does not, all but variants of one denoiser, of which each would hold the same weights."""
    graphs = {graph.name for graph in manifest.graphs}
    if asked is not None:
        return graphs if asked else set()
    variants = {graph.name for graph in manifest.graphs if any(spec.name == DENOISER_OUTPUT for spec in graph.outputs)}
    return graphs if len(variants) == 1 else graphs - variants


def open_session(
    model: bytes,
    folder: Path,
    constants: Mapping[str, Any],
    device: torch.device,
    threads: int,
    *,
    prepack: bool,
) -> Any:
    """A session of the model over these constants. Raises what ONNX Runtime raises, and ArtifactError when it would run on
    another device.

    Kernels read the constants where they lie. The optimizer reads some before: on the CPU from a copy that ONNX Runtime makes
    of all of them while it opens the model, so that nothing is opened by its name after it was checked; on a GPU, for which it
    takes no copy, from the files in `folder`.
    """
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    if device.type == "cpu":
        options.add_external_initializers(list(constants), list(constants.values()))
    else:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    for name, value in constants.items():
        options.add_initializer(name, value)
    provider = PROVIDERS[device.type]
    session = onnxruntime.InferenceSession(model, options, [provider], disabled_optimizers=[MERGING_OPTIMIZER])
    if session.get_providers()[0] != provider:
        raise ArtifactError(f"it would run on {session.get_providers()[0]}, not on {provider}")
    return session


def ort_value(tensor: torch.Tensor) -> Any:
    """The tensor's memory as ONNX Runtime names it."""
    return onnxruntime.OrtValue.from_dlpack(BooleanTensor(tensor) if tensor.dtype is torch.bool else tensor.detach())


class BooleanTensor:
    """A tensor of booleans as ONNX Runtime imports them: DLPack's bytes, under the name of their dtype."""

    dtype = "bool"

    def __init__(self, tensor: torch.Tensor):
        self._bytes = tensor.detach().view(torch.uint8)

    def __dlpack__(self) -> Any:
        return self._bytes.__dlpack__()


class SessionModel:
    """A session that is called as every graph is: flat tensors in, flat tensors out, freshly allocated."""

    def __init__(self, graph: Graph, session: Any, constants: Mapping[str, Any], device: torch.device):
        self._session = session
        self._constants = constants  # the session holds their addresses, and does not keep them alive
        self._device = device
        self._inputs = tuple(spec.name for spec in graph.inputs)
        self._outputs = tuple((spec.name, spec.shape, torch_dtype(spec.dtype)) for spec in graph.outputs)
        named = (
            tuple(i.name for i in session.get_inputs()),
            tuple(o.name for o in session.get_outputs()),
        )
        if named != (self._inputs, tuple(name for name, _, _ in self._outputs)):
            raise ArtifactError(
                f"graph {graph.name!r}: its file takes {', '.join(named[0])} and gives {', '.join(named[1])}, "
                "which is not what the manifest says; export again"
            )

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs = [torch.empty(shape, dtype=dtype, device=self._device) for _, shape, dtype in self._outputs]
        binding = self._session.io_binding()
        for name, tensor in zip(self._inputs, inputs, strict=True):
            binding.bind_ortvalue_input(name, ort_value(tensor))
        for (name, _, _), tensor in zip(self._outputs, outputs, strict=True):
            binding.bind_ortvalue_output(name, ort_value(tensor))
        self._session.run_with_iobinding(binding)
        return outputs
