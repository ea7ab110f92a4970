"""What `prebake inspect --layers` says of kernels: where they are called, why they are not, in 80 columns."""

from __future__ import annotations

import json

from prebake.runtime.cli.inspect import _kernel_lines
from prebake.runtime.manifest import Cost, Graph, KernelRefusal, Manifest

COST = Cost(flops=0, ops=0, constants=0, constants_bytes=0)


def graph(name: str, **of_kernels) -> Graph:
    return Graph(name=name, package="p", inputs=(), outputs=(), constants={}, cost=COST, **of_kernels)


def lines(*graphs: Graph) -> list[str]:
    return _kernel_lines(Manifest.model_construct(graphs=graphs))


def test_calls_and_refusals_are_listed_graph_by_graph():
    refusal = KernelRefusal(kernel="few_rows", reason="more than 4 rows", places=12, first="blocks.0.attn.to_out")
    assert lines(graph("full", kernels={"attention": 57}, refusals=(refusal,)), graph("vae_decoder")) == [
        "",
        "graph  kernel     places",
        "full   attention      57  called",
        "full   few_rows       12  not: more than 4 rows, blocks.0.attn.to_out",
    ]


def test_a_long_reason_goes_on_in_the_next_line():
    first = "denoiser.transformer.transformer_blocks.0.attn.processor.and.more"
    reason = "pairs that are no neighbours, or turned otherwise"
    said = lines(
        graph("text_encoder_2", refusals=(KernelRefusal(kernel="rotary", reason=reason, places=3, first=first),))
    )
    assert max(map(len, said[:-1])) <= 80
    assert [line.split()[0] for line in said[1:3]] == ["graph", "text_encoder_2"]
    assert "".join("".join(said[2:]).split()) == "".join(f"text_encoder_2 rotary 3 not: {reason}, {first}".split())


def test_an_artifact_without_kernels_says_nothing():
    assert lines(graph("full")) == []


def test_a_graph_of_an_older_artifact_has_none():
    older = graph("full").model_dump(mode="json")
    del older["kernels"], older["refusals"]
    read = Graph.model_validate_json(json.dumps(older))
    assert (read.kernels, read.refusals) == ({}, ())
