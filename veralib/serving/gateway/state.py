"""Gateway: what the routes share. One for an application, at app.state.gateway."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from ...store import Store
from .client import EngineClient
from .deletions import Deletions
from .engine import Engine
from .errors import ApiError
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
    deletions: Deletions

    async def base(self) -> tuple[str, int]:
        """What clients call the base model, and since when it is there: 0 while its engine is away. ApiError where only the
        engine knows its name."""
        try:
            about = await self.client.about()
        except ApiError:
            if self.settings.base_name is None:
                raise
            return self.settings.base_name, 0
        return self.settings.base_name or about.name, about.created


def gateway_of(request: Request) -> Gateway:
    """A dependency."""
    return request.app.state.gateway


Here = Annotated[Gateway, Depends(gateway_of)]
