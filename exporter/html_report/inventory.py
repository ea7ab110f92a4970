"""The page's words and tables about what is in the artifact: cost, use, files."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from ...runtime.manifest import ATTACH_FAMILY
from ...runtime.text import folder_bytes, format_bytes, format_count, weights_bytes, weights_text
from ..rewrite.quantize import layer_role
from .elements import HtmlTable, bar_table
from .facts import PageFacts


def cost_section(g: PageFacts) -> dict[str, Any]:
    m = g.manifest
    rows = [
        (
            graph.name,
            format_count(graph.cost.flops),
            format_bytes(graph.cost.moved_bytes),
            str(graph.cost.ops),
            str(graph.cost.constants),
            format_bytes(graph.cost.constants_bytes),
        )
        for graph in m.graphs
    ]
    heads = ("graph", "FLOPs", "bytes moved besides", "operators", "constants", "their bytes")
    weights = [((name, treatment or "-", format_bytes(n)), n) for (name, treatment), n in g.weights.items()]
    counted = Counter((layer_role(name), *said) for name, said in m.layers.items())
    layers = [(role, what, why, str(n)) for (role, what, why), n in sorted(counted.items())]
    return {
        "said": "Counted on the compiled graphs, 2 FLOPs for a multiplication and its addition. All that is in no class here "
        "(norms, activations, quantizing) moves bytes and counts as no FLOP.",
        "weights": bar_table("Weights by kind of layer", ("weights of", "kept as", "bytes"), weights),
        "before": weights_text(weights_bytes(m), m.unquantized_bytes) if m.unquantized_bytes else "",
        "graphs": HtmlTable("Graphs", heads, rows, numbers=range(1, 6)),
        "layers": HtmlTable("Layers", ("role", "treatment", "why", "layers"), layers, numbers=(3,)) if layers else None,
    }


def use_section(g: PageFacts) -> dict[str, Any]:
    m, needs = g.manifest, g.manifest.requires
    terms = [
        ("system", f"{needs.system} {needs.machine}"),
        ("device", needs.device),
        ("instructions", needs.isa_level + (f": {', '.join(needs.isa)}" if needs.isa else "")),
        ("torch", f"{needs.torch}, no other minor version" if needs.torch else "any"),
        ("glibc", f"{needs.glibc} or newer" if needs.glibc else "any"),
        *((name, value) for name, value in needs.packages.items()),
    ]
    return {
        "said": "Replaying takes prebake's runtime: no diffusers and no compiler."
        if m.family != ATTACH_FAMILY
        else "It holds the denoiser alone; diffusers runs the rest of the pipeline.",
        "code": loading_code(g),
        "needs": terms,
        "trust": "An artifact holds machine code, and opening one runs its author's program: take it only from someone you "
        "trust. `prebake check ARTIFACT` compares everything with the manifest and with your machine, and opens no code.",
    }


def loading_code(g: PageFacts) -> str:
    m = g.manifest
    folder = json.dumps(g.name, ensure_ascii=False)
    prompt = json.dumps(
        g.verification.shown[0].prompt if g.verification and g.verification.shown else "a prompt", ensure_ascii=False
    )
    if m.family == ATTACH_FAMILY:
        return (
            f"from diffusers import {m.source.pipeline}\n\nfrom prebake.runtime import attach\n\n"
            f"pipe = {m.source.pipeline}.from_pretrained({json.dumps(m.source.model)})\nattach(pipe, {folder})"
        )
    begin = (m.pipeline.get("picture") or {}).get("required")
    opened = "from PIL import Image\n\n" if begin else ""
    image = ', image=Image.open("begin.png")' if begin else ""
    call = f"pipe({prompt}{image}, seed=0)"
    made = f"frames = {call}.frames[0]" if m.defaults.num_frames else f"image = {call}.images[0]"
    return f"{opened}from prebake.runtime import load\n\npipe = load({folder})\n{made}"


def contents_section(g: PageFacts) -> dict[str, Any]:
    m = g.manifest
    by_folder = [((name, format_bytes(n)), n) for name, n in folder_bytes(m).items() if name != "total"]
    by_folder.sort(key=lambda row: -row[1])
    files = [(e.path, format_bytes(e.size), e.sha256) for e in m.files]
    again = "yes, of the same recipe, weights and toolchain" if m.reproducible else "no: kernels were chosen by times"
    return {
        "sizes": bar_table("Sizes", ("folder or file", "bytes"), by_folder),
        "origin": [
            ("model", f"{m.source.title} ({m.source.pipeline})"),
            ("sha256 of it", m.source.sha256),
            ("sha256 of manifest.json", g.manifest_sha256),
            ("same bytes again", again),
        ],
        "versions": HtmlTable("Toolchain", ("", "version"), sorted(m.toolchain.items())),
        "files": HtmlTable("Files", ("file", "bytes", "SHA-256"), files, numbers=(1,), hashes=(2,)),
        "recipe": json.dumps(m.recipe, indent=2, sort_keys=True, ensure_ascii=False),
    }
