"""Two workers under uvicorn whose artifact is replaced and loaded anew every minute: memory, maps and descriptors stay flat.

    pip install uvicorn
    python benchmarks/reload_soak.py artifacts/flux-fast-shapes --minutes 30 --output soak.json

Before each reload the folder is replaced by a fresh copy, by renaming, so that what a worker still holds of the one before
is a deleted file. Clients ask all the time, and every picture is compared with the first of its seed. Once between two reloads they
pause until no call is at work, each worker gives back what its allocator has free, and a line is written for it: what a call or a reload holds
while it works, and what is kept for the next, would hide what stays. Flat is: over the last two thirds of the time memory that is no file's
does not grow by `MAX_GROWTH_BYTES_PER_HOUR` with 95 % confidence (resident pages of the mapped weights come and go with each reload), and
maps and descriptors at a third and at the end are equal; no deleted file is mapped.
Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import theilslopes

HERE = Path(__file__).parent
MAX_GROWTH_BYTES_PER_HOUR = 1 << 20
SETTLE_S = 1.0
START_S = 120
"""How long workers may take to answer for the first time."""


@dataclass(frozen=True)
class WorkerSample:
    """Of one worker: bytes of memory, and how many maps of files, maps of deleted files, descriptors without connections, and threads
    it has."""

    seconds: float
    worker: int
    rss: int
    anonymous: int
    maps: int
    deleted: int
    descriptors: int
    threads: int


def sample_worker(seconds: float, worker: int) -> WorkerSample:
    own = Path("/proc") / str(worker)
    lines = (line.split() for line in (own / "smaps_rollup").read_text("utf-8").splitlines()[1:])
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    maps = (own / "maps").read_text("utf-8").splitlines()
    opened = sum(not is_socket(path) for path in (own / "fd").iterdir())
    threads = sum(1 for _ in (own / "task").iterdir())
    files = [line for line in maps if len(line.split()) > 5 and line.split(maxsplit=5)[5].startswith("/")]
    deleted = sum("(deleted)" in line for line in files)
    return WorkerSample(seconds, worker, kib["Rss"] << 10, kib["Anonymous"] << 10, len(files), deleted, opened, threads)


def settle_workers(workers: Sequence[int], settled: Path) -> None:
    """Has each worker end its reload and give back what it has free. Raises RuntimeError where one does not."""
    told = [settled.with_name(f"{settled.name}.{worker}") for worker in workers]
    for worker in workers:
        os.kill(worker, signal.SIGUSR1)
    ends = time.monotonic() + START_S
    while not all(file.exists() for file in told):
        if time.monotonic() > ends:
            raise RuntimeError(f"a worker did not settle within {START_S} s")
        time.sleep(0.05)
    for file in told:
        file.unlink()


def is_socket(descriptor: Path) -> bool:
    """Whether it is a connection, which comes and goes with its request, or is gone already."""
    try:
        return os.readlink(descriptor).startswith("socket:")
    except OSError:
        return True


class Clients:
    """Threads that ask without a pause. `wrong` are answers that differ from the first of their seed, and errors."""

    def __init__(self, port: int, count: int):
        self.port, self.requests = port, 0
        self.wrong: list[str] = []
        self.workers: dict[int, int] = {}  # process id -> reloads
        self._first: dict[int, str] = {}
        self._stop = threading.Event()
        self._at_work = [threading.Lock() for _ in range(count)]  # of each thread, while it waits for an answer
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask_on, args=(i,), daemon=True) for i in range(count)]

    def ask(self, seed: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/?seed={seed}", timeout=START_S) as answer:
            said: dict[str, Any] = json.load(answer)
        with self._lock:
            self.requests += 1
            self.workers[said["worker"]] = said["reloads"]
            if said["picture"] != self._first.setdefault(seed, said["picture"]):
                self.wrong.append(f"seed {seed}: another picture from worker {said['worker']}")

    def _ask_on(self, seed: int) -> None:
        while not self._stop.is_set():
            try:
                with self._at_work[seed]:
                    self.ask(seed)
            except OSError as e:
                if not self._stop.is_set():
                    self.wrong.append(f"seed {seed}: {e}")
                    self._stop.wait(1)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, nobody asks, and all that were asked have answered."""
        with ExitStack() as stack:
            for at_work in self._at_work:
                stack.enter_context(at_work)
            time.sleep(SETTLE_S)
            yield

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(START_S)


def replace_folder(source: Path, live: Path) -> None:
    """Puts a fresh copy of `source` where `live` is."""
    fresh, old = live.with_name("fresh"), live.with_name("old")
    shutil.copytree(source, fresh)
    live.rename(old)
    fresh.rename(live)
    shutil.rmtree(old)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def wait_for_workers(clients: Clients, count: int, server: subprocess.Popen[bytes]) -> None:
    """Until every worker has answered. Raises RuntimeError where they do not come."""
    ends = time.monotonic() + START_S
    while len(clients.workers) < count:
        if server.poll() is not None or time.monotonic() > ends:
            raise RuntimeError(f"{len(clients.workers)} of {count} workers answered; is uvicorn installed?")
        try:
            clients.ask(0)
        except OSError:
            time.sleep(0.5)


@dataclass(frozen=True)
class Growth:
    """Units an hour: the median slope (Theil-Sen), and where it lies with 95 % confidence."""

    slope: float
    low: float
    high: float

    def format_mib(self) -> str:
        return f"{self.slope / 2**20:+.2f} MiB an hour ({self.low / 2**20:+.2f} to {self.high / 2**20:+.2f})"


def growth_per_hour(samples: Sequence[WorkerSample], what: str) -> Growth:
    """Over the last two thirds. One sample that is far off does not count."""
    last = [(s.seconds / 3600, getattr(s, what)) for s in samples if s.seconds >= samples[-1].seconds / 3]
    hours, values = zip(*last, strict=True)
    fitted: Any = theilslopes(values, hours)
    return Growth(float(fitted.slope), float(fitted.low_slope), float(fitted.high_slope))


def soak_problems(samples: Sequence[WorkerSample]) -> list[str]:
    """Sentences on what one worker's samples show that is not flat."""
    third = min(samples, key=lambda s: abs(s.seconds - samples[-1].seconds / 3))
    found = []
    if (growth := growth_per_hour(samples, "anonymous")).low >= MAX_GROWTH_BYTES_PER_HOUR:
        found.append(f"memory of its own grows by {growth.slope / 2**20:.1f} MiB an hour")
    for what in ("maps", "descriptors"):
        if getattr(third, what) != getattr(samples[-1], what):
            found.append(f"{what}: {getattr(third, what)} at a third, {getattr(samples[-1], what)} at the end")
    if samples[-1].deleted:
        found.append(f"{samples[-1].deleted} maps of deleted files")
    return found


def soak(args: argparse.Namespace, folder: Path) -> list[WorkerSample]:
    """The samples of all workers. Raises RuntimeError for a wrong answer."""
    live, settled, port = folder / "live", folder / "settled", free_port()
    shutil.copytree(args.artifact, live)
    environment = {
        **os.environ,
        "PREBAKE_ARTIFACT": str(live),
        "PREBAKE_RELOAD_S": str(args.reload),
        "PREBAKE_SETTLED": str(settled),
    }
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(HERE), "--workers", str(args.workers)]
    command += ["--port", str(port), "--log-level", "warning", "reload_server:app"]
    server = subprocess.Popen(command, env=environment)
    clients, samples = Clients(port, args.clients), []
    try:
        wait_for_workers(clients, args.workers, server)
        clients.start()
        begun = time.monotonic()
        while (seconds := time.monotonic() - begun) < 60 * args.minutes:
            time.sleep(args.reload / 2)
            replace_folder(args.artifact, live)
            time.sleep(args.reload / 2)
            with clients.pause():
                settle_workers(sorted(clients.workers), settled)
                for worker in sorted(clients.workers):
                    samples.append(sample_worker(seconds, worker))
                    print(json.dumps(asdict(samples[-1])), flush=True)
        # the last reload takes what was replaced last out of use
        time.sleep(args.reload * 1.5)
        with clients.pause():
            settle_workers(sorted(clients.workers), settled)
            samples += [sample_worker(time.monotonic() - begun, worker) for worker in sorted(clients.workers)]
    finally:
        clients.stop()
        server.terminate()
        server.wait(START_S)
    print(f"{clients.requests} requests, reloads by worker: {clients.workers}")
    if clients.wrong:
        raise RuntimeError("; ".join(clients.wrong[:5]))
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--reload", type=float, default=60, help="seconds between reloads of a worker")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=4, help="threads that ask at once")
    parser.add_argument("--output", type=Path, help="write the samples as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prebake-soak-") as folder:
        samples = soak(args, Path(folder))
    found = 0
    for worker in sorted({s.worker for s in samples}):
        own = [s for s in samples if s.worker == worker]
        problems = soak_problems(own)
        found += len(problems)
        print(
            f"worker {worker}: memory of its own {growth_per_hour(own, 'anonymous').format_mib()}, resident "
            f"{growth_per_hour(own, 'rss').format_mib()}, {own[-1].maps} maps, {own[-1].descriptors} descriptors, "
            f"{own[-1].threads} threads; {'; '.join(problems) or 'flat'}"
        )
    if args.output:
        args.output.write_text(json.dumps([asdict(s) for s in samples], indent=1) + "\n", "utf-8")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
