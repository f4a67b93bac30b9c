"""Two gateways and two engines over one store, behind a balancer: what one is told both know; when one dies the other goes on.

python examples/two_gateways.py

The balancer here is thirty lines, so that the example runs alone; in production it is nginx, HAProxy or a cloud's.
"""

import argparse
import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import openai
import torch
import transformers

from veralib import VeraConfig, attach
from veralib.store import open_store

ROOT = Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser()
parser.add_argument("--output", default="out/two_gateways", help="folder for the store, the state and the logs")
parser.add_argument("--model", default=str(ROOT / "models" / "books-4m"))
options = parser.parse_args()
folder = Path(options.output)
folder.mkdir(parents=True, exist_ok=True)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Balancer:
    """Passes connections on in turn to the backends that take them."""

    def __init__(self, ports: list[int]) -> None:
        self.turns, self.tries = itertools.cycle(ports), len(ports)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, both ways, until either side ends it."""
        for _ in range(self.tries):
            with contextlib.suppress(OSError):
                back_reader, back_writer = await asyncio.open_connection("127.0.0.1", next(self.turns))
                await asyncio.gather(self.copy(reader, back_writer), self.copy(back_reader, writer))
                return
        writer.close()

    async def copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes from one side to the other."""
        with contextlib.suppress(OSError, asyncio.CancelledError):  # cancelled: the example is over
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


def gateway(port: int) -> subprocess.Popen:
    """A gateway with an engine of its own; both share the store, and the state: keys, files, jobs."""
    command = [sys.executable, "-m", "veralib.cli", "serve", "--model", options.model, "--port", str(port), "--no-auth"]
    command += ["--store", str(folder / "store"), "--state", str(folder / "state")]
    with open(folder / f"gateway-{port}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def some_adapter(seed: int):
    """An adapter that says something of its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    form = attach(model, VeraConfig(rank=64, targets=["q_proj", "v_proj"])).adapter()
    draw = torch.Generator().manual_seed(seed)
    vectors = {unit: (d, 6 * torch.randn(b.shape, generator=draw)) for unit, (d, b) in form.vectors.items()}
    return replace(form, vectors=vectors)


async def answers(url: str, model: str, times: int) -> list[str]:
    """The same question several times, each on a connection of its own, so that the balancer takes turns."""
    said = []
    for _ in range(times):
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=5) as client:
            done = await client.completions.create(model=model, prompt="The old man", max_tokens=12, temperature=0)
            said.append(done.choices[0].text)
    return said


async def main() -> None:
    """The story."""
    ports = [free_port(), free_port()]
    servers = [gateway(port) for port in ports]
    try:
        for port in ports:
            while not await ready(port):
                await asyncio.sleep(0.3)
        balancer = await asyncio.start_server(Balancer(ports), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{balancer.sockets[0].getsockname()[1]}/v1"
        store = open_store(folder / "store")

        store.put("ann", some_adapter(seed=1))
        first = await answers(url, "ann", 4)
        print(f"version 1, by both gateways: {first[0]!r}, the same {len(first)} times: {len(set(first)) == 1}")

        store.put("ann", some_adapter(seed=2))
        second = await answers(url, "ann", 4)
        print(f"version 2, at once, by both: {second[0]!r}, the same {len(second)} times: {len(set(second)) == 1}")

        servers[0].kill()
        servers[0].wait()
        third = await answers(url, "ann", 4)
        print(f"one gateway killed, {len(third)} more answers by the other, the same: {set(third) == set(second)}")
        assert len(set(first)) == len(set(second)) == len(set(third)) == 1 and first[0] != second[0] == third[0]
        balancer.close()
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(60)


async def ready(port: int) -> bool:
    """Whether a gateway and its engine answer."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.write(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    line = await reader.readline()
    writer.close()
    return b" 200 " in line


asyncio.run(main())
