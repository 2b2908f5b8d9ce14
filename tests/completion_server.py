"""A small HTTP server on loopback that speaks OpenAI's chat and completions API, and fails as it is told to."""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VERBS = (
    "Describe",
    "Compare",
    "Summarize",
    "Translate",
    "Explain",
    "Classify",
    "Rank",
    "Correct",
    "Invent",
    "Question",
)
THINGS = (
    "river",
    "letter",
    "recipe",
    "festival",
    "bridge",
    "poem",
    "contract",
    "garden",
    "planet",
    "dialect",
    "engine",
)
PLACES = ("village", "harbour", "school", "forest", "market", "kitchen", "museum", "theatre", "desert", "island")
CHINESE = (
    "描述一条河流的四季变化",
    "比较两种茶叶的味道",
    "给新邻居写一封欢迎信",
    "解释为什么要节约粮食",
    "概括这段历史的经过",
)


def canned(prompt: str, seed: int) -> str:
    """What a model could write: a function of the prompt and the seed, good and bad tasks mixed."""
    draw = random.Random(hashlib.sha256(f"{seed}{prompt}".encode()).digest())
    if prompt.startswith("Below is a list"):
        first = int(re.findall(r"Task (\d+):", prompt)[-1])
        new = [
            f"{draw.choice(VERBS)} the {draw.choice(THINGS)} that {draw.choice(VERBS).lower()}s every {draw.choice(PLACES)} "
            f"with {draw.choice(THINGS)}s"
            for _ in range(4)
        ]
        new += [draw.choice(CHINESE), "Draw the graph.", "Draw a picture of the engine", "Too short"]
        draw.shuffle(new)
        return f" {new[0]}\n" + "\n".join(f"Task {first + n}: {text}" for n, text in enumerate(new[1:], 1))
    if prompt.startswith("Does the task"):
        return draw.choice((" Yes", " No", " No", " perhaps"))
    if prompt.endswith("Label:"):
        return f" good\nInput: the {draw.choice(THINGS)}\nLabel: bad\nInput: no {draw.choice(THINGS)}"
    given = draw.choice(("none", draw.choice(THINGS)))
    return draw.choice((f" {given}\nOutput: {draw.choice(PLACES)} 好\nTask: more", " nothing of use"))


Fault = Callable[["Handler"], None]


@dataclass
class Served:
    """A running server: its address, what it was asked, and how the next requests fail."""

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    faults: list[Fault | None] = field(default_factory=list)
    answer: Callable[[str, int], str] = canned
    delay_s: float = 0.0
    finish_reason: str = "stop"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    served: Served

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.served.asked.append({"path": self.path, **asked})
        self.served.headers.append(dict(self.headers))
        fault = self.served.faults.pop(0) if self.served.faults else None
        if fault is not None:
            fault(self)
            return
        time.sleep(self.served.delay_s)
        chat = self.path.endswith("/chat/completions")
        prompt = asked["messages"][0]["content"] if chat else asked["prompt"]
        text = self.served.answer(prompt, asked["seed"])
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        self.say(200, json.dumps({"choices": [choice | {"finish_reason": self.served.finish_reason}]}))

    def say(self, code: int, text: str, **headers: str) -> None:
        raw = text.encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""


def says(code: int, text: str = "", **headers: str) -> Fault:
    return lambda handler: handler.say(code, text, **headers)


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def drips(handler: Handler) -> None:
    """An answer that never ends, a byte now and then."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    except OSError:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no fault."""


@contextmanager
def serving() -> Iterator[Served]:
    handler = type("Bound", (Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    served = Served(f"http://127.0.0.1:{server.server_address[1]}/v1")
    handler.served = served
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
