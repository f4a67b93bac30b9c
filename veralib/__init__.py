"""VeRA adapters (Vector-based Random Matrix Adaptation, ICLR 2024): kilobyte fine-tunes that share one frozen model.

Needs torch, numpy and safetensors alone.
"""

from typing import TYPE_CHECKING, Any

from .adapter import Adapter
from .attaching import attach, handle
from .config import VeraConfig
from .errors import (
    AdapterFileError,
    AdapterMismatch,
    ConfigError,
    DataError,
    EndpointError,
    MissingPackage,
    StateError,
    StoreError,
    StoreUnavailable,
    UnknownName,
    VeraError,
    VeraWarning,
)
from .format import load_adapter, save_adapter
from .merge_report import MergeReport
from .model import Vera

if TYPE_CHECKING:
    from .interop.peft import from_peft

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterFileError",
    "AdapterMismatch",
    "ConfigError",
    "DataError",
    "EndpointError",
    "MergeReport",
    "MissingPackage",
    "StateError",
    "StoreError",
    "StoreUnavailable",
    "UnknownName",
    "Vera",
    "VeraConfig",
    "VeraError",
    "VeraWarning",
    "attach",
    "from_peft",
    "handle",
    "load_adapter",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name == "from_peft":  # imports peft, so not before it is asked for
        from .interop.peft import from_peft

        return from_peft
    raise AttributeError(f"module 'veralib' has no attribute {name!r}")
