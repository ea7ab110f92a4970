"""The order of jobs, simulated with a clock of its own against first come, first served."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from prebake.runtime.engine.costs import CostTable
from prebake.runtime.engine.policy import GRACE_S, STRETCH, order_jobs


@dataclass(eq=False)
class Job:
    arrived: float
    total: float
    entry: float
    remaining_s: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        self.remaining_s = self.total

    @property
    def latency(self) -> float:
        return self.finished - self.arrived


Order = Callable[[list[Job], float], list[Job]]
PAGE = Path(__file__).parents[3] / "docs/how-to/serve.md"


def take_turns(jobs: list[Job], now: float) -> list[Job]:
    """Round robin: whoever has been served least."""
    return sorted(jobs, key=lambda job: (job.total - job.remaining_s, job.arrived))


def first_come(jobs: list[Job], now: float) -> list[Job]:
    return sorted(jobs, key=lambda job: job.arrived)


def simulate(jobs: list[Job], order: Order) -> list[Job]:
    """One runner; a job's entries take `entry` seconds each, and after each the order is asked again."""
    coming, here, now = sorted(jobs, key=lambda job: job.arrived), [], 0.0
    while coming or here:
        if not here:
            now = max(now, coming[0].arrived)
        while coming and coming[0].arrived <= now:
            here.append(coming.pop(0))
        job = order(here, now)[0]
        now += job.entry
        job.remaining_s -= job.entry
        if job.remaining_s < 1e-9:
            job.finished = now
            here.remove(job)
    return jobs


def arrivals(load: float, count: int, seed: int, bursts: bool) -> list[Job]:
    """Of ten requests nine have 4 steps and one has 50, of a second each."""
    rng, now, jobs = random.Random(seed), 0.0, []
    mean = (0.9 * 4 + 0.1 * 50) / load
    for i in range(count):
        now += 0.0 if bursts and i % 8 else rng.expovariate(1 / (mean * (8 if bursts else 1)))
        jobs.append(Job(now, 50.0 if rng.random() < 0.1 else 4.0, 1.0))
    return jobs


def quantile(jobs: list[Job], share: float) -> float:
    return sorted(job.latency for job in jobs)[int(share * (len(jobs) - 1))]


ORDERS: dict[str, Order] = {"prebake": order_jobs, "first come, first served": first_come, "round robin": take_turns}


def latency_table() -> str:
    """As the page has it: seconds from a request's arrival to its picture."""
    head = (
        "",
        "short, half within",
        "short, 99 % within",
        "long, half within",
        "long, 99 % within",
        "worst, times its own length",
    )
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for bursts in (False, True):
        for name, order in ORDERS.items():
            jobs = simulate(arrivals(0.8, 400, 1, bursts), order)
            short, long = ([j for j in jobs if (j.total > 4) == is_long] for is_long in (False, True))
            figures = [f"{quantile(some, q):.0f} s" for some in (short, long) for q in (0.5, 0.99)]
            worst = max(j.latency / j.total for j in jobs)
            lines.append((f"{name}{', in bursts of 8' if bursts else ''}", *figures, f"{worst:.1f}"))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_page_has_the_simulated_latencies():
    assert f"<!-- table: policy -->\n{latency_table()}<!-- table: end -->" in PAGE.read_text("utf-8")


@pytest.mark.parametrize("bursts", [False, True])
def test_half_of_the_requests_are_drawn_sooner_than_first_come(bursts):
    ours = simulate(arrivals(0.8, 400, 1, bursts), order_jobs)
    fifo = simulate(arrivals(0.8, 400, 1, bursts), first_come)
    assert quantile(ours, 0.5) < 0.5 * quantile(fifo, 0.5)
    assert max(j.finished for j in ours) == pytest.approx(max(j.finished for j in fifo))  # no second is lost
    short = [j for j in ours if j.total == 4]
    assert quantile(short, 0.99) < quantile([j for j in fifo if j.total == 4], 0.99)


def test_a_long_request_is_not_overtaken_for_ever():
    """Short requests alone would keep the runner busy; the long one is drawn once it is due."""
    short = [Job(4.0 * i, 4.0, 1.0) for i in range(400)]
    long = Job(0.5, 50.0, 1.0)
    simulate([*short, long], order_jobs)
    assert long.latency <= 1.1 * (GRACE_S + STRETCH * 50)  # short ones that are due before it still go first
    starved = Job(0.5, 50.0, 1.0)
    simulate([*[Job(4.0 * i, 4.0, 1.0) for i in range(400)], starved], lambda jobs, now: order_jobs(jobs, now, 1e9))
    assert starved.latency > 1500  # the canary: without the bound it waits for all of them


def test_costs_are_predicted_by_the_work_and_then_measured():
    costs = CostTable({"full": 1000, "reuse": 100}, flops_per_second=1000)
    assert costs.seconds("full") == 1
    costs.measure("full", 1, 0.5)
    assert costs.seconds("full") == 0.5
    assert costs.seconds("reuse") == pytest.approx(0.05)  # not called yet: at the pace of the other
    assert costs.seconds("full", 2) == pytest.approx(1.0)
    costs.measure("full", 1, 1.0)
    assert 0.5 < costs.seconds("full") < 1
