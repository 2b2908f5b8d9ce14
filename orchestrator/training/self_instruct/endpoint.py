"""An OpenAI-compatible endpoint as a generator: one POST for a completion, repeated where the fault may pass.

The standard library's client, without redirects: one would carry the key to another host. Waits, repetitions and the size of an
answer are bounded.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from orchestrator.training.self_instruct.generator import Completion, GeneratorFailed, Request

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_ANSWER_BYTES = 2**24
MAX_WAIT_S = 60.0
"""Between two attempts, also where the server asks for more."""
_PASSING = frozenset({408, 409, 425, 429})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class _Passing(Exception):
    """A fault after which the request is repeated."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class EndpointGenerator:
    """A model behind HTTP.

    Args:
        url: up to and without /chat/completions, https://HOST/v1 for instance.
        api: `chat` sends the prompt as a user's message, `completions` as a text to go on from.
        timeout_s: of one attempt, from the connection to the last byte.
        backoff_s: wait before the second attempt; it doubles with each further one.
    """

    url: str
    model: str
    api: Literal["chat", "completions"] = "chat"
    key: str | None = None
    timeout_s: float = 120.0
    num_attempts: int = 6
    backoff_s: float = 1.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the endpoint {self.url} is no http:// or https:// address, such as https://HOST/v1")
        if self.key and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ValueError(
                f"{self.url} is not encrypted, and would carry the key of {KEY_VARIABLE} readable: use https://"
            )
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(f"the key in {KEY_VARIABLE} holds a character that no HTTP header can carry")

    @property
    def name(self) -> str:
        return f"{self.model} at {urlsplit(self.url).netloc.rpartition('@')[2]}"

    def complete(self, request: Request) -> Completion:
        told = ""
        for attempt in range(self.num_attempts):
            try:
                return self._read(self._post(self._body(request)))
            except _Passing as fault:
                told = str(fault)
                if attempt + 1 < self.num_attempts:
                    time.sleep(min(MAX_WAIT_S, max(fault.wait_s, self.backoff_s * 2**attempt)))
        raise GeneratorFailed(
            f"{self._address} failed {self.num_attempts} times, the last time so: {told}",
            "when it answers again, the same command goes on",
        )

    @property
    def _address(self) -> str:
        return f"{self.url.rstrip('/')}/{'chat/completions' if self.api == 'chat' else 'completions'}"

    def _body(self, request: Request) -> dict[str, Any]:
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": request.prompt}]}
            if self.api == "chat"
            else {"prompt": request.prompt}
        )
        if request.stop:  # some servers refuse an empty list
            asked["stop"] = list(request.stop)
        return asked | {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }

    def _post(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "shardwise"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        posted = urllib.request.Request(self._address, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.timeout_s
        try:
            with urllib.request.build_opener(_NoRedirect).open(posted, timeout=self.timeout_s) as answer:
                return _read_until(answer, deadline)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = getattr(error, "reason", None) or error
            raise _Passing(f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__) from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """Return what an HTTP error means: it passes, or it is the user's to mend."""
        try:
            said = error.read(2000).decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        told = f"HTTP {error.code} {error.reason}: {' '.join(said.split())[:300]}"
        if self.key:
            told = told.replace(self.key, "(the key)")
        if error.code in _PASSING or error.code >= 500:
            return _Passing(told, _seconds(error.headers.get("Retry-After")))
        fix = {401: f"put the key into {KEY_VARIABLE}", 403: f"put a key that may do this into {KEY_VARIABLE}"}.get(
            error.code, "check --endpoint, --model and --api"
        )
        return GeneratorFailed(f"{self._address} refuses the request: {told}", fix)

    def _read(self, raw: bytes) -> Completion:
        try:
            choice = json.loads(raw)["choices"][0]
            text = choice["message"]["content"] if self.api == "chat" else choice["text"]
            text.encode("utf-8")
            return Completion(text=text, truncated=choice.get("finish_reason") == "length")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shown = raw[:100].decode("utf-8", errors="replace")
            raise _Passing(f"the answer is no completion: {shown!r}") from None


def _read_until(answer: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole answer. TimeoutError where it drips in for too long, ValueError where it is too large."""
    parts: list[bytes] = []
    size = 0
    while part := answer.read1(2**16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer took too long")
        if size > MAX_ANSWER_BYTES:
            raise _Passing(f"the answer is larger than {MAX_ANSWER_BYTES:,} bytes")
    return b"".join(parts)


def _seconds(text: str | None) -> float:
    """Return the seconds that Retry-After asks for; 0 where it is a date or nothing."""
    return float(text) if text and text.strip().isdecimal() else 0.0
