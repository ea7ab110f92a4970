"""Mixed requests from many threads for a long time: memory, file descriptors and threads stay flat, and no picture changes.

    python benchmarks/soak.py artifacts/flux-fast-shapes --minutes 30

Requests differ in prompt, seed, number of images, cache, plan, guidance, output, callbacks, pictures to begin from where the
artifact takes them, and some are cancelled or fail. Every answer is compared, bit by bit, with what the same request gave
when nothing else ran. Every few seconds a line is written: seconds, requests, resident and proportional memory, memory of
the process alone, file descriptors, threads. Memory is flat when a line fitted to the samples of the second half
grows less over that half than `TOLERANCE_BYTES` and than four times what the samples scatter around it; exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prebake.runtime import Cancelled, RequestError, load
from prebake.runtime.pipeline import Pipeline

TOLERANCE_BYTES = 8 << 20
"""Bytes: what the allocator of threads that come and go moves by, a few arenas."""
SOAK_PROMPTS = ("a red circle", "a small green heart above a large pink square", "", "a blue star left of a red ring")
DISTINCT_REQUESTS = 48
"""Different requests; each is drawn alone first."""
REQUEST_KINDS = ("plain", "batch", "callback", "interrupted", "picture", "cancelled", "failing", "refused")


@dataclass(frozen=True)
class SoakRequest:
    """One call, and what it is about: `kind` is one of `REQUEST_KINDS`."""

    kind: str
    arguments: dict[str, Any]


def make_requests(pipe: Pipeline, count: int, seed: int = 0) -> list[SoakRequest]:
    """`count` requests of every kind that the artifact takes, the same for the same seed."""
    dice = random.Random(seed)
    kinds = [kind for kind in REQUEST_KINDS if kind != "picture" or pipe.family_rules.settings.picture]
    plans = [plan for plan in pipe.artifact.plans.values() if plan.name == str(plan.steps)]
    return [
        make_request(pipe, dice, kind, dice.choice(plans).steps)
        for kind in itertools.islice(itertools.cycle(kinds), count)
    ]


def make_request(pipe: Pipeline, dice: random.Random, kind: str, steps: int) -> SoakRequest:
    arguments: dict[str, Any] = {
        "prompt": dice.choice(SOAK_PROMPTS),
        "seed": dice.randrange(1000),
        "num_inference_steps": steps,
        "cache": dice.random() < 0.7,
        "output_type": dice.choice(("latent", "pt")),
    }
    if dice.random() < 0.5:
        arguments["guidance_scale"] = dice.choice((1.0, 2.5, 5.0))
    if kind == "batch":
        arguments["prompt"] = [arguments["prompt"], dice.choice(SOAK_PROMPTS)]
    if (picture := pipe.family_rules.settings.picture) and (kind == "picture" or picture.required):
        arguments["image"] = torch.rand(
            3, picture.height, picture.width, generator=torch.Generator().manual_seed(steps)
        )
        if picture.role == "start":
            arguments["strength"] = dice.choice((0.5, 0.75, 1.0))
    if kind == "refused":
        arguments["num_inference_steps"] = 10_000
    return SoakRequest(kind, arguments)


class CallbackError(Exception):
    """What a `failing` request's callback raises."""


def answer_request(pipe: Pipeline, request: SoakRequest) -> torch.Tensor | str:
    """What comes of it: the output, or the name of the error."""
    arguments, cancel = dict(request.arguments), threading.Event()

    def callback(_: Any, step: int, timestep: float, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if request.kind == "failing":
            raise CallbackError
        if request.kind == "cancelled":
            cancel.set()
        if request.kind == "interrupted":
            pipe._interrupt = True
        return {"latents": tensors["latents"] * 0.5}

    if request.kind in ("callback", "interrupted", "cancelled", "failing"):
        arguments["callback_on_step_end"] = callback
    try:
        return pipe(**arguments, cancel=cancel)[0]
    except (RequestError, Cancelled, CallbackError) as e:
        return type(e).__name__


def is_same_answer(a: torch.Tensor | str, b: torch.Tensor | str) -> bool:
    """Bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return isinstance(a, str) and isinstance(b, str) and a == b


def serve_requests(
    pipe: Pipeline, requests: Iterator[tuple[int, SoakRequest]], threads: int, each: Callable[[int, Any], None]
) -> None:
    """Answers the requests from that many threads; `each(i, answer)` is told of all. Raises what a thread raised."""
    lock, raised = threading.Lock(), []

    def work() -> None:
        while not raised:
            with lock:
                i, asked = next(requests, (-1, None))
            if asked is None:
                return
            try:
                got = answer_request(pipe, asked)
                with lock:
                    each(i, got)
            except BaseException as e:
                raised.append(e)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if raised:
        raise raised[0]


# --- what the process holds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemorySample:
    """Of this process: bytes of memory that is resident, in proportion (shared pages by share), and private."""

    seconds: float
    requests: int
    rss: int
    pss: int
    private: int
    descriptors: int
    threads: int


def take_sample(seconds: float, requests: int) -> MemorySample:
    own = Path("/proc/self")
    lines = (line.split() for line in (own / "smaps_rollup").read_text("utf-8").splitlines()[1:])
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    private = kib["Private_Dirty"] + kib["Private_Clean"]
    counts = (sum(1 for _ in (own / name).iterdir()) for name in ("fd", "task"))
    return MemorySample(seconds, requests, kib["Rss"] << 10, kib["Pss"] << 10, private << 10, *counts)


def fit_growth(samples: Sequence[MemorySample], what: str) -> tuple[float, float]:
    """How much a line fitted to the second half grows over it, and how far the samples scatter around that line."""
    half = samples[len(samples) // 2 :]
    times = [s.seconds for s in half]
    values = [float(getattr(s, what)) for s in half]
    slope, start = statistics.linear_regression(times, values)
    scatter = statistics.pstdev([v - start - slope * t for t, v in zip(times, values, strict=True)])
    return slope * (times[-1] - times[0]), scatter


def growth_problems(samples: Sequence[MemorySample]) -> list[str]:
    """Sentences on what was not flat."""
    found = []
    for what in ("rss", "private"):
        growth, scatter = fit_growth(samples, what)
        if growth > max(TOLERANCE_BYTES, 4 * scatter):
            found.append(f"{what} grew by {growth / 2**20:.1f} MiB, scatter {scatter / 2**20:.1f} MiB")
    for what in ("descriptors", "threads"):
        counts = [getattr(s, what) for s in samples[len(samples) // 2 :]]
        if max(counts) > max(getattr(s, what) for s in samples[: len(samples) // 2]):
            found.append(f"{what} rose to {max(counts)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=8, help="that ask at once")
    parser.add_argument("--runners", type=int, help="that work at once; load's own default unless said")
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    parser.add_argument("--output", type=Path, help="write the samples as JSON")
    args = parser.parse_args()

    pipe = load(args.artifact, runners=args.runners)
    distinct = make_requests(pipe, DISTINCT_REQUESTS)
    wanted = [answer_request(pipe, asked) for asked in distinct]
    samples, counts = [take_sample(0.0, 0)], {"requests": 0, "changed": 0}
    begun = time.monotonic()

    def tell(i: int, got: Any) -> None:
        counts["requests"] += 1
        counts["changed"] += not is_same_answer(got, wanted[i])
        seconds = time.monotonic() - begun
        if seconds - samples[-1].seconds >= args.every:
            samples.append(take_sample(seconds, counts["requests"]))
            print(json.dumps(asdict(samples[-1])), flush=True)

    def asked() -> Iterator[tuple[int, SoakRequest]]:
        dice = random.Random(1)
        while time.monotonic() - begun < 60 * args.minutes:
            i = dice.randrange(len(distinct))
            yield i, distinct[i]

    serve_requests(pipe, asked(), args.threads, tell)
    found = growth_problems(samples) + ([f"{counts['changed']} answers changed"] if counts["changed"] else [])
    growth, scatter = fit_growth(samples, "rss")
    print(
        f"{counts['requests']} requests in {args.minutes:g} minutes from {args.threads} threads with {pipe.artifact.runners.count} "
        f"runners; second half: rss {growth / 2**20:+.2f} MiB (scatter {scatter / 2**20:.2f}), "
        f"{samples[-1].descriptors} descriptors, {samples[-1].threads} threads; " + ("; ".join(found) or "flat")
    )
    if args.output:
        args.output.write_text(json.dumps([asdict(s) for s in samples], indent=1) + "\n", "utf-8")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
