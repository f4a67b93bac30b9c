"""Each method in a process of its own, one after the other, so that peak memory is that method's alone; the fleet in another."""

import multiprocessing
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StateError
from .methods import COMMON, METHODS

if TYPE_CHECKING:
    from ..training import Result

Show = Callable[[int, int, float], None]
"""Called with (step, steps, loss)."""


def settings_of(name: str, model: Path, data: Mapping[str, Path], output: Path) -> dict[str, Any]:
    """The settings of one row's run, as `vera train` takes them. The validation split isn't used: it served to tune."""
    places = {"model": str(model), "data": str(data["train"]), "test": str(data["test"]), "output": str(output / name)}
    return {**COMMON, **METHODS[name].settings, **places, "resume": False}


def train_apart(settings: Mapping[str, Any], show: Show) -> "Result":
    """The Result of a training run in a process of its own.

    Errors: StateError with the child's message, or its exit code where it ended without one.
    """
    return _apart("train_here", dict(settings), show, f"trained {settings['method']}")


def compare_apart(model: Path, say: Callable[..., None], store: Path) -> dict[str, Any]:
    """The fleet's comparison (fleet.compare) in a process of its own; errors as train_apart's."""
    return _apart("compare_here", (model, store), say, "trained the fleet")


def _apart(entry: str, argument: Any, show: Callable[..., None], what: str) -> Any:
    context: Any = multiprocessing.get_context(_start_method())
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(entry, argument, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, *facts = ours.recv()
            if kind == "step":
                show(*facts)
            elif kind == "failed":
                raise StateError(facts[0])
            else:
                return facts[0]
    except EOFError as e:
        process.join(10)
        raise StateError(
            f"the process that {what} ended without a result (exit code {process.exitcode}). On Linux -9 "
            "often means that memory ran out; the demo needs about 1.5 GB free."
        ) from e
    finally:
        process.join(10)
        process.kill()


def _run(entry: str, argument: Any, pipe: Any) -> None:
    from . import child  # here, since this process alone needs PyTorch and transformers

    getattr(child, entry)(argument, pipe)


def warm_up() -> None:
    """Starts the process that imports PyTorch and transformers once, and from which the methods' processes are forked."""
    if _start_method() == "forkserver":
        from multiprocessing import forkserver

        multiprocessing.set_forkserver_preload([f"{__package__}.child"])
        forkserver.ensure_running()


def _start_method() -> str:
    # Elsewhere forking after these imports isn't safe, or there is no fork: each process then imports for itself.
    return "forkserver" if sys.platform == "linux" else "spawn"
