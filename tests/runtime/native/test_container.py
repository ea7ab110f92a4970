"""The two ways into a model's library: with the library's own count of idle instances, and without, as a GPU's are run."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from prebake.runtime.native.container import Container
from prebake.runtime.storage.unpack import read_members, unpack_members
from prebake.runtime.weights import map_weights
from support import toy_model as toy


def test_a_single_instance_gives_what_any_other_gives(toy_artifact, tmp_path):
    data = (toy_artifact / "graphs/vae_decoder.pt2").read_bytes()
    latents = torch.randn(1, toy.N, toy.C)
    made = []
    for way in ("Run", "RunSingleThreaded"):
        with unpack_members(read_members("p", data), "x", tmp_path / way) as libraries:
            container = Container("decoder", ctypes.CDLL(str(libraries["vae_decoder"])), 1, torch.device("cpu"))
        assert container._run == "Run"  # on the CPU
        container._run = way
        weights = map_weights({p: p for p in (toy_artifact / "weights").iterdir()}, torch.device("cpu"))
        container.bind({n: weights[k] for n, k in constants(toy_artifact, container).items()})
        made.append(container.run([latents])[0])
    assert torch.equal(*made)
    assert made[0].std() > 0


def constants(folder, container) -> dict[str, str]:
    """Name in the library -> key in the weight files."""
    from prebake.runtime.backends import aoti
    from prebake.runtime.manifest import read_manifest

    data = (folder / "graphs/vae_decoder.pt2").read_bytes()
    with unpack_members(read_members("p", data), "x") as libraries:
        model = aoti.open_model(libraries["vae_decoder"], torch.device("cpu"))
    keys = read_manifest(folder).graph("vae_decoder").constants
    return {model._compiled[fqn].name: key for fqn, key in keys.items()}


class Library:
    """Notes what is called; every call succeeds, and has no outputs."""

    def __init__(self):
        self.calls, self._handle = [], 0
        self.AOTInductorGetLastError = SimpleNamespace()

    def __getitem__(self, name):
        def function(*args):
            self.calls.append((name.removeprefix("AOTInductorModelContainer"), args))
            return 0

        return function


@pytest.mark.parametrize(("runners", "way"), [(1, "RunSingleThreaded"), (2, "Run")])
def test_on_a_gpu_a_call_is_queued_on_the_callers_stream(monkeypatch, runners, way):
    asked = []
    monkeypatch.setattr("_ctypes.dlclose", lambda handle: None)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: asked.append(device) or SimpleNamespace(cuda_stream=42)
    )
    library, device = Library(), torch.device("cuda:1")
    assert Container("full", library, runners, device).run([]) == []
    created, run = library.calls[0], next(c for c in library.calls if c[0].startswith("Run"))
    assert created[0] == "CreateWithDevice"
    assert created[1][1:] == (runners, b"cuda:1", None)
    assert run[0] == way
    assert run[1][5] == 42
    assert asked == [device]
