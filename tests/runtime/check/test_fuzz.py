"""Artifacts that are damaged at random: one is refused by an ArtifactError, or what comes out is exactly what its bytes say.

`make fuzz` runs the long version, PREBAKE_FUZZ examples for each kind of file, and six times as many contradictions: whole
pipelines whose hashes are right and whose numbers, names, shapes and tokenizers need not fit. Whatever the damage, nothing but
the cache is written, `prebake check` is of one opinion with `load`, and an example takes no longer than LONGEST.
"""

import contextlib
import copy
import datetime
import hashlib
import json
import math
import os
import resource
import shutil
import struct
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prebake.runtime.backends.aoti
from prebake.runtime import ArtifactError, RequestError, load
from prebake.runtime.artifact import open_artifact
from prebake.runtime.cli.inspect import inspection_json, inspection_lines
from prebake.runtime.manifest import read_manifest
from prebake.runtime.plan import Plan
from prebake.runtime.problems import artifact_problems, pipeline_problems
from support import paper_artifact as paper

EXAMPLES = int(os.environ.get("PREBAKE_FUZZ", "100"))
MOST_KIB = 2 << 20  # of memory that an example may take beyond what the process had
LONGEST = datetime.timedelta(seconds=5)  # a good one takes some 10 ms on a quiet core
WEIGHTS, PLAN, PACKAGE = "weights/denoiser.safetensors", "plans/2.json", "graphs/denoiser.pt2"
fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize="PREBAKE_FUZZ" not in os.environ,  # the short version is the same every time
    database=None,
    deadline=LONGEST,
    suppress_health_check=list(HealthCheck),
)
HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a\0b",
    "a\\b",
    "x" * 5000,
    "\ud800",
    "weights/" + "y" * 300,
    "full",
    "int8",
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, -(2**63), 10**400])
    | st.floats()
    | st.sampled_from(HOSTILE)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


class Base:
    """A good artifact, and what it is to be when an example begins and when it has ended."""

    def __init__(self, home):
        self.home, self.folder = home, paper.build(home / "artifact")
        self.files = {
            p.relative_to(self.folder).as_posix(): p.read_bytes() for p in self.folder.rglob("*") if p.is_file()
        }
        self.models = []
        (home / "cwd").mkdir()

    def opened(self):
        """The artifact, or None where it is refused. Either way nothing has been written but the cache."""
        self.models.clear()
        before, cache = self.listing(), self.home / "cache"
        told = list(artifact_problems(self.folder))
        artifact, refusal = None, None
        try:
            artifact = open_artifact(self.folder, cache_dir=cache)
        except ArtifactError as e:
            refusal = str(e)
        assert bool(told) == bool(refusal), (told, refusal)
        shutil.rmtree(cache, ignore_errors=True)
        assert self.listing() == before
        return artifact

    def listing(self):
        return {p: p.read_bytes() if p.is_file() else None for p in self.home.rglob("*") if "cache" not in p.parts}

    @contextlib.contextmanager
    def holding(self, path, data, listed=True):
        """The file is this one for the length of the block, and `listed` is whether the manifest knows."""
        (self.folder / path).write_bytes(data)
        if listed:
            paper.relist(self.folder)
        try:
            yield
        finally:
            for name in {path, "manifest.json"}:
                (self.folder / name).write_bytes(self.files[name])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    home = Base(tmp_path_factory.mktemp("fuzz"))

    def open_model(so, device, runners):
        home.models.append(paper.PaperModel(so))
        return home.models[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prebake.runtime.backends.aoti, "open_model", open_model)
        patch.chdir(home.home / "cwd")
        yield home


# --- damage -----------------------------------------------------------------------------------------------------------


@st.composite
def changes(draw):
    """Damage to bytes of any length: a function from bytes to bytes."""
    kinds = ("flip", "set", "remove", "insert", "repeat", "cut", "copy")
    steps = draw(
        st.lists(
            st.tuples(st.sampled_from(kinds), st.floats(0, 1), st.floats(0, 1), st.integers(0, 255)),
            min_size=1,
            max_size=4,
        )
    )

    def change(data):
        for step in steps:
            data = changed(data, *step)
        return data

    return change


def changed(data, kind, x, y, value):
    """One step of damage, at the share `x` of the data; of up to 16 bytes, or to the share `y`."""
    at, end, to = int(x * len(data)), int(x * len(data)) + int(y * 16) + 1, int(y * len(data))
    if kind == "flip":
        return data[:at] + bytes(b ^ (1 << value % 8) for b in data[at : at + 1]) + data[at + 1 :]
    if kind == "copy":
        return data[:to] + data[at:end] + data[to + end - at :]
    if kind == "cut":
        return data[:at]
    new = {
        "set": bytes([value]) * len(data[at:end]),
        "remove": b"",
        "insert": bytes([value]) * (end - at) + data[at:end],
        "repeat": data[at:end] * (value * 40),
    }
    return data[:at] + new[kind] + data[end:]


def places(value, path=()):
    """Every place in parsed JSON, as keys."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def edits(draw):
    """Damage to JSON that leaves it JSON: a function from text to text."""
    steps = draw(
        st.lists(
            st.tuples(st.sampled_from(("set", "remove", "twice", "add")), st.floats(0, 1, exclude_max=True), VALUES),
            min_size=1,
            max_size=3,
        )
    )

    def edit(text):
        holder = {"": json.loads(text)}
        for kind, x, value in steps:
            spots = list(places(holder))[1:]
            if not spots:
                break
            *keys, last = spots[int(x * len(spots))]
            inside = holder
            for key in keys:
                inside = inside[key]
            if kind == "set":
                inside[last] = copy.deepcopy(value)
            elif kind == "remove" and len(keys):
                del inside[last]
            elif kind == "twice" and isinstance(inside, list):
                inside.append(copy.deepcopy(inside[last]))
            elif kind == "add" and isinstance(inside[last], dict):
                inside[last]["new"] = copy.deepcopy(value)
        return json.dumps(holder[""]).encode()

    return edit


DAMAGE = changes() | edits()


# --- what must hold ---------------------------------------------------------------------------------------------------


def test_the_good_one_is_opened(base):
    assert base.opened().plans == {"2": paper.PLAN}
    assert [m.code for m in base.models] == [paper.library()] * 2


@fuzzed
@given(change=DAMAGE)
def test_a_manifest(base, change):
    """A manifest is the only word on itself: where it is accepted, the files that it lists are the same files."""
    with base.holding("manifest.json", change(base.files["manifest.json"]), listed=False):
        if artifact := base.opened():
            assert all(plan == paper.PLAN for plan in artifact.plans.values())
            assert {k: t.tolist() for k, t in artifact.weights.items()} in ({"denoiser.w": [1.0] * 3}, {})
            assert all(model.code == paper.library() for model in base.models)


@fuzzed
@given(change=DAMAGE)
def test_a_plan(base, change):
    data = change(base.files[PLAN])
    with base.holding(PLAN, data):
        if artifact := base.opened():
            plan = artifact.plans["2"]
            assert plan == Plan.model_validate(json.loads(data))
            assert all(
                math.isfinite(x) for e in plan.evaluations for x in (e.timestep, *e.update.latents, *e.coefficients)
            )


@st.composite
def headers(draw):
    """Damage to the header of a safetensors file, whose length stays right."""
    edit = draw(edits())

    def change(data):
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = edit(data[8:end])
        return struct.pack("<Q", len(header)) + header + data[end:]

    return change


@fuzzed
@given(change=changes() | headers())
def test_weights(base, change):
    data = change(base.files[WEIGHTS])
    with base.holding(WEIGHTS, data):
        if artifact := base.opened():
            end = 8 + struct.unpack("<Q", data[:8])[0]
            said = {k: v for k, v in json.loads(data[8:end]).items() if k != "__metadata__"}
            assert said.keys() == artifact.weights.keys()
            for key, tensor in artifact.weights.items():
                first, last = (end + offset for offset in said[key]["data_offsets"])
                assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == data[first:last]


@st.composite
def archives(draw):
    """Damage inside one member of a package, with an archive around it that is whole."""
    change, which = draw(changes()), draw(st.floats(0, 1, exclude_max=True))

    def rewrite(data, scratch):
        with zipfile.ZipFile(scratch / "old.pt2") as old, zipfile.ZipFile(scratch / "new.pt2", "w") as new:
            names = old.namelist()
            for i, name in enumerate(names):
                content = old.read(name)
                new.writestr(name, change(content) if i == int(which * len(names)) else content)
        return (scratch / "new.pt2").read_bytes()

    return rewrite


def held(base, data):
    with base.holding(PACKAGE, data):
        if base.opened():
            with zipfile.ZipFile(base.folder / PACKAGE) as archive:
                content = {n.split("/")[3]: archive.read(n) for n in archive.namelist() if n.endswith(".so")}
            assert {m.name: m.code for m in base.models} == content


@fuzzed
@given(change=changes())
def test_a_package(base, change):
    held(base, change(base.files[PACKAGE]))


@fuzzed
@given(rewrite=archives())
def test_members_of_a_package(base, rewrite, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("zip")
    (scratch / "old.pt2").write_bytes(base.files[PACKAGE])
    held(base, rewrite(base.files[PACKAGE], scratch))
    shutil.rmtree(scratch)


@fuzzed
@given(change=changes(), path=st.sampled_from([WEIGHTS, PLAN, PACKAGE]))
def test_what_the_manifest_does_not_know_is_never_opened(base, change, path):
    data = change(base.files[path])
    with base.holding(path, data, listed=False):
        assert (base.opened() is None) == (data != base.files[path])


# --- contradictions ---------------------------------------------------------------------------------------------------

MANIFEST, TOKENIZER = "manifest.json", paper.TOKENIZER
NUMBERS = [0, -1, 1, 2, 3, 4, 5, 7, 8, 28, 1000, 2**31, 2**31 - 1, 2**63, 10**9, 10**400, 0.5, -0.5, 1e39, 1e300, True]
TEXTS = [
    "",
    "x",
    "s",
    "a@1",
    "cuda",
    "sdxl",
    "sd",
    "attach",
    "float64",
    "load",
    "\x1b[2J",
    "a\nb",
    "y" * 300,
    "z" * 5000,
    "\ud800",
]
PROCESSORS = [
    {"type": "BertProcessing", "sep": ["s", 5], "cls": ["c", 1]},
    {"type": "BertProcessing", "sep": ["s", 2], "cls": ["c", 1]},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"type": "Sequence", "processors": []},
    None,
]


@st.composite
def contradictions(draw):
    """Changes of places in manifest, plan and tokenizer that leave each of them JSON of nearly the same structure: a list of
    (which file, where in it, how, with what)."""
    files = st.sampled_from([MANIFEST, MANIFEST, MANIFEST, PLAN, TOKENIZER])
    share = st.floats(0, 1, exclude_max=True)
    return draw(st.lists(st.tuples(files, share, share, share), min_size=1, max_size=4))


def contradict(holder, where, how, what):
    """One change of parsed JSON: a number for a number, a name for a name, lists and objects with items too few or too many."""
    spots = list(places(holder))[1:]
    *keys, last = spots[int(where * len(spots))]
    inside = holder
    for key in keys:
        inside = inside[key]
    value = inside[last]
    if isinstance(value, bool) or value is None or (how < 0.1 and not isinstance(value, dict | list)):
        pool = [None, True, False, "x", 1, *PROCESSORS]
    elif isinstance(value, int | float):
        pool = NUMBERS
    elif isinstance(value, str):
        pool = [*TEXTS, *names_in(holder)]
    elif isinstance(value, list):
        first, *_ = value or [0]
        pool = [[], [*value, first], value[::-1], value[1:], [*value, *value], [first] * 50]
    else:
        last_key = next(reversed(value), "")
        less = {key: inner for key, inner in value.items() if key != last_key}
        renamed = {(key + "x" if key == last_key else key): inner for key, inner in value.items()}
        swapped = dict(zip(value, [*value.values()][::-1], strict=True))
        pool = [{}, less, renamed, swapped, {**value, "new": 1}]
    inside[last] = copy.deepcopy(pool[int(what * len(pool))])


def names_in(value):
    """Every text of at most 40 letters, so that a name may become any other name."""
    found = {v for v in leaves(value) if isinstance(v, str) and len(v) <= 40}
    return sorted(found)


def leaves(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole pipeline on paper, whose graphs return zeros, and a function that writes it with these contents and right hashes."""
    folder = paper.build_pipeline(tmp_path_factory.mktemp("whole") / "artifact")
    good = {path: json.loads((folder / path).read_text()) for path in (MANIFEST, PLAN, TOKENIZER)}

    def write(contents):
        manifest = contents[MANIFEST]
        for path in (PLAN, TOKENIZER):
            data = json.dumps(contents[path]).encode("utf-8", "surrogatepass")
            (folder / path).write_bytes(data)
            listed = manifest.get("files") if isinstance(manifest, dict) else None
            for entry in listed if isinstance(listed, list) else ():
                if isinstance(entry, dict) and entry.get("path") == path:
                    entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / MANIFEST).write_text(json.dumps(manifest))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        patch.setattr(
            prebake.runtime.backends.aoti,
            "open_model",
            lambda so, device, runners: paper.PaperModel(so, read_manifest(folder)),
        )
        yield folder, good, write


@settings(fuzzed, max_examples=max(EXAMPLES, (EXAMPLES - 100) * 6))  # `make fuzz`: 11,400
@given(changes=contradictions())
def test_a_contradiction(whole, changes):
    """It is refused by both, or draws: no crash, no raw error, and neither time nor memory without bound."""
    folder, good, write = whole
    contents = copy.deepcopy(good)
    for path, *change in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):  # the place went with an earlier change
            contradict(contents[path], *change)
    write(contents)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = [*artifact_problems(folder)] or [*pipeline_problems(folder)]
    pipe, refusal = None, None
    try:
        pipe = load(folder)
    except (ArtifactError, RequestError) as e:  # the latter: an artifact of a denoiser alone
        refusal = str(e)
    assert bool(told) == bool(refusal), (told, refusal)
    if pipe is not None:
        for steps in pipe.steps:
            assert pipe("a red circle", seed=0, num_inference_steps=steps).images
        plans = pipe.artifact.plans
        assert inspection_lines(folder, pipe.artifact.manifest, plans, layers=True)
        assert inspection_json(pipe.artifact.manifest, plans)
        assert repr(pipe)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB


def test_the_contradictions_reach_what_they_are_for(whole):
    """The canary of the generator: of the changes that it makes some are refused, by a schema or behind it, and some draw."""
    folder, good, write = whole
    kinds = set()
    for i in range(60):
        contents = copy.deepcopy(good)
        with contextlib.suppress(KeyError, IndexError, TypeError):
            contradict(contents[(MANIFEST, PLAN, TOKENIZER)[i % 3]], (i * 0.618) % 1, 0.5, (i * 0.414) % 1)
        write(contents)
        told = [*artifact_problems(folder)]
        kinds |= {kind for kind, _ in told} or {"pipeline" if [*pipeline_problems(folder)] else "draws"}
    assert {"manifest", "plans", "pipeline", "draws"} <= kinds
