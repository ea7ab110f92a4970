"""A server under load: clients that draw, leave, and ask wrongly, and what it did to the others and to memory.

    python benchmarks/serve.py ARTIFACT [--clients 32] [--seconds 600] [--output FILE]

Starts `prebake serve ARTIFACT` and asks it from as many threads. Of ten requests one is wrong, one leaves before its answer, one streams. Of every
picture the bytes are compared with those of the same request alone, drawn before by the pipeline. An answer that was not asked for is
an error. Memory is the server's resident set, its slope that of a line through the second half. Needs `pip install 'prebake[serve]' httpx2`.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

import prebake

PROMPTS = ("a red circle", "a large red star", "a small blue square")
SEEDS = range(4)
QUALITIES = ("low", "medium", "high")


def drawn_alone(artifact: str) -> dict[tuple[str, int, str], bytes]:
    """Every request that clients make, and its pixels."""
    from prebake.runtime.serve.models import plan_qualities

    with prebake.load(artifact) as pipe:
        plans = plan_qualities(pipe.plans, pipe.steps[0])
        return {
            (prompt, seed, quality): pipe(
                prompt,
                seed=seed,
                num_inference_steps=plans[quality].steps,
                cache=not plans[quality].name.endswith("-uncached"),
            )
            .images[0]
            .tobytes()
            for prompt in PROMPTS
            for seed in SEEDS
            for quality in QUALITIES
        }


def pixels(b64: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(b64))).tobytes()


def ask(client: httpx2.Client, rng: random.Random, alone: dict[Any, bytes], seconds: list[float]) -> str:
    """One request of a kind that is drawn by chance; what became of it."""
    key = (rng.choice(PROMPTS), rng.choice(SEEDS), rng.choice(QUALITIES))
    body = {"prompt": key[0], "seed": key[1], "quality": key[2]}
    kind = rng.choices(("draw", "stream", "wrong", "leave"), (7, 1, 1, 1))[0]
    if kind == "wrong":
        answer = client.post("/v1/images/generations", json={**body, "size": "7x7"})
        return "refused" if answer.status_code == 400 else f"error {answer.status_code}"
    if kind == "leave":
        try:
            client.post("/v1/images/generations", json={**body, "n": 10}, timeout=rng.random() * 0.2)
        except httpx2.TimeoutException:
            return "left"
        return "drawn before it left"
    began = time.monotonic()
    if kind == "stream":
        with client.stream(
            "POST", "/v1/images/generations", json={**body, "stream": True, "partial_images": 2}
        ) as answer:
            lines = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
        picture = lines[-1].get("b64_json") if answer.status_code == 200 else None
    else:
        answer = client.post("/v1/images/generations", json=body)
        picture = answer.json()["data"][0]["b64_json"] if answer.status_code == 200 else None
    if picture is None:
        return "told to come again" if answer.status_code == 429 else f"error {answer.status_code}"
    seconds.append(time.monotonic() - began)
    return "drawn" if pixels(picture) == alone[key] else "error: another picture"


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    alone = drawn_alone(args.artifact)
    command = [sys.executable, "-m", "prebake.runtime", "serve", args.artifact, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    url = ""
    for line in process.stderr:
        event = json.loads(line)
        url = f"http://127.0.0.1:{event['port']}" if event["event"] == "listening" else url
        if event["event"] == "ready":
            break
    threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
    outcomes: Counter[str] = Counter()
    seconds: list[float] = []
    ends, lock = time.monotonic() + args.seconds, threading.Lock()

    def work(i: int) -> None:
        rng = random.Random(i)
        with httpx2.Client(base_url=url, timeout=300) as client:
            while time.monotonic() < ends:
                became = ask(client, rng, alone, seconds)
                with lock:
                    outcomes[became] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(args.clients)]
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < ends:
        memory.append((time.monotonic(), resident_mib(process.pid)))
        time.sleep(min(1.0, args.seconds / 60))
    for thread in threads:
        thread.join()
    process.terminate()
    process.wait()
    later = np.array(memory[len(memory) // 2 :])
    figures = {
        "clients": args.clients,
        "seconds": args.seconds,
        **{f"requests {name}": count for name, count in sorted(outcomes.items())},
        "pictures_per_s": round(len(seconds) / args.seconds, 2),
        "p50_s": round(float(np.quantile(seconds, 0.5)), 3),
        "p99_s": round(float(np.quantile(seconds, 0.99)), 3),
        "resident_mib": round(memory[-1][1], 1),
        "resident_mib_per_hour": round(float(np.polyfit(later[:, 0], later[:, 1], 1)[0]) * 3600, 2),
    }
    print(json.dumps(figures, indent=1))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(any(name.startswith("error") for name in outcomes))


if __name__ == "__main__":
    main()
