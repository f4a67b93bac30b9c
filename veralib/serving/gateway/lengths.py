"""Whether prompt and answer fit into the engine's length, and how long an answer may become that named no length."""

from typing import Any

from .client import About, EngineClient, encode
from .errors import ApiError

LONGEST_WORD = 64
"""Characters a token at most, for a text that isn't worth the engine's time."""
CHARACTERS_A_TOKEN = 4
"""Bytes of a token, roughly, for a limit that is corrected by the engine's count."""
SPECIAL, MESSAGE = 8, 64
"""Tokens that a tokenizer, and a chat template for each message, may add beside the text's."""


async def fit(client: EngineClient, about: About, path: str, body: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """The body with max_tokens set: as asked, or what is left of the length and at most max_tokens. ApiError 400.

    No token is shorter than a byte, so a text whose bytes fit needs no counting; otherwise the engine counts. What both miss,
    such as a template's long preamble, the engine refuses itself.
    """
    generates = "input" not in body
    asked = body.get("max_tokens")
    wanted = 0 if not generates else asked or (16 if path == "/v1/completions" else max_tokens)
    length = about.max_length
    if length is None or at_most(body) + (wanted if generates else 0) <= length:
        return {**body, "max_tokens": wanted} if generates else body
    counts = []
    for prompt in prompts(body):
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            counts.append(len(prompt))
        elif generates and len(str(prompt)) > LONGEST_WORD * length:  # not worth the engine's time
            raise _too_long(f"over {length}", wanted, length)
        else:
            kind: dict[str, Any] = {"messages": prompt} if "messages" in body else {"prompt": prompt}
            if body.get("tools"):
                kind["tools"] = body["tools"]
            count = await client.count_tokens({"model": about.name, **kind})
            if count is None:
                return {**body, "max_tokens": wanted} if generates else body
            counts.append(count)
    longest = max(counts)
    if asked is None and generates:
        wanted = min(wanted, length - longest)
    if longest + wanted > length or (generates and wanted < 1):
        raise _too_long(str(longest), max(wanted, 1), length)
    return {**body, "max_tokens": wanted} if generates else body


def prompts(body: dict[str, Any]) -> list[Any]:
    """What is tokenised one by one: texts, lists of tokens, or one list of messages."""
    if "messages" in body:
        return [body["messages"]]
    given = body.get("prompt", body.get("input"))
    several = isinstance(given, list) and given and not isinstance(given[0], int)
    return list(given) if several and isinstance(given, list) else [given]


def at_most(body: dict[str, Any]) -> int:
    """A bound on the tokens of the longest prompt."""
    if "messages" in body:
        return SPECIAL + MESSAGE * len(body["messages"]) + len(encode([body["messages"], body.get("tools")]))
    return SPECIAL + max(len(p) if isinstance(p, list) else len(p.encode("utf-8", "surrogatepass")) for p in prompts(body))


def estimate(body: dict[str, Any]) -> int:
    """The tokens of all prompts together, roughly: lists of tokens are counted, texts guessed from their length."""
    given = [encode([body["messages"], body.get("tools")])] if "messages" in body else prompts(body)
    sizes = (len(p.encode("utf-8", "surrogatepass") if isinstance(p, str) else p) for p in given)
    return sum(n if isinstance(p, list) else -(-n // CHARACTERS_A_TOKEN) for p, n in zip(given, sizes, strict=True))


def _too_long(count: str, wanted: int, length: int) -> ApiError:
    answer = f" and {wanted} for the answer" if wanted else ""
    return ApiError(
        400,
        f"The model's length is {length} tokens; this request needs {count} for the prompt{answer}. Send less, or lower "
        "max_tokens.",
        code="context_length_exceeded",
    )
