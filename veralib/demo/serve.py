"""The demo's last lines: `vera serve` over the store that the fleet was put into, asked through the OpenAI API."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import StateError

START_S = 120
SETTLE_S = 20


def command(model: Path, store: Path, port: int = 8000) -> list[str]:
    """What starts the server: `vera` and its arguments."""
    # As the fleet was trained: the checkpoint is bf16, and a processor that has bf16 would serve it so, with other tokens.
    command = ["vera", "serve", "--model", str(model), "--store", str(store), "--no-auth", "--port", str(port)]
    return [*command, "--engine-args=--dtype=float32"]


@contextmanager
def running(model: Path, store: Path) -> Iterator[str]:
    """The base of the API of a server that is ready; it is stopped at the end. StateError where it doesn't come up."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        arguments = [*command(model, store, port)[1:], "--state", str(Path(folder) / "state")]
        with open(log, "wb") as out:
            server = subprocess.Popen([sys.executable, "-m", "veralib.cli", *arguments], stdout=out, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + START_S
            while not _ready(url):
                if server.poll() is not None or time.monotonic() > deadline:
                    end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise StateError(f"the server didn't come up within {START_S} s. What it wrote last:\n{end}")
                time.sleep(0.2)
            yield f"{url}/v1"
        finally:
            server.terminate()
            try:
                server.wait(SETTLE_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def ask(api: str, models: Sequence[str], prompt: str, tokens: int) -> dict[str, str]:
    """What each model, the base or an owner's adapter, goes on with: prompt and greedy text on one line."""
    import httpx2

    said = {}
    for model in models:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        answer = httpx2.post(f"{api}/completions", json=body, timeout=60)
        if answer.status_code != 200:
            raise StateError(f'the server answered {answer.status_code} for "{model}": {answer.text[:500]}')
        said[model] = " ".join((prompt + answer.json()["choices"][0]["text"]).split())
    return said


def unlike(said: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """The models whose served text isn't what the same adapter said before, outside of the server."""
    return [model for model in said if said[model] != expected[model]]


def _ready(url: str) -> bool:
    import httpx2

    try:
        return httpx2.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
