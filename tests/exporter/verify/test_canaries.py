"""The canaries of the gate: an artifact that is broken a little misses it, on evaluations alone, and one that is whole does not.

Pictures would show less: the last latents of a random model change little with anything.
"""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from prebake.exporter.lower.aoti.kernels.operators import PANEL, pack_columns, unpack_columns
from prebake.exporter.progress import Progress
from prebake.exporter.verify import verify as verification
from prebake.exporter.verify.budget import Costs
from prebake.exporter.verify.verify import settle_verdict
from prebake.exporter.verify.weight_check import CODES, PACKED, PACKED_SCALES, SCALES
from prebake.runtime.errors import QualityError
from prebake.runtime.manifest import read_manifest
from support.verification import asking, rewrite_manifest

SHIPPED = {"evaluation_error": 3.0, "worst_evaluation_error": 5.0}
"""What `flux-fast` asks for."""


@pytest.fixture(autouse=True)
def slow_eager(monkeypatch):
    """As at real size: a picture in eager takes longer than the budget."""
    costs = Costs({}, 60.0, bfloat16=10.0)
    monkeypatch.setattr(
        verification,
        "measure_costs",
        lambda replayer, *_: replace(costs, variants=dict.fromkeys(replayer.variants, 1.0)),
    )


def settle(folder, tiny_folder):
    settle_verdict(folder, *asking(folder, tiny_folder, budget="6m", **SHIPPED), False, Progress())


def missed(folder, tiny_folder) -> str:
    rewrite_manifest(folder)
    with pytest.raises(QualityError) as refused:
        settle(folder, tiny_folder)
    return str(refused.value)


def change_weight(folder, ending, change) -> str:
    """One tensor of the denoiser is another one, and its hash fits; its name. An int8 weight, or its scale, has the names that the
    backend gives it: packed for its own kernels where the CPU runs these."""
    path = folder / "weights/denoiser.safetensors"
    weights = load_file(path)
    endings = (ending, ending.replace(CODES, PACKED).replace(SCALES, PACKED_SCALES))
    name = next(n for n in sorted(weights) if n.endswith(endings))
    save_file({**weights, name: change(weights[name]).contiguous()}, path)
    return name


def change_plan(folder, name, place):
    """The first number in that place of some evaluation is 1 % larger."""
    path = folder / read_manifest(folder).plans[name]
    plan = json.loads(path.read_text())
    *outer, last = place
    for evaluation in plan["evaluations"][2:]:
        table = evaluation
        for key in outer:
            table = table[key]
        value = table.get(last)
        if not value:
            continue  # no coefficients where everything is computed
        table[last] = [1.01 * value[0], *value[1:]] if isinstance(value, list) else 1.01 * value
        break
    path.write_text(json.dumps(plan))


def test_an_artifact_that_is_whole_passes(copied, tiny_folder):
    settle(copied, tiny_folder)
    report = json.loads((copied / "reports/verify.json").read_text())
    found = {(v["plan"], v["figure"]) for v in report["verdicts"]}
    figures = ("evaluation_error", "worst_evaluation_error", "plan_error")
    assert found == {("", "weight_error"), *((plan, figure) for plan in ("8", "8-uncached") for figure in figures)}


@pytest.mark.parametrize(
    ("ending", "change"),
    [
        ("transformer_blocks.0.attn.to_out.0.parametrizations.weight.original0", lambda w: w.roll(1, 0)),
        ("transformer_blocks.0.attn.to_out.0.parametrizations.weight.original1", lambda scale: scale * 2),
        ("norm_out.linear.weight", lambda w: -w),
    ],
    ids=["rows of one weight", "scale of one layer", "sign of one weight"],
)
def test_one_wrong_weight_or_scale_is_missed(copied, tiny_folder, ending, change):
    change_weight(copied, ending, change)
    sentences = missed(copied, tiny_folder)
    assert "plan '8-uncached': evaluation_error is " in sentences
    assert "raise verify.worst_evaluation_error" in sentences


def change_number(weight):
    """The same with one number of it a fiftieth of the largest away: far less than rounding does to an evaluation."""
    changed = weight.clone().flatten()
    changed[7] += changed.abs().max() / 50 if weight.is_floating_point() else 2
    return changed.view_as(weight)


def change_int8_number(weight):
    """The same of an int8 weight, plain or packed."""
    if weight.shape[1] % PANEL or len(weight) * PANEL > 1024:
        return change_number(weight)
    rows = weight.shape[1] // PANEL - 4
    return pack_columns(change_number(unpack_columns(weight, rows, len(weight) * PANEL)))


@pytest.mark.parametrize(
    ("ending", "change"),
    [
        ("transformer_blocks.0.attn.to_qkv.parametrizations.weight.original0", change_int8_number),
        ("single_transformer_blocks.1.proj_out.parametrizations.weight.original1", lambda scale: scale * 1.02),
        ("norm_out.linear.weight", change_number),
    ],
    ids=["int8 number", "scale", "number"],
)
def test_one_number_that_no_evaluation_shows_is_missed(copied, tiny_folder, ending, change):
    name = change_weight(copied, ending, change)
    sentences = missed(copied, tiny_folder)
    assert "weight_error is " in sentences
    named = name.replace(SCALES, CODES) if name.endswith(SCALES) else name
    named = f"{name.removesuffix(PACKED_SCALES)}{PACKED}" if name.endswith(PACKED_SCALES) else named
    assert f"{named} is not the model's: restore weights/" in sentences
    assert "evaluation_error" not in sentences


@pytest.mark.parametrize(
    ("plan", "place"),
    [
        ("8-uncached", ("update", "outputs")),
        ("8-uncached", ("update", "latents")),
        ("8", ("coefficients",)),
        ("8", ("timestep",)),
    ],
)
def test_one_coefficient_that_is_off_by_one_percent_is_missed(copied, tiny_folder, plan, place):
    change_plan(copied, plan, place)
    told = [s for s in missed(copied, tiny_folder).splitlines() if s.startswith(f"plan {plan!r}: plan_error is 0.01")]
    assert len(told) == 1
    assert f"expected at most 0.0001; restore plans/{plan}.json, or export again" in told[0]
