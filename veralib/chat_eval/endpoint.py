"""An OpenAI-compatible chat endpoint: one request in, one reply out, with patience for rate limits and hiccups."""

import email.utils
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, EndpointError, need

KEY_VARIABLE = "OPENAI_API_KEY"
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
LONGEST_WAIT = 300.0
NONSENSE = 3
"""How often a request is sent in all whose answers are no chat completions."""
ITS_OWN = (400, 413, 422)
"""Refusals that may be of one conversation alone: a content filter, too many tokens."""
IN_A_ROW = 8
"""After so many of them, with no reply between, it isn't the conversations."""


class NoCompletion(EndpointError):
    """This conversation gets no chat completion, by what the endpoint says; another may."""


@dataclass(frozen=True)
class Reply:
    """What came back. model: the version that answered, by the endpoint's own word."""

    text: str
    model: str
    finish: str
    input_tokens: int
    output_tokens: int


class Endpoint:
    """A model behind URL/chat/completions. The key comes from OPENAI_API_KEY, and is neither kept in a file nor printed.

    retries: how often a request is repeated after a rate limit, a server error, a timeout or a broken connection; pause: seconds
    before the first repeat, twice as many before each next one, or what the endpoint's Retry-After asks for. fields: more fields
    of the request; None takes one out. Safe to call from several threads; all of them wait while one was told to.
    works: whether it has ever given a completion; to be set where a file of its replies shows so. patient: whether one that
    works may refuse any number of conversations; else IN_A_ROW.
    """

    def __init__(
        self, url: str, model: str, *, retries: int = 6, timeout: float = 180.0, pause: float = 1.0,
        fields: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        try:
            import httpx2
        except ImportError as e:
            raise need("httpx2", "chat", "Asking an endpoint") from e
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f'endpoint is "{url}", expected the base of an API, such as https://api.openai.com/v1')
        url = url.rstrip("/")
        self.url = url if url.endswith("/chat/completions") else url + "/chat/completions"
        self.model, self.retries, self.pause, self.fields = model, retries, pause, dict(fields or {})
        self._key = _key()
        self._http = httpx2
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.Client(timeout=httpx2.Timeout(timeout, connect=min(timeout, 20.0)), headers=headers)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._refused = 0
        self.works = self.patient = False

    def stop(self) -> None:
        """Ends every wait: threads that are between two tries give up."""
        self._stop.set()

    def request(self, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The request's JSON: model, messages, parameters, and the fields given at the start, which win."""
        body = {"model": self.model, "messages": list(messages), **parameters, **self.fields}
        return {k: v for k, v in body.items() if v is not None}

    def chat(self, messages: Sequence[Mapping[str, str]], **parameters: Any) -> Reply:
        """The reply to one conversation.

        Errors: EndpointError where there is none after all tries, or trying again can't help; NoCompletion where this
        conversation is refused, as by a content filter, or an endpoint that works gave three answers that are something else.
        """
        body = self.request(messages, parameters)
        nonsense = 0
        for attempt in range(self.retries + 1):
            self._wait_for_others()
            try:
                answer = self._client.post(self.url, json=body)
            except self._http.RequestError as e:
                fault, wanted = f"{type(e).__name__}: {self._scrub(str(e)) or 'no answer in time'}", 0.0
            except self._http.InvalidURL as e:
                raise ConfigError(f"endpoint {self.url} is no URL: {e}") from e
            else:
                if answer.status_code == 200:
                    reply = self._reply(answer)
                    if reply is not None:
                        self.works, self._refused = True, 0
                        return reply
                    nonsense += 1
                    if nonsense == min(NONSENSE, self.retries + 1):
                        raise self._no_completion(answer, nonsense)
                    fault, wanted = "no chat completion", 0.0
                else:
                    fault, wanted = self._refusal(answer)
            if attempt < self.retries:
                self._wait(max(wanted, self.pause * 2**attempt * random.uniform(0.5, 1.0)), wanted > 0)
        tries = f"{self.retries + 1} tries" if self.retries else "one try"
        raise EndpointError(f"{self.url} gave no answer in {tries}; the last: {fault}. Is it running, and is the address right?")

    def _reply(self, answer: Any) -> Reply | None:
        """The answer's Reply; None where it is no chat completion."""
        try:
            found = answer.json()
            choice, usage = found["choices"][0], found.get("usage") or {}
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                return None
            counts = [int(usage.get(k) or 0) for k in ("prompt_tokens", "completion_tokens")]
            return Reply(text, str(found.get("model") or self.model), str(choice.get("finish_reason") or ""), *counts)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None

    def _no_completion(self, answer: Any, tries: int) -> EndpointError:
        said = f"{self.url} answered, but not with a chat completion ({tries} tries): {self._scrub(answer.text[:120])!r}."
        if self.works:
            return NoCompletion(said)
        return EndpointError(f"{said} The endpoint must be the base of an OpenAI-compatible API, which mostly ends in /v1.")

    def _refusal(self, answer: Any) -> tuple[str, float]:
        """(what was said, seconds asked for) of an answer that may pass; EndpointError where it won't."""
        status = answer.status_code
        said = self._scrub(answer.text[:300].strip())
        if status in (401, 403):
            given = "refuses the key in" if self._key else "wants a key, and there is none in"
            raise EndpointError(f"{self.url} {given} the environment variable {KEY_VARIABLE} (HTTP {status}).")
        if status not in PASSING or "insufficient_quota" in said:
            hint = f' Does it know the model "{self.model}"?' if status == 404 else ""
            with self._lock:
                self._refused += 1
                row = self._refused
            endless = row >= IN_A_ROW and not (self.patient and self.works)
            alone = status in ITS_OWN and not endless and "insufficient_quota" not in said
            many = f" {row} requests in a row were refused." if endless else ""
            kind = NoCompletion if alone else EndpointError
            raise kind(f"{self.url} refuses the request (HTTP {status}): {said}.{hint}{many}")
        wanted = retry_after(answer.headers.get("retry-after"))
        if wanted > LONGEST_WAIT:
            raise EndpointError(f"{self.url} asks to wait {wanted:.0f} seconds (HTTP {status}): {said}")
        return f"HTTP {status}: {said}", wanted

    def _wait(self, seconds: float, everybody: bool) -> None:
        if everybody:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic() + seconds)
        if self._stop.wait(seconds):
            raise EndpointError(f"stopped while waiting for {self.url}")

    def _wait_for_others(self) -> None:
        while (left := self._free_at - time.monotonic()) > 0 and not self._stop.is_set():
            self._stop.wait(left)
        if self._stop.is_set():
            raise EndpointError(f"stopped while waiting for {self.url}")

    def _scrub(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text


def retry_after(value: str | None) -> float:
    """The seconds that a Retry-After header asks for, given as seconds or as a date; 0 where there is none."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or any(c.isspace() or not c.isprintable() for c in key):
        raise ConfigError(f"the environment variable {KEY_VARIABLE} holds no key: expected one line of letters and digits")
    return key
