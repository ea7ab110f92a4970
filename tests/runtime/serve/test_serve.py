"""`prebake serve` on the compiled toy, asked by OpenAI's own client: one server for all."""

from __future__ import annotations

import base64
import inspect
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image

from prebake.runtime.__main__ import main
from prebake.runtime.serve.drawing import refuse_long_queue
from prebake.runtime.serve.errors import ApiError, error_response
from prebake.runtime.serve.fields import FIELDS
from support.page_blocks import ROOT, blocks_of

KEY = "test-key"
SECONDS = 120  # on a busy machine
MODEL = "toy"


@dataclass
class Server:
    """A server in a process of its own; its log is in a file."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    folder: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(api_key=KEY, base_url=f"{self.url}/v1", max_retries=0, timeout=SECONDS)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=SECONDS, **more)

    def post(self, path: str, key: str = KEY, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=SECONDS, headers={"Authorization": f"Bearer {key}"}, **more)

    def lines(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]


def start(folder: Path, tmp: Path, *options: str) -> Server:
    """A server at any free port, which its log has."""
    log = tmp / "log"
    command = [sys.executable, "-m", "prebake.runtime", "serve", str(folder), "--port", "0", *options]
    environment = {**os.environ, "PREBAKE_API_KEYS": KEY, "XDG_CACHE_HOME": str(tmp / "cache")}
    process = subprocess.Popen(command, stderr=log.open("wb"), env=environment)
    server = Server(process, "", log, folder)
    wait_until(lambda: "listening" in log.read_text() or process.poll() is not None, "listening")
    if listening := server.lines("listening"):
        server.url = f"http://127.0.0.1:{listening[0]['port']}"
    return server


def wait_until(done: Any, what: str) -> None:
    ends = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < ends, what
        time.sleep(0.02)


def is_ready(server: Server) -> bool:
    try:
        return server.get("/health").status_code == 200
    except httpx.TransportError:
        assert server.process.poll() is None, server.log.read_text()
        return False


@pytest.fixture(scope="session")
def server(toy_artifact, tmp_path_factory) -> Iterator[Server]:
    tmp = tmp_path_factory.mktemp("served")
    folder = shutil.copytree(toy_artifact, tmp / MODEL)
    running = start(folder, tmp, "--max-body-mib", "1", "--max-queue-seconds", "100000")
    try:
        wait_until(lambda: is_ready(running), "ready")
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(SECONDS) in (0, -signal.SIGTERM, 143), running.log.read_text()


@pytest.fixture
def client(server) -> openai.OpenAI:
    return server.client


def picture(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


# --- what it does -----------------------------------------------------------------------------------------------------


def test_models_are_listed_with_sizes_and_plans(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "prebake")
    assert model.sizes == ["8x8"]
    assert model.qualities["medium"]["plan"] == "4"
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_picture_is_that_of_the_pipeline(client, pipe):
    made = client.images.generate(model=MODEL, prompt="red circle", extra_body={"seed": 7, "guidance_scale": 2.0})
    want = np.asarray(pipe("red circle", seed=7, guidance_scale=2.0).images[0])
    assert np.array_equal(picture(made.data[0].b64_json), want)
    assert (made.output_format, made.size, made.quality, made.seed) == ("png", "8x8", "medium", 7)


def test_several_pictures_are_those_of_one_call(client, pipe):
    made = client.images.generate(prompt="red", n=3, quality="high", extra_body={"seed": 7})
    want = pipe("red", seed=7, cache=False, num_images_per_prompt=3).images
    assert [picture(each.b64_json).tolist() for each in made.data] == [np.asarray(each).tolist() for each in want]


def test_a_drawn_seed_is_told(client, pipe):
    made = client.images.generate(prompt="red")
    assert np.array_equal(picture(made.data[0].b64_json), np.asarray(pipe("red", seed=made.seed).images[0]))


def test_a_stream_has_partial_pictures_and_the_picture(client, pipe):
    events = list(client.images.generate(prompt="red", stream=True, partial_images=2, extra_body={"seed": 7}))
    assert [event.type for event in events] == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert np.array_equal(picture(events[-1].b64_json), np.asarray(pipe("red", seed=7).images[0]))
    assert events[0].size == "8x8"


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_a_picture_comes_in_the_format_that_was_asked_for(client, file_format):
    made = client.images.generate(prompt="red", output_format=file_format)
    with Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))) as image:
        assert image.format == file_format.upper()


def test_many_clients_get_each_their_own(client, pipe):
    seeds, drawn = range(12), {}

    def ask(seed: int) -> None:
        made = client.images.generate(prompt="red", quality=("low", "high")[seed % 2], extra_body={"seed": seed})
        drawn[seed] = picture(made.data[0].b64_json)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(drawn) == set(seeds)
    for seed, got in drawn.items():
        assert np.array_equal(got, np.asarray(pipe("red", seed=seed, cache=seed % 2 == 0).images[0]))


# --- what it refuses ---------------------------------------------------------------------------------------------------


def client_fields() -> set[str]:
    """Those of the official client's `images.generate` and `images.edit`."""
    ways = (openai.resources.images.Images.generate, openai.resources.images.Images.edit)
    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    return {name for way in ways for name in inspect.signature(way).parameters} - own


def test_every_field_of_the_client_has_a_fate():
    assert client_fields() - FIELDS.keys() == set()
    extensions = {name for name, rule in FIELDS.items() if rule.note.startswith("extension")} | {"lora", "loras"}
    assert FIELDS.keys() - client_fields() == extensions


@pytest.mark.parametrize("name", [name for name, rule in FIELDS.items() if rule.fate == "refused"])
def test_a_field_that_is_not_taken_is_named(client, name):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="red", extra_body={name: "x"})
    assert refused.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 11),
        ("n", "many"),
        ("size", "9x9"),
        ("size", "large"),
        ("quality", "xhigh"),
        ("background", "transparent"),
        ("output_format", "svg"),
        ("output_compression", 50),
        ("response_format", "url"),
        ("partial_images", 4),
        ("partial_images", 1),
        ("num_inference_steps", 5),
        ("guidance_scale", "much"),
        ("negative_prompt", "blue"),
        ("seed", 1.5),
        ("prompt", ""),
        ("seeds", 1),
    ],
)
def test_a_value_that_cannot_be_had_is_a_400_that_names_its_field(server, name, value):
    answer = server.post("/v1/images/generations", json={"prompt": "red", name: value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == ("height" if value == "9x9" else name)


def test_the_other_refusals(server, client):
    with pytest.raises(openai.NotFoundError, match="toy"):
        client.images.generate(model="other", prompt="red")
    assert server.post("/v1/images/generations", key="wrong", json={"prompt": "red"}).status_code == 401
    assert server.get("/v1/models").status_code == 401
    for body in (b"{", b"[1]"):
        broken = httpx.post(
            f"{server.url}/v1/images/generations",
            content=body,
            headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        assert broken.status_code == 422
    assert server.post("/v1/images/generations", content=b'{"prompt": "red"}').status_code == 422  # no content type
    assert server.post("/v1/images/generations", json={"prompt": " " * (1 << 21)}).status_code == 413
    assert server.get("/v1/other").status_code == 404
    assert server.get("/v1/other").json()["error"]["code"] == "not_found"


def test_an_artifact_without_image_to_image_says_so(client):
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    with pytest.raises(openai.BadRequestError, match="exported without image-to-image") as refused:
        client.images.edit(image=("x.png", png.getvalue()), prompt="red")
    assert refused.value.param == "image"
    with pytest.raises(openai.BadRequestError, match="expected a picture"):
        client.images.edit(image=("x.png", b"no picture"), prompt="red")


def test_a_long_queue_is_a_429_that_says_when_it_is_over():
    model = SimpleNamespace(engine=SimpleNamespace(queued_s=12.3))
    refuse_long_queue(model, 12.5)
    with pytest.raises(ApiError) as refused:
        refuse_long_queue(model, 10)
    answer = error_response(refused.value)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


# --- what it tells -----------------------------------------------------------------------------------------------------


def test_health_and_metrics(server):
    server.client.images.generate(prompt="red", n=2)
    assert server.get("/v2/health/live").status_code == server.get("/v2/health/ready").status_code == 200
    metrics = server.get("/metrics").text
    for line in (
        r'prebake_requests_total\{route="/v1/images/generations",status="200"\} [1-9]',
        r'prebake_running\{model="toy"\} 0\.0',
        r'prebake_waiting\{model="toy"\} 0\.0',
        r'prebake_queue_seconds\{model="toy"\} 0\.0',
        r'prebake_entry_seconds_count\{graph="opening",model="toy"\} [1-9]',
        r'prebake_entry_predicted_seconds_total\{graph="opening",model="toy"\} [0-9]',
        r'prebake_entry_pictures_sum\{model="toy"\} [1-9]',
        r'prebake_request_seconds_count\{model="toy"\} [1-9]',
        r'prebake_artifact_info\{digest="[0-9a-f]{64}"',
        r"process_resident_memory_bytes [0-9]",
    ):
        assert re.search(line, metrics), line


def test_the_log_is_json_without_prompts(server):
    long = "a red circle left of a blue square"  # longer than the artifact takes, which a call warns of
    server.client.images.generate(prompt=long, user="somebody", extra_body={"seed": 3})
    assert "blue square" not in server.log.read_text()
    assert server.lines("the prompt is longer than 5 tokens of tokenizer")
    drawn = server.lines("drawn")[-1]
    assert (drawn["model"], drawn["kind"], drawn["user"]) == (MODEL, "image_generation", "somebody")
    assert {"seconds", "predicted_s", "queued_s"} <= drawn.keys()


def test_the_page_to_play_with_asks_nobody_else(server):
    page = server.get("/").text
    assert "<h1>prebake</h1>" in page
    assert not re.search(r"https?://|src=\"(?!data:)", page)


# --- its pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["docs/how-to/serve.md", "/README.md"])
def test_the_shown_clients_work(server, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks_of(ROOT / page.lstrip("/")):
        if block.mark == "run by" and block.language == "python":
            text = block.text.replace("http://127.0.0.1:8000", server.url).replace('"none"', repr(KEY))
            exec(compile(text, str(block), "exec"), names)
    assert names["client"].images.generate(prompt="red").data


def test_the_page_has_the_fate_of_every_field():
    rows = "".join(f"| `{name}` | {rule.fate} | {rule.note} |\n" for name, rule in FIELDS.items())
    assert f"{rows}<!-- table: end -->" in (ROOT / "docs/how-to/serve.md").read_text("utf-8")


# --- clients as they are ----------------------------------------------------------------------------------------------


def test_a_slow_reader_holds_nobody_up(server):
    body = {"prompt": "red", "stream": True, "partial_images": 2}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream(
        "POST", f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=SECONDS
    ) as slow:
        bytes_of = slow.iter_raw(1)
        assert next(bytes_of)
        server.client.images.generate(prompt="blue")
        assert b"image_generation.completed" in b"".join(bytes_of)


# --- reload and leaving ------------------------------------------------------------------------------------------------


def count(server: Server, metric: str) -> float:
    found = re.search(rf"^{re.escape(metric)} ([0-9.]+)$", server.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_clients_that_go_away_cancel_their_requests(server):
    """So many that most are not drawn when all of them leave."""
    let_in, cancelled = (f'prebake_{m}{{model="toy"}}' for m in ("request_predicted_seconds_count", "cancelled_total"))
    before, gone, number = count(server, let_in), count(server, cancelled), 60
    body = json.dumps({"prompt": "red", "n": 10, "quality": "high"}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    clients = [socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) for _ in range(number)]
    for client in clients:
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_until(lambda: count(server, let_in) == before + number, "all are let in")
    for client in clients:
        client.close()
    wait_until(lambda: count(server, cancelled) > gone, "some are cancelled")
    wait_until(lambda: count(server, 'prebake_running{model="toy"}') == 0, "idle again")
    assert server.lines("cancelled")
    assert server.client.images.generate(prompt="red").data


def test_a_new_version_is_served_without_a_lost_request(server, pipe):
    manifest = server.folder / "manifest.json"
    text, stop, drawn = manifest.read_text(), threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            drawn.append(server.client.images.generate(prompt="red", extra_body={"seed": 7}).data[0].b64_json)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert server.post("/admin/reload").json() == {"reloaded": []}
        manifest.write_text(text + "\n")
        assert server.post("/admin/reload").json() == {"reloaded": [MODEL]}
        manifest.write_text(text)
        reloads = len(server.lines("reloaded"))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(server.lines("reloaded")) > reloads, "reloaded by SIGHUP")
        manifest.write_text("{}")
        assert server.post("/admin/reload").status_code == 500  # and the last version stays
    finally:
        manifest.write_text(text)
        stop.set()
        for thread in threads:
            thread.join()
    want = np.asarray(pipe("red", seed=7).images[0])
    assert drawn
    assert all(np.array_equal(picture(each), want) for each in drawn)


def test_a_port_that_is_taken_is_a_sentence_and_exit_code_2(server, capsys):
    port = server.url.rpartition(":")[2]
    assert main(["serve", str(server.folder), "--port", port]) == 2
    assert re.search(rf"--port {port}: nothing can listen there .* give another", capsys.readouterr().err)


def test_what_is_not_installed_is_a_sentence(monkeypatch, capsys, declared_extras):
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    assert main(["serve", "artifact"]) == 2
    assert "pip install 'prebake[serve]'" in capsys.readouterr().err


def test_a_damaged_artifact_is_a_sentence_and_exit_code_5(artifact_copy, tmp_path):
    weights = max((artifact_copy / "weights").iterdir(), key=lambda path: path.stat().st_size)
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    server = start(artifact_copy, tmp_path)
    assert server.process.wait(SECONDS) == 5
    errors = [line for line in server.log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert weights.name in errors[0]
