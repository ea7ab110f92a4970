"""A FLUX-like artifact small enough to compile in a test: four modules, three packages of machine code, two plans.

`build(folder)` writes it, and `Eager` is the same thing in plain torch, so that a replay can be compared with a loop
that a reader can check by eye. Shapes: N = 4 tokens of C = 8, T = 6 text tokens of D = 8, P = 6, images 3 x 8 x 8.
"""

import hashlib
import json
import platform
import zipfile
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from prebake.exporter.lower.aoti.pt2 import weaken_unique_symbols
from prebake.runtime.check.machine import cpu_flags
from prebake.runtime.manifest import Cost, Defaults, FileEntry, Graph, Manifest, Requires, Site, Source, TensorSpec
from prebake.runtime.plan import Evaluation, Plan, Update

N, C, T, D, P, L = 4, 8, 6, 8, 6, 5
WORDS = ["[PAD]", "[UNK]", "a", "red", "circle", "blue", "square", "of", "left"]
TABLE = ((1.0, 0.0), (1.5, -0.5), (1.25, -0.25))  # coefficients of the second, third and fourth evaluation
SIGMAS = (1.0, 0.8, 0.55, 0.3, 0.0)


class Full(nn.Module):
    """The denoiser with its one site, the block's output, computed and given out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(C, 16)
        self.text = nn.Linear(D, 16)
        self.pool = nn.Linear(P, 16)
        self.block = nn.Linear(16, 16)
        self.out = nn.Linear(16, C)

    def start(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance):
        text = self.text(encoder_hidden_states).mean(1, keepdim=True)
        return self.embed(hidden_states) + text + self.pool(pooled_projections)[:, None] + timestep + 0.1 * guidance

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance):
        h = self.start(hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance)
        fresh = self.block(torch.nn.functional.gelu(h))
        return self.out(h + fresh), fresh


class Reuse(nn.Module):
    """The same denoiser with the block's output put together from the two stored generations."""

    def __init__(self, full):
        super().__init__()
        self.full = full

    def forward(
        self, hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance, coefficients, new, old
    ):
        h = self.full.start(hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance)
        return self.full.out(h + coefficients[:, 0, None, None] * new + coefficients[:, 1, None, None] * old)


class Text(nn.Module):
    """Both text encoders: the same ids give pooled [1, P], or hidden states [1, T, D] from other tables."""

    def __init__(self, pooled):
        super().__init__()
        self.pooled = pooled
        self.table = nn.Embedding(len(WORDS), P if pooled else D)

    def forward(self, input_ids):
        x = self.table(input_ids)
        return x.mean(1) if self.pooled else x


class Texts(nn.Module):
    """Both, as one graph."""

    def __init__(self, pooled: Text, hidden: Text):
        super().__init__()
        self.text, self.text_2 = pooled, hidden

    def forward(self, input_ids, input_ids_2):
        return self.text_2(input_ids_2), self.text(input_ids)


class Decoder(nn.Module):
    """Packed latents [1, N, C] to an image [1, 3, 8, 8] in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(N * C, 3 * 8 * 8)

    def forward(self, latents):
        return torch.sigmoid(self.out(latents.reshape(1, N * C))).reshape(1, 3, 8, 8)


class Eager:
    """The toy's modules, seeded, and the loop in plain torch."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.full = Full().eval()
        self.reuse = Reuse(self.full).eval()
        self.text, self.text_2, self.decoder = Text(True).eval(), Text(False).eval(), Decoder().eval()

    @torch.no_grad()
    def latents(self, ids, ids_2, noise, guidance, cached=True):
        pooled, hidden = self.text(ids), self.text_2(ids_2)
        x, stored = noise, None
        for i, (sigma, after) in enumerate(pairwise(SIGMAS)):
            args = (x, hidden, pooled, torch.tensor([sigma]), torch.tensor([guidance]))
            if cached and i % 2:
                c = torch.tensor([TABLE[i - 1]])
                sample = self.reuse(*args, c, *stored)
            else:
                sample, fresh = self.full(*args)
                stored = (fresh, fresh) if stored is None else (fresh, stored[0])
            x = x + (after - sigma) * sample
        return x


def plans():
    def evaluation(i, cached):
        reuse = cached and i % 2
        return Evaluation(
            step=i,
            variant="reuse" if reuse else "full",
            timestep=1000 * SIGMAS[i],
            coefficients=TABLE[i - 1] if reuse else (),
            update=Update(latents=(1.0,), outputs=(SIGMAS[i + 1] - SIGMAS[i],)),
        )

    def plan(name, cached):
        evaluations = tuple(evaluation(i, cached) for i in range(4))
        cache = "taylor" if cached else "none"
        return Plan(name=name, steps=4, cache=cache, scheduler="toy", sigmas=SIGMAS, evaluations=evaluations)

    return {"4": plan("4", True), "4-uncached": plan("4-uncached", False)}


def specs(**tensors):
    return tuple(
        TensorSpec(name=name.replace("__", "@"), shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
        for name, t in tensors.items()
    )


def compile_package(path, modules):
    """Writes a `.pt2` with one model for each (module, example arguments), and without the C++ that made it."""
    import torch._inductor
    from torch._inductor.package import package_aoti

    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "always_keep_tensor_constants": True,
        "aot_inductor.use_consts_asm_build": False,
    }
    files = {
        name: torch._inductor.aot_compile(torch.export.export(module, args).module(), args, options=options)
        for name, (module, args) in modules.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    package_aoti(str(path), files)
    rewrite_zip(path, lambda name, data: None if name.endswith(".cpp") else (name, closable(name, data)))


def closable(name, data):
    return weaken_unique_symbols(data) if name.endswith(".so") else data


def rewrite_zip(path, change):
    """Rewrites the archive; `change(name, data)` gives the member's new name and data, or None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        members = [change(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in filter(None, members):
            archive.writestr(zipfile.ZipInfo(name), data)


def tokenizer_json():
    vocab = {word: i for i, word in enumerate(WORDS)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    return json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model})


def graph(name, package, inputs, outputs, constants, **more):
    cost = Cost(flops=1000, ops=10, constants=len(constants), constants_bytes=1000)
    return Graph(name=name, package=package, inputs=inputs, outputs=outputs, constants=constants, cost=cost, **more)


def requires():
    return Requires(
        system=platform.system(),
        machine=platform.machine(),
        device="cpu",
        isa_level="native",
        isa=tuple(sorted(cpu_flags() & {"sse2", "avx2"})),
        torch=".".join(torch.__version__.split(".")[:2]),
        glibc="2.17",
    )


def write_manifest(folder, **changes):
    """Lists what is in the folder and writes `manifest.json`; `changes` are fields of the manifest to set."""
    manifest = folder / "manifest.json"
    manifest.unlink(missing_ok=True)
    files = tuple(
        FileEntry(
            path=p.relative_to(folder).as_posix(),
            size=p.stat().st_size,
            sha256=hashlib.sha256(p.read_bytes()).hexdigest(),
        )
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.is_relative_to(folder / "reports")
    )
    fields = {
        "family": "flux",
        "requires": requires(),
        "source": Source(model="toy", pipeline="FluxPipeline", sha256="0" * 64),
        "toolchain": {"torch": torch.__version__},
        "recipe": {},
        "defaults": Defaults(num_inference_steps=4, guidance_scale=3.5, height=8, width=8),
        "files": files,
    }
    manifest.write_text(Manifest(**{**fields, **changes}).to_json(), "utf-8")


def edit_manifest(folder: Path, **changes):
    """Sets fields of the manifest as they stand in JSON, and nothing else: hashes may be wrong after that."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def build(folder: Path, eager: Eager) -> Path:
    """The toy artifact, compiled and written to `folder`."""
    x, text, pooled, one = torch.randn(1, N, C), torch.randn(1, T, D), torch.randn(1, P), torch.ones(1)
    fresh, ids = torch.randn(1, N, 16), torch.zeros(1, L, dtype=torch.int64)
    ids_2 = torch.zeros(1, T, dtype=torch.int64)
    # Each example input is its own tensor: of one that occurs twice, AOTInductor would read only the first.
    full_args = (x, text, pooled, one, one.clone())
    reuse_args = (*full_args, torch.ones(1, 2), fresh, fresh.clone())
    compile_package(
        folder / "graphs/denoiser.pt2", {"full": (eager.full, full_args), "reuse": (eager.reuse, reuse_args)}
    )
    both = Texts(eager.text, eager.text_2)
    others = {"text_encoder": (both, (ids, ids_2)), "vae_decoder": (eager.decoder, (x,))}
    for name, job in others.items():
        compile_package(folder / f"graphs/{name}.pt2", {name: job})

    (folder / "weights").mkdir()
    full = {f"denoiser.{k}": v for k, v in eager.full.state_dict().items()}
    save_file(full, folder / "weights/denoiser.safetensors")
    rest = {f"{name}.{k}": v for name, (module, _) in others.items() for k, v in module.state_dict().items()}
    save_file(rest, folder / "weights/rest.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        (folder / "tokenizers" / name).mkdir(parents=True)
        (folder / "tokenizers" / name / "tokenizer.json").write_text(tokenizer_json())
    (folder / "plans").mkdir()
    for name, plan in plans().items():
        (folder / f"plans/{name}.json").write_text(plan.model_dump_json())
    (folder / "reports").mkdir()
    (folder / "reports/verify.json").write_text("{}")

    denoiser_inputs = specs(
        hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=one, guidance=one
    )
    slots = specs(coefficients=torch.ones(1, 2), block__0=fresh, block__1=fresh)
    keys = list(eager.full.state_dict())
    full_constants = {k: f"denoiser.{k}" for k in keys}
    reuse_constants = {f"full.{k}": f"denoiser.{k}" for k in keys if not k.startswith("block")}
    own = {name: {k: f"{name}.{k}" for k in module.state_dict()} for name, (module, _) in others.items()}
    image = torch.zeros(1, 3, 8, 8)
    package = "graphs/denoiser.pt2"
    graphs = (
        graph("full", package, denoiser_inputs, specs(sample=x, block=fresh), full_constants, stores=("block",)),
        graph("reuse", package, denoiser_inputs + slots, specs(sample=x), reuse_constants, combines=("block",)),
        graph(
            "text_encoder",
            "graphs/text_encoder.pt2",
            specs(input_ids=ids, input_ids_2=ids_2),
            specs(encoder_hidden_states=text, pooled_projections=pooled),
            own["text_encoder"],
        ),
        graph("vae_decoder", "graphs/vae_decoder.pt2", specs(latents=x), specs(image=image), own["vae_decoder"]),
    )
    prompt = {"pad_id": 0, "pad_token": "[PAD]"}
    write_manifest(
        folder,
        pipeline={
            "latents_shape": [2, 4, 4],
            "timestep_scale": 0.001,
            "text": {
                "prompts": [
                    {"tokenizer": "tokenizers/tokenizer/tokenizer.json", "max_length": L, **prompt},
                    {
                        "tokenizer": "tokenizers/tokenizer_2/tokenizer.json",
                        "argument": "prompt_2",
                        "input": "input_ids_2",
                        "max_length": T,
                        **prompt,
                    },
                ],
                "embeds": {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"},
            },
        },
        sites=(Site(name="block", slots=2, tensors=("block",)),),
        graphs=graphs,
        plans={name: f"plans/{name}.json" for name in plans()},
        layers={"block": ("int8", "large"), "embed": ("kept", "too small")},
    )
    return folder
