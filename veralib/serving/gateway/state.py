"""Gateway: what the routes share. One for an application, at app.state.gateway."""

from dataclasses import dataclass

from fastapi import Request

from ...store import Store
from .client import EngineClient
from .engine import Engine
from .keys import Keys
from .limits import Limits
from .metrics import Metrics
from .models import Names
from .settings import GatewaySettings


@dataclass(frozen=True)
class Gateway:
    """Made by make_app."""

    settings: GatewaySettings
    store: Store
    keys: Keys
    names: Names
    engine: Engine
    client: EngineClient
    limits: Limits
    metrics: Metrics


def gateway_of(request: Request) -> Gateway:
    """A dependency."""
    return request.app.state.gateway
