"""Plans that begin in the middle, against the loops of diffusers' image-to-image and inpainting pipelines."""

from __future__ import annotations

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from prebake.exporter.caches import Fora, NoCache, PyramidAttentionBroadcast, TaylorSeer
from prebake.exporter.package.folder import write_plans
from prebake.exporter.plan import make_plans
from prebake.exporter.plan.sampler import MAX_HISTORY, SchedulerTable, tabulate_scheduler, tabulate_tails
from prebake.exporter.sites.layout import Layout, Place
from prebake.runtime.artifact import Artifact
from prebake.runtime.errors import ExportError, RequestError
from prebake.runtime.manifest import Cost, Graph, Site
from prebake.runtime.plan import Evaluation, Plan, Tail, Update
from prebake.runtime.replay import DenoiserVariant, replay, tabulate_plan
from support.scheduler_cases import CASES, FLOW, KARRAS, SD, UNCLIPPED, Case, flux, name, relative_error, replayed

STEPS = 8
STARTS = (1, 2, 3, 5, 7)
PICTURE_CASES = (
    Case("DDIMScheduler", {**UNCLIPPED, **SD, "steps_offset": 1, "set_alpha_to_one": False}),
    Case("DDIMScheduler", {**UNCLIPPED, **SD, "steps_offset": 1}, step={"eta": 0.5}),
    Case("PNDMScheduler", {**SD, "skip_prk_steps": True, "steps_offset": 1}),
    Case("EulerDiscreteScheduler", {**SD, "timestep_spacing": "leading", "steps_offset": 1}),
    Case("EulerAncestralDiscreteScheduler", SD),
    Case("DPMSolverMultistepScheduler", SD),
    Case("DPMSolverMultistepScheduler", KARRAS),
    Case("DPMSolverMultistepScheduler", {**SD, "solver_order": 3}),
    Case("DPMSolverMultistepScheduler", {**KARRAS, "algorithm_type": "sde-dpmsolver++"}),
    Case("UniPCMultistepScheduler", SD),
    Case("UniPCMultistepScheduler", {**SD, "solver_order": 3}),
    Case("UniPCMultistepScheduler", FLOW),
    Case("HeunDiscreteScheduler", SD),
    Case("KDPM2DiscreteScheduler", SD),
    Case("LMSDiscreteScheduler", SD),
    Case("DDPMScheduler", {**UNCLIPPED, **SD, "steps_offset": 1}),
    Case("LCMScheduler", SD),
    Case("CogVideoXDPMScheduler", UNCLIPPED),
    Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    Case("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, flux),
    Case("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
)


def tables_of(case: Case, n: int = STEPS) -> tuple[SchedulerTable, dict[int, SchedulerTable]]:
    arguments = {"step_kwargs": case.step, **case.schedule(n)}
    return tabulate_scheduler(case.build(), n, **arguments), tabulate_tails(case.build(), n, **arguments)


def plan_of(case: Case, cache: Any = None, n: int = STEPS) -> Plan:
    table, tails = tables_of(case, n)
    return make_plans(cache or NoCache(), LAYOUT, {n: table}, tails={n: tails}).plans[0]


def noised(scheduler: Any, x0: torch.Tensor, noise: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The forward process with the call of pipeline_stable_diffusion_img2img.py, or of pipeline_flux_img2img.py."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x0, at, noise)
    return scheduler.add_noise(x0, noise, at)


def picture_loop(case: Case, left_out: int, x0: Any, noise: Any, outputs: Any, draws: Any, monkeypatch: Any) -> Any:
    """`get_timesteps`, `prepare_latents` and the loop of diffusers' pipelines, in float64.

    Gives the latents at the start, those after each step, and what inpainting puts where the picture is kept, which it
    asks for after each step but the last (pipeline_stable_diffusion_inpaint.py, pipeline_flux_inpaint.py).
    """
    scheduler, schedule = case.build(), case.schedule(STEPS)
    scheduler.set_timesteps(**({} if "sigmas" in schedule else {"num_inference_steps": STEPS}), **schedule)
    monkeypatch.setattr(torch, "float32", torch.float64)
    for key, value in vars(scheduler).items():
        if torch.is_tensor(value) and value.is_floating_point():
            setattr(scheduler, key, value.double())
    timesteps = scheduler.timesteps[left_out * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(left_out * scheduler.order)
    x = noised(scheduler, x0, noise, timesteps[:1])
    start, results, kept, result = x, [], [], (None,)
    for i, t in enumerate(timesteps):
        drawn = lambda *a, dtype=torch.float64, i=i, **k: draws[i].to(dtype)  # noqa: E731
        monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", drawn, raising=False)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        more: dict[str, Any] = dict(case.step)
        if case.scheduler == "CogVideoXDPMScheduler":  # pipeline_cogvideox_video2video.py
            more |= {"old_pred_original_sample": result[-1], "timestep_back": timesteps[i - 1] if i > 0 else None}
        result = scheduler.step(outputs[i], timestep=t, sample=x, **more, return_dict=False)
        x = result[0]
        results.append(x)
        if i < len(timesteps) - 1:
            kept.append(noised(scheduler, x0, noise, torch.tensor([timesteps[i + 1]])))
    monkeypatch.undo()
    return start, results, kept


def random_run(evaluations: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    x0, noise, *rest = torch.randn(2 + 2 * evaluations, 1, 4, 3, 5, generator=generator, dtype=torch.float64)
    return x0, noise, torch.stack(rest[::2]), torch.stack(rest[1::2])


def at(evaluation: Evaluation, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    assert evaluation.marginal is not None
    image, eps = evaluation.marginal
    return image * x0 + eps * noise


def updates_of(plan: Plan) -> Any:
    """As much of a table as `replayed` reads."""
    return SimpleNamespace(updates=[e.update for e in plan.evaluations])


# A tail is the loop of the pipeline ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PICTURE_CASES, ids=name)
def test_a_tail_is_the_loop_of_an_image_to_image_pipeline(case, monkeypatch):
    whole = plan_of(case)
    for left_out in (0, *STARTS):
        tail = whole.tail(left_out)
        x0, noise, outputs, draws = random_run(len(tail.evaluations))
        start, results, kept = picture_loop(case, left_out, x0, noise, outputs, draws, monkeypatch)
        # all is float64 and of one formula: rounding only
        torch.testing.assert_close(at(tail.evaluations[0], x0, noise), start, rtol=1e-12, atol=1e-12)
        assert relative_error(replayed(updates_of(tail), outputs, draws, start), results) < 1e-9
        for evaluation, truth in zip(tail.evaluations[1:], kept, strict=True):
            torch.testing.assert_close(at(evaluation, x0, noise), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", PICTURE_CASES, ids=name)
def test_a_loop_that_begins_elsewhere_is_another_one(case, monkeypatch):
    """The canary: the same comparison, with the tail that begins a step later, or with one coefficient 0.1% off."""
    tail, later = plan_of(case).tail(3), plan_of(case).tail(4)
    x0, noise, outputs, draws = random_run(len(tail.evaluations))
    start, results, _ = picture_loop(case, 3, x0, noise, outputs, draws, monkeypatch)
    assert (at(later.evaluations[0], x0, noise) - start).abs().max() > 1e-3
    first = tail.evaluations[0].update
    wrong = first.model_copy(update={"latents": (first.latents[0] * 1.001,)})
    off = tail.evaluations[0].model_copy(update={"update": wrong})
    broken = tail.model_copy(update={"evaluations": (off, *tail.evaluations[1:])})
    assert relative_error(replayed(updates_of(broken), outputs, draws, start), results) > 1e-6


@pytest.mark.parametrize("case", PICTURE_CASES, ids=name)
def test_a_tail_is_a_plan_for_fewer_steps(case):
    whole = plan_of(case)
    assert whole.tail(0) is whole
    for left_out in range(1, STEPS):
        tail = whole.tail(left_out)
        assert (tail.steps, tail.init_noise_sigma, tail.tails) == (STEPS - left_out, 1.0, ())
        assert sorted({e.step for e in tail.evaluations}) == list(range(tail.steps))
        assert [e.timestep for e in tail.evaluations] == [e.timestep for e in whole.evaluations][
            -len(tail.evaluations) :
        ]
        assert tail.sigmas == whole.sigmas[len(whole.sigmas) - len(tail.sigmas) :]


def test_a_solver_without_history_shares_every_evaluation_with_the_whole_plan():
    heads = {case.scheduler: [len(t.head) for t in plan_of(case).tails] for case in PICTURE_CASES}
    memoryless = ("DDIM", "Euler", "EulerAncestral", "Heun", "KDPM2", "DDPM", "LCM", "FlowMatchEuler", "FlowMatchHeun")
    for scheduler, lengths in heads.items():
        if scheduler.removesuffix("Scheduler").removesuffix("Discrete") in memoryless:
            assert lengths == [0] * 7
    assert [len(t.head) for t in plan_of(Case("DPMSolverMultistepScheduler", SD)).tails] == [1] * 6 + [0]


# All of them, against the slow way ---------------------------------------------------------------------------------------


def coefficients(table: SchedulerTable) -> torch.Tensor:
    """[E, 2 HISTORY + 1]: latents, outputs and noise of each update, zeros where an update is shorter."""
    return torch.tensor(
        [
            [c for part in (u.latents, u.outputs) for c in (*part, *(0.0,) * (MAX_HISTORY - len(part)))] + [u.noise]
            for u in table.updates
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.scheduler != "LMSDiscreteScheduler"], ids=name)
def test_tail_tables_are_those_of_whole_probes(case):
    n = 12 if 20 in case.counts and not case.schedule(1) else case.counts[-1]
    whole = tabulate_scheduler(case.build(), n, step_kwargs=case.step, **case.schedule(n))
    if whole.marginals is None:
        with pytest.raises(ExportError, match=rf"^{case.scheduler} has no forward process"):
            tabulate_tails(case.build(), n, step_kwargs=case.step, **case.schedule(n))
        return
    assert torch.tensor(whole.marginals).isfinite().all()
    assert len(whole.marginals) == len(whole.updates)
    tails = tabulate_tails(case.build(), n, step_kwargs=case.step, **case.schedule(n))
    order = getattr(case.built, "order", 1)
    assert list(tails) == [s for s in range(1, n) if s * order < len(whole.updates)]
    for step, table in list(tails.items())[:: max(1, len(tails) // 4)]:
        slow = tabulate_scheduler(case.build(), n, begin=step * order, step_kwargs=case.step, **case.schedule(n))
        assert replace(table, updates=()) == replace(slow, updates=())
        ours, truth = coefficients(table), coefficients(slow)
        # rounding of the probes, and of the multiples of zero that `shortest` takes away
        assert ((ours - truth).abs().amax(1) <= 1e-10 * truth.abs().amax(1)).all()


def test_a_scheduler_whose_history_is_long_is_probed_to_the_end():
    """One that counts its steps: no evaluation of a tail is one of the whole loop, however late."""

    class Counting(diffusers.EulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            self.count = getattr(self, "count", 0) + 1
            return super().step(model_output * self.count, timestep, sample, return_dict=return_dict)

    scheduler = Counting(**SD)
    tails = tabulate_tails(scheduler, 20)
    for step in (1, 7, 19):
        slow = tabulate_scheduler(scheduler, 20, begin=step)
        assert tails[step].updates == slow.updates


# With a real pipeline ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """A seeded UNet and VAE, as small as they come; prompts are given as embeddings."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
    )
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    return {"unet": unet.eval(), "vae": vae.eval(), **dict.fromkeys(names), "requires_safety_checker": False}


class Watched:
    """A pipeline's scheduler, put under watch: `steps` are (timestep, output, sample, result) of every step, `noised` are
    (picture, noise, result) of every call of the forward process."""

    def __init__(self, scheduler: Any) -> None:
        self.steps, self.noised = [], []
        step, add_noise = scheduler.step, scheduler.add_noise

        @functools.wraps(step)  # with its signature: the pipeline asks whether it takes eta
        def stepped(output: torch.Tensor, t: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
            result = step(output, t, sample, **kwargs)
            self.steps.append((float(t), output.double(), sample.double(), result[0]))
            return result

        def noise_added(picture: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            self.noised.append((picture, noise, add_noise(picture, noise, timesteps)))
            return self.noised[-1][-1]

        scheduler.step, scheduler.add_noise = stepped, noise_added

    def error(self, evaluations: tuple[Evaluation, ...]) -> float:
        """The largest error of an update on what the pipeline had, relative to the latents' size."""
        errors = []
        for e, (_, _, latents, result) in enumerate(self.steps):
            u = evaluations[e].update
            x = sum(a * self.steps[e - k][2] for k, a in enumerate(u.latents))
            x = x + sum(b * self.steps[e - k][1] for k, b in enumerate(u.outputs))
            errors.append(((x - result).abs().max() / latents.abs().max()).item())
        return max(errors)


def called(pipe: Any, image: torch.Tensor, strength: float, **more: Any) -> Watched:
    pipe.set_progress_bar_config(disable=True)
    watched, generator = Watched(pipe.scheduler), torch.Generator().manual_seed(5)
    pipe(
        prompt_embeds=torch.randn(1, 4, 8, generator=generator),
        image=image,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=generator,
        output_type="latent",
        **more,
    )
    return watched


PIPELINE_CASES = [c for c in PICTURE_CASES if c.config.keys() >= SD.keys()]
# float32 latents of up to 16 times unit size, and coefficients of differences of log-SNRs (test_sampler.py): up to 2e-6
# was seen
FLOAT32 = 1e-5


@pytest.mark.parametrize("case", PIPELINE_CASES, ids=name)
@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_a_tail_begins_where_the_pipeline_does(case, strength, parts):
    """What the image-to-image pipeline really hands to its scheduler, and gets: begin, start and each step."""
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, scheduler=case.build())
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    watched = called(pipe, image, strength, eta=case.step.get("eta", 0.0))
    tail = plan_of(case).tail(STEPS - int(STEPS * strength))
    assert [e.timestep for e in tail.evaluations] == [t for t, *_ in watched.steps]
    ((picture, noise, start),) = watched.noised
    torch.testing.assert_close(at(tail.evaluations[0], picture, noise), start, rtol=FLOAT32, atol=FLOAT32)
    if not any(e.update.noise for e in tail.evaluations):
        assert watched.error(tail.evaluations) < FLOAT32


@pytest.mark.parametrize("case", PIPELINE_CASES, ids=name)
def test_inpainting_keeps_what_the_marginals_say(case, parts):
    """All that the inpainting pipeline asks of the forward process; and its steps, from latents that it has mixed."""
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts, scheduler=case.build())
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    mask = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
    watched = called(pipe, image, 0.75, mask_image=mask, height=16, width=16, eta=case.step.get("eta", 0.0))
    tail = plan_of(case).tail(2)
    assert len(watched.noised) == len(tail.evaluations)
    for evaluation, (picture, noise, result) in zip(tail.evaluations, watched.noised, strict=True):
        torch.testing.assert_close(at(evaluation, picture, noise), result, rtol=FLOAT32, atol=FLOAT32)
    # UniPC goes on from a sample that it has corrected itself, whatever it is given: its updates hold on a trajectory
    if case.scheduler != "UniPCMultistepScheduler" and not any(e.update.noise for e in tail.evaluations):
        assert watched.error(tail.evaluations) < FLOAT32


# Caches ------------------------------------------------------------------------------------------------------------------

LAYOUT = Layout(
    tuple(
        Place(f"transformer_blocks.{i}{child}", "", f"m.transformer_blocks.{i}{child}", kind, ("hidden_states",))
        for i in range(3)
        for child, kind in ((".attn", "attention"), ("", "block"))
    )
)
CACHES = {
    "fora": Fora(interval=3, start_step=1),
    "pab": PyramidAttentionBroadcast(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(50, 950)
    ),
    "taylorseer": TaylorSeer(cache_interval=3, disable_cache_before_step=2, max_order=1),
}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler"]
)
def test_a_cached_tail_computes_all_first_and_then_does_as_the_whole_plan(scheduler, cache):
    case = Case(scheduler, {**SD, **({"clip_sample": False} if "DDIM" in scheduler else {}), "skip_prk_steps": True})
    table, tails = tables_of(
        Case(scheduler, {k: v for k, v in case.config.items() if k in getattr(diffusers, scheduler)().config})
    )
    without = make_plans(cache, LAYOUT, {STEPS: table})
    planned = make_plans(cache, LAYOUT, {STEPS: table}, tails={STEPS: tails})
    assert planned.variants == without.variants
    assert planned.marks == without.marks
    cached, uncached = planned.plans
    assert len(cached.tails) == len(uncached.tails) == STEPS - 1
    assert len(cached.variants()) > 1
    for tail in cached.tails:
        whole, ours = cached.evaluations[tail.begin :], cached.tail(tail.step).evaluations
        assert ours[0].variant == "full"
        assert ours[0].coefficients == ()
        assert [(e.variant, e.coefficients, e.timestep) for e in ours[1:]] == [
            (e.variant, e.coefficients, e.timestep) for e in whole[1:]
        ]
        assert [e.update for e in ours] == [e.update for e in uncached.tail(tail.step).evaluations]


def test_a_cached_tail_replays():
    """Every slot is filled by the first evaluation, so a variant finds what it combines, from every start."""
    cached = plan_of(Case("DPMSolverMultistepScheduler", SD), CACHES["taylorseer"])
    sites = {f"s{i}": Site(name=f"s{i}", slots=2, tensors=(f"s{i}:0",)) for i in range(3)}
    seen: list[str] = []

    def graph(name: str, stores: bool) -> DenoiserVariant:
        def call(inputs: Any) -> dict[str, torch.Tensor]:
            seen.append(name)
            if not stores:
                assert {f"s{i}:0@{k}" for i in range(3) for k in range(2)} <= inputs.keys()
            fresh = {f"s{i}:0": inputs["hidden_states"] for i in range(3)} if stores else {}
            return {"sample": inputs["hidden_states"], **fresh}

        cost = Cost(flops=0, ops=0, constants=0, constants_bytes=0)
        own = {"stores" if stores else "combines": tuple(sites)}
        return DenoiserVariant(
            Graph(name=name, package="p", inputs=(), outputs=(), constants={}, cost=cost, **own), call
        )

    variants = {"full": graph("full", True), "reuse": graph("reuse", False)}
    for step in range(1, STEPS):
        seen.clear()
        tail = cached.tail(step)
        replay(tabulate_plan(tail, torch.device("cpu")), variants, sites, {}, torch.ones(1, 2, 3))
        assert seen == [e.variant for e in tail.evaluations]
        assert seen[0] == "full"


# The file and the artifact -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [NoCache(), *CACHES.values()], ids=["none", *CACHES])
def test_what_is_written_is_what_is_read(cache, tmp_path):
    written = plan_of(Case("UniPCMultistepScheduler", SD), cache)
    write_plans(tmp_path, [written])
    text = (tmp_path / "plans" / "8.json").read_text()
    assert Plan.model_validate_json(text) == written
    assert '"input_scale"' not in text  # 1.0 everywhere, which a reader assumes
    assert any(tail.head for tail in written.tails)


def test_a_tail_costs_what_differs_and_no_more(tmp_path):
    """A plan of DDIM for 50 steps names 49 starts in less than a fifth of its size."""
    written = plan_of(Case("DDIMScheduler", UNCLIPPED), n=50)
    write_plans(tmp_path, [written, written.model_copy(update={"name": "bare", "tails": ()})])
    size, bare = ((tmp_path / "plans" / f"{n}.json").stat().st_size for n in ("50", "bare"))
    assert bare < size < 1.2 * bare


def two_steps(*tails: Tail) -> Plan:
    e = Evaluation(step=0, variant="full", timestep=1000.0, update=Update(latents=(1.0,), outputs=(-0.5,)))
    later = e.model_copy(update={"step": 1, "timestep": 500.0})
    return Plan(name="2", steps=2, scheduler="Euler", evaluations=(e, later), tails=tails)


def test_a_start_that_a_plan_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(RequestError, match=r"^plan '2' cannot begin at step 1, .*image_to_image=true$"):
        two_steps().tail(1)
    with pytest.raises(RequestError, match=r"'2' cannot begin at step 2, .*choose another start"):
        two_steps(Tail(step=1, begin=1)).tail(2)


def test_variants_are_those_of_the_tails_too():
    head = two_steps().evaluations[1].model_copy(update={"variant": "other"})
    assert two_steps(Tail(step=1, begin=1, head=(head,))).variants() == ("full", "other")


def test_tables_of_a_tail_are_made_once():
    one = two_steps(Tail(step=1, begin=1))
    cpu = torch.device("cpu")
    manifest: Any = SimpleNamespace(pipeline={"timestep_scale": 0.001})
    artifact = Artifact(Path(), manifest, cpu, {}, {}, {"2": one}, {"2": tabulate_plan(one, cpu, 0.001)})
    assert artifact.tables_from("2", 0) is artifact.tables["2"]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: artifact.tables_from("2", 1), range(64)))
    assert len({id(tables) for tables in made}) == 1
    assert made[0].plan == one.tail(1)
    assert [t.tolist() for t in made[0].timesteps] == [[0.5]]
    with pytest.raises(RequestError, match="cannot begin at step 3"):
        artifact.tables_from("2", 3)
