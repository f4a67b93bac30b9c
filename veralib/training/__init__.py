"""One training run: Settings in, an adapter file and a Result out. `vera train` is this on the command line."""

from .result import Result, load_result
from .run import train
from .settings import Settings, load_settings

__all__ = ["Result", "Settings", "load_result", "load_settings", "train"]
