"""Fleets: many owners' adapters trained at once, each as if alone. vera.fleet(config, slots) makes one."""

from .fleet import Fleet
from .loss import owner_loss, owner_losses
from .optimizer import FleetAdamW, StepReport

__all__ = ["Fleet", "FleetAdamW", "StepReport", "owner_loss", "owner_losses"]
