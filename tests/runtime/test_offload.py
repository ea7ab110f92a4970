"""Weights that visit a device, which is played: what is sent to it arrives when it is joined, and what left is gone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from prebake.runtime import ArtifactError, RequestError, load, offload
from prebake.runtime import artifact as opening
from prebake.runtime.artifact import open_artifact
from prebake.runtime.manifest import read_manifest
from prebake.runtime.offload import (
    ALLOCATION_ALIGNMENT_BYTES,
    OffloadedGroup,
    OffloadedModel,
    OffloadedWeights,
    offloaded_graphs,
    owned_weights,
    pack_offsets,
    stay_on_device,
)
from support.heap import heap_bytes

CPU = torch.device("cpu")


class Device:
    """Copies wait for a `join`. Memory that was let go of is not given out again, so that what comes back lies elsewhere."""

    def __init__(self, where: torch.device = CPU) -> None:
        self.queued: list[tuple[Tensor, Tensor]] = []
        self.log: list[str] = []
        self.taken: list[Tensor] = []
        self.size = 0

    def pinned(self, count: int) -> Tensor:
        self.size += count
        return torch.full([count], 255, dtype=torch.uint8)

    def send(self, target: Tensor, source: Tensor) -> None:
        self.log += ["send"]
        self.queued.append((target, source))

    def sent(self) -> list[tuple[Tensor, Tensor]]:
        queued, self.queued = self.queued, []
        return queued

    def join(self, ticket: list[tuple[Tensor, Tensor]], memory: Tensor) -> None:
        self.log += ["join"]
        for target, source in ticket:
            target.copy_(source)

    def freed(self) -> None:
        self.log += ["free"]
        self.taken.append(torch.empty(self.size, dtype=torch.uint8))


WEIGHTS = {
    "matrix": torch.arange(600, dtype=torch.float32).reshape(30, 20),
    "scalar": torch.tensor(7.0),
    "half": torch.arange(130, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
    "bytes": torch.arange(100, dtype=torch.int8).to(torch.float8_e4m3fn),
    "mask": torch.tensor([True, False, True]),
    "last": torch.empty(0),
}


def guest(device: Device) -> OffloadedGroup:
    made = OffloadedGroup(WEIGHTS, CPU, device, piece_bytes=1024)
    made.leave()
    device.log.clear()
    return made


def equal(made: OffloadedGroup) -> bool:
    return all(
        t.shape == WEIGHTS[k].shape and t.dtype == WEIGHTS[k].dtype and t.tolist() == WEIGHTS[k].tolist()
        for k, t in made.tensors.items()
    )


def bytes_there(made: OffloadedGroup) -> int:
    return made.tensors["matrix"].untyped_storage().nbytes()


# --- memory ---------------------------------------------------------------------------------------------------------


def test_places_are_aligned_and_no_two_overlap():
    offsets, total = pack_offsets(WEIGHTS)
    spans = sorted((at, at + WEIGHTS[key].nbytes) for key, at in offsets.items())
    assert all(at % ALLOCATION_ALIGNMENT_BYTES == 0 for at, _ in spans)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert spans[-1][1] <= total < sum(t.nbytes for t in WEIGHTS.values()) + len(WEIGHTS) * ALLOCATION_ALIGNMENT_BYTES


def test_tensors_are_there_inside_and_take_no_memory_outside():
    device = Device()
    made = guest(device)
    assert bytes_there(made) == 0
    with made.hold_resident():
        assert equal(made)
        assert bytes_there(made) == made.nbytes
    assert bytes_there(made) == 0
    sent = -(-made.nbytes // 1024)
    assert device.log == ["send"] * sent + ["join", "free"]


def test_the_copies_are_what_makes_them_equal(monkeypatch):
    """The canary: not joined, nothing has arrived."""
    device = Device()
    made = guest(device)
    monkeypatch.setattr(Device, "join", lambda *_: None)
    with made.hold_resident():
        made._memory.fill_(1)
        assert not equal(made)


def test_views_in_another_layout_come_back_too():
    weights = {"c": torch.randn(2, 3, 4, 5), "z": torch.randn(6, 2)}
    made = OffloadedGroup(weights, CPU, Device())
    turned, numbers = made.tensors["c"].permute(0, 3, 1, 2), torch.view_as_complex(made.tensors["z"])
    made.leave()
    for _ in range(2):
        with made.hold_resident():
            assert torch.equal(turned, weights["c"].permute(0, 3, 1, 2))
            assert torch.equal(numbers, torch.view_as_complex(weights["z"]))


@pytest.mark.parametrize("fails", ["send", "sent", "join"])
def test_nothing_is_left_of_a_visit_that_failed(monkeypatch, fails):
    made = guest(Device())

    def refused(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as during:
        during.setattr(Device, fails, refused)
        with pytest.raises(torch.OutOfMemoryError), made.hold_resident():
            pytest.fail("it was not there")
    assert bytes_there(made) == 0
    with made.hold_resident():
        assert equal(made)
    with pytest.raises(KeyError), made.hold_resident():
        raise KeyError
    assert bytes_there(made) == 0


def test_the_first_thread_brings_them_and_the_last_lets_them_go():
    device = Device()
    made = guest(device)
    both = threading.Barrier(4)

    def visit(_) -> bool:
        with made.hold_resident():
            both.wait(10)
            right = equal(made)
            both.wait(10)
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(visit, range(4)))
    assert device.log.count("send") == -(-made.nbytes // 1024)  # once
    assert device.log.count("join") == 4  # each thread's stream waits
    assert device.log[-1] == "free"
    assert device.log.count("free") == 1
    assert bytes_there(made) == 0


def test_a_host_without_that_much_memory_is_told():
    class Poor(Device):
        def pinned(self, count):
            raise RuntimeError("CUDA error: out of memory\nand a stack")

    with pytest.raises(ArtifactError, match=r"could not be pinned .*\(CUDA error: out of memory\)"):
        OffloadedGroup(WEIGHTS, CPU, Poor())


# --- models ---------------------------------------------------------------------------------------------------------


class Model:
    """Adds up its constant where it was bound, as compiled code does: by address."""

    def __init__(self) -> None:
        self.bound: list[int] = []

    def bind(self, tensors) -> None:
        self.tensor = tensors["w"]
        self.bound.append(self.tensor.data_ptr())

    def __call__(self, inputs):
        assert self.tensor.data_ptr() == self.bound[-1]
        return [inputs[0] + self.tensor.sum()]


def visiting(device: Device) -> tuple[OffloadedModel, Model, OffloadedGroup]:
    made, model = guest(device), Model()
    return OffloadedModel(model, {"w": made.tensors["matrix"]}, [made]), model, made


def test_weights_come_for_a_call_or_stay_for_several():
    device = Device()
    call, _, made = visiting(device)
    zero, expected = [torch.zeros(1)], [WEIGHTS["matrix"].sum()]
    assert call(zero) == expected
    assert device.log.count("free") == 1
    with stay_on_device():
        assert call(zero) == call(zero) == expected
        assert bytes_there(made)
        with stay_on_device():  # the inner one is none of its own
            assert call(zero) == expected
        assert bytes_there(made)
    assert device.log.count("free") == 2
    assert bytes_there(made) == 0
    with pytest.raises(IndexError), stay_on_device():
        call([])
    assert bytes_there(made) == 0


def test_constants_are_bound_again_where_they_came_back_elsewhere():
    call, model, _ = visiting(Device())
    for _ in range(3):
        call([torch.zeros(1)])
    assert len(model.bound) == 3
    assert all(a != b for a, b in pairwise(model.bound))


def test_constants_that_came_back_to_their_place_are_not_bound_again(monkeypatch):
    call, model, _ = visiting(Device())
    monkeypatch.setattr(OffloadedGroup, "address", 4096)
    monkeypatch.setattr(Model, "__call__", lambda self, inputs: inputs)
    for _ in range(3):
        call([torch.zeros(1)])
    assert len(model.bound) == 1


def test_threads_do_not_bind_while_another_runs():
    device = Device()
    call, _, _ = visiting(device)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda i: float(call([torch.tensor(float(i))])[0]), range(200)))
    assert made == [float(WEIGHTS["matrix"].sum()) + i for i in range(200)]


def test_what_binding_again_leaves_behind_is_small(toy_artifact, cache_dir):
    """Of AOTInductor's own: what this binding has made for it, it takes back."""
    artifact = open_artifact(toy_artifact, cache_dir=cache_dir)
    graph = artifact.graphs["full"]
    constants = {name: artifact.weights[key].clone() for name, key in graph.graph.constants.items()}

    def grown(rounds: int, keep: list[bytes] | None = None) -> float:
        """Bytes of the heap that are taken more, for each constant."""
        before = heap_bytes()
        for _ in range(rounds):
            graph._model.bind(constants)
            if keep is not None:
                keep.append(bytes(1024))
        return (heap_bytes() - before) / rounds / len(constants)

    grown(10)
    assert grown(2000) < 40  # 32, and 160 kB of what else the process may take meanwhile
    assert grown(50, []) > 40  # the canary: a kilobyte more at each


# --- what may leave ---------------------------------------------------------------------------------------------------


def manifest(graphs: dict[str, dict[str, str]], device: str = "cuda", backend: str = "aoti"):
    found = [SimpleNamespace(name=n, constants=c) for n, c in graphs.items()]
    return SimpleNamespace(
        requires=SimpleNamespace(device=device), backend=backend, graphs=found, batches=(1,), sizes=()
    )


ALL = {n: {} for n in ("full", "text_encoder", "vae_decoder", "vae_encoder")}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (False, ()),
        (None, ()),
        ((), ()),
        (True, ("text_encoder", "vae_encoder")),
        (["vae_encoder"], ("vae_encoder",)),
        (("vae_encoder", "text_encoder"), ("text_encoder", "vae_encoder")),
    ],
)
def test_what_runs_once_for_a_prompt_can_leave(asked, expected):
    assert offloaded_graphs(asked, manifest(ALL), {"full"}) == expected
    assert offloaded_graphs(False, manifest(ALL, "cpu", "onnxruntime"), {"full"}) == ()


@pytest.mark.parametrize(
    ("asked", "where", "words"),
    [
        (
            True,
            ("cpu", "aoti"),
            "the artifact is for the CPU, where weights are pages of their files already.*leave it out",
        ),
        (
            True,
            ("cuda", "tensorrt"),
            "the backend 'tensorrt' keeps its weights to itself; leave it out, or export with",
        ),
        (
            ["vae_decoder"],
            ("cuda", "aoti"),
            "'vae_decoder' is not among .*: text_encoder, vae_encoder; denoiser and decoder",
        ),
        (["full"], ("cuda", "aoti"), "'full' is not among"),
        ("text_encoder", ("cuda", "aoti"), r"expected True, or a list of graphs such as \['text_encoder'\]"),
        ([1], ("cuda", "aoti"), "expected True, or a list of graphs"),
        (1, ("cuda", "aoti"), "offload=1: expected True, or a list of graphs"),
    ],
)
def test_what_means_nothing_is_refused(monkeypatch, asked, where, words):
    rebinds = SimpleNamespace(REBINDS=where[1] == "aoti")
    monkeypatch.setattr(offload, "backend_module", lambda name: rebinds)
    with pytest.raises(RequestError, match=words):
        offloaded_graphs(asked, manifest(ALL, *where), {"full"})


def test_an_artifact_for_the_cpu_refuses_it(toy_artifact, cache_dir):
    with pytest.raises(RequestError, match="offload=True: the artifact is for the CPU"):
        load(toy_artifact, cache_dir=cache_dir, offload=True)


def test_weights_that_something_else_reads_stay():
    shared = manifest({"full": {"a": "w0", "b": "w1"}, "text": {"a": "w1", "b": "w2"}, "image": {"a": "w2", "b": "w3"}})
    owned = owned_weights(shared, ("text", "image"))
    assert {name: list(keys) for name, keys in owned.items()} == {"text": ["w2"], "image": ["w3"]}
    device = Device()
    guests = OffloadedWeights(shared, ("text", "image"), CPU, device)
    weights = {f"w{i}": torch.full([4], float(i)) for i in range(4)}
    there = guests.to_device(weights)
    guests.leave()
    assert there.keys() == weights.keys()
    assert [len(guests.needed(g.constants)) for g in shared.graphs] == [0, 1, 2]
    assert [t.untyped_storage().nbytes() > 0 for _, t in sorted(there.items())] == [True, True, False, False]


# --- a whole pipeline -------------------------------------------------------------------------------------------------


@pytest.fixture
def offloaded(toy_artifact, cache_dir, monkeypatch):
    """The compiled toy, whose text encoder visits."""
    device = Device()
    monkeypatch.setattr(offload, "CudaOffloadDevice", lambda where: device)
    monkeypatch.setattr(
        opening, "offloaded_graphs", lambda asked, manifest, variants: ("text_encoder",) if asked else ()
    )
    pipe = load(toy_artifact, cache_dir=cache_dir, offload=True, runners=2)
    device.log.clear()
    return pipe, device


def picture(pipe, prompt, **more) -> Tensor:
    return pipe(prompt, seed=0, output_type="pt", **more).images


PROMPTS = ["a red circle", "blue square", "a blue circle"]


def test_prompts_in_turn_give_what_they_give_without(offloaded, pipe):
    visited, device = offloaded
    for prompt in PROMPTS:
        assert torch.equal(picture(visited, prompt), picture(pipe, prompt))
    assert device.log == ["send", "join", "free"] * len(PROMPTS)
    assert not torch.equal(picture(pipe, PROMPTS[0]), picture(pipe, PROMPTS[1]))  # the text matters


def test_several_prompts_are_encoded_in_one_visit(offloaded, pipe):
    visited, device = offloaded
    assert torch.equal(picture(visited, PROMPTS), picture(pipe, PROMPTS))
    assert device.log == ["send", "join", "free"]


def test_the_weights_are_gone_before_the_first_step(offloaded):
    visited, _ = offloaded
    manifest = read_manifest(visited.artifact.folder)
    keys = manifest.graph("text_encoder").constants.values()
    sizes = []

    def seen(pipe, step, timestep, tensors):
        sizes.append(sum(visited.artifact.weights[key].untyped_storage().nbytes() for key in keys))

    picture(visited, PROMPTS[0], callback_on_step_end=seen)
    assert sizes == [0] * 4
    assert visited.artifact.weights["denoiser.embed.weight"].untyped_storage().nbytes() > 0


def test_threads_share_a_visit(offloaded, pipe):
    visited, device = offloaded
    expected = [picture(pipe, p) for p in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda i: picture(visited, PROMPTS[i % 3]), range(60)))
    assert all(torch.equal(x, expected[i % 3]) for i, x in enumerate(made))
    assert device.log.count("join") == 60
    assert device.log.count("send") == device.log.count("free") <= 60


def test_nothing_is_left_of_a_call_that_failed(offloaded, pipe):
    visited, device = offloaded
    with pytest.raises(RequestError):
        visited([PROMPTS[0], ""], ["one"], seed=0)
    with pytest.raises(RequestError, match="latents: expected"):
        visited(PROMPTS[0], latents=torch.zeros(1))
    assert device.log.count("send") == device.log.count("free")
    assert torch.equal(picture(visited, PROMPTS[0]), picture(pipe, PROMPTS[0]))
