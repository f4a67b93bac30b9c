"""make_app: the gateway as a FastAPI application. Here: what it is made of, and its life from start to end."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from importlib import import_module
from typing import Any

from fastapi import FastAPI

from ... import __version__
from ...errors import ConfigError
from ...store import open_store
from . import errors
from .auth import OPEN, Authenticate
from .client import EngineClient
from .deletions import Deletions
from .engine import make_engine
from .keys import Keys
from .learning import Learning, LearningSettings, install, read_settings
from .limits import Limits
from .metrics import Metrics
from .middleware import Admit, BodyLimits, Measure
from .models import Names
from .settings import GatewaySettings
from .state import Gateway

ROUTERS = ("routes_generate", "routes_models", "routes_health", "routes_files", "routes_jobs")
"""Modules beside this one, each with a `router`."""

OnDelete = Callable[[str], Awaitable[dict[str, int]]]
"""Removes what belongs to an adapter of this name; says how much of what went: {"files": 2, "jobs": 1}."""


def places(settings: GatewaySettings) -> tuple[str, ...]:
    """Where store, state and model lie, in every form that an error may hold: as given, and as links lead there."""
    found: set[str] = set()
    model = settings.model if settings.model is not None and os.path.isdir(settings.model) else None
    for where in filter(None, (settings.store, settings.state, model)):
        path = where.removeprefix("file://")
        found |= {where.rstrip("/")} if "://" in path else {os.path.abspath(path), os.path.realpath(path)}
    return tuple(sorted(found - {"/"}, key=len, reverse=True))


def make_app(settings: GatewaySettings) -> FastAPI:
    """The application. Its state: gateway, on_delete (called with the name of every adapter that is deleted), background
    (functions whose coroutines run from start to end), draining (True once it is about to end)."""
    metrics = Metrics()
    store = open_store(settings.store)
    engine = make_engine(settings, metrics)
    client = EngineClient(engine, settings.engine_seconds, settings.running + 64, places(settings))
    keys = Keys(settings.state)
    deletions = Deletions(settings.state)
    gateway = Gateway(settings, store, keys, Names(store), engine, client, Limits(settings, metrics), metrics, deletions)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start(client.health)
        running = [deletions.follow(client), *(make() for make in app.state.background)]
        tasks = [asyncio.create_task(each) for each in running]
        try:
            yield
        finally:
            app.state.draining = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await engine.stop()
            await client.close()
            gateway.names.close()

    about = "VeRA adapters behind the OpenAI API."
    app = FastAPI(title="veralib", version=__version__, description=about, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.gateway = gateway
    app.state.on_delete = list[OnDelete]()
    app.state.background = list[Callable[[], Coroutine[Any, Any, None]]]()
    app.state.draining = False
    learns = read_settings(settings.jobs, settings.model, settings.base_name or "")
    _check_rank(settings, learns)
    install(app, Learning(settings.state, store, learns, keys if settings.auth else None))
    errors.install(app)
    open_paths = OPEN | {"/metrics"} if settings.open_metrics else OPEN
    # The last one added is the first to see a request: who asks is known before a byte of the body is read.
    app.add_middleware(BodyLimits, settings.max_body_bytes, settings.max_upload_bytes, settings.body_seconds)
    app.add_middleware(Admit, gateway.limits)
    app.add_middleware(Authenticate, keys if settings.auth else None, open_paths)
    app.add_middleware(Measure, metrics)
    for name in ROUTERS:
        app.include_router(import_module(f".{name}", __package__).router)
    return app


def _check_rank(settings: GatewaySettings, learns: LearningSettings) -> None:
    """ConfigError where jobs are set up to train what our own vLLM won't serve; a warning where nobody said how jobs train."""
    rank = learns.rank if isinstance(learns.rank, int) else max(learns.rank.values())
    if settings.engine != "vllm" or settings.engine_url is not None or rank <= settings.max_rank:
        return
    text = f"jobs train adapters of rank {rank}, and the engine takes up to {settings.max_rank}: give --max-rank {rank} or more, "
    text += "or a YAML file with a smaller rank as --jobs."
    if settings.jobs is not None:
        raise ConfigError(text)
    errors.LOG.warning(text)
