"""The engine: `Engine(pipe).submit("a red circle", seed=7).result()`, and requests that are there at once advance together.

An entry is one call of one graph: a job's opening, an evaluation, the decoder. Each runner of the artifact is a thread here, which takes
the next entry by `policy.py`, runs it, and puts its pictures back. So a short request overtakes a long one between two evaluations, and
a cancelled one is gone after the entry that runs. Pictures whose next entries name the same variant share its evaluation where the
artifact has a graph for as many, at whatever step, plan or guidance each of them is. What an entry computes is that of `replay.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from ..call.batches import stack_conditions
from ..drawing.drawing import CallGraphs, count_pictures, format_output
from ..drawing.request import REQUEST_ARGUMENTS, Request, RequestReader
from ..errors import RequestError
from ..finite import NonfiniteError, refuse_nonfinite_result, watch_latents
from ..manifest import PROLOGUE, STEP, Site
from ..pipeline import Pipeline
from ..process.default_device import CPU, default_device
from ..process.self_test import refuse_wrong_arithmetic
from ..replay import DenoiserVariant, Tensors, Trajectory, forecast_latents
from ..start import evaluation_callback
from .costs import CostTable
from .jobs import OPENING, Job, PartialCallback, PendingPictures, Picture, count_entries, picture_agenda
from .memory import default_budget, picture_bytes
from .policy import STRETCH, is_urgent, order_jobs

ENGINE_ARGUMENTS = (*REQUEST_ARGUMENTS, "partial_images", "on_partial")
EntryListener = Callable[[str, int, float, float], None]
"""Told of each entry after it ran: its graph, how many pictures shared it, the predicted and the measured seconds."""


@dataclass(frozen=True)
class Entry:
    """A call that a runner makes now: `graph`, for those pictures; for the opening of a job there are none yet."""

    graph: str
    job: Job
    pictures: tuple[Picture, ...] = ()

    @property
    def jobs(self) -> set[Job]:
        return {self.job, *(picture.job for picture in self.pictures)}


class Engine:
    """Draws the requests of one pipeline. It uses the artifact's runners; calls of the pipeline itself wait for their turn among them.

    `memory_bytes` bounds what opened requests hold between evaluations (default: a quarter of the device's memory): one that does not
    fit waits unopened. `stretch` is how many times as long as alone a request may take before it goes first. `on_entry` is told of each
    entry. `close`, or the end of a `with` block, draws what was submitted to its end; the pipeline stays open.
    """

    def __init__(
        self,
        pipe: Pipeline[Any],
        *,
        memory_bytes: int | None = None,
        stretch: float = STRETCH,
        on_entry: EntryListener | None = None,
    ):
        self.pipe = pipe
        self.artifact = pipe.artifact
        self.costs = CostTable(entry_flops(pipe))
        self._reader = RequestReader(self.artifact, pipe.families, ENGINE_ARGUMENTS)
        self._graphs = CallGraphs(self.artifact, pipe.families)
        self._budget = default_budget(pipe.device) if memory_bytes is None else memory_bytes
        self._stretch = stretch
        self._on_entry = on_entry
        self._jobs: list[Job] = []
        self._held_bytes = 0
        self._closed = False
        self._any_cancelled = False
        self._changed = threading.Condition()
        count = self.artifact.runners.count
        self._threads = [threading.Thread(target=self._work, daemon=True, name="prebake-engine") for _ in range(count)]
        for thread in self._threads:
            thread.start()

    # --- for those who ask ------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | list[str] | None = None,
        *,
        partial_images: int = 0,
        on_partial: PartialCallback | None = None,
        **arguments: Any,
    ) -> PendingPictures:
        """The pictures to come of a request by the pipeline's arguments, but without callbacks, `cancel` and `return_dict`.

        `on_partial(picture, k, image)` is called in the engine's thread with up to `partial_images` previews of each picture: what the
        decoder makes of the latents that the plan would end at, if the denoiser went on saying what it has said last. Raises
        RequestError for what the artifact was not exported for, as the pipeline's call does.
        """
        request = self._reader.read_all({"prompt": prompt, **arguments})
        return self._add(request, partial_images if on_partial else 0, on_partial)

    @property
    def queued_s(self) -> float:
        """Predicted seconds until what is here now is drawn."""
        with self._changed:
            return self._queued_s()

    @property
    def opened_count(self) -> int:
        """Requests that were opened."""
        return sum(job.pictures is not None or job.opening for job in list(self._jobs))

    @property
    def queued_count(self) -> int:
        """Requests that were not opened yet."""
        return len(self._jobs) - self.opened_count

    @property
    def held_bytes(self) -> int:
        """What opened requests hold, by their known sizes."""
        return self._held_bytes

    def close(self) -> None:
        """Takes no more requests, and returns when those that are here are drawn or cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, request: Request, partials: int, on_partial: PartialCallback | None) -> PendingPictures:
        family, count = request.family, count_pictures(request)
        decoder = None if request.output_type == "latent" else family.graph_name("vae_decoder")
        agenda = picture_agenda(request.plan, decoder, partials)
        left, nbytes = count_entries(agenda, count), count * picture_bytes(self.artifact.manifest, request)
        with self._changed:
            if self._closed or not self._threads[0].is_alive():  # or it is in a process that was forked
                raise RequestError(
                    f"{self.artifact.folder}: its engine was closed, or is another process's; make one here"
                )
            total = self.costs.total(left)
            future = PendingPictures(total, self._queued_s(), self._note_cancelled)
            job = Job(request, agenda, count, nbytes, time.monotonic(), self.costs, future, on_partial, total, left)
            self._jobs.append(job)
            self._changed.notify()
        return future

    def _queued_s(self) -> float:
        return sum(job.remaining_s for job in self._jobs) / len(self._threads)

    def _note_cancelled(self) -> None:
        with self._changed:
            self._any_cancelled = True
            self._changed.notify_all()

    # --- the threads ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """One runner: takes entries until the engine is closed and empty."""
        runners = self.artifact.runners
        with torch.no_grad(), default_device(CPU):
            while entry := self._take(wait=True):
                try:
                    with runners.one():
                        while entry:
                            self._run(entry)
                            entry = None if runners.waiting else self._take(wait=False)
                except Exception as e:  # the artifact was closed
                    if entry:
                        self._put_back(entry, dict.fromkeys(entry.jobs, e))

    def _take(self, *, wait: bool) -> Entry | None:
        """The next entry, marked as taken; None where there is none, and with `wait` where there will be none."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if entry := self._choose(time.monotonic()):
                    return entry
                if not wait or (self._closed and not self._jobs):
                    self._changed.notify_all()
                    return None
                self._changed.wait()

    def _choose(self, now: float) -> Entry | None:
        """The next entry of the job that the policy puts first; a job that waits unopened is opened before that where it comes before
        it, or where its pictures could share the evaluation."""
        ranked = order_jobs(self._jobs, now, self._stretch)
        if self._any_cancelled:
            ranked = [job for job in ranked if not job.future.cancelled()]
        ready = [picture for job in ranked for picture in job.ready()]
        job = self._find_unopened(ranked, now)
        if job and (
            not ready
            or ranked.index(job) < ranked.index(ready[0].job)
            or len(ready) < max(self._graphs.shared_batches(ready[0].agenda[ready[0].done]))
        ):
            job.opening, job.held_bytes = True, job.nbytes
            self._held_bytes += job.nbytes
            return Entry(OPENING, job)
        return self._join(ready) if ready else None

    def _find_unopened(self, ranked: list[Job], now: float) -> Job | None:
        """The first job that memory lets be opened. An urgent one that waits for it is waited for."""
        for job in ranked:
            if job.pictures is None and not job.opening:
                if not self._held_bytes or self._held_bytes + job.nbytes <= self._budget:
                    return job
                if is_urgent(job, now, self._stretch):
                    return None
        return None

    def _join(self, ready: list[Picture]) -> Entry:
        """The first picture's next entry, together with those of others of its size that call the same graph, as many as it takes at once.
        In an artifact of a range pictures of all sizes call one."""
        graph, family = ready[0].agenda[ready[0].done], ready[0].job.request.family
        size = family.height, family.width
        families = [(picture, picture.job.request.family) for picture in ready if picture.next == graph]
        same = [picture for picture, other in families if (other.height, other.width) == size]
        pictures = tuple(same[: max(batch for batch in self._graphs.shared_batches(graph) if batch <= len(same))])
        for picture in pictures:
            picture.busy = True
        return Entry(graph, ready[0].job, pictures)

    def _run(self, entry: Entry) -> None:
        """Runs the entry and puts it back. What it raises is what all of its requests get, what is wrong with one picture its own."""
        batch, seconds = max(len(entry.pictures), 1), 0.0
        predicted, began = self.costs.seconds(entry.graph, batch), time.perf_counter()
        failed: dict[Job, Exception] = {}
        try:
            with self._graphs.explain_memory():
                if entry.graph == OPENING:
                    self._open(entry.job)
                elif entry.graph in self._graphs.variants[1]:
                    failed = self._evaluate(entry.graph, entry.pictures)
                else:
                    self._decode(entry.pictures[0])
                if self.pipe.device.type == "cuda":  # what is queued behind it could not be overtaken any more
                    torch.cuda.current_stream(self.pipe.device).synchronize()
            seconds = time.perf_counter() - began
            if self._on_entry:
                self._on_entry(entry.graph, batch, predicted, seconds)
        except Exception as e:
            failed = dict.fromkeys(entry.jobs, e)
        self._put_back(entry, failed, seconds)

    def _open(self, job: Job) -> None:
        refuse_wrong_arithmetic()
        self.artifact.refuse_changed_weights()
        request = job.request
        start = self._graphs.begin(request)
        pictures = []
        for i in range(len(start)):
            group = self._graphs.group(request, start, slice(i, i + 1))
            trajectory = Trajectory(group.tables, group.inputs, group.latents, iter(group.noise))
            watch = watch_latents(request.plan, self.pipe.device, evaluation_callback(request.plan, group.blend, None))
            pictures.append(Picture(job, i, group, trajectory, watch, job.agenda))
        job.pictures = pictures

    def _evaluate(self, name: str, pictures: tuple[Picture, ...]) -> dict[Job, Exception]:
        """One evaluation of each picture by one call of the variant: inputs [B, ...] of their own [1, ...], and its outputs apart. The
        jobs whose picture came out wrong, and how."""
        variant, failed = self._graphs.variants[len(pictures)][name], {}
        together = stack_conditions([p.trajectory.evaluation_inputs(variant.graph) for p in pictures])
        results = split_rows(variant.call(together), len(pictures))
        for picture, result in zip(pictures, results, strict=True):
            try:
                advance_picture(picture, variant, self._graphs.sites, result)
            except NonfiniteError as e:
                failed[picture.job] = e
        return failed

    def _decode(self, picture: Picture) -> None:
        """The picture itself at the end of its plan, before that a partial one, which whoever asked is given."""
        request, trajectory = picture.job.request, picture.trajectory
        if trajectory.evaluation is None:
            refuse_nonfinite_result(request.plan, trajectory.latents)
            picture.final = self._graphs.decode(request.family, [trajectory.latents])
            return
        latents = forecast_latents(trajectory)
        if picture.group.blend:
            latents = picture.group.blend(len(request.plan.evaluations) - 1, latents)
        made = format_output(request.family, self._graphs.decode(request.family, [latents]), "pil")
        assert picture.job.on_partial
        if not picture.job.future.cancelled():
            picture.job.on_partial(picture.index, picture.partials, made[0])
        picture.partials += 1

    def _put_back(self, entry: Entry, failed: Mapping[Job, Exception], seconds: float = 0.0) -> None:
        """Takes the entry off its jobs' agendas. Jobs that are finished or failed leave."""
        with self._changed:
            if seconds:
                self.costs.measure(entry.graph, max(len(entry.pictures), 1), seconds)
            if entry.graph == OPENING:
                entry.job.opening = False
                entry.job.take_off(OPENING)
            for picture in entry.pictures:
                picture.busy = False
                picture.done += 1
                picture.job.take_off(entry.graph)
            ended = [job for job in entry.jobs if (job in failed or not +job.left) and self._remove(job)]
            self._changed.notify_all()
        for job in ended:
            settle(job, failed.get(job))

    def _drop_cancelled(self) -> None:
        """Lets go of cancelled jobs; of one that a runner is at later."""
        if not self._any_cancelled:
            return
        cancelled = [job for job in self._jobs if job.future.cancelled()]
        for job in cancelled:
            if not job.busy:
                self._remove(job)
                settle(job, None)
        self._any_cancelled = any(job.busy for job in cancelled)

    def _remove(self, job: Job) -> bool:
        """Lets go of the job; whether it was here."""
        if job not in self._jobs:
            return False
        self._jobs.remove(job)
        self._held_bytes -= job.held_bytes
        return True


def advance_picture(picture: Picture, variant: DenoiserVariant, sites: Mapping[str, Site], result: Tensors) -> None:
    """Takes the picture over an evaluation. Raises NonfiniteError."""
    trajectory = picture.trajectory
    trajectory.advance(variant.graph, sites, result)
    if picture.watch:
        replaced = picture.watch(trajectory.index - 1, trajectory.outputs[0], trajectory.latents)
        trajectory.latents = trajectory.latents if replaced is None else replaced


def settle(job: Job, error: Exception | None) -> None:
    """Gives the job's future what was drawn, or the error; nothing where it was cancelled."""
    if not job.future.set_running_or_notify_cancel():
        return
    if error is None:
        try:
            job.future.set_result(job_output(job))
            return
        except Exception as e:
            error = e
    job.future.set_exception(error)


def job_output(job: Job) -> Any:
    """What the caller gets of all pictures of the job."""
    request, pictures = job.request, job.pictures or []
    if request.output_type == "latent":
        finals = torch.cat([picture.trajectory.latents for picture in pictures])
        refuse_nonfinite_result(request.plan, finals)
    else:
        finals = torch.cat([picture.final for picture in pictures if picture.final is not None])
    return format_output(request.family, finals, request.output_type)


def split_rows(result: Tensors, count: int) -> list[Tensors]:
    """The outputs [count n, ...] of a shared call as [n, ...] for each picture. Copies, so that none keeps the others' memory."""
    if count == 1:
        return [result]
    rows = {name: tensor.chunk(count) for name, tensor in result.items()}
    return [{name: row[i].clone() for name, row in rows.items()} for i in range(count)]


def entry_flops(pipe: Pipeline[Any]) -> dict[str, int]:
    """The work of each entry for one picture, as the manifest has it. That of an opening are the text encoders, and what is computed
    before the loop."""
    flops = {graph.name: graph.cost.flops for graph in pipe.artifact.manifest.graphs}
    before_loop = {pipe.family_rules.graph_name(name) for name in (PROLOGUE, STEP)}
    opening = sum(n for name, n in flops.items() if name.startswith("text_encoder") or name in before_loop)
    return {**flops, OPENING: opening}
