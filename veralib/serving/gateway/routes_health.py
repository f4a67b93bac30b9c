"""/health, /ready and /metrics: for balancers and Prometheus."""

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from .auth import admin_of, tenant_of
from .client import unavailable
from .errors import json_response
from .state import Here

router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> Response:
    """200 while the gateway lives."""
    return json_response({"status": "alive"})


@router.get("/ready", responses={503: {"description": "The engine doesn't answer, or the gateway is about to end."}})
async def ready(request: Request, here: Here) -> Response:
    """200 while requests are answered: the engine answers and the gateway isn't ending."""
    if request.app.state.draining:
        raise unavailable("The gateway is ending.", code="draining")
    if not await here.client.healthy():
        raise unavailable("The engine doesn't answer.")
    return json_response({"status": "ready"})


@router.get("/metrics", responses={401: {"description": "No valid API key."}, 403: {"description": "No admin key."}})
async def metrics(request: Request, here: Here) -> Response:
    """Prometheus' page: the gateway's own, and what the engine says of its caches. For the admin key, or for everybody with
    --open-metrics: load is something that one tenant could tell another by."""
    if not here.settings.open_metrics:
        admin_of(tenant_of(request))
    text = here.metrics.text(await here.client.metrics())
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")
