"""What eager gave is kept: an interrupted comparison goes on, parts of several machines are put together, and either equals a whole one."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from prebake.exporter.cli.main import main
from prebake.exporter.progress import Progress
from prebake.exporter.verify.opening import load_reference
from prebake.exporter.verify.options import VerifyOptions, parse_part
from prebake.exporter.verify.reference import Reference
from prebake.exporter.verify.replayer import DrawnPicture, GraphCall
from prebake.exporter.verify.report import describe_outcome
from prebake.exporter.verify.results import EagerResults, RememberedReference, call_digest
from prebake.exporter.verify.verify import verify_artifact
from prebake.runtime.errors import RecipeError
from prebake.runtime.manifest import read_manifest
from support.verification import PROMPTS, rewrite_manifest

# --- on paper


class Counted:
    """An eager reference that counts what it is asked."""

    def __init__(self):
        self.asked, self.dtype = 0, torch.float32

    def cast_to_bfloat16(self):
        self.dtype = torch.bfloat16

    def draw(self, prompt, seed, steps):
        self.asked += 1
        return DrawnPicture(torch.full((1, 3, 2, 2), float(seed)).to(self.dtype), torch.zeros(1), 2.5)

    def evaluate(self, call):
        self.asked += 1
        return 2 * call.inputs["x"].to(self.dtype), 7.0

    def evaluate_variant(self, call):
        self.asked += 1
        return call.stored.get("a:0@0")


def call(x, stored=None, graph="full"):
    return GraphCall(graph, {"x": torch.tensor([x])}, {}, 1.0, stored or {})


def test_eager_is_asked_once_and_answers_to_the_bit(tmp_path):
    def ask(reference):
        first = reference.draw("a", 1, 8)
        answers = [first.image, first.latents, torch.tensor(first.seconds)]
        answers += [reference.evaluate(call(x))[0] for x in (0.1, 0.2)]
        return [*answers, reference.evaluate_variant(call(0.1, {"a:0@0": torch.ones(2)}))]

    real = Counted()
    once = ask(RememberedReference(real, EagerResults(tmp_path), "m"))
    again = ask(RememberedReference(real, EagerResults(tmp_path), "m"))
    assert real.asked == 4
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    ask(RememberedReference(real, EagerResults(tmp_path), "another model"))
    assert real.asked == 8


def test_bfloat16_is_another_answer_and_casts_only_when_it_is_asked(tmp_path):
    real = Counted()
    reference = RememberedReference(real, EagerResults(tmp_path), "m")
    assert reference.evaluate(call(0.1))[0].dtype == torch.float32
    reference.cast_to_bfloat16()
    assert real.dtype == torch.float32
    assert reference.evaluate(call(0.1))[0].dtype == real.dtype == torch.bfloat16
    assert RememberedReference(real, EagerResults(tmp_path), "m").evaluate_variant(call(0.1)) is None


def test_calls_differ_by_graph_inputs_and_stored_values():
    calls = [call(0.1), call(0.2), call(0.1, graph="reuse"), call(0.1, {"a:0@0": torch.ones(1)})]
    assert len({call_digest(c) for c in calls}) == 4
    assert call_digest(call(0.1)) == call_digest(calls[0])


def test_a_damaged_file_is_as_none(tmp_path):
    results = EagerResults(tmp_path)
    results.tensors("k", lambda: {"x": torch.ones(1)})
    (tmp_path / "k.safetensors").write_bytes(b"half")
    assert results.tensors("k", lambda: {"x": torch.zeros(1)})["x"].item() == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="choose another folder with --results"):
        EagerResults(tmp_path / "file").write("k", b"")


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "a/b", "1/2/3", "-1/2"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ValueError, match="such as 1/3"):
        parse_part(text)
    assert parse_part("2/3") == (2, 3)


def test_a_part_needs_a_folder(tiny_artifact, tiny_folder):
    with pytest.raises(RecipeError, match="name a folder for it with --results"):
        verify_artifact(tiny_artifact, VerifyOptions(True, str(tiny_folder), part=(1, 2)), Progress())


# --- the tiny artifact


TIMES = {"image_s", "evaluation_ms", "speedup", "predicted_s", "time_share_percent", "compared", "machine", "seconds"}


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.fixture
def verify(copied, tiny_folder, monkeypatch, tmp_path):
    """Verifies the copied artifact with two prompts and gives its figures; `verify.asked` counts what eager was asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(PROMPTS))
    asked = SimpleNamespace(count=0, stop=None)

    def counting(own):
        def counted(self, *args):
            if asked.count == asked.stop:
                raise KeyboardInterrupt
            asked.count += 1
            return own(self, *args)

        return counted

    for name in ("draw", "evaluate", "evaluate_variant"):
        monkeypatch.setattr(Reference, name, counting(getattr(Reference, name)))

    def verified(stop=None, **choices):
        asked.count, asked.stop = 0, stop
        options = VerifyOptions(True, str(tiny_folder), lines, seeds=1, budget="full", **choices)
        figures = describe_outcome(*verify_artifact(copied, options, Progress()))
        return without_times(json.loads(json.dumps(figures)))

    verified.asked = asked
    return verified


def test_a_resumed_and_a_merged_comparison_equal_a_whole_one(verify, tmp_path):
    whole = verify()
    total = verify.asked.count
    with pytest.raises(KeyboardInterrupt):
        verify(stop=total // 2)
    assert verify() == whole
    assert verify.asked.count == total - total // 2
    assert verify() == whole
    assert verify.asked.count == total  # what was kept by itself goes when it is not needed any more
    for k in (1, 2):
        told = verify(results=tmp_path / f"machine-{k}", part=(k, 2))
        assert told["verdicts"] == []
        assert f"part {k} of 2 was drawn" in told["not_measured"][0]
        shutil.copytree(tmp_path / f"machine-{k}", tmp_path / "merged", dirs_exist_ok=True)
    assert verify(results=tmp_path / "merged") == whole
    assert verify.asked.count == 0


def test_what_was_exported_with_verify_later_is_settled_from_results(copied, tiny_folder, tmp_path, capsys):
    rewrite_manifest(copied, status="unverified", verification=None)
    arguments = ["--source", "--model", str(tiny_folder), "--results", str(tmp_path / "kept"), "--quiet"]
    assert main(["verify", str(copied), *arguments]) == 0, capsys.readouterr().err
    assert read_manifest(copied).status == "verified"
    assert list((tmp_path / "kept").glob("*.safetensors"))


def test_a_variant_in_eager_equals_the_compiled_one(replayer, tiny_artifact, tiny_folder):
    """At the same stored values, so that what the cache predicts wrongly is no error of it."""
    manifest = replayer.artifact.manifest
    from prebake.exporter.recipe.resolve import Recipe

    reference = load_reference(tiny_artifact, manifest, Recipe.model_validate(manifest.recipe), str(tiny_folder))
    plan = replayer.artifact.plans["8"]
    cached = [e for e, v in enumerate(plan.evaluations) if v.variant not in manifest.whole_graphs]
    calls = replayer.trace(PROMPTS[0], 0, plan, plan.steps, cached[:1])
    told = calls[cached[0]]
    difference = (reference.evaluate_variant(told) - told.outputs["sample"]).norm() / told.outputs["sample"].norm()
    assert difference < 0.03
    assert reference.evaluate_variant(calls[cached[1]]) is None  # its stored values were not asked for
