"""The page's first words: the figures in front, what is missing, the pictures, and the plan.

Nothing here draws or reads files. What was not measured has no cell that looks as if it was: it is a dash, and a sentence
in `page_gaps` says why.
"""

from __future__ import annotations

import base64
import io
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from ...runtime.manifest import Manifest
from ...runtime.plan import Plan
from ...runtime.text import folder_bytes, format_bytes
from ..verify.picture_sheet import DIFFERENCE_GAIN
from . import plots
from .elements import SafeMarkup, machine_text, seconds_text
from .facts import PageFacts
from .measurements import order_plans
from .plan_strip import ACTION_WORDS

SMALL_PIXELS = 160  # pixels: a picture below is enlarged with its pixels kept square


def default_plan(g: PageFacts) -> Plan:
    """The plan that a call uses where the caller names none."""
    return g.plans.get(str(g.manifest.defaults.num_inference_steps), g.shown[-1])


def subtitle(m: Manifest) -> str:
    d = m.defaults
    frames = f"{d.num_frames} frames of " if d.num_frames else ""
    recipe = f"recipe {m.recipe['name']} on " if isinstance(m.recipe.get("name"), str) else ""
    more = f" ({m.range})" if m.range else ""
    size = f"{frames}{d.width} × {d.height} pixels{more}, {d.num_inference_steps} steps"
    return f"{recipe}{m.source.title} ({m.source.pipeline}), {size}, compiled by {m.backend} for {m.requires.device}"


def summary_tiles(g: PageFacts) -> Iterator[dict[str, str]]:
    plan = default_plan(g)
    verified = g.verification.verified if g.verification else None
    figures = verified.plans.get(plan.name) if verified else None
    if verified and figures and figures.speedup:
        note = f"diffusers, float32, {plan.steps} steps; whole pictures, {machine_text(verified.machine)}"
        yield {"value": f"{figures.speedup:.2f}×", "what": "as fast as eager", "note": note}
    if figures and figures.near:
        near = figures.near
        note = f"mean of {near.pictures} pictures, the worst {near.psnr_db_min:.1f}"
        yield {"value": f"{near.psnr_db:.1f} dB", "what": "PSNR to eager's pictures", "note": note}
    if verified and figures and figures.accuracy_percent is not None:
        eager = verified.eager[plan.steps].accuracy_percent if plan.steps in verified.eager else None
        note = "by the model's checker" + ("" if eager is None else f"; eager {eager:.1f}%")
        yield {"value": f"{figures.accuracy_percent:.1f}%", "what": "of prompts drawn right", "note": note}
    share = flops_share(g.manifest, plan)
    whole = g.manifest.whole_graphs
    computed = sum(e.variant in whole for e in plan.evaluations)
    note = f"{computed} of {len(plan.evaluations)} evaluations compute everything"
    yield {"value": f"{100 * share:.0f}%", "what": "of the denoiser's arithmetic", "note": note}
    if g.times:
        what = "video" if g.manifest.defaults.num_frames else "picture"
        image = g.times.plans[plan.name].image_s
        note = f"median of {g.times.runs}, {machine_text(g.times.machine)}"
        yield {"value": seconds_text(statistics.median(image)), "what": f"a {what} here", "note": note}
    total = folder_bytes(g.manifest)["total"]
    yield {"value": format_bytes(total), "what": "on disk", "note": f"{len(g.manifest.files)} files"}


def flops_share(m: Manifest, plan: Plan) -> float:
    """The plan's FLOPs over those of as many evaluations of its largest variant."""
    flops = [m.graph(e.variant).cost.flops for e in plan.evaluations]
    return sum(flops) / (len(flops) * max(flops)) if max(flops) else 1.0


def page_gaps(g: PageFacts) -> Iterator[str]:
    """Sentences on what the page does not have."""
    if g.verification is None:
        yield (
            "No pictures, no closeness and no errors: the artifact has no verification in its reports/; "
            "`prebake report ARTIFACT --source` draws them anew."
        )
    elif not g.verification.shown:
        yield "No pictures: the verification kept none one by one; `prebake report ARTIFACT --source` draws them anew."
    if g.verification:
        yield from (f"{sentence[:1].upper()}{sentence[1:]}." for sentence in g.verification.verified.not_measured)
        lacking = [name for name in g.plans if name not in g.verification.verified.plans]
        if g.verification.verified.plans and lacking:
            yield f"No errors of plan {', '.join(lacking)}: the verification was of the others alone."
    if g.manifest.unverified:
        yield (
            f"Plan {', '.join(g.manifest.unverified)} was added since the artifact was verified; "
            "`prebake verify ARTIFACT --source` settles that."
        )
    if g.times is None:
        yield "No times of stages and evaluations: the page was made with --no-timing."
    if g.signed:
        yield "Whose signature it is: `prebake verify ARTIFACT --signature` holds it against a public key."


def pictures_section(g: PageFacts) -> dict[str, Any] | None:
    if not g.verification or not g.verification.shown:
        return None
    when = "when this page was made" if g.has_new_pictures else "when the artifact was verified"
    rows = []
    for shown in g.verification.shown:
        small = ' class="small"' if shown.eager.height < SMALL_PIXELS else ""
        of = [{"name": p, "label": plan_label(g.plans[p]), "picture": data_uri(a), "difference": data_uri(d), "psnr": f"{db:.1f} dB"} for p, (a, d, db) in shown.plans.items() if p in g.plans]  # fmt: skip
        rows.append({"prompt": shown.prompt, "seed": shown.seed, "eager": data_uri(shown.eager), "plans": of, "small": SafeMarkup(small)})  # fmt: skip
    said = (
        f"Drawn {when}, by the pipeline in float32 and by the artifact from the same noise. Below each is its difference from "
        f"eager's, times {DIFFERENCE_GAIN}: black is equal. The pictures with the lowest PSNR of all that were drawn come first. PSNR is from before rounding to 8 bits, and 120 dB is equal."
    )
    return {"rows": rows, "gain": DIFFERENCE_GAIN, "said": said}


def plan_label(plan: Plan) -> str:
    return "artifact" if plan.cache == "none" else f"artifact, cache {plan.cache}"


def data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def plan_section(g: PageFacts) -> dict[str, Any]:
    """Strips are the caller's to draw: `strips` names the plans."""
    cached = [p for p in order_plans(g) if p.cache != "none"]
    plain = [name for name, p in g.plans.items() if p.cache == "none"]
    used = {a for p in cached or g.shown[:1] for row in g.strips[p.name] for a in row.actions}
    said = "A plan is fixed at export: what every evaluation of the denoiser computes, and what it predicts from values kept before. "
    if cached and plain:
        said += f"{computing_phrase('Plan', plain)} everything at every step, and {'is' if len(plain) == 1 else 'are'} not drawn here."
    key = [
        {"said": ACTION_WORDS[action], "color": color, "tall": round(100 * tall)}
        for action, (color, tall) in plots.ACTION_STYLES.items()
        if action in used
    ]
    return {"said": said, "key": key, "strips": cached or g.shown[:1]}


def computing_phrase(what: str, names: Sequence[str]) -> str:
    return f"{what} {names[0]} computes" if len(names) == 1 else f"{what}s {', '.join(names)} compute"


def strip_sentence(g: PageFacts, plan: Plan) -> str:
    counts = Counter(e.variant for e in plan.evaluations)
    shares = {v: variant_share(g.manifest, v, plan) for v in counts}
    parts = [f"{n} × variant {v} ({shares[v]:.3g}% of the full FLOPs)" for v, n in counts.items()]
    more = len(g.strips[plan.name]) - plots.MAX_STRIP_ROWS
    cut = f" {more} more rows are not drawn." if more > 0 else ""
    return f"{plan.scheduler}, {len(plan.evaluations)} evaluations: {', '.join(parts)}.{cut}"


def variant_share(m: Manifest, variant: str, plan: Plan) -> float:
    largest = max(m.graph(v).cost.flops for v in plan.variants())
    return 100 * m.graph(variant).cost.flops / largest if largest else 100.0
