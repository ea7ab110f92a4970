"""Mixed requests from many threads for a long time: memory, file descriptors and threads stay flat, and no picture changes.

    python benchmarks/soak.py artifacts/flux-fast-shapes --minutes 30

Requests differ in prompt, seed, number of images, cache, plan, guidance, output, callbacks, pictures to begin from where the
artifact takes them, and some are cancelled or fail. Every answer is compared, bit by bit, with what the same request gave
when nothing else ran. Every few seconds a line is written: seconds, requests, resident and proportional memory, memory of
the process alone, file descriptors, threads. Memory is flat when a line fitted to the samples of the second half
grows less over that half than `TOLERANCE` and than four times what the samples scatter around it; exit code 1 otherwise.
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

from prebake.runtime import ArtifactError, Cancelled, load
from prebake.runtime.pipeline import Pipeline

TOLERANCE = 8 << 20
"""Bytes: what the allocator of threads that come and go moves by, a few arenas."""
PROMPTS = ("a red circle", "a small green heart above a large pink square", "", "a blue star left of a red ring")
DISTINCT = 48
"""Different requests; each is drawn alone first."""
KINDS = ("plain", "batch", "callback", "interrupted", "picture", "cancelled", "failing", "refused")


@dataclass(frozen=True)
class Request:
    """One call, and what it is about: `kind` is one of `KINDS`."""

    kind: str
    arguments: dict[str, Any]


def mixed(pipe: Pipeline, count: int, seed: int = 0) -> list[Request]:
    """`count` requests of every kind that the artifact takes, the same for the same seed."""
    dice = random.Random(seed)
    kinds = [kind for kind in KINDS if kind != "picture" or pipe.family.settings.picture]
    plans = [plan for plan in pipe.artifact.plans.values() if plan.name == str(plan.steps)]
    return [
        request(pipe, dice, kind, dice.choice(plans).steps) for kind in itertools.islice(itertools.cycle(kinds), count)
    ]


def request(pipe: Pipeline, dice: random.Random, kind: str, steps: int) -> Request:
    arguments: dict[str, Any] = {
        "prompt": dice.choice(PROMPTS),
        "seed": dice.randrange(1000),
        "num_inference_steps": steps,
        "cache": dice.random() < 0.7,
        "output_type": dice.choice(("latent", "pt")),
    }
    if dice.random() < 0.5:
        arguments["guidance_scale"] = dice.choice((1.0, 2.5, 5.0))
    if kind == "batch":
        arguments["prompt"] = [arguments["prompt"], dice.choice(PROMPTS)]
    if (picture := pipe.family.settings.picture) and (kind == "picture" or picture.required):
        arguments["image"] = torch.rand(
            3, picture.height, picture.width, generator=torch.Generator().manual_seed(steps)
        )
        if picture.role == "start":
            arguments["strength"] = dice.choice((0.5, 0.75, 1.0))
    if kind == "refused":
        arguments["num_inference_steps"] = 10_000
    return Request(kind, arguments)


class Failed(Exception):
    """What a `failing` request's callback raises."""


def answer(pipe: Pipeline, request: Request) -> torch.Tensor | str:
    """What comes of it: the output, or the name of the error."""
    arguments, cancel = dict(request.arguments), threading.Event()

    def callback(_: Any, step: int, timestep: float, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if request.kind == "failing":
            raise Failed
        if request.kind == "cancelled":
            cancel.set()
        if request.kind == "interrupted":
            pipe._interrupt = True
        return {"latents": tensors["latents"] * 0.5}

    if request.kind in ("callback", "interrupted", "cancelled", "failing"):
        arguments["callback_on_step_end"] = callback
    try:
        return pipe(**arguments, cancel=cancel)[0]
    except (ArtifactError, Cancelled, Failed) as e:
        return type(e).__name__


def same(a: torch.Tensor | str, b: torch.Tensor | str) -> bool:
    """Bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return isinstance(a, str) and isinstance(b, str) and a == b


def served(
    pipe: Pipeline, requests: Iterator[tuple[int, Request]], threads: int, each: Callable[[int, Any], None]
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
                got = answer(pipe, asked)
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
class Sample:
    """Of this process: bytes of memory that is resident, in proportion (shared pages by share), and private."""

    seconds: float
    requests: int
    rss: int
    pss: int
    private: int
    descriptors: int
    threads: int


def sample(seconds: float, requests: int) -> Sample:
    own = Path("/proc/self")
    lines = (line.split() for line in (own / "smaps_rollup").read_text("utf-8").splitlines()[1:])
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    private = kib["Private_Dirty"] + kib["Private_Clean"]
    counts = (sum(1 for _ in (own / name).iterdir()) for name in ("fd", "task"))
    return Sample(seconds, requests, kib["Rss"] << 10, kib["Pss"] << 10, private << 10, *counts)


def grown(samples: Sequence[Sample], what: str) -> tuple[float, float]:
    """How much a line fitted to the second half grows over it, and how far the samples scatter around that line."""
    half = samples[len(samples) // 2 :]
    times = [s.seconds for s in half]
    values = [float(getattr(s, what)) for s in half]
    slope, start = statistics.linear_regression(times, values)
    scatter = statistics.pstdev([v - start - slope * t for t, v in zip(times, values, strict=True)])
    return slope * (times[-1] - times[0]), scatter


def problems(samples: Sequence[Sample]) -> list[str]:
    """What was not flat."""
    found = []
    for what in ("rss", "private"):
        growth, scatter = grown(samples, what)
        if growth > max(TOLERANCE, 4 * scatter):
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
    distinct = mixed(pipe, DISTINCT)
    wanted = [answer(pipe, asked) for asked in distinct]
    samples, counts = [sample(0.0, 0)], {"requests": 0, "changed": 0}
    begun = time.monotonic()

    def tell(i: int, got: Any) -> None:
        counts["requests"] += 1
        counts["changed"] += not same(got, wanted[i])
        seconds = time.monotonic() - begun
        if seconds - samples[-1].seconds >= args.every:
            samples.append(sample(seconds, counts["requests"]))
            print(json.dumps(asdict(samples[-1])), flush=True)

    def asked() -> Iterator[tuple[int, Request]]:
        dice = random.Random(1)
        while time.monotonic() - begun < 60 * args.minutes:
            i = dice.randrange(len(distinct))
            yield i, distinct[i]

    served(pipe, asked(), args.threads, tell)
    found = problems(samples) + ([f"{counts['changed']} answers changed"] if counts["changed"] else [])
    growth, scatter = grown(samples, "rss")
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
