"""The page of `prebake report`: what it says is what the files say, and it holds everything itself."""

from __future__ import annotations

import html
import io
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from prebake.exporter.html_report import plan_strip, plots, summary, svg, timing
from prebake.exporter.html_report.build import build_page, write_page
from prebake.exporter.html_report.facts import PageFacts, ReportOptions, find_layer, gather_facts
from prebake.exporter.progress import Progress
from prebake.exporter.verify import picture_sheet as sheet
from prebake.exporter.verify.replayer import DrawnPicture, GraphCall
from prebake.runtime import ArtifactError
from prebake.runtime.manifest import read_manifest
from prebake.runtime.plan import DenoiserCall as PlanCall
from prebake.runtime.plan import Plan
from support import paper_artifact as paper
from support.paper_report import NO_TIMES, Tags, described, drawn_row, timed, verify_on_paper, words

HOSTILE = "<script>alert(1)</script>\"'&`$x$"


# --- pictures, in and out of the sheet ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 64, 224])
def test_pictures_come_out_of_a_sheet_as_they_were_drawn(side):
    row = drawn_row(HOSTILE, side)
    file = io.BytesIO()
    sheet.save_sheet([drawn_row("another", side), row], [paper.PLAN], file)
    _, shown = sheet.read_sheet(file)
    assert (shown.prompt, shown.seed) == (HOSTILE, 0)
    ours, difference, db = shown.plans["2"]
    for image, tensor in ((shown.eager, row.eager[2].image), (ours, row.plans["2"].image)):
        expected = (tensor[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
        assert image.tobytes() == expected.numpy().tobytes()
    assert difference.getpixel((3, 3)) == (204, 204, 204)  # 8 x 0.1 of 255
    assert db == pytest.approx(20.0, abs=1e-4)  # of a difference of 0.1 everywhere


def test_a_larger_picture_comes_out_as_it_was_shown():
    file = io.BytesIO()
    sheet.save_sheet([drawn_row(side=300)], [paper.PLAN], file)
    assert sheet.read_sheet(file)[0].eager.size == (sheet.MAX_PICTURE_HEIGHT, sheet.MAX_PICTURE_HEIGHT)


def sheet_that_says(folder: Path, said: str | None) -> None:
    verify_on_paper(folder, [drawn_row()])
    chunk = sheet.PngInfo()
    if said is not None:
        chunk.add_itxt(sheet.PNG_CHUNK, said)
    Image.new("RGB", (50, 50)).save(folder / "reports/verify.png", pnginfo=chunk)


@pytest.mark.parametrize(
    "said", ["no json", "{}", '{"cell": [9999, 9], "enlarged": 1, "plans": [], "rows": [["a", 0, []]]}']
)
def test_another_picture_is_no_sheet(folder, said):
    sheet_that_says(folder, said)
    with pytest.raises(ArtifactError, match=r"verify\.png: expected a sheet .*; write it anew"):
        gather_facts(folder, NO_TIMES, Progress())


def test_a_sheet_of_before_it_said_what_its_cells_show_leaves_the_pictures_out(folder):
    sheet_that_says(folder, None)
    said = words(build_page(gather_facts(folder, NO_TIMES, Progress()))[0])
    assert "No pictures: the verification kept none one by one" in said
    assert "41.2 dB" in said


def test_a_file_that_is_no_picture_is_refused_by_name(folder):
    verify_on_paper(folder, [drawn_row()])
    (folder / "reports/verify.png").write_bytes(b"not a picture")
    with pytest.raises(ArtifactError, match=r"verify\.png"):
        gather_facts(folder, NO_TIMES, Progress())


# --- what is said ---------------------------------------------------------------------------------------------------


def test_what_was_not_measured_is_said_and_has_no_figures(bare):
    page, pngs = build_page(bare)
    said = words(page)
    assert "No pictures, no closeness and no errors" in said
    assert "made with --no-timing" in said
    ids = {attributes.get("id") for tag, attributes in Tags(page).tags if tag == "section"}
    assert ids == {"plan", "cost", "use", "contents"}
    assert set(pngs) == {"plan-2", "cost"}
    assert "dB" not in said


def test_figures_of_the_verification_are_on_the_page(folder):
    verify_on_paper(folder, [drawn_row()])
    page, pngs = build_page(timed(gather_facts(folder, NO_TIMES, Progress())))
    said = words(page)
    for figure in (
        "2.12×",
        "41.2 dB",
        "the worst 33.5",
        "0.9900",
        "1.00e-02",
        "2.00e-01",
        "1.06 s",
        "a CPU, 3 threads",
    ):
        assert figure in said
    assert "The moon was not weighed." in said
    assert "made with --no-timing" not in said
    assert set(pngs) == {"plan-2", "cost", "errors", "stages", "steps", "pictures"}
    assert "21 ms" in said  # the median of 20, 21 and 22
    assert "2 ± 0" in said  # the text encoder
    sections = {attributes.get("id") for tag, attributes in Tags(page).tags if tag == "section"}
    linked = {a["href"] for tag, a in Tags(page).tags if tag == "a"}
    assert linked == {f"#{name}" for name in sections}


def test_hashes_and_sizes_are_the_manifests(bare, folder):
    said = words(build_page(bare)[0])
    for entry in read_manifest(folder).files:
        assert entry.path in said
        assert entry.sha256 in said
    assert bare.manifest_sha256 in said


def test_a_missed_threshold_is_said(folder):
    verify_on_paper(folder, [drawn_row()], passed=False, missed=["plan '2': psnr_db is 1"])
    said = words(build_page(gather_facts(folder, NO_TIMES, Progress()))[0])
    assert "Missed plan '2': psnr_db is 1" in said


def test_the_worst_is_not_taken_for_a_number(folder):
    """NaN, as `report.format_json` writes it, is shown and does not stop the plot."""
    figures = described()["plans"]
    figures["2"]["relative_error"]["max_per_evaluation"] = ["nan", "inf"]
    verify_on_paper(folder, [drawn_row()], plans=figures)
    assert "nan" in words(build_page(gather_facts(folder, NO_TIMES, Progress()))[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"model": "m", "pipeline": "P", "sha256": "1" * 64}}, "is about model 'm' with sha256 111111111111"),
        ({"plans": {"2": described()["plans"]["2"] | {"evaluations": ["full", "full"]}}}, "plan '2' is another one"),
        ({"plans": {"2": {}}}, r"\[plans\.2\."),
    ],
)
def test_a_verification_of_something_else_is_refused(folder, changes, said):
    verify_on_paper(folder, [drawn_row()], **changes)
    with pytest.raises(ArtifactError, match=said):
        gather_facts(folder, NO_TIMES, Progress())


def test_a_damaged_artifact_has_no_page(folder):
    (folder / "weights/denoiser.safetensors").write_bytes(
        b"0" * (folder / "weights/denoiser.safetensors").stat().st_size
    )
    with pytest.raises(ArtifactError, match="sha256"):
        gather_facts(folder, NO_TIMES, Progress())


def test_an_artifact_of_another_machine_has_a_page_and_no_times(folder):
    paper.edit(folder, lambda raw: raw["requires"].update(machine="s390x"))
    assert "Linux s390x" in words(build_page(gather_facts(folder, NO_TIMES, Progress()))[0])
    with pytest.raises(ArtifactError, match="--no-timing"):
        gather_facts(folder, ReportOptions(runs=2), Progress())


# --- what is drawn --------------------------------------------------------------------------------------------------


def test_equal_inputs_give_equal_bytes(folder, tmp_path):
    verify_on_paper(folder, [drawn_row()])
    pages = [
        write_page(tmp_path / name / "page.html", timed(gather_facts(folder, NO_TIMES, Progress())))
        for name in ("a", "b")
    ]
    assert [p.name for p in pages[0]] == [p.name for p in pages[1]]
    for one, other in zip(*pages, strict=True):
        assert one.read_bytes() == other.read_bytes()
    changed = gather_facts(folder, NO_TIMES, Progress())
    assert build_page(changed)[0].encode() != pages[0][0].read_bytes()  # canary: without times it is another page


def test_a_users_matplotlib_settings_change_nothing(bare):
    import matplotlib

    plain = build_page(bare)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        assert build_page(bare) == plain


def strip_plan(variants: str) -> Plan:
    first = paper.PLAN.evaluations[0]
    named = {"f": "full", "r": "reuse"}
    evaluations = tuple(first.model_copy(update={"step": i, "variant": named[v]}) for i, v in enumerate(variants))
    return paper.PLAN.model_copy(update={"steps": len(variants), "evaluations": evaluations})


def test_the_strip_joins_sites_that_do_the_same(folder):
    manifest = read_manifest(folder)
    actions = {"full": {}, "reuse": {"s": "combine", "blocks.0.attn": "combine", "blocks.1.attn": "zero"}}
    rows = plan_strip.strip_rows(strip_plan("frf"), manifest, actions)
    assert [(row.sites, row.actions) for row in rows] == [
        (("s", "blocks.0.attn"), ("compute", "combine", "compute")),
        (("blocks.1.attn",), ("compute", "zero", "compute")),
    ]
    assert plan_strip.StripRow(("a.0.attn", "a.1.attn"), ()).label == "2 sites, attn"
    assert plan_strip.StripRow(("a", "b"), ()).label == "2 sites, a to b"


def test_a_plan_without_sites_computes_everything(folder):
    paper.edit(folder, lambda raw: raw.update(sites=[]))
    manifest = read_manifest(folder)
    (row,) = plan_strip.strip_rows(strip_plan("ff"), manifest, {})
    assert (row.label, row.actions) == (plan_strip.WHOLE_DENOISER, ("compute", "compute"))


def test_every_cell_of_the_strip_is_drawn_in_the_colour_and_height_of_its_action(folder):
    plan, (row,) = strip_plan("frrf"), (plan_strip.StripRow(("s",), ("compute", "combine", "combine", "compute")),)
    with svg.matplotlib_settings(svg.LIGHT):
        (ax,) = plots.plot_plan_strip(svg.LIGHT, 400, plan, [row]).axes
    from matplotlib.colors import to_hex

    cells = sorted(
        (round(p.get_x() + p.get_width() / 2), to_hex(p.get_facecolor()), abs(p.get_height())) for p in ax.patches
    )
    full, half = 22.0, 11.0
    blue, orange = svg.LIGHT["blue"], svg.LIGHT["orange"]
    assert cells == [(0, blue, full), (1, orange, half), (2, orange, half), (3, blue, full)]
    assert plots.strip_text(plan, [row]) == (
        "Strip of plan 2, cache reuse, 4 evaluations. s: 2 computed, 2 predicted from kept values."
    )


def test_bars_are_as_long_as_the_figures(bare):
    flops = plots.picture_gflops(bare.manifest, bare.shown)
    assert flops == {"denoiser, plan 2": {}}  # the graphs on paper have no classes
    classes = {"matmul int8": 3 * 10**9}
    graphs = [
        g.model_copy(update={"name": name, "cost": g.cost.model_copy(update={"flops_by_class": classes})})
        for g in bare.manifest.graphs
        for name in (g.name, f"{g.name}.call2")
    ]
    twice = tuple(e.model_copy(update={"calls": (PlanCall(of=0), PlanCall(of=1))}) for e in paper.PLAN.evaluations)
    counted = bare.manifest.model_copy(update={"graphs": tuple(graphs)})
    called = paper.PLAN.model_copy(update={"evaluations": twice})
    assert plots.picture_gflops(counted, [called]) == {
        "denoiser, plan 2": {"matmul int8": 12.0}
    }  # two calls in two evaluations
    with svg.matplotlib_settings(svg.LIGHT):
        (ax,) = plots.plot_stacked_bars(svg.LIGHT, 400, {"a": {"x": 1.0, "y": 3.0}, "b": {"y": 2.0}}, "ms").axes
    widths = [(round(p.get_x(), 6), p.get_width()) for p in ax.patches if p.get_width()]
    assert widths == [(0.0, 1.0), (1.0, 3.0), (0.0, 2.0)]


def test_svg_takes_its_colours_from_the_page(bare):
    page, _ = build_page(bare)
    style = Path(summary.__file__).with_name("style.css").read_text()
    for block in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert not re.search(r"#[0-9a-fA-F]{6}\b", re.sub(r"#[\w-]*-[mp][0-9a-f]+", "", block))
        assert set(re.findall(r"var\(--(\w+)\)", block)) <= set(svg.LIGHT)
    light, dark = (dict(re.findall(r"--(\w+): (#\w+);", half)) for half in style.split("@media", 1))
    assert {name: light[name] for name in svg.LIGHT} == svg.LIGHT
    assert set(svg.LIGHT) <= set(dark)


def luminance(color: str) -> float:
    """Relative, as WCAG 2 has it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("half", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(half):
    """4.5 : 1 is what WCAG 2 asks of text (level AA)."""
    style = Path(summary.__file__).with_name("style.css").read_text().split("@media", 1)[half]
    colors = dict(re.findall(r"--([\w-]+): (#\w{6});", style))
    for ink in ("ink", "muted", "link", "good", "bad"):
        grounds = {"good": ["good-soft", "card"], "bad": ["bad-soft", "card"]}.get(ink, ["card", "soft", "page"])
        for ground in grounds:
            low, high = sorted((luminance(colors[ink]), luminance(colors[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


# --- safe, whole and for everybody ----------------------------------------------------------------------------------


def hostile(folder: Path) -> PageFacts:
    """Everything that a stranger's artifact can name is markup."""
    verify_on_paper(folder, [drawn_row(HOSTILE)], not_measured=[HOSTILE], machine={"cpu": HOSTILE})
    g = gather_facts(folder, NO_TIMES, Progress())
    changed = {
        "recipe": {"name": HOSTILE},
        "toolchain": {HOSTILE: HOSTILE},
        "source": g.manifest.source.model_copy(update={"model": HOSTILE, "pipeline": HOSTILE}),
        "layers": {HOSTILE: (HOSTILE, HOSTILE)},
    }
    strips = {name: (plan_strip.StripRow((HOSTILE,), row.actions),) for name, (row,) in g.strips.items()}
    return replace(g, name=HOSTILE, manifest=g.manifest.model_copy(update=changed), strips=strips)


def test_what_an_artifact_says_is_text(folder):
    page, _ = build_page(timed(hostile(folder)))
    parsed = Tags(page)
    assert parsed.open == []
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert HOSTILE in html.unescape("".join(parsed.text))


def test_the_page_loads_nothing_from_elsewhere(folder):
    verify_on_paper(folder, [drawn_row()])
    page, _ = build_page(timed(gather_facts(folder, NO_TIMES, Progress())))
    for tag, attributes in Tags(page).tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, name, value)
    assert re.findall(r"url\((?!#)[^)]*\)|@import", page) == []
    assert "default-src 'none'" in page


def test_every_picture_and_plot_has_words(folder):
    verify_on_paper(folder, [drawn_row()])
    parsed = Tags(build_page(timed(gather_facts(folder, NO_TIMES, Progress())))[0])
    pictures = [a["alt"] for tag, a in parsed.tags if tag == "img"]
    assert len(pictures) == 3
    assert all(pictures)
    plotted = [a for tag, a in parsed.tags if a.get("role") == "img"]
    assert len(plotted) == 5
    assert all(len(a["aria-label"] or "") > 30 for a in plotted)
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = [a["id"] for _, a in parsed.tags if a.get("id")]
    assert len(ids) == len(set(ids))


# --- times ----------------------------------------------------------------------------------------------------------


class Drawing:
    """Stands for an artifact that draws: a text encoder of 2 ms, evaluations of 1 and 3 ms, and 4 ms of other things."""

    def __init__(self, artifact):
        self.artifact, self.order = artifact, []

    def draw(self, prompt, seed, plan):
        self.order.append((plan.name, seed))
        calls = tuple(
            GraphCall(name, {}, {}, ms) for name, ms in (("text_encoder", 2.0), ("full", 1.0), ("reuse.call2", 3.0))
        )
        return DrawnPicture(torch.zeros(1), torch.zeros(1), 0.010, calls)

    def evaluations(self, drawn):
        return drawn.calls[1:]


def test_stages_add_up_to_the_picture_and_plans_take_turns(folder, monkeypatch):
    from types import SimpleNamespace

    fake = Drawing(SimpleNamespace(variants={"full", "reuse"}, device=torch.device("cpu")))
    monkeypatch.setattr(timing, "open_artifact", lambda folder, trust: None)
    monkeypatch.setattr(timing, "manifest_recipe", lambda folder, manifest: None)
    monkeypatch.setattr(timing, "open_replayer", lambda artifact, recipe, model: fake)
    monkeypatch.setattr(timing, "picture_prompts", lambda recipe: ("a",))
    plans = [paper.PLAN, paper.PLAN.model_copy(update={"name": "other"})]
    times = timing.time_plans(folder, read_manifest(folder), plans, 2, None, Progress())
    assert fake.order == [("2", 0), ("other", 0), ("2", 0), ("other", 0), ("2", 1), ("other", 1)]
    for t in times.plans.values():
        assert t.evaluations_ms == [(1.0, 3.0)] * 2
        for seconds, stages in zip(t.image_s, t.stages_ms, strict=True):
            assert stages == {"text_encoder": 2.0, timing.DENOISER_STAGE: 4.0, timing.REST_STAGE: pytest.approx(4.0)}
            assert sum(stages.values()) == pytest.approx(seconds * 1e3)
    assert plots.stage_names(times) == ["text_encoder", timing.DENOISER_STAGE, timing.REST_STAGE]


def test_layers_are_found_in_the_names_of_their_tensors(folder):
    layers = {"blocks.0.ff": ("int8", "x"), "blocks.0.ff.net": ("kept", "x")}
    manifest = read_manifest(folder).model_copy(update={"layers": layers})
    assert (
        find_layer("denoiser.transformer.blocks.0.ff.net.parametrizations.weight.original0", manifest)
        == "blocks.0.ff.net"
    )
    assert find_layer("denoiser.transformer.blocks.0.ff.bias", manifest) == "blocks.0.ff"
    assert find_layer("denoiser.blocks.10.ff.bias", manifest) is None
