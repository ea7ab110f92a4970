"""An artifact on paper: every file is there and listed, and its `.so` files hold no machine code.

They say what an ELF library says of itself, and have no segment that could be loaded. So these tests cost nothing, and
whatever gets past the checks fails at dlopen, which the fixture `never_opened` turns into a failure of the test.
"""

import hashlib
import json
import platform
import struct
import zipfile

import torch
from safetensors.torch import save_file

from prebake.runtime.manifest import Cost, Defaults, FileEntry, Graph, Manifest, Requires, Site, Source, TensorSpec
from prebake.runtime.plan import Evaluation, Plan, Update

X = TensorSpec(name="hidden_states", shape=(1, 2, 3), dtype="float32")
T = TensorSpec(name="timestep", shape=(1,), dtype="float32")
K = TensorSpec(name="coefficients", shape=(1, 1), dtype="float32")
SAMPLE = TensorSpec(name="sample", shape=(1, 2, 3), dtype="float32")
COST = Cost(flops=2, ops=1, constants=1, constants_bytes=12)
EULER = Update(latents=(1.0,), outputs=(-0.5,))
PLAN = Plan(
    name="2",
    steps=2,
    cache="reuse",
    scheduler="Euler",
    evaluations=(
        Evaluation(step=0, variant="full", timestep=1000.0, update=EULER),
        Evaluation(step=1, variant="reuse", timestep=500.0, coefficients=(1.0,), update=EULER),
    ),
)


MACHINES = {"x86_64": 62, "aarch64": 183}


def library(needs=None, stack=6, machine=None):
    """An ELF library without code. `needs` are versions by library; `stack` the flags of its stack, or None for no word."""
    names, at = b"\0", {}
    for name in [n for library, versions in (needs or {}).items() for n in (library, *versions)]:
        at[name] = len(names)
        names += name.encode() + b"\0"
    table = b""
    for i, (name, versions) in enumerate((needs or {}).items()):
        entries = [struct.pack("<IHHII", 0, 0, 2, at[v], 16 * (j + 1 < len(versions))) for j, v in enumerate(versions)]
        ahead = 16 * (len(versions) + 1) if i + 1 < len(needs) else 0
        table += struct.pack("<HHIII", 1, len(versions), at[name], 16, ahead) + b"".join(entries)
    start = 64 + 56 * 3  # behind the headers, and addresses are offsets
    dynamic = struct.pack("<8Q", 5, start + 64, 0x6FFFFFFE, start + 64 + len(names), 0x6FFFFFFF, len(needs or {}), 0, 0)
    end = start + len(dynamic + names + table)
    kinds = [(0x6474E551, stack, 0, 0)] if stack is not None else []
    if needs:
        kinds += [(1, 4, 0, end), (2, 4, start, 64)]
    segments = b"".join(struct.pack("<IIQQQQQQ", k, f, o, o, o, size, size, 8) for k, f, o, size in kinds)
    number = MACHINES[machine or platform.machine()]
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, number, 1, 0, 64, 0, 0, 64, 56, len(kinds), 64, 0, 0
    )
    return (header + segments).ljust(start, b"\0") + dynamic + names + table


def write_package(path, models=("full", "reuse"), extra=(), so=None):
    """A `.pt2` whose `.so` is `library()`, or `so`; `extra` are (name or ZipInfo, data) put in at the end."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("denoiser/archive_version", "0")
        for model in models:
            archive.writestr(f"denoiser/data/aotinductor/{model}/a.wrapper.so", library() if so is None else so)
            archive.writestr(f"denoiser/data/aotinductor/{model}/a.wrapper_metadata.json", "{}")
        for name, data in extra:
            archive.writestr(name, data)


def manifest_of(folder):
    files = tuple(
        FileEntry(
            path=p.relative_to(folder).as_posix(),
            size=p.stat().st_size,
            sha256=hashlib.sha256(p.read_bytes()).hexdigest(),
        )
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "manifest.json"
    )
    slot = TensorSpec(name="a@0", shape=(1, 2), dtype="float32")
    stored = TensorSpec(name="a", shape=(1, 2), dtype="float32")
    constants = {"w": "denoiser.w"}
    package = "graphs/denoiser.pt2"
    full = Graph(
        name="full",
        package=package,
        inputs=(X, T),
        outputs=(SAMPLE, stored),
        constants=constants,
        cost=COST,
        stores=("s",),
    )
    reuse = Graph(
        name="reuse",
        package=package,
        inputs=(X, T, K, slot),
        outputs=(SAMPLE,),
        constants=constants,
        cost=COST,
        combines=("s",),
    )
    return Manifest(
        family="flux",
        requires=Requires(
            system=platform.system(),
            machine=platform.machine(),
            device="cpu",
            isa_level="any",
            isa=(),
            torch=".".join(torch.__version__.split(".")[:2]),
        ),
        source=Source(model="m", pipeline="FluxPipeline", sha256="0" * 64),
        toolchain={},
        recipe={},
        defaults=Defaults(num_inference_steps=2, guidance_scale=3.5, height=8, width=8),
        pipeline={
            "latents_shape": [1, 2, 6],
            "timestep_scale": 1.0,
            "text": {"graph": "full", "prompts": [], "embeds": {}},
        },
        sites=(Site(name="s", slots=1, tensors=("a",)),),
        graphs=(full, reuse),
        plans={"2": "plans/2.json"},
        files=files,
    )


# --- a whole pipeline -------------------------------------------------------------------------------------------------

TOKENS = {"<pad>": 0, "a": 1, "red": 2, "circle": 3, "<unk>": 4}
TOKENIZER = "tokenizers/tokenizer/tokenizer.json"
PROMPT = {"tokenizer": TOKENIZER, "max_length": 4, "pad_id": 0, "pad_token": "<pad>", "embedding": "table"}


def tokenizer(vocab=TOKENS, post_processor=None, **more):
    """A tokenizer.json whose words are whole."""
    raw = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": post_processor,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    return json.dumps(raw | more)


def pipeline_manifest(folder):
    """The manifest of a FLUX on paper: 6 tokens of 4 numbers, pictures of 8 x 8, an embedding of 5 rows."""
    spec, manifest = TensorSpec, manifest_of(folder)
    states = spec(name="encoder_hidden_states", shape=(1, 4, 2), dtype="float32")
    pooled = spec(name="pooled_projections", shape=(1, 2), dtype="float32")
    latents = spec(name="hidden_states", shape=(1, 6, 4), dtype="float32")
    sample = spec(name="sample", shape=(1, 6, 4), dtype="float32")
    variants = [
        graph.model_copy(
            update={"inputs": (latents, states, pooled, *graph.inputs[1:]), "outputs": (sample, *graph.outputs[1:])}
        )
        for graph in manifest.graphs
    ]
    text = Graph(
        name="text_encoder",
        package="graphs/components.pt2",
        inputs=(spec(name="input_ids", shape=(1, 4), dtype="int64"),),
        outputs=(states, pooled),
        constants={"table": "text_encoder.table"},
        cost=COST,
    )
    decoder = Graph(
        name="vae_decoder",
        package="graphs/components.pt2",
        inputs=(spec(name="latents", shape=(1, 6, 4), dtype="float32"),),
        outputs=(spec(name="image", shape=(1, 3, 8, 8), dtype="float32"),),
        constants={},
        cost=COST,
    )
    embeds = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}
    settings = {"latents_shape": [1, 4, 6], "timestep_scale": 1.0, "text": {"prompts": [PROMPT], "embeds": embeds}}
    return manifest.model_copy(update={"graphs": (*variants, text, decoder), "pipeline": settings})


def build_pipeline(folder):
    """Writes to `folder` a paper artifact that `load` takes: its graphs fit each other and their family."""
    build(folder)
    write_package(folder / "graphs/components.pt2", models=("text_encoder", "vae_decoder"))
    save_file({"text_encoder.table": torch.zeros(5, 2)}, folder / "weights/text_encoder.safetensors")
    (folder / TOKENIZER).parent.mkdir(parents=True)
    (folder / TOKENIZER).write_text(tokenizer())
    relist(folder)
    return folder


def build(folder):
    """Writes the paper artifact to `folder`."""
    for name in ("graphs", "plans", "weights", "reports"):
        (folder / name).mkdir(parents=True)
    write_package(folder / "graphs/denoiser.pt2")
    (folder / "plans/2.json").write_text(PLAN.model_dump_json())
    save_file({"denoiser.w": torch.ones(3)}, folder / "weights/denoiser.safetensors")
    relist(folder)
    return folder


def relist(folder):
    """Writes the manifest anew for the files as they are."""
    manifest = pipeline_manifest if (folder / "graphs/components.pt2").exists() else manifest_of
    (folder / "manifest.json").write_text(manifest(folder).to_json(), "utf-8")


def edit(folder, change):
    """Applies `change` to the manifest as parsed JSON."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


class PaperModel:
    """What stands where machine code would: it takes its constants, what was in its file is kept, and where the manifest is
    given, it returns zeros."""

    def __init__(self, so, manifest=None):
        self.name, self.code, self.constants = so.parent.name, so.read_bytes(), {}
        self.manifest = manifest

    def __call__(self, inputs):
        outputs = self.manifest.graph(self.name).outputs
        return [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in outputs]

    def bind(self, tensors):
        self.constants = dict(tensors)

    def check_counts(self, inputs, outputs):
        """Machine code would say how many it was compiled for; paper takes any."""
