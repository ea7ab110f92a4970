"""One damaged or malicious artifact for each rule of artifacts/README.md; nothing of it is ever opened.

`RULES` maps a rule to what is done to a good artifact and to a part of what is said about it.
"""

import stat
import zipfile

import pytest

from prebake.runtime import ArtifactError
from prebake.runtime.artifact import open_artifact
from prebake.runtime.plan import Evaluation, Tail, Update
from support.paper_artifact import EULER, PLAN, edit, relist, write_package

PACKAGE = "graphs/denoiser.pt2"


def legal(least: int, largest: int) -> dict:
    """A range by 8 pixels."""
    side = {"min": least, "max": largest, "step": 8}
    return {"height": side, "width": side, "latents_shape": [1, 2, 6]}


def listed(path):
    """The manifest lists this name, whatever it is."""
    return lambda folder: edit(folder, lambda m: m["files"].append({"path": path, "size": 1, "sha256": "0" * 64}))


def field(*keys, to):
    """The manifest says `to` at this place."""

    def change(raw):
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = to

    return lambda folder: edit(folder, change)


def written(path, text):
    """The file has this text, and the manifest does not know."""
    return lambda folder: (folder / path).write_text(text)


def package(**kwargs):
    """The package is another one, correctly listed."""

    def damage(folder):
        write_package(folder / PACKAGE, **kwargs)
        relist(folder)

    return damage


def member(name, data=""):
    return package(extra=[(name, data)])


def plan(*evaluations):
    """The plan is another one, correctly listed."""

    def damage(folder):
        (folder / "plans/2.json").write_text(PLAN.model_copy(update={"evaluations": evaluations}).model_dump_json())
        relist(folder)

    return damage


def plan_saying(number):
    """The plan has this as its first timestep, correctly listed."""

    def damage(folder):
        (folder / "plans/2.json").write_text(PLAN.model_dump_json().replace("1000.0", number, 1))
        relist(folder)

    return damage


def tails(*tails):
    """The plan, which has two evaluations, can begin in these places too."""

    def damage(folder):
        (folder / "plans/2.json").write_text(PLAN.model_copy(update={"tails": tails}).model_dump_json())
        relist(folder)

    return damage


def linked(folder):
    target = folder / "weights/denoiser.safetensors"
    target.rename(folder.parent / "elsewhere")
    target.symlink_to(folder.parent / "elsewhere")


def linked_folder(folder):
    (folder / "plans").rename(folder.parent / "elsewhere")
    (folder / "plans").symlink_to(folder.parent / "elsewhere")


def flipped(path):
    def damage(folder):
        data = bytearray((folder / path).read_bytes())
        data[-1] ^= 1
        (folder / path).write_bytes(data)

    return damage


def symlink_member():
    info = zipfile.ZipInfo("denoiser/data/aotinductor/full/b.json")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return package(extra=[(info, "/etc/passwd")])


def compressed_member():
    info = zipfile.ZipInfo("denoiser/extra/x.json")
    info.compress_type = zipfile.ZIP_DEFLATED
    return package(extra=[(info, "x" * 100)])


def not_a_zip(folder):
    (folder / PACKAGE).write_text("no")
    relist(folder)


def short_safetensors(folder):
    path = folder / "weights/denoiser.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    relist(folder)


def twice_stored(folder):
    (folder / "weights/more.safetensors").write_bytes((folder / "weights/denoiser.safetensors").read_bytes())
    relist(folder)


def overlapping(folder):
    """Two members are one place in the file: the second entry of the table points where the first does."""
    path = folder / PACKAGE
    write_package(path, extra=[("denoiser/extra/1", "x" * 10_000), ("denoiser/extra/2", "x" * 10_000)])
    with zipfile.ZipFile(path) as archive:
        first, second = archive.infolist()[-2:]
    data = path.read_bytes()
    again = data[first.header_offset : second.header_offset].replace(b"extra/1", b"extra/2")
    table = data[data.index(b"PK\1\2") :]
    shorter = data[: second.header_offset] + again[:40]
    entry = table.rindex(b"PK\1\2")
    moved = table[: entry + 42] + first.header_offset.to_bytes(4, "little") + table[entry + 46 :]
    end = moved.rindex(b"PK\5\6")
    moved = moved[: end + 16] + len(shorter).to_bytes(4, "little") + moved[end + 20 :]
    path.write_bytes(shorter + moved)
    relist(folder)


def deeper(folder):
    """As an archive of a folder is unpacked into a folder of its name."""
    folder.rename(folder.with_name("inner"))
    folder.mkdir()
    folder.with_name("inner").rename(folder / folder.name)


def no_file_of_its_own(folder):
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


def pointer(folder):
    """What a clone without Git LFS has in a file's place."""
    path = folder / "weights/denoiser.safetensors"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {path.stat().st_size}\n")


def repository(folder):
    (folder / ".git/objects").mkdir(parents=True)
    for i in range(30):
        (folder / f".git/objects/{i}").touch()


def evaluation(**changes):
    return Evaluation(**{"step": 0, "variant": "full", "timestep": 1.0, "update": EULER, **changes})


RULES = {
    # the manifest
    "no manifest": (
        lambda f: (f / "manifest.json").unlink(),
        "expected manifest.json in an artifact folder, found none",
    ),
    "one folder deeper": (deeper, "found none; there is one in "),
    "manifest that is a folder": (no_file_of_its_own, "manifest.json is a folder; restore the file"),
    "not JSON": (written("manifest.json", "{"), "expected JSON, but"),
    "empty manifest": (written("manifest.json", ""), "expected JSON, but the file is empty; restore the file"),
    "endless brackets": (
        written("manifest.json", "[" * 100_000),
        "expected JSON, but objects and lists lie in one another more than 64 deep",
    ),
    "timesteps times a word": (
        field("pipeline", to={"timestep_scale": "twice"}),
        "manifest.json [pipeline.timestep_scale]: 'twice' is not a number",
    ),
    "timesteps times nothing that is finite": (
        field("pipeline", to={"timestep_scale": float("inf")}),
        "manifest.json [pipeline.timestep_scale]: inf is not a number",
    ),
    "name that is too long": (listed("weights/" + "x" * 300), "x is missing, the manifest lists it; restore the file"),
    "half a character": (listed("\ud800"), "[files.3.path]: Input should be a valid string"),
    "not an object": (
        written("manifest.json", "[]"),
        "[schema_version]: this runtime reads version 2, the file says None",
    ),
    "newer version": (field("schema_version", to=3), "[schema_version]: this runtime reads version 2, the file says 3"),
    "older version": (field("schema_version", to=1), "[schema_version]: this runtime reads version 2, the file says 1"),
    "batches without one": (
        field("batches", to=[2]),
        "[batches]: expected different numbers from 1 on in order, got [2]",
    ),
    "batches in disorder": (field("batches", to=[1, 4, 2]), "[batches]: expected different numbers from 1 on in order"),
    "a size twice": (
        field("sizes", to=[{"height": 64, "width": 32}, {"height": 64, "width": 32}]),
        "[sizes]: '32x64' occurs 2 times",
    ),
    "a range without the default size": (
        field("range", to=legal(16, 32)),
        "[range]: has height 16 to 32 by 8, width 16 to 32",
    ),
    "a range that ends between steps": (field("range", to=legal(8, 30)), "the nearest are 24 and 32"),
    "a range beside sizes": (
        lambda f: edit(f, lambda m: m.update(range=legal(8, 32), sizes=[{"height": 64, "width": 32}])),
        "[range]: stands beside sizes",
    ),
    "a shape without a range": (
        field("graphs", 0, "inputs", 0, "axes", to={"1": "height"}),
        "follows the size, and the artifact has no range",
    ),
    "a shape of another size": (
        lambda f: edit(
            f, lambda m: (m.update(range=legal(8, 32)), m["graphs"][0]["inputs"][0].update(axes={"1": "7*height"}))
        ),
        "and by its axes",
    ),
    "a dimension that is no sum": (
        field("graphs", 0, "inputs", 0, "axes", to={"1": "height**9999"}),
        "expected a sum such as 'height*width/256+512', got 'height**9999'",
    ),
    "unknown key": (
        field("trust_me", to=True),
        "manifest.json [trust_me]: is not a key that this version knows; restore the file or export again",
    ),
    "missing key": (lambda f: edit(f, lambda m: m.pop("requires")), "manifest.json [requires]: Field required"),
    "wrong type": (
        field("files", 0, "size", to="big"),
        "manifest.json [files.0.size]: Input should be a valid integer",
    ),
    # names
    "absolute name": (
        listed("/etc/passwd"),
        "'/etc/passwd' is not a plain name inside the folder; an artifact holds machine code",
    ),
    "climbing name": (listed("weights/../../x"), "'weights/../../x' is not a plain name inside the folder"),
    "backslash": (listed("weights\\x"), "is not a plain name inside the folder"),
    "empty name": (listed(""), "'' is not a plain name inside the folder"),
    "name in two forms": (listed("./plans/2.json"), "'./plans/2.json' is not a plain name inside the folder"),
    "listed twice": (listed("plans/2.json"), "'plans/2.json' is listed 2 times"),
    "lists itself": (listed("manifest.json"), "'manifest.json' cannot be listed"),
    "lists a report": (listed("reports/x"), "'reports/x' cannot be listed"),
    # files
    "missing file": (
        lambda f: (f / "plans/2.json").unlink(),
        "plans/2.json is missing, the manifest lists it; restore the file",
    ),
    "short file": (written("plans/2.json", "{}"), "plans/2.json has 2 bytes, the manifest says"),
    "unlisted file": (
        written("weights/evil.so", ""),
        "weights/evil.so is not in the manifest; remove it, or put it under reports/",
    ),
    "a pointer of Git LFS": (
        pointer,
        "weights/denoiser.safetensors is a pointer of Git LFS, not the file itself; `git",
    ),
    "a repository": (
        repository,
        ".git/ has 30 files that are not in the manifest, such as .git/objects/0; remove them, or put them under reports/",
    ),
    "linked file": (linked, "weights/denoiser.safetensors is a symbolic link, an artifact holds plain files only"),
    "linked folder": (linked_folder, "plans is a symbolic link, an artifact holds plain files only"),
    "wrong hash of code": (flipped(PACKAGE), "graphs/denoiser.pt2: sha256 is"),
    "wrong hash of weights": (flipped("weights/denoiser.safetensors"), "take it only from someone you trust"),
    # this machine
    "other system": (field("requires", "system", to="Plan9"), "was compiled for Plan9"),
    "other machine": (field("requires", "machine", to="pdp11"), "pdp11, this machine is"),
    "missing instructions": (
        field("requires", "isa", to=["avx2048"]),
        "this CPU lacks avx2048; export again on this machine, or with a lower",
    ),
    "other torch": (field("requires", "torch", to="1.0"), "was compiled with torch 1.0, this is torch 2."),
    "newer glibc": (field("requires", "glibc", to="99.1"), "needs glibc 99.1, this system has"),
    # references
    "unlisted package": (field("graphs", 0, "package", to="graphs/x.pt2"), "'graphs/x.pt2' is used but not in files"),
    "unlisted plan": (field("plans", "9", to="plans/9.json"), "'plans/9.json' is used but not in files"),
    "same name twice": (field("graphs", 1, "name", to="full"), "[graphs]: 'full' occurs 2 times"),
    "unknown site": (field("graphs", 0, "stores", to=["x"]), "[graphs.full]: site 'x' is not in sites"),
    "slots without inputs": (
        field("sites", 0, "slots", to=2),
        "[graphs.reuse]: combines need the inputs ['a@0', 'a@1'], it has ['a@0']",
    ),
    "store without output": (
        lambda f: edit(f, lambda m: m["graphs"][0]["outputs"].pop()),
        "[graphs.full]: stores 'a', which is not among its outputs",
    ),
    "unknown dtype": (field("graphs", 0, "inputs", 0, "dtype", to="load"), "'load' is not a dtype of this torch"),
    # plans
    "plan not to schema": (
        lambda f: ((f / "plans/2.json").write_text("{}"), relist(f)),
        "plans/2.json [name]: Field required",
    ),
    "not a number": (plan_saying("NaN"), "plans/2.json [evaluations.0.timestep]: Input should be a finite number"),
    "endless number": (plan_saying("1e999"), "plans/2.json [evaluations.0.timestep]: Input should be a finite number"),
    "empty plan": (plan(), "plans/2.json: has no evaluations"),
    "unknown variant": (
        plan(evaluation(variant="x")),
        "[evaluation 0]: variant 'x' is not in the artifact, it has full, reuse",
    ),
    "read before write": (
        plan(evaluation(variant="reuse", coefficients=(1.0,))),
        "[evaluation 0]: combines site 's' before any evaluation stored it",
    ),
    "reads the future": (
        plan(evaluation(update=Update(latents=(1.0, 1.0), outputs=()))),
        "the update reads 2 evaluations, there are 1 so far",
    ),
    "reads nothing": (
        plan(evaluation(update=Update(latents=(), outputs=()))),
        "the update reads 0 evaluations, there are 1 so far",
    ),
    "coefficients": (
        plan(evaluation(), evaluation(variant="reuse")),
        "[evaluation 1]: has 0 coefficients, variant 'reuse' takes 1",
    ),
    "coefficients without a dimension": (
        field("graphs", 1, "inputs", 2, "shape", to=[]),
        "[evaluation 1]: has 1 coefficients, variant 'reuse' takes a shape of []; export again",
    ),
    "tail that nothing was stored for": (
        tails(Tail(step=1, begin=1)),
        "plans/2.json [tail 1, evaluation 0]: combines site 's' before any evaluation stored it",
    ),
    "tail that reads the future": (
        tails(Tail(step=1, begin=1, head=(evaluation(update=Update(latents=(1.0, 1.0), outputs=())),))),
        "plans/2.json [tail 1, evaluation 0]: the update reads 2 evaluations, there are 1 so far",
    ),
    "tail of an unknown variant": (
        tails(Tail(step=1, begin=1, head=(evaluation(variant="x"),))),
        "plans/2.json [tail 1, evaluation 0]: variant 'x' is not in the artifact, it has full, reuse",
    ),
    "tail with coefficients": (
        tails(Tail(step=1, begin=1, head=(evaluation(coefficients=(1.0,)),))),
        "plans/2.json [tail 1, evaluation 0]: has 1 coefficients, variant 'full' takes 0",
    ),
    "tail without a beginning": (
        tails(Tail(step=1, begin=1, head=(evaluation(),))),
        "plans/2.json [tail 1]: has no marginal to begin with; export again",
    ),
    "tail behind the end": (
        tails(Tail(step=1, begin=2, head=())),
        "plans/2.json [tail 1]: begins at evaluation 2, the plan has 2; export again",
    ),
    "tail at the start": (tails(Tail.model_construct(step=1, begin=0)), "2.json [tails.0.begin]: Input should be"),
    "tail that leaves out nothing": (tails(Tail.model_construct(step=0, begin=1)), "2.json [tails.0.step]: Input"),
    "tail that leaves out all": (
        tails(Tail(step=2, begin=1, head=(evaluation(),))),
        "plans/2.json [tail 2]: leaves out 2 steps, the plan has 2; export again",
    ),
    "tail with a long head": (
        tails(Tail(step=1, begin=1, head=(evaluation(), evaluation()))),
        "plans/2.json [tail 1]: its head has 2 evaluations, 1 are left; export again",
    ),
    "tail listed twice": (
        tails(*2 * (Tail(step=1, begin=1, head=(evaluation(),)),)),
        "plans/2.json [tail 1]: occurs 2 times; export again",
    ),
    # weights
    "short weights": (short_safetensors, "denoiser.safetensors: expected safetensors, but"),
    "key in two files": (twice_stored, "key 'denoiser.w' is in another weight file too"),
    "permuted vector": (
        field("channels_last", to=["denoiser.w"]),
        "[channels_last]: 'denoiser.w' is not a stored tensor [N, H, W, C]",
    ),
    "pairs of one": (
        field("complex", to=["denoiser.w"]),
        "[complex]: 'denoiser.w' is not a stored tensor [..., 2]",
    ),
    "weight in no file": (
        field("graphs", 1, "constants", to={"w": "denoiser.v"}),
        "graph 'reuse': weight 'denoiser.v' is in no weight file (1 in all)",
    ),
    # packages
    "not a zip": (not_a_zip, "denoiser.pt2: expected a .pt2 package, but File is not a zip file"),
    "not a library": (package(so="text"), "a.wrapper.so: expected a shared library, but it does not begin like"),
    "overlapping members": (overlapping, "denoiser.pt2: expected a .pt2 package, but its members overlap"),
    "zip slip": (
        member("denoiser/data/aotinductor/full/../../../../x"),
        "has a name that could leave the package's folder; do not open",
    ),
    "absolute member": (member("/tmp/x"), "member '/tmp/x' has a name that could leave the package's folder"),
    "backslash member": (member("denoiser\\x"), "has a name that could leave the package's folder"),
    "member twice": (member("denoiser/data/aotinductor/full/a.wrapper.so"), "a.wrapper.so' occurs twice"),
    "linked member": (symlink_member(), "b.json' is a symbolic link"),
    "compressed member": (compressed_member(), "x.json' is compressed or encrypted"),
    "source code": (member("denoiser/data/aotinductor/full/a.cpp"), "a.cpp' is source code or compile flags"),
    "compile flags": (
        member("denoiser/data/aotinductor/full/a_compile_flags.json"),
        "flags.json' is source code or compile flags",
    ),
    "other suffix": (member("denoiser/data/aotinductor/full/w.blob"), "w.blob' is not one of .so, .json, .cubin"),
    "no library": (member("denoiser/data/aotinductor/third/a.json"), "model 'third' must have one .so, it has 0"),
    "two libraries": (member("denoiser/data/aotinductor/full/b.so"), "model 'full' must have one .so, it has 2"),
    "model missing": (
        package(models=("full",)),
        "the manifest names the models full, reuse, the package has full; export again",
    ),
    "model too many": (package(models=("full", "reuse", "spy")), "the package has full, reuse, spy"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("rule", RULES)
def test_it_is_refused_in_words_before_anything_is_opened(paper, never_opened, rule):
    damage, words = RULES[rule]
    damage(paper)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(paper)
    assert words in str(caught.value)


def test_the_undamaged_one_gets_as_far_as_its_machine_code(paper, never_opened):
    with pytest.raises(AssertionError, match=r"a\.wrapper\.so was opened"):
        open_artifact(paper)


def test_all_problems_are_told_at_once(paper, never_opened):
    field("requires", "torch", to="1.0")(paper)
    field("requires", "isa", to=["avx2048"])(paper)
    listed("../x")(paper)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(paper)
    assert len(str(caught.value).splitlines()) == 3
    assert all(line.startswith(f"{paper}: ") for line in str(caught.value).splitlines())


def test_without_hashing_weights_their_content_is_not_read_twice(paper, never_opened):
    flipped("weights/denoiser.safetensors")(paper)
    with pytest.raises(AssertionError, match="was opened"):
        open_artifact(paper, trust="size")


def test_code_is_hashed_always(paper, never_opened):
    flipped(PACKAGE)(paper)
    with pytest.raises(ArtifactError, match="sha256 is"):
        open_artifact(paper, trust="size")


def test_a_file_in_place_of_a_folder_is_named(paper, never_opened):
    with pytest.raises(ArtifactError, match="expected an artifact folder, found a file"):
        open_artifact(paper / "manifest.json")


def test_a_report_may_lie_beside(paper, never_opened):
    (paper / "reports/times.json").write_text("{}")
    with pytest.raises(AssertionError, match="was opened"):
        open_artifact(paper)


def test_what_is_not_machine_code_is_an_error_of_ours(paper, tmp_path):
    with pytest.raises(ArtifactError, match=r"a\.wrapper\.so: .*AOTInductor, but .*; export again"):
        open_artifact(paper, cache_dir=tmp_path / "cache")
