"""SDXL's tiny pipelines, called as diffusers calls them, and with other schedulers."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image, ImageDraw

from prebake.exporter.caches import Decision, Schedule
from prebake.exporter.families.picture import Size, example_picture
from prebake.exporter.plan import join_plan
from prebake.exporter.plan.sampler import tabulate_scheduler, tabulate_tails
from prebake.runtime.pipeline import Pipeline
from prebake.runtime.replay import tabulate_plan
from support.family_parity import (
    PROMPTS,
    as_kind,
    eager,
    ours,
)

SIZE = Size(32, 32, 16)
TWO = list(PROMPTS[:2])
OTHER = example_picture(Size(32, 32, 0), 4)
MASK = Image.new("L", (32, 32))
ImageDraw.Draw(MASK).rectangle((8, 4, 23, 19), fill=255)


def works(ability: str, *names: str):
    """For the docs' table: the test shows this ability, of the base where no names are given."""

    def marked(test):
        for name in names or ("sdxl",):
            test = pytest.mark.works(name, ability)(test)
        return test

    return marked


def as_called(kind: type, prompt, *, model: str = "sdxl", **call) -> torch.Tensor:
    """diffusers' latents of another pipeline class around the same model, eight steps."""
    usual = {"num_inference_steps": 8, "guidance_scale": 5.0, "output_type": "latent"}
    return as_kind(kind, eager(model))(prompt=prompt, **{**usual, **call})[0]


from_picture = partial(as_called, StableDiffusionXLImg2ImgPipeline)
painted = partial(as_called, StableDiffusionXLInpaintPipeline, height=32, width=32)


def plain(model: str) -> dict:
    """What a pipeline has besides its components, as far as an export asks."""
    return {"config": eager(model).config, "vae_scale_factor": eager(model).vae_scale_factor}


@contextmanager
def scheduled(name: str, *models: str):
    """The eager pipelines with that scheduler."""
    pipes = [eager(model) for model in models or ("sdxl",)]
    usual = [pipe.scheduler for pipe in pipes]
    for pipe in pipes:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    try:
        yield
    finally:
        for pipe, scheduler in zip(pipes, usual, strict=True):
            pipe.scheduler = scheduler


@functools.cache
def tables(name: str):
    """The scheduler's table for eight steps, and those of its later starts."""
    scheduler = getattr(diffusers, name).from_config(eager("sdxl").scheduler.config)
    return tabulate_scheduler(scheduler, 8), tabulate_tails(scheduler, 8)


def planned(model: str, name: str) -> Pipeline:
    """The same artifact with that scheduler's plan: graphs know no scheduler."""
    pipe = ours(model)
    whole, tails = tables(name)
    schedule = Schedule((), tuple(Decision() for _ in whole.updates))
    plan = join_plan("8", 8, "none", whole, schedule, {(): "full"}, tails)
    artifact = replace(
        pipe.artifact, plans={"8": plan}, tables={"8": tabulate_plan(plan, pipe.artifact.device)}, _tables={}
    )
    return Pipeline(artifact)
