"""A client of `shardwise serve`, from the standard library alone.

client = Client("http://127.0.0.1:8700")
client.submit(Path("job.yaml").read_text())
client.job("small")["state"]
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

URL, TOKEN, CA = "SHARDWISE_SERVER", "SHARDWISE_TOKEN", "SHARDWISE_CA"
"""Environment variables: the service's address, the user's token, a file of certificates to trust."""
ENDED = ("succeeded", "failed", "cancelled")
TIMEOUT_S = 30.0
POLL_S = 1.0


class ServiceError(Exception):
    """What the service refused. `code` is the HTTP status; 0: it could not be reached."""

    def __init__(self, code: int, message: str, fix: str = "", errors: list[dict[str, Any]] | None = None) -> None:
        super().__init__(message if not fix else f"{message}\n  to fix: {fix}")
        self.code, self.message, self.fix, self.errors = code, message, fix, errors or []


class Client:
    """The calls of one user to one service."""

    def __init__(self, url: str | None = None, *, token: str | None = None, ca: str | None = None) -> None:
        """By default, what SHARDWISE_SERVER, SHARDWISE_TOKEN and SHARDWISE_CA say."""
        self.url = (url or os.environ.get(URL) or "http://127.0.0.1:8700").rstrip("/")
        self.token = token or os.environ.get(TOKEN)
        self.ca = ca or os.environ.get(CA)
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ServiceError(400, f"{self.url} is no address of a service", "http://HOST:PORT or https://HOST:PORT")
        self._parts = parts

    # The calls --------------------------------------------------------------------------------------------------------

    def submit(self, text: str) -> dict[str, Any]:
        """Submit a job as YAML; the same name and content again is the same job."""
        return self.call("POST", "/v1/jobs", body={"job": text})

    def jobs(self, *, states: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
        """Yield all jobs, or those in some states, in the order of their submission."""
        after: int | None = 0
        while after is not None:
            page = self.call("GET", "/v1/jobs", query={"after": after, "state": list(states)})
            yield from page["jobs"]
            after = page["next_after"]

    def job(self, name: str) -> dict[str, Any]:
        return self.call("GET", f"/v1/jobs/{quote(name, safe='')}")

    def events(self, name: str, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """Yield what happened to a job, oldest first, from after an event's id on."""
        position: int | None = after
        while position is not None:
            query = {"after": position, "limit": 1000}
            page = self.call("GET", f"/v1/jobs/{quote(name, safe='')}/events", query=query)
            yield from page["events"]
            position = page["next_after"]

    def logs(self, name: str, *, rank: int = 0, follow: bool = False) -> Iterator[str]:
        """Yield what a rank printed, in pieces; with `follow`, until the job ends."""
        offset = 0
        while True:
            is_over = not follow or self.job(name)["state"] in ENDED  # asked first: what is printed later is still read
            while True:
                query = {"rank": rank, "offset": offset}
                page = self.call("GET", f"/v1/jobs/{quote(name, safe='')}/logs", query=query)
                if page["next_offset"] == offset:
                    break
                offset = page["next_offset"]
                yield page["text"]
            if is_over:
                return
            time.sleep(POLL_S)

    def pause(self, name: str) -> dict[str, Any]:
        return self.call("POST", f"/v1/jobs/{quote(name, safe='')}/pause")

    def resume(self, name: str) -> dict[str, Any]:
        return self.call("POST", f"/v1/jobs/{quote(name, safe='')}/resume")

    def cancel(self, name: str) -> dict[str, Any]:
        return self.call("POST", f"/v1/jobs/{quote(name, safe='')}/cancel")

    def watch(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the job now and whenever it changes, until it ends."""
        before: dict[str, Any] | None = None
        while True:
            now = self.job(name)
            if now != before:
                yield now
            if now["state"] in ENDED:
                return
            before = now
            time.sleep(POLL_S)

    def nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.call("GET", "/v1/nodes")["nodes"]
        return found

    def cordon(self, node: str, *, cordoned: bool = True) -> list[dict[str, Any]]:
        """Start no more jobs on a node, or start them again."""
        verb = "cordon" if cordoned else "uncordon"
        found: list[dict[str, Any]] = self.call("POST", f"/v1/nodes/{quote(node, safe='')}/{verb}")["nodes"]
        return found

    # The wire ---------------------------------------------------------------------------------------------------------

    def call(
        self, method: str, path: str, *, query: dict[str, Any] | None = None, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the JSON of one call. ServiceError where the service refuses it or cannot be reached."""
        headers = {"Accept": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        if method == "POST":
            headers["Content-Type"] = "application/json"
        target = self._parts.path + path + (f"?{urlencode(query, doseq=True)}" if query else "")
        data = None if body is None else json.dumps(body)
        connection = None
        try:
            connection = self._connection()
            connection.request(method, target, body=data, headers=headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            told = str(error) or type(error).__name__
            raise ServiceError(0, f"{self.url} cannot be reached: {told}", f"--server URL, or set {URL}") from None
        finally:
            if connection is not None:
                connection.close()
        try:
            found = json.loads(text)
            found = dict(found)
        except (ValueError, TypeError):
            raise ServiceError(status, f"{self.url} answered what is no JSON object: {text[:80]!r}") from None
        if status >= 400:
            raise ServiceError(status, str(found.get("message")), str(found.get("fix", "")), found.get("errors"))
        return found

    def _connection(self) -> http.client.HTTPConnection:
        host, port = str(self._parts.hostname), self._parts.port
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, port or 80, timeout=TIMEOUT_S)
        trusts = ssl.create_default_context(cafile=self.ca)
        return http.client.HTTPSConnection(host, port or 443, timeout=TIMEOUT_S, context=trusts)
