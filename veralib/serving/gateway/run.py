"""Runs the gateway until it is told to end: /ready says no first, then streams end, then the engine."""

import asyncio
import contextlib
import ctypes
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from ...errors import ConfigError
from .app import make_app
from .settings import GatewaySettings

ARENAS = 2
M_ARENA_MAX = -8


def run(settings: GatewaySettings) -> None:
    """Serves until SIGTERM, which leaves with code 0, or Ctrl-C; a second signal ends it at once. ConfigError where the port
    can't be had."""
    check_port(settings.host, settings.port)
    share_arenas()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    app = make_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # names of adapters are people's
        server_header=False,
        timeout_keep_alive=75,  # longer than balancers keep an idle connection, so that they don't send into a closed one
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn drains first and then raises it again
    DrainingServer(config, settings.drain_delay).run()


def check_port(host: str, port: int) -> None:
    """ConfigError where nobody can listen there, before an engine starts for it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself does
            probe.bind(address)
    except OSError as e:
        raise ConfigError(f"can't listen on {host}, port {port}: {e.strerror or e}. Choose another with --port or --host.") from e


def share_arenas() -> None:
    """Threads share two arenas of glibc's allocator from now on. By default each of the threads that ask the store gets an
    arena, which keeps what it ever needed at once, for nothing: they wait for the disk, not for the allocator. Other C
    libraries have no such setting."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


class DrainingServer(uvicorn.Server):
    """A server whose first signal makes /ready say no, `delay` seconds before it takes no more connections."""

    def __init__(self, config: uvicorn.Config, delay: float) -> None:
        super().__init__(config)
        self.delay = delay
        self._leaving: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        app = self.config.app
        draining = getattr(app, "state", None)
        if draining is None or draining.draining or self._loop is None or self.delay == 0:
            super().handle_exit(sig, frame)
            if draining is not None:
                draining.draining = True
            return
        draining.draining = True
        # Within a signal handler nothing of the loop's may be touched but this.
        self._loop.call_soon_threadsafe(self._leave_later, sig)

    def _leave_later(self, sig: int) -> None:
        assert self._loop is not None
        self._leaving = self._loop.call_later(self.delay, super().handle_exit, sig, None)
