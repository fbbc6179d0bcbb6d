"""One request to an OpenAI-compatible server: sent, tried again where that helps, and read with care.

The library's own retries are off: how long to wait, for all requests at once, is decided here, and every request
counted.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.evaluation.judge.cache import Reply

if TYPE_CHECKING:
    from openai import AsyncOpenAI

LOOPBACK = ("127.0.0.1", "::1", "localhost")
FIRST_WAIT_S = 1.0
"""After a first failure; it doubles with every further one, up to a minute."""

LONGEST_WAIT_S = 300.0
"""A server that asks for a longer pause is asked again by the next command."""


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is, and how hard it may be asked. ``key`` is shown nowhere."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout_s: float = 120.0
    tries: int = 6
    requests_per_minute: float | None = None
    concurrency: int = 4

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""


class Unavailable(FlocktuneError):
    """The server did not answer one request, after all tries."""


class Rejected(FlocktuneError):
    """The server does not take this one request: too long, perhaps."""


class Stopped(FlocktuneError):
    """The user asked to stop; nothing was sent, or what was sent is given up."""


class Pace:
    """When the next request may start: requests a minute, and the pauses that the server asks for."""

    def __init__(self, requests_per_minute: float | None, stop: threading.Event) -> None:
        self.gap_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self.next_at = 0.0
        self.stop = stop

    async def turn(self) -> None:
        """Wait for a turn. Raises Stopped."""
        while (wait := self.next_at - time.monotonic()) > 0 and not self.stop.is_set():
            await asyncio.sleep(min(wait, 0.2))
        if self.stop.is_set():
            raise Stopped("stopped")
        self.next_at = time.monotonic() + self.gap_s

    def pause(self, seconds: float) -> None:
        self.next_at = max(self.next_at, time.monotonic() + seconds)


def connect(endpoint: Endpoint) -> AsyncOpenAI:
    """A client of the openai library. From the environment it takes proxies alone, and those not for loopback."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Omit

    none: Any = Omit()
    outside = endpoint.host not in LOOPBACK
    return AsyncOpenAI(
        api_key=endpoint.key or "none",
        base_url=endpoint.url,
        timeout=endpoint.timeout_s,
        max_retries=0,
        default_headers={"OpenAI-Organization": none, "OpenAI-Project": none},
        http_client=DefaultAsyncHttpxClient(timeout=endpoint.timeout_s, trust_env=outside, follow_redirects=False),
    )


async def send(
    client: AsyncOpenAI,
    body: Mapping[str, Any],
    endpoint: Endpoint,
    pace: Pace,
    *,
    sent: Callable[[], None] = lambda: None,
    waiting: Callable[[str], None] = lambda reason: None,
    answered_before: bool = True,
) -> Reply:
    """Ask once, and again after time-outs, cut connections, 408, 409, 425, 429 and 5xx.

    Waits double from :data:`FIRST_WAIT_S` and are never shorter than the server's Retry-After. ``sent`` is called for
    every request that goes out, ``waiting`` with the reason of every pause. ``answered_before``: the server has; if
    not, a refused connection is the end. Raises UserError for what no try can mend (key, address, model), Rejected,
    Unavailable, Stopped.
    """
    import openai

    reason = ""
    for attempt in range(endpoint.tries):
        await pace.turn()
        sent()
        asked_for = 0.0
        try:
            # As text: what comes may be anything, and the library's types do not check.
            return _read(await client.post("/chat/completions", cast_to=str, body=dict(body)), endpoint.key)
        except openai.APIStatusError as error:
            reason = f"{error.status_code} {_message(error, endpoint.key)}"
            _refuse(error, reason, endpoint)
            asked_for = _retry_after(error.response.headers)
        except openai.APITimeoutError:
            reason = f"no answer within {endpoint.timeout_s:g} s"
        except openai.APIConnectionError as error:
            reason = f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}"
            if type(error.__cause__).__name__ == "ConnectError" and not answered_before:
                raise UserError(_unreachable(endpoint, reason)) from None
        except ValueError as error:
            reason = str(error)
        if asked_for > LONGEST_WAIT_S:
            raise Unavailable(f"{reason}; it asks for a pause of {asked_for:.0f} s")
        if attempt + 1 < endpoint.tries:
            wait = max(asked_for, min(60.0, FIRST_WAIT_S * 2**attempt) * random.uniform(0.75, 1.25))
            waiting(f"{reason}; waiting {wait:.0f} s")
            pace.pause(wait)
    raise Unavailable(f"{reason} ({endpoint.tries} tries)")


def _read(text: str, key: str) -> Reply:
    """Raises ValueError when it is not a chat completion."""
    try:
        answer = json.loads(text)
        choice = answer["choices"][0]
        content = choice["message"].get("content")
        if isinstance(content, list):  # some servers answer in parts
            content = "".join(part.get("text") or "" for part in content)
        usage = answer.get("usage") or {}
        reply = Reply(
            content or "", choice.get("finish_reason"), usage.get("prompt_tokens"), usage.get("completion_tokens")
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        start = " ".join(_hidden(text, key)[:80].split())
        raise ValueError(f"an answer that is no chat completion: {start!r}") from None
    if not isinstance(reply.text, str):
        raise ValueError(f"an answer whose content is no text: {_hidden(str(reply.text), key)[:80]!r}")
    told = reply.tokens_in, reply.tokens_out
    counts = [count if type(count) is int and count >= 0 else None for count in told]  # less than 0 would lower a cost
    reason = reply.finish_reason if isinstance(reply.finish_reason, str) else None
    return Reply(reply.text, reason, *counts)


def _refuse(error: Any, reason: str, endpoint: Endpoint) -> None:
    """Raise for a status that trying again does not mend; return for one that it may."""
    status = error.status_code
    if status in (401, 403):
        got = "a key that it does not take" if endpoint.key else "no key"
        fix = "The key comes from the environment variable that --key-variable names."
        raise UserError(Problem(endpoint.url, "a key that the server takes", f"{got} ({reason})", fix)) from None
    if status == 404:
        raise UserError(
            Problem(
                f"{endpoint.url}, model {endpoint.model}",
                "a server that knows this model",
                reason,
                "--url ends before /chat/completions, mostly in /v1; --model is the name that the server uses.",
            )
        ) from None
    if status == 402 or (status == 429 and getattr(error, "code", None) == "insufficient_quota"):
        raise UserError(Problem(endpoint.url, "an account with credit", reason)) from None
    if status < 400:  # followed, it would carry somebody's data to where nobody allowed it to go
        to = error.response.headers.get("location") or "elsewhere"
        raise UserError(Problem(endpoint.url, "a server that answers itself", f"{status}, to {to}", "Mend --url."))
    if 400 <= status < 500 and status not in (408, 409, 425, 429):
        raise Rejected(reason) from None


def _unreachable(endpoint: Endpoint, reason: str) -> Problem:
    return Problem(endpoint.url, "a server that listens", reason, "Start it, or mend --url.")


def _message(error: Any, key: str) -> str:
    """What the server says, in one line and without the key."""
    body = error.body if isinstance(error.body, dict) else {}
    text = str(body.get("message") or error.response.text or "")
    text = " ".join(_hidden(text, key).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _hidden(text: str, key: str) -> str:
    return text.replace(key, "(key)") if key else text


def _retry_after(headers: Any) -> float:
    """Seconds that the server asks to wait, from ``Retry-After`` as seconds or as a date; 0 when it does not."""
    value = str(headers.get("retry-after") or "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
