"""A server under load for half an hour, with everything that goes wrong in it, and every answer checked.

    python -m benchmarks.soak [--minutes 30] [--clients 64] [--adapters 5000] [--engine embedded|vllm] [--engine-python PYTHON]

`vera serve` over models/books-4m. Clients ask for adapters by Zipf's law, for the base, for names that there aren't; some leave
their stream. Beside them versions are put, adapters deleted, loaded, unloaded, damaged on the disk. After a third of the time the
engine is killed (SIGKILL), after two thirds the gateway. At the end each answer is compared with what that adapter says when the
same model computes it with vera.rows, at each version that was live meanwhile. Writes results/serving/soak-ENGINE.json and .md.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from veralib.store import open_store
from veralib.store.folder import FolderStore

from . import measure
from .soak_world import BROKEN, MISSING, PROMPTS, Answer, Timeline, World, judge

RESULTS = measure.ROOT / "results" / "serving"
RANK, TOKENS, SLOTS = 64, 8, 64
ENGINE_ARGS = {
    "embedded": f"--slots {SLOTS} --dtype float32",
    "vllm": "--enforce-eager --dtype float32 --max-model-len 64 --max-num-seqs 64 --num-gpu-blocks-override 256",
}
"""float32, as the answers are judged by: the checkpoint is bf16, and processors that have bf16 serve it so."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""One thread for the engine: the gateway and the clients run beside it. What is set outside goes first."""
ZIPF = 1.1
LOST = 599  # no answer: the connection broke


class Soak:
    """One run. folder: for the store, the server's state and its logs."""

    def __init__(self, a: argparse.Namespace, folder: Path) -> None:
        self.a, self.folder = a, folder
        self.world = World(measure.ROOT / "models" / "books-4m", RANK, TOKENS)
        store = open_store(folder / "store", "folder", keep=3)
        assert isinstance(store, FolderStore)
        self.store = store
        self.names = [f"user:{i:05}" for i in range(a.adapters)]
        self.timeline, self.answers, self.down = Timeline(), [], []
        self.revisions = {name: 0 for name in self.names}
        self.counts = dict.fromkeys(("updates", "deletes", "damaged", "loads", "unloads", "left streams"), 0)
        self.memory: dict[str, list[tuple[float, int, int]]] = {"gateway": [], "engine": []}
        self.weights = list(itertools.accumulate(1 / (i + 1) ** ZIPF for i in range(a.adapters)))
        self.draw = random.Random(0)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start_server(self) -> None:
        """Starts `vera serve`; it isn't ready yet."""
        a = self.a
        command = [sys.executable, "-m", "veralib.cli", "serve", "--model", str(measure.ROOT / "models" / "books-4m")]
        command += ["--store", str(self.folder / "store"), "--state", str(self.folder / "state"), "--port", str(self.port)]
        command += ["--no-auth", "--key-concurrency", "4096", "--engine", a.engine, "--engine-args", a.engine_args]
        command += ["--slots", str(SLOTS), "--resident", str(4 * SLOTS)]  # vLLM's
        command += ["--engine-python", a.engine_python] if a.engine_python else []
        with open(self.folder / "gateway.log", "ab") as log:
            env = {**ENVIRONMENT, **os.environ}
            self.server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)

    def engine_process(self) -> Any:
        """The engine, a child of the gateway."""
        import psutil

        return psutil.Process(self.server.pid).children()[0]

    async def until_ready(self, client: Any) -> None:
        """Waits for /ready."""
        while True:
            if self.server.poll() is not None:
                raise SystemExit(f"the gateway ended with {self.server.returncode}: see {self.folder}/gateway.log")
            if await _status(client.get(f"{self.url}/ready", timeout=5)) == 200:
                return
            await asyncio.sleep(0.2)

    async def run(self) -> None:
        """The whole time, all roles side by side."""
        import httpx2

        begin = time.time()
        self.world.fill(self.store, self.names)
        for name in self.names:
            self.timeline.add(name, begin, time.time(), 0)
        print(f"{len(self.names):,} adapters in the store after {time.time() - begin:.0f} s", flush=True)
        self.start_server()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=256)
        async with httpx2.AsyncClient(timeout=120, limits=limits) as client:
            await self.until_ready(client)
            self.began = time.time()
            self.ends = self.began + 60 * self.a.minutes
            roles = [self.ask(client) for _ in range(self.a.clients)]
            await asyncio.gather(*roles, self.change(client), self.kill(client), self.watch())
            self.metrics = (await client.get(f"{self.url}/metrics")).text

    async def ask(self, client: Any) -> None:
        """One client, one request after the other."""
        while time.time() < self.ends:
            name = self.pick() if self.draw.random() < 0.95 else self.draw.choice((None, "user:nobody"))
            prompt = self.draw.randrange(len(PROMPTS))
            stream = self.draw.random() < 0.15
            leave = stream and self.draw.random() < 0.2
            body = {"model": name or "books-4m", "prompt": self.world.prompts[prompt], "max_tokens": TOKENS, "temperature": 0}
            began = time.time()
            got: str | int
            try:
                got, said = await (self.streamed(client, body, leave) if stream else self.whole(client, body))
            except Exception as e:
                got, said = LOST, f"{type(e).__name__}: {e}"[:200]
            self.answers.append(Answer(name, prompt, began, time.time(), got, leave, said))
            self.counts["left streams"] += leave
            if isinstance(got, int) and got >= 500:
                await asyncio.sleep(1)

    async def whole(self, client: Any, body: dict[str, Any]) -> tuple[str | int, str]:
        """(the text, ""), or (the status, what came with it)."""
        answer = await client.post(f"{self.url}/v1/completions", json=body)
        if answer.status_code == 200:
            return answer.json()["choices"][0]["text"], ""
        return _settled(answer.status_code), answer.text[:300]

    async def streamed(self, client: Any, body: dict[str, Any], leave: bool) -> tuple[str | int, str]:
        """The same, piece by piece; left after the second piece."""
        text, pieces = "", 0
        async with client.stream("POST", f"{self.url}/v1/completions", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                return _settled(answer.status_code), (await answer.aread()).decode()[:300]
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return text, ""
                if not line.startswith("data: "):
                    continue
                piece = json.loads(line[6:])
                if "error" in piece:
                    return 503, line[:300]
                text += piece["choices"][0]["text"] if piece["choices"] else ""
                pieces += 1
                if leave and pieces == 2:
                    return text, ""
        return LOST, "the stream ended early"

    async def change(self, client: Any) -> None:
        """Versions, deletions, damage, loads, unloads; one at a time, so that their order is known."""
        while time.time() < self.ends:
            name, dice, begin = self.pick(), self.draw.random(), time.time()
            if dice < 0.7 or self.timeline.now(name) in (MISSING, BROKEN):
                self.revisions[name] += 1
                adapter = self.world.adapter(name, self.revisions[name])
                await asyncio.to_thread(self.store.put, name, adapter)
                self.timeline.add(name, begin, time.time(), self.revisions[name])
                self.counts["updates"] += 1
            elif dice < 0.8:
                status = await _status(client.delete(f"{self.url}/v1/models/{name}", timeout=60))
                # Where no answer came it may have happened, or not: the deletion is never known to have ended.
                self.timeline.add(name, begin, time.time() if status == 200 else float("inf"), MISSING)
                self.counts["deletes"] += 1
            elif dice < 0.85:
                # An engine that holds it goes on with it: the damage may be met, or not.
                self.damage(name)
                self.timeline.add(name, begin, float("inf"), BROKEN)
                self.counts["damaged"] += 1
            else:
                what = "load" if dice < 0.93 else "unload"
                await _status(client.post(f"{self.url}/v1/{what}_lora_adapter", json={"lora_name": name}, timeout=60))
                self.counts[f"{what}s"] += 1
            await asyncio.sleep(self.a.pause)

    def damage(self, name: str) -> None:
        """Writes nonsense over the current version's record."""
        path = self.folder / "store" / self.store._folder(name) / self.store._files_of(name)[-1]
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xff" * 16)

    async def kill(self, client: Any) -> None:
        """The engine after a third of the time, the gateway after two thirds."""
        third = (self.ends - self.began) / 3
        await asyncio.sleep(third)
        for which in ("engine", "gateway"):
            begin = time.time()
            # Until something is ready again nobody knows when; then the window is closed.
            self.down.append((begin, float("inf")))
            if which == "engine":
                self.engine_process().send_signal(signal.SIGKILL)
                await asyncio.sleep(0.5)
            else:
                self.server.kill()
                self.server.wait()
                self.start_server()
            await self.until_ready(client)
            self.down[-1] = (begin, time.time() + 0.5)
            print(f"{which} killed; ready again after {time.time() - begin:.1f} s", flush=True)
            await asyncio.sleep(max(0.0, third - (time.time() - begin)) if which == "engine" else 0)

    async def watch(self) -> None:
        """Memory of the gateway and of the engine with its workers, every second or so."""
        import psutil

        while time.time() < self.ends:
            for which, find in (("gateway", lambda: psutil.Process(self.server.pid)), ("engine", self.engine_process)):
                try:
                    process = find()
                    workers = process.children(recursive=True) if which == "engine" else []
                    held = sum(p.memory_info().rss for p in (process, *workers))
                    if held:  # not one that was just killed
                        self.memory[which].append((time.time() - self.began, process.pid, held))
                except (psutil.Error, IndexError):
                    pass
            await asyncio.sleep(max(1.0, self.a.minutes))

    def pick(self) -> str:
        """A name by Zipf's law."""
        return self.draw.choices(self.names, cum_weights=self.weights)[0]


def _settled(status: int) -> int:
    return 422 if status == 400 else status  # a broken adapter may be either


async def _status(call: Any) -> int:
    try:
        return (await call).status_code
    except Exception:
        return LOST


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def growth(samples: list[tuple[float, int, int]]) -> list[dict[str, Any]]:
    """For each process of a role: its memory when a third of its life had passed, and at its end, in MiB; and its course, as
    (minutes of the soak, MiB), thirty points or so."""
    found: list[dict[str, Any]] = []
    for _, group in itertools.groupby(samples, key=lambda s: s[1]):
        course = [(s[0] / 60, s[2] / 2**20) for s in group]
        sizes = [size for _, size in course]
        if len(sizes) >= 6:
            thin = [(round(minutes, 2), round(size, 1)) for minutes, size in course[:: max(1, len(course) // 30)]]
            found.append({"after_a_third": sizes[len(sizes) // 3], "at_the_end": sizes[-1], "most": max(sizes), "course": thin})
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs it, checks each answer, writes the report. Where any was wrong or failed: keeps the logs, exits with 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=5000)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two changes")
    parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
    parser.add_argument("--engine-python")
    parser.add_argument("--engine-args", help="left out, what this machine's processor needs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="keep the logs and the store even if all is well")
    a = parser.parse_args(arguments)
    a.engine_args = a.engine_args or ENGINE_ARGS[a.engine]
    folder = Path(tempfile.mkdtemp(prefix="vera-soak-"))
    soak = Soak(a, folder)
    try:
        asyncio.run(soak.run())
    finally:
        if hasattr(soak, "server"):
            soak.server.send_signal(signal.SIGTERM)
            try:
                soak.server.wait(60)
            except subprocess.TimeoutExpired:
                soak.server.kill()
    answers: list[Answer] = soak.answers
    seconds = sorted(x.ended - x.began for x in answers if isinstance(x.got, str) and not x.partial)
    found: dict[str, Any] = {
        **{"engine": a.engine, "minutes": a.minutes, "clients": a.clients, "adapters": a.adapters, "slots": SLOTS},
        **judge(soak.world, soak.timeline, answers, soak.down),
        "changes": soak.counts,
        "down_seconds": [end - begin for begin, end in soak.down],
        "latency_ms": {p: 1000 * seconds[int(len(seconds) * q)] for p, q in (("p50", 0.5), ("p99", 0.99))} if seconds else {},
        "requests_per_second": len(answers) / (60 * a.minutes),
        "memory_mib": {which: growth(samples) for which, samples in soak.memory.items()},
        "machine": measure.environment(),
    }
    a.results.mkdir(parents=True, exist_ok=True)
    (a.results / f"soak-{a.engine}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (a.results / f"soak-{a.engine}.md").write_text(render(found), encoding="utf-8")
    print(render(found))
    failed = bool(found["wrong"] or found["unavailable"])
    if a.keep or failed:
        print(f"logs and store: {folder}")
    else:
        import shutil

        shutil.rmtree(folder)
    if failed:
        sys.exit(1)
    return found


def render(found: dict[str, Any]) -> str:
    """The Markdown page."""
    changes = ", ".join(f"{n:,} {what}" for what, n in found["changes"].items())
    memory = "; ".join(
        f"{which} " + ", then ".join(f"{g['after_a_third']:.0f} → {g['at_the_end']:.0f} MiB" for g in grown)
        for which, grown in found["memory_mib"].items()
        if grown
    )
    lines = [
        f"# Soak, {found['engine']} engine",
        "",
        f"Rendered by `python -m benchmarks.soak --engine {found['engine']} --minutes {found['minutes']:g}`; nothing is typed.",
        "",
        f"{found['minutes']:g} minutes, {found['clients']} clients, {found['adapters']:,} adapters of which the engine holds "
        f"{found['slots']}, Zipf {ZIPF}; models/books-4m, rank {RANK}, {TOKENS} tokens. Beside them: {changes}. The engine and "
        "the gateway were each killed once.",
        "",
        "| answers | right | equally likely tokens | refused rightly | lost while a process was down | 5xx otherwise | wrong |",
        "|---|---|---|---|---|---|---|",
        f"| {found['answers']:,} | {found['right']:,} | {found['ties']:,} | {found['refused']:,} | {found['while down']:,} | "
        f"{found['unavailable']:,} | **{found['wrong']:,}** |",
        "",
        f"Right: the greedy text of that adapter at a version that was live meanwhile ({100 * found['unlike_the_base']:.0f} % of "
        f"these texts differ from the base's). {found['requests_per_second']:.1f} requests/s; latency p50 "
        f"{found['latency_ms'].get('p50', 0):.0f} ms, p99 {found['latency_ms'].get('p99', 0):.0f} ms; ready again "
        f"{' and '.join(f'{s:.1f}' for s in found['down_seconds'])} s after the kills.",
        "",
        f"Memory of each process, after a third of its life → at its end: {memory}.",
        "",
        *(f"- {line}" for line in found["examples"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
