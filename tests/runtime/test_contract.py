"""The call contract: what a graph is called with, every time, and what a pipeline's call may say."""

import inspect
import json
import time
import weakref

import pytest
import torch

from prebake.runtime import ArtifactError, RequestError
from prebake.runtime.artifact import open_artifact
from prebake.runtime.contract import Contract
from prebake.runtime.manifest import Cost, Graph, TensorSpec
from support import toy_model as toy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def artifact(toy_artifact, cache_dir):
    return open_artifact(toy_artifact, cache_dir=cache_dir)


def denoiser_inputs():
    return {
        "hidden_states": torch.zeros(1, toy.N, toy.C),
        "encoder_hidden_states": torch.zeros(1, toy.T, toy.D),
        "pooled_projections": torch.zeros(1, toy.P),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
    }


def a_contract(shapes):
    """Of a graph 'g' with these float32 inputs, and a call that fits."""
    specs = tuple(TensorSpec(name=name, shape=shape, dtype="float32") for name, shape in shapes.items())
    cost = Cost(flops=1, ops=1, constants=0, constants_bytes=0)
    graph = Graph(name="g", package="p", inputs=specs, outputs=specs[:1], constants={}, cost=cost)
    return Contract(graph, CPU), {s.name: torch.zeros(s.shape) for s in specs}


class Marked(torch.Tensor):
    pass


ONLY = "[1, 4, 8] is the only shape it was exported for"
WRONG_INPUTS = {
    "shape": (torch.zeros(1, 5, toy.C), f"float32 [1, 5, 8] on cpu; {ONLY}"),
    "batch": (torch.zeros(2, toy.N, toy.C), f"float32 [2, 4, 8] on cpu; {ONLY}"),
    "rank": (torch.zeros(toy.N, toy.C), f"float32 [4, 8] on cpu; {ONLY}"),
    "dtype": (torch.zeros(1, toy.N, toy.C).double(), "float64 [1, 4, 8] on cpu; give it .to(torch.float32)"),
    "strides": (
        torch.zeros(1, toy.C, toy.N).mT,
        "float32 [1, 4, 8] on cpu with strides (32, 1, 4); give it .contiguous()",
    ),
    "overlapping": (
        torch.zeros(1, 1, toy.C).expand(1, toy.N, toy.C),
        "float32 [1, 4, 8] on cpu with strides (8, 0, 1); give it .contiguous()",
    ),
    "device": (torch.zeros(1, toy.N, toy.C, device="meta"), "float32 [1, 4, 8] on meta; give it .to('cpu')"),
    "sparse": (
        torch.zeros(1, toy.N, toy.C).to_sparse(),
        "float32 [1, 4, 8] on cpu, sparse_coo; give it .to_dense()",
    ),
    "sign": (
        torch._neg_view(torch.zeros(1, toy.N, toy.C)),
        "float32 [1, 4, 8] on cpu, a view whose sign is not yet in its memory; give it .clone()",
    ),
    "subclass": (
        torch.zeros(1, toy.N, toy.C).as_subclass(Marked),
        "float32 [1, 4, 8] on cpu of the class Marked; give a plain torch.Tensor",
    ),
    "several": (
        torch.zeros(1, toy.C, toy.N, dtype=torch.int64).mT,
        "int64 [1, 4, 8] on cpu with strides (32, 1, 4); give it .to(torch.float32).contiguous()",
    ),
    "scalar": (5.0, "float; give a tensor, such as torch.full([1, 4, 8], 5.0)"),
    "nothing": (None, "NoneType; give a tensor"),
}


@pytest.mark.parametrize("what", WRONG_INPUTS)
def test_a_wrong_input_is_named_with_what_came_and_the_nearest_that_is_right(artifact, what):
    given, came = WRONG_INPUTS[what]
    with pytest.raises(RequestError) as caught:
        artifact.graph("full")({**denoiser_inputs(), "hidden_states": given})
    assert (
        str(caught.value)
        == f"graph 'full': input 'hidden_states': expected contiguous float32 [1, 4, 8] on cpu, got {came}"
    )


@pytest.mark.parametrize("what", WRONG_INPUTS)
def test_it_is_refused_after_calls_that_were_right(what):
    contract, given = a_contract({"x": (1, toy.N, toy.C), "y": (3,)})
    contract.inputs(given)
    for _ in range(2):
        wrong, came = WRONG_INPUTS[what]
        with pytest.raises(RequestError) as caught:
            contract.inputs({**given, "x": wrong})
        assert str(caught.value) == f"graph 'g': input 'x': expected contiguous float32 [1, 4, 8] on cpu, got {came}"
        contract.inputs(given)


def test_what_is_right_is_taken_in_every_mode_and_form():
    """What torch's look tells apart and compiled code does not: each is read in full, and then like the one before."""
    contract, given = a_contract({"x": (1, 4), "y": (1, 4)})
    x = torch.zeros(1, 4)
    with torch.inference_mode():
        in_inference = torch.zeros(1, 4)
    forms = (x, torch.nn.Parameter(x), x.clone().requires_grad_(), torch.zeros(4, 1).T, in_inference)
    for form in (*forms, *reversed(forms)):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                assert contract.inputs({**given, "x": form})[0] is form
    assert contract.inputs({"x": x, "y": x}) == [x, x]  # one tensor may be two inputs


def test_no_tensor_of_a_call_is_kept():
    contract, given = a_contract({"x": (1, 4)})
    contract.inputs(given)
    left = weakref.ref(given.pop("x"))
    assert left() is None


@pytest.mark.parametrize("name", denoiser_inputs())
@pytest.mark.parametrize("graph", ["full", "reuse"])
def test_every_input_of_every_call_is_looked_at(artifact, graph, name):
    inputs = {s.name: torch.ones(s.shape) for s in artifact.graph(graph).graph.inputs}
    artifact.graph(graph)(inputs)
    with pytest.raises(RequestError, match=f"'{graph}': input '{name}': .*contiguous float32"):
        artifact.graph(graph)({**inputs, name: inputs[name].half()})
    artifact.graph(graph)(inputs)


def test_what_the_advice_says_is_accepted(artifact):
    want = artifact.graph("full")(denoiser_inputs())["sample"]
    for given in (
        torch.zeros(1, toy.C, toy.N, dtype=torch.int64).mT.to(torch.float32).contiguous(),
        torch._neg_view(torch.zeros(1, toy.N, toy.C)).clone(),
        torch.zeros(1, toy.N, toy.C).to_sparse().to_dense(),
        torch.nn.Parameter(torch.zeros(1, toy.N, toy.C), requires_grad=False),
    ):
        got = artifact.graph("full")({**denoiser_inputs(), "hidden_states": given})["sample"]
        assert torch.equal(got, want)


def test_missing_and_unknown_inputs_are_named_with_the_one_that_was_meant(artifact):
    inputs = denoiser_inputs()
    inputs["time_step"] = inputs.pop("timestep")
    inputs["x"] = torch.zeros(1)
    with pytest.raises(RequestError) as caught:
        artifact.graph("full")(inputs)
    assert str(caught.value) == (
        "graph 'full': 'timestep' is missing; 'time_step' is not an input, did you mean 'timestep'?; 'x' is not an input; "
        "it takes hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance"
    )


def test_the_order_of_what_is_given_does_not_matter(artifact):
    inputs = denoiser_inputs() | {"timestep": torch.full([1], 0.25), "hidden_states": torch.ones(1, toy.N, toy.C)}
    backwards = dict(reversed(inputs.items()))
    assert torch.equal(artifact.graph("full")(backwards)["sample"], artifact.graph("full")(inputs)["sample"])


def test_an_output_that_is_not_the_promised_one_is_named(artifact_copy, cache_dir):
    graphs = json.loads((artifact_copy / "manifest.json").read_text())["graphs"]
    graphs[-1]["outputs"][0]["shape"] = [1, 3, 16, 16]
    toy.edit_manifest(artifact_copy, graphs=graphs)
    decode = open_artifact(artifact_copy, cache_dir=cache_dir).graph("vae_decoder")
    for _ in range(2):
        with pytest.raises(ArtifactError) as caught:
            decode({"latents": torch.zeros(1, toy.N, toy.C)})
        assert str(caught.value) == (
            "graph 'vae_decoder': output 'image': expected contiguous float32 [1, 3, 16, 16] on cpu, got float32 [1, 3, 8, 8] "
            "on cpu; export again"
        )


def test_a_graph_whose_code_has_another_number_of_inputs_is_not_opened(artifact_copy, cache_dir):
    graphs = json.loads((artifact_copy / "manifest.json").read_text())["graphs"]
    del graphs[-1]["inputs"][0]
    toy.edit_manifest(artifact_copy, graphs=graphs)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(artifact_copy, cache_dir=cache_dir)
    assert str(caught.value) == (
        "graph 'vae_decoder': was compiled for 1 inputs and 1 outputs, the manifest has 0 and 1; export again"
    )


def test_an_unknown_graph_is_answered_with_those_that_exist(artifact):
    with pytest.raises(ArtifactError, match=r"graph 'x' is not .*; it has full, reuse, text_encoder"):
        artifact.graph("x")


# --- what was fixed at export ---------------------------------------------------------------------------------------


def test_no_argument_of_the_diffusers_pipeline_is_ignored(pipe):
    """Each is an argument here too, or refused by name: what was fixed at export cannot be given and do nothing."""
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux", reason="diffusers is not installed")
    theirs = set(inspect.signature(flux.FluxPipeline.__call__).parameters) - {"self"}
    ours = set(inspect.signature(pipe.__call__).parameters) | set(pipe.family_rules.arguments)
    assert {"sigmas", "true_cfg_scale", "joint_attention_kwargs", "ip_adapter_image"} <= theirs - ours
    for name in sorted(theirs - ours):
        with pytest.raises(RequestError, match=f"^{name}: .*FluxPipeline does not take it; .*it takes prompt"):
            pipe("red", **{name: 3.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3", [3.0]])
def test_guidance_that_is_no_number_is_refused(pipe, value):
    with pytest.raises(RequestError, match=r"^guidance_scale.*: expected a (finite )?number"):
        pipe("red", guidance_scale=value)


# --- what it costs --------------------------------------------------------------------------------------------------

WIDEST = 82
"""Inputs of FLUX.1-dev's variant that reuses every attention (`pab`): 5, the coefficients, and of 19 double blocks two
stored tensors each, of 38 single ones one."""


def test_looking_at_the_widest_call_costs_microseconds():
    contract, given = a_contract({f"t{i}": (1, 16, 32) for i in range(WIDEST)})
    tensors = list(given.values())
    looks, reads = [], []
    for _ in range(300):
        looks.append(seconds(lambda: contract.inputs(given)))
        reads.append(seconds(lambda: [tensor.dtype for tensor in tensors]))
    # benchmarks/contract.py measures it: 3.5 times what reading one attribute of each takes; reading all, it was 7 times.
    assert min(looks) < 5 * min(reads)


def seconds(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
