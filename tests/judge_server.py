"""A real HTTP server that speaks chat completions and does what a test tells it, faults among it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Says:
    """A completion that says ``text``, or ``body`` as it is; sent after ``delay_s``, whole or ``cut`` in the middle."""

    text: str = ""
    finish_reason: str = "stop"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    usage: Mapping[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10})
    delay_s: float = 0.0
    cut: bool = False

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.text}
        choice = {"index": 0, "finish_reason": self.finish_reason, "message": message}
        return json.dumps({"object": "chat.completion", "choices": [choice], "usage": self.usage}).encode()


Reply: TypeAlias = Callable[[Mapping[str, Any], int], Says]


@dataclass
class Script:
    """Who answers: ``reply`` gets a request's body and its number from 0. ``requests`` and ``keys`` are what came."""

    reply: Reply
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)


def scores(first: float, second: float) -> Says:
    return Says(f'They differ.\n{{"first": {first}, "second": {second}}}')


def first_is_better(body: Mapping[str, Any], number: int) -> Says:
    return scores(9, 5)


def longer_is_better(body: Mapping[str, Any], number: int) -> Says:
    """A judge without bias of order: a point for every letter, up to 10."""
    first, second = answers_in(body)
    return scores(min(10, 1 + len(first)), min(10, 1 + len(second)))


def answers_in(body: Mapping[str, Any]) -> tuple[str, str]:
    text = body["messages"][0]["content"]
    first, second = re.findall(r"\[Answer [12] begins (\w+)\]\n(.*?)\n\[Answer [12] ends \1\]", text, re.DOTALL)
    return first[1], second[1]


def in_turn(says: Sequence[Says], then: Reply = longer_is_better) -> Reply:
    """The n-th request gets the n-th answer, later ones ``then``'s."""
    return lambda body, number: says[number] if number < len(says) else then(body, number)


@contextmanager
def serving(reply: Reply) -> Iterator[Script]:
    """A server at ``script.url`` while inside."""
    script = Script(reply)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(script.requests)
                script.requests.append(body)
                script.keys.append(self.headers.get("Authorization", ""))
            known = self.path == "/v1/chat/completions"
            says = script.reply(body, number) if known else Says(status=404, body=b"no such path")
            if says.delay_s:
                script.released.wait(says.delay_s)
            content = says.content()
            try:
                self.send_response(says.status)
                for name, value in {"Content-Type": "application/json", **says.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if says.cut else content)
                self.wfile.flush()
            except OSError:  # the client is gone
                pass
            if says.cut:
                self.close_connection = True

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield script
    finally:
        script.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
