"""What a first call would stumble over, or not survive: `prebake check` says it, `load` refuses it, and both say the same.

`CONTRADICTIONS` are manifests whose files and hashes are right and whose numbers, names, shapes or tokenizers do not fit each
other, each with a part of what is said.
"""

import json
import os
import time

import pytest
import torch

import prebake.runtime.backends.aoti
from prebake.runtime import ArtifactError, load
from prebake.runtime.manifest import read_manifest
from prebake.runtime.plan import Evaluation
from prebake.runtime.problems import artifact_problems, pipeline_problems
from support import paper_artifact as paper
from support.paper_artifact import EULER, PLAN, TOKENIZER, edit, relist, tokenizer, write_package


def said(folder):
    """What `check` says; the same as `load` does."""
    told = [line for _, line in [*artifact_problems(folder)] or [*pipeline_problems(folder)]]
    refusal = ""
    try:
        load(folder)
    except ArtifactError as e:
        refusal = str(e)
    assert bool(told) == bool(refusal), f"check: {told}, load: {refusal}"
    return "\n".join([refusal, *told])


@pytest.fixture
def opened(paper_pipeline, monkeypatch, tmp_path):
    """A good artifact whose graphs return zeros."""

    def open_model(so, device, runners):
        return paper.PaperModel(so, read_manifest(paper_pipeline))

    monkeypatch.setattr(prebake.runtime.backends.aoti, "open_model", open_model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return paper_pipeline


def field(*keys, to):
    def change(raw):
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = to

    return lambda folder: edit(folder, change)


def appended(*keys, item=None):
    """The list has this item too, or its first one twice."""

    def change(raw):
        for key in keys:
            raw = raw[key]
        raw.append(raw[0] if item is None else item)

    return lambda folder: edit(folder, change)


def graph_input(graph, name, /, **changes):
    return lambda folder: edit(folder, lambda m: _spec(m, graph, name).update(changes))


def _spec(raw, graph, name):
    specs = [s for g in raw["graphs"] if g["name"] == graph for s in (*g["inputs"], *g["outputs"])]
    return next(s for s in specs if s["name"] == name)


def tokenized(**changes):
    def damage(folder):
        (folder / TOKENIZER).write_text(tokenizer(**changes))
        relist(folder)

    return damage


def planned(*plans, names=None):
    """These are the plans, under their own names or others."""

    def damage(folder):
        for file in (folder / "plans").iterdir():
            file.unlink()
        for plan in plans:
            (folder / f"plans/{plan.name}.json").write_text(plan.model_dump_json())
        relist(folder)
        paths = [f"plans/{plan.name}.json" for plan in plans]
        edit(folder, lambda m: m.update(plans=dict(zip(names or [p.name for p in plans], paths, strict=True))))

    return damage


def plan(name="2", steps=2, taken=(0, 1), **changes):
    evaluations = tuple(Evaluation(step=s, variant="full", timestep=1000.0 - s, update=EULER) for s in taken)
    return PLAN.model_copy(update={"name": name, "steps": steps, "evaluations": evaluations, **changes})


def member(name):
    def damage(folder):
        write_package(folder / "graphs/denoiser.pt2", extra=[(f"denoiser/data/aotinductor/full/{name}", "")])
        relist(folder)

    return damage


def plan_saying(before, after):
    def damage(folder):
        path = folder / "plans/2.json"
        path.write_text(path.read_text().replace(before, after, 1))
        relist(folder)

    return damage


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
LACKING = {"single": [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
ADDED = {"X": {"id": "X", "ids": [5], "tokens": ["X"]}}
CONTRADICTIONS = {
    # numbers: each has a bound
    "many slots": (field("sites", 0, "slots", to=10**9), "[sites.0.slots]: Input should be less than or equal to 1024"),
    "many stored tensors": (field("sites", 0, "slots", to=1024), "combines need 1024 inputs of stored tensors"),
    "huge tensor": (field("graphs", 0, "inputs", 0, "shape", to=[2**31] * 8), "[graphs.0.inputs.0.shape]: expected at"),
    "negative size": (field("graphs", 0, "inputs", 0, "shape", to=[-1]), "[graphs.0.inputs.0.shape.0]: Input should"),
    "FLOPs without end": (field("graphs", 0, "cost", "flops", to=10**400), "[graphs.0.cost.flops]: "),
    "negative FLOPs": (field("graphs", 0, "cost", "flops", to=-1), "[graphs.0.cost.flops]: "),
    "file of petabytes": (field("files", 0, "size", to=2**60), "[files.0.size]: Input should be less than or equal to"),
    "guidance beyond float32": (
        field("defaults", "guidance_scale", to=1e300),
        "[defaults.guidance_scale]: Input shoul",
    ),
    "no pixels": (field("defaults", "height", to=0), "[defaults.height]: Input should be greater than or equal to 1"),
    "long text": (
        field("pipeline", "text", "prompts", 0, "max_length", to=10**9),
        "prompts.0.max_length]: Input should be",
    ),
    "negative padding": (
        field("pipeline", "text", "prompts", 0, "pad_id", to=-1),
        "prompts.0.pad_id]: Input should be",
    ),
    "many latents": (
        field("pipeline", "latents_shape", to=[1000, 1000, 1000]),
        "latents_shape]: [1000, 1000, 1000] has m",
    ),
    "no latents": (field("pipeline", "latents_shape", to=[0, 4, 6]), "[pipeline.latents_shape.0]: Input should be gr"),
    "not a hash": (field("files", 0, "sha256", to="00"), "[files.0.sha256]: String should match pattern"),
    "draws without end": (plan_saying('"unused_draws":0', '"unused_draws":1000000000'), "update.unused_draws]: Input"),
    "update beyond float32": (plan_saying('"outputs":[-0.5]', '"outputs":[1e300]'), "update.outputs.0]: Input should"),
    "timestep beyond float32": (plan_saying("1000.0", "1e300"), "[evaluations.0.timestep]: Input should be less"),
    "start beyond float32": (
        plan_saying('"init_noise_sigma":1.0', '"init_noise_sigma":1e39'),
        "[init_noise_sigma]: Inp",
    ),
    # names
    "site twice": (appended("sites"), "manifest.json [sites]: 's' occurs 2 times; export again"),
    "store twice": (field("graphs", 0, "stores", to=["s", "s"]), "[graphs.0.stores]: 's' occurs 2 times"),
    "tensor twice": (field("sites", 0, "tensors", to=["a", "a"]), "[sites.0.tensors]: 'a' occurs 2 times"),
    "input twice": (appended("graphs", 0, "inputs"), "[graphs.full.inputs]: 'hidden_states' occurs 2 times"),
    "output twice": (appended("graphs", 0, "outputs"), "[graphs.full.outputs]: 'sample' occurs 2 times"),
    "unverified plan that is none": (field("unverified", to=["9"]), "[unverified]: '9' is not in plans"),
    "member with a long name": (member("x" * 300 + ".json"), "has a name that no file can have"),
    "member that is its folder": (member("../full/./x.json"), "has a name that could leave the package's folder"),
    "member that rings": (member("\x07.json"), "has a name that no file can have"),
    # plans
    "plans exchanged": (
        planned(plan(), plan("3", 3, (0, 1, 2)), names=("3", "2")),
        "is the plan '2', the manifest has it as '3'",
    ),
    "one plan under two names": (
        lambda f: edit(f, lambda m: m["plans"].update({"2-uncached": "plans/2.json"})),
        "[plans]: 'plans/2.json' occurs 2 times",
    ),
    "plan of other steps": (planned(plan(steps=28)), "the plan '2' has 28 steps"),
    "plan that stops early": (planned(plan("28", 28, (0, 1, 2))), "expected evaluations of the steps 0 to 27"),
    "plan that leaves steps out": (
        planned(plan("4", 4, (0, 1, 3))),
        "the steps 0 to 3, one after the other, got 0, 1, 3",
    ),
    "plan that goes back": (planned(plan("2", 2, (0, 1, 0, 1))), "expected evaluations of the steps 0 to 1"),
    "uncached plan with a cache": (planned(plan(), plan("2-uncached")), "the plan '2-uncached' has the cache 'reuse'"),
    "no plan of the default": (field("defaults", "num_inference_steps", to=3), "there is no plan of 3 steps, it has 2"),
    # shapes
    "latents that are no patches": (
        field("pipeline", "latents_shape", to=[1, 3, 6]),
        "[pipeline.latents_shape]: expected an even height and width",
    ),
    "latents of a video": (
        field("pipeline", "latents_shape", to=[1, 4, 6, 2]),
        "[pipeline.latents_shape]: Tuple should have at most 3",
    ),
    "latents of another graph": (
        field("pipeline", "latents_shape", to=[1, 8, 6]),
        "'hidden_states' is float32 [1, 6, 4]",
    ),
    "frames of a picture": (
        field("defaults", "num_frames", to=3),
        "[defaults.num_frames]: is 3, this family makes images",
    ),
    "no sample": (graph_input("full", "sample", name="samples"), "[graphs.full.outputs]: has no 'sample'"),
    "sample of another shape": (
        graph_input("full", "sample", shape=[1, 6, 5]),
        "'sample' is float32 [1, 6, 5], a call has",
    ),
    "sample of another dtype": (
        graph_input("full", "sample", dtype="bfloat16"),
        "'sample' is bfloat16 [1, 6, 4], a call",
    ),
    "text of another shape": (
        graph_input("reuse", "pooled_projections", shape=[1, 3]),
        "'pooled_projections' is float32",
    ),
    "an input that nobody gives": (
        graph_input("full", "timestep", name="time"),
        "[graphs.full.inputs]: has 'time', which",
    ),
    "slot of another shape": (
        graph_input("reuse", "a@0", shape=[1, 3]),
        "'a@0' has another shape or dtype than what is",
    ),
    "coefficients as integers": (
        graph_input("reuse", "coefficients", dtype="int64"),
        "its coefficients are not float32",
    ),
    "ids of another length": (
        graph_input("text_encoder", "input_ids", shape=[1, 5]),
        "[pipeline.text.prompts]: give [(",
    ),
    "ids as floats": (graph_input("text_encoder", "input_ids", dtype="float32"), "[pipeline.text.prompts]: give [("),
    "text of a terabyte": (
        graph_input("text_encoder", "pooled_projections", shape=[1, 2**31]),
        "'pooled_projections' has more than 67108864 numbers",
    ),
    "embedding of nothing": (
        field("pipeline", "text", "embeds", to={}),
        "[pipeline.text.embeds]: Dictionary should have",
    ),
    "no prompts": (
        field("pipeline", "text", "prompts", to=[]),
        "[pipeline.text.prompts]: Tuple should have at least 1",
    ),
    "decoder of another size": (
        graph_input("vae_decoder", "image", shape=[1, 3, 8, 9]),
        "expected one tensor [1, 3, 8, 8]",
    ),
    "decoder of integers": (
        graph_input("vae_decoder", "image", dtype="uint8"),
        "expected one tensor [1, 3, 8, 8] of floats",
    ),
    "decoder of other latents": (
        graph_input("vae_decoder", "latents", shape=[1, 4]),
        "'latents' is float32 [1, 4], a call",
    ),
    "picture without an encoder": (
        field("pipeline", "picture", to={"height": 8, "width": 8}),
        "graph 'vae_encoder' is not",
    ),
    # tokenizers
    "id beyond the embedding": (
        tokenized(vocab={**paper.TOKENS, "x": 5}),
        "the token 'x' has the id 5, the text encoder's em",
    ),
    "padding beyond the embedding": (
        field("pipeline", "text", "prompts", 0, "pad_id", to=5),
        "the token '<pad>' has the id 5",
    ),
    "added id beyond the embedding": (
        tokenized(post_processor={**TEMPLATE, **LACKING, "special_tokens": ADDED}),
        "the token 'X' has the id 5, the text encoder's embedding has 5 rows",
    ),
    "separator beyond the embedding": (
        tokenized(post_processor={"type": "BertProcessing", "sep": ["s", 4 * 10**9], "cls": ["c", 1]}),
        "the token 's' has the id 4000000000",
    ),
    "embedding that is none": (field("pipeline", "text", "prompts", 0, "embedding", to="x"), "has no constant 'x'"),
    "embedding unsaid": (
        lambda f: (
            tokenized(vocab={**paper.TOKENS, "x": 5})(f),
            edit(f, lambda m: m["pipeline"]["text"]["prompts"][0].pop("embedding")),
        ),
        "the token 'x' has the id 5, the text encoder's embedding has 5 rows",
    ),
    "empty vocabulary": (tokenized(vocab={}), "expected a tokenizer that reads any text, but "),
    "post-processor that panics": (tokenized(post_processor={**TEMPLATE, **LACKING}), "but no entry found for key"),
    "normalizer that panics": (
        tokenized(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "expected a tokenizer.json, but Precompiled",
    ),
    "more added than there is room for": (
        lambda f: (
            tokenized(post_processor={"type": "BertProcessing", "sep": ["s", 2], "cls": ["c", 1]})(f),
            edit(f, lambda m: m["pipeline"]["text"]["prompts"][0].update(max_length=1)),
            graph_input("text_encoder", "input_ids", shape=[1, 1])(f),
        ),
        "gives 2 ids of a text, where manifest.json [pipeline.text] says 1",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_check_and_load_say_the_same(opened, what):
    damage, words = CONTRADICTIONS[what]
    damage(opened)
    began = time.monotonic()
    assert words in said(opened)
    assert time.monotonic() - began < 5


def test_the_good_one_draws(opened):
    assert not said(opened).strip()
    (image,) = load(opened)("a red circle", seed=0).images
    assert image.size == (8, 8)


def test_a_word_that_only_some_texts_have_is_refused_when_it_comes(opened):
    """A tokenizer may normalize one word to another; what it gave is compared at every call, before a graph sees it."""
    pipe = load(opened)
    pipe.family_rules._text._tokenizers[0]._rows = 3
    assert pipe("a red", seed=0).images
    with pytest.raises(ArtifactError, match="gives the id 3, the text encoder's embedding has 3 rows"):
        pipe("a circle", seed=0)


# --- the manifest's file ----------------------------------------------------------------------------------------------


def pipe_file(path):
    os.mkfifo(path)


def sparse(path):
    with path.open("wb") as file:
        file.truncate(5 << 30)


def linked_to_zero(path):
    path.symlink_to("/dev/zero")


def text(content):
    return lambda path: path.write_text(content)


def nested(depth):
    return text('{"schema_version": 2, "recipe": ' + "[" * depth + "]" * depth + "}")


NO_MANIFESTS = {
    "a pipe": (pipe_file, "manifest.json is not a plain file"),
    "a link to what never ends": (linked_to_zero, "manifest.json is a symbolic link"),
    "5 GB": (sparse, "has more than 16777216 bytes"),
    "300 deep": (nested(300), "more than 64 deep"),
    "1,500 deep": (nested(1500), "more than 64 deep"),
    "a million values": (
        text('{"schema_version": 2, "recipe": [' + "1," * 1_000_000 + "1]}"),
        "more than 1000000 values",
    ),
    "a million keys": (
        text("{" + ",".join(f'"{i}": 1' for i in range(900_000)) + "}"),
        "has 900000 keys, at most 100000 are read",
    ),
}


@pytest.mark.parametrize("what", NO_MANIFESTS)
def test_a_manifest_costs_little_before_it_is_trusted(paper, what):
    make, words = NO_MANIFESTS[what]
    (paper / "manifest.json").unlink()
    make(paper / "manifest.json")
    began = time.monotonic()
    with pytest.raises(ArtifactError) as caught:
        read_manifest(paper)
    assert words in str(caught.value)
    assert time.monotonic() - began < 5


def test_every_number_of_the_schema_has_a_bound():
    """Also those that are still to come: a number without one is found here."""
    from prebake.runtime.attachment.facts import AttachmentFacts
    from prebake.runtime.families.sd3 import SD3Settings
    from prebake.runtime.families.sdxl import SDXLSettings
    from prebake.runtime.manifest import Manifest
    from prebake.runtime.plan import Plan

    for model in (Manifest, Plan, SDXLSettings, SD3Settings, AttachmentFacts):
        assert list(unbounded(model.model_json_schema(), model.__name__)) == []


def unbounded(schema, where):
    """The places in a JSON schema that may be of any size."""
    if isinstance(schema, dict):
        kind = schema.get("type")
        if kind in ("integer", "number"):
            low, high = {"minimum", "exclusiveMinimum"} & schema.keys(), {"maximum", "exclusiveMaximum"} & schema.keys()
            if not (low and high) and "const" not in schema:
                yield f"{where}: {kind}"
        if kind == "string" and not {"maxLength", "pattern", "enum", "const"} & schema.keys():
            yield f"{where}: string"
        if kind == "array" and "maxItems" not in schema:
            yield f"{where}: array"
        if isinstance(schema.get("additionalProperties"), dict) and "maxProperties" not in schema:
            yield f"{where}: object"
        for key, inner in schema.items():
            yield from unbounded(inner, f"{where}.{key}")
    elif isinstance(schema, list):
        for inner in schema:
            yield from unbounded(inner, where)


def test_json_bounds_do_not_touch_what_is_in_them():
    from prebake.runtime.bounds import parse_json

    said = {"a": [1, {"b": None}], "c": "x,[{"}
    assert parse_json(json.dumps(said).encode()) == said


def test_the_embedding_is_the_one_that_is_named(opened):
    """Another constant of the graph may have more rows."""
    from safetensors.torch import save_file

    table, large = torch.zeros(5, 2), torch.zeros(50, 2)
    save_file({"text_encoder.table": table, "text_encoder.large": large}, opened / "weights/text_encoder.safetensors")
    tokenized(vocab={**paper.TOKENS, "x": 5})(opened)
    edit(opened, lambda m: m["graphs"][2]["constants"].update(large="text_encoder.large"))
    assert "the text encoder's embedding has 5 rows" in said(opened)
    edit(opened, lambda m: m["pipeline"]["text"]["prompts"][0].update(embedding="large"))
    assert not said(opened)
