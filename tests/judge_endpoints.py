"""Judges to talk to: an endpoint that fails in the ways that a real one cannot be made to, and a real vLLM server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_llama

AXES = ("relevance", "correctness", "coherence", "safety")


def answer(*ratings: Sequence[int]) -> str:
    return json.dumps({f"response_{i}": dict(zip(AXES, given, strict=True)) for i, given in enumerate(ratings, 1)})


Reply = Callable[["Faulty", dict[str, Any], int], None]


class Faulty(BaseHTTPRequestHandler):
    """Answers the n-th request as the server's ``reply`` says."""

    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((body, self.headers["Authorization"]))
        self.server.reply(self, body, number)

    def send(self, status: int, body: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body.encode())

    def say(self, content: str | None, finish: str = "stop") -> None:
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "finish_reason": finish, "message": message}
        self.send(200, json.dumps({"id": "1", "object": "chat.completion", "created": 0, "choices": [choice]}))

    def log_message(self, *_: Any) -> None:
        pass


def texts_of(body: dict[str, Any]) -> list[str]:
    """The responses as they were shown."""
    return [json.loads(text) for text in re.findall(r"^response_\d+: (.*)$", body["messages"][0]["content"], re.M)]


def rate_by_length(handler: Faulty, body: dict[str, Any], number: int) -> None:
    handler.say(answer(*([min(len(text), 5), 1, 1, 1] for text in texts_of(body))))


@contextmanager
def endpoints() -> Iterator[Callable[[Reply], Any]]:
    """Starts a server for each way to reply; all are gone at the end."""
    servers = []

    def start(reply: Reply) -> Any:
        server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
        server.reply, server.requests, server.lock = reply, [], threading.Lock()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    try:
        yield start
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@contextmanager
def vllm_endpoint(tokenizer: Any, tmp_path: Path) -> Iterator[str]:
    """The URL of a vLLM server of a random model named "tiny"; its key is "sk-loopback"."""
    folder = tmp_path / "model"
    make_llama(tokenizer, context=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "model": folder, "served-model-name": "tiny", "host": "127.0.0.1", "port": port, "dtype": "float32",
        "max-model-len": 4096, "kv-cache-memory-bytes": 96 << 20, "chat-template": tmp_path / "chat.jinja",
        "generation-config": "vllm",
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {
        "VLLM_API_KEY": "sk-loopback", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    log = tmp_path / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False
