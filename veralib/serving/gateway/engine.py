"""The engine: a child process that is started again when it dies, or one that somebody else runs."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from ...errors import ConfigError
from .client import ABSENT
from .errors import LOG
from .metrics import Metrics
from .settings import ENGINE_KEY, GatewaySettings

LOOK_SECONDS = 1.0
DEAD_LOOKS = 3
"""In a row: so often /health is 503, or nobody listens, before an engine that was well is taken for dead."""
LONGEST_PAUSE = 30.0
STOP_SECONDS, DEAD_SECONDS = 15.0, 1.0
"""From SIGTERM to SIGKILL: for an engine, and for what is left of one that is dead."""
KEEP_SECONDS = 75
"""How long our engine keeps an idle connection: longer than the gateway does, also when it is too busy to look at the clock."""
LOG_BYTES = 10 * 2**20


class Engine:
    """Where the engine is and whether it answers. up: as it was at the last look, a second ago at most.

    url is None while there is none; run counts the starts. This class looks after an engine that somebody else runs.
    """

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.url: str | None = settings.engine_url
        self.key: str | None = os.environ.get(ENGINE_KEY)
        self.run = 1
        self.up = False
        self._task: asyncio.Task[None] | None = None

    def start(self, health: Callable[[], Awaitable[int]]) -> None:
        """Begins to look after it, in a task. health: EngineClient's."""
        self._task = asyncio.create_task(self._look_after(health))

    async def stop(self) -> None:
        """Ends the task; a child process with it."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _note(self, up: bool) -> None:
        if up != self.up:
            LOG.log(
                logging.INFO if up else logging.WARNING, "the engine at %s %s", self.url, "answers" if up else "doesn't answer"
            )
            self.run += up and self.settings.engine_url is not None  # perhaps another one now
        self.up = up
        self.metrics.engine_up.set(up)

    async def _look_after(self, health: Callable[[], Awaitable[int]]) -> None:
        while True:
            self._note(await health() == 200)
            await asyncio.sleep(LOOK_SECONDS)


class ChildEngine(Engine):
    """An engine of our own on a free port of this machine. Its output goes to a file in the state folder.

    It dies with the gateway, also when that is killed (Linux), and is started again when it ends or no longer answers: at once,
    then after 1, 2, 4 … 30 seconds.
    """

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self.url, self.key = None, secrets.token_urlsafe(24)
        self.process: asyncio.subprocess.Process | None = None
        self.log = Path(settings.state) / "logs" / f"engine-{socket.gethostname()}-{settings.port}.log"

    async def _look_after(self, health: Callable[[], Awaitable[int]]) -> None:
        pause = 0.0
        while True:
            began, seconds = time.monotonic(), STOP_SECONDS
            try:
                seconds = await self._run(health)
            finally:
                self._note(False)
                self.url = None
                await self._end(seconds)
            pause = 0.0 if time.monotonic() - began > 60 else min(LONGEST_PAUSE, max(1.0, 2 * pause))
            LOG.warning("the engine is started again in %g s; its output is in %s", pause, self.log)
            self.metrics.restarts.inc()
            await asyncio.sleep(pause)

    async def _run(self, health: Callable[[], Awaitable[int]]) -> float:
        """One life of a child, until it ends or hangs; how many seconds it has for its end."""
        port = free_port()
        argv = command(self.settings, port)
        if shutil.which(argv[0]) is None:
            LOG.error('can\'t start the engine: "%s" is no program. Give its Python with --engine-python', argv[0])
            return STOP_SECONDS
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.is_file() and self.log.stat().st_size > LOG_BYTES:
            os.replace(self.log, self.log.with_suffix(".log.1"))
        with open(self.log, "ab") as log:
            try:
                self.process = await asyncio.create_subprocess_exec(
                    *bound_to_us(argv),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment(self.settings, self.key or ""),
                    start_new_session=True,  # Ctrl-C is for the gateway, which lets requests end first
                )
            except OSError as e:
                LOG.error("can't start the engine: %s", e)
                return STOP_SECONDS
        self.run += 1
        self.url = f"http://127.0.0.1:{port}"
        LOG.info("engine %d starts at %s; its output goes to %s", self.process.pid, self.url, self.log)
        answered = time.monotonic() + self.settings.engine_start_seconds - self.settings.engine_hung_seconds
        lived, gone = False, 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS if self.up else 0.2):
                    await self.process.wait()
                why = "" if lived else f"; the end of its output:\n{self._log_tail()}"  # a request's text isn't in it yet
                LOG.error("the engine ended with code %s%s", self.process.returncode, why)
                return STOP_SECONDS
            status = await health()
            lived, gone = lived or status == 200, gone + 1 if lived and status in (503, ABSENT) else 0
            answered = max(answered, time.monotonic()) if status == 200 else answered
            self._note(status == 200)
            if gone == DEAD_LOOKS:
                # vLLM's server outlives the process that computes, and ends only when its last connection does.
                LOG.error("the engine %s: it is ended", "says that it is dead" if status == 503 else "listens no more")
                return DEAD_SECONDS
            if time.monotonic() - answered > self.settings.engine_hung_seconds:
                LOG.error("the engine hasn't answered for too long: it is ended")
                return STOP_SECONDS

    def _log_tail(self) -> str:
        with open(self.log, "rb") as log:
            log.seek(max(0, self.log.stat().st_size - 1500))
            return log.read().decode("utf-8", "replace").strip()

    async def _end(self, seconds: float) -> None:
        """Asks the child and its own children to end, and sees to it after so many seconds."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await process.wait()
            os.killpg(process.pid, signal.SIGKILL)  # what is left of its group, such as vLLM's workers
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()


def make_engine(settings: GatewaySettings, metrics: Metrics) -> Engine:
    """The engine that the settings ask for, not yet started."""
    return Engine(settings, metrics) if settings.engine_url else ChildEngine(settings, metrics)


_BOUND = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM; it outlives exec
if os.getppid() == int(sys.argv[1]):  # otherwise the parent went before that
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def bound_to_us(command: list[str]) -> list[str]:
    """The same command, which the kernel (Linux) sends SIGTERM when this process is gone, however it went.

    The child asks for that itself, in a fresh interpreter: code between fork and exec (preexec_fn) can wait for ever for a lock
    that another thread of the parent held.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-ISc", _BOUND, str(os.getpid()), *command]


def command(settings: GatewaySettings, port: int) -> list[str]:
    """How the engine is started."""
    if settings.model is None:
        raise ConfigError("name the base model with --model, or an engine that runs with --engine-url.")
    python, name = settings.engine_python or sys.executable, settings.base_name or settings.model
    model = str(Path(settings.model).resolve()) if os.path.isdir(settings.model) else settings.model
    where = ["--host", "127.0.0.1", "--port", str(port), "--model", model, "--served-model-name", name]
    if settings.engine == "embedded":
        return [python, "-m", "veralib.serving.embedded", *where, "--store", _absolute(settings.store), *settings.engine_args]
    vera = {"store": _absolute(settings.store), "max_rank": settings.max_rank, "max_bases": settings.max_bases}
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server", *where, "--enable-lora"),
        *("--max-loras", str(settings.slots), "--max-cpu-loras", str(max(settings.slots, settings.resident))),
        *("--additional-config", json.dumps({"vera": vera}), *settings.engine_args),
    ]


def environment(settings: GatewaySettings, key: str) -> dict[str, str]:
    """The child's. The key is what it asks of whoever connects: every user of this machine reaches its port."""
    own = {"VLLM_API_KEY": key, "PYTHONUNBUFFERED": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_SECONDS)}
    if settings.engine == "vllm":
        own |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return {**os.environ, **own}


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _absolute(store: str) -> str:
    return store if "://" in store else str(Path(store).resolve())
