"""What runs in a method's own process. Its imports take most of ten seconds, once: the fork server holds them for all methods."""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# The models' classes and Trainer: transformers imports them only when they are asked for.
import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401
from transformers import TrainerCallback

from ..errors import VeraError
from ..training import Settings, train


def train_here(settings: dict[str, Any], pipe: Connection) -> None:
    """Trains and sends what happens: ("step", step, steps, loss) ten times a second, then ("done", Result) or ("failed", why)."""
    _tell(pipe, lambda: train(Settings(**settings), callbacks=[Report(pipe)]))


def compare_here(paths: tuple[Path, Path], pipe: Connection) -> None:
    """Runs the fleet's comparison on (model, store); ("step", phase, step, steps) ten times a second, then the result."""
    from .fleet import compare

    last = 0.0

    def say(phase: str, step: int | None = None, steps: int | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if step is None or step == steps or now - last > 0.1:
            last = now
            pipe.send(("step", phase, step, steps))

    _tell(pipe, lambda: compare(paths[0], say, paths[1]))


def _tell(pipe: Connection, work: Callable[[], Any]) -> None:
    try:
        pipe.send(("done", work()))
    except VeraError as e:
        pipe.send(("failed", str(e)))
    finally:
        pipe.close()


class Report(TrainerCallback):
    """Tells the parent process where the training is."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.loss, self.last = pipe, float("nan"), 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self.last > 0.1 or state.global_step == state.max_steps:
            self.last = now
            self.pipe.send(("step", state.global_step, state.max_steps, self.loss))
