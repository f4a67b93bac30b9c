"""vera train: its flags are the fields of Settings, with their descriptions as help."""

import inspect
from collections.abc import Callable
from typing import Any

from .flags import flags, pairs, set_option, settings_argument
from .shared import human_bytes, table

HELP = """Train an adapter on your data; writes it, result.json and plot.png to the output folder.

Settings come from flags, or from a YAML file with the same names (flags win). A killed run goes on when started again.

Examples:

    vera train --model sentence-transformers/all-MiniLM-L6-v2 --data reviews.csv --validation 0.1 --output run

    vera train run.yaml --epochs 10 --set training.bf16=true

    torchrun --nproc-per-node 2 -m veralib.cli train run.yaml
"""
# The first field of each group of flags, in the order of Settings.
PANELS = {
    "model": "Run",
    "text": "Data",
    "revision": "Base model",
    "rank": "Adapter",
    "seed": "Training",
    "evaluate_every": "Evaluation and checkpoints",
}
DICTS = ("options", "training")  # set by --set name.key=value


def make_train() -> Callable[..., None]:
    """The command, built from Settings."""

    from ..training.settings import Settings

    def train(**given: Any) -> None:
        run_train(given.pop("settings_file"), given.pop("set"), {k: v for k, v in given.items() if v is not None})

    parameters = [settings_argument(), *flags(Settings, PANELS, DICTS), set_option("training.bf16=true")]
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}
    train.__doc__ = HELP
    return train


def run_train(settings_file: str | None, sets: list[str], given: dict[str, Any]) -> None:
    """One run from a file, --set pairs and flags; prints what came out."""
    from ..training import Settings, load_settings, train

    given = {**given, **pairs(sets, DICTS)}
    settings = load_settings(settings_file, **given) if settings_file else Settings(**given)
    result = train(settings, callbacks=[_reporter()])
    from ..training.folder import is_main_process

    if not is_main_process():
        return
    rows = [(name.replace("_", " "), f"{value:.4f}") for name, value in result.metrics.items()]
    rows += [
        (
            "trained parameters",
            f"{result.adapter_parameters:,}" + (f" + {result.head_parameters:,} of the head" if result.head_parameters else ""),
        ),
        ("adapter on disk", f"{result.adapter_bytes:,} bytes ({human_bytes(result.adapter_bytes)})"),
        ("steps", f"{result.steps:,}, {result.seconds_per_step:.3f} s each"),
        ("seconds in all", f"{result.seconds:.1f}"),
        ("peak memory", human_bytes(result.peak_memory_bytes)),
        ("written", ", ".join([*result.files, "result.json"] + (["plot.png"] if settings.plot else []))),
    ]
    table(f"{result.method} on {settings.model}, in {settings.output}", ("", "value"), rows, right=())
    print(f"Next: vera predict {settings.output} NEW_ROWS.csv")


def _reporter() -> Any:
    """A callback that prints a line at each tenth of the run and at each evaluation, on the main process."""
    import time

    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.start, self.first, self.shown = time.monotonic(), 0, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start, self.first, self.shown = time.monotonic(), state.global_step, time.monotonic()
            if state.is_world_process_zero:
                resumed = f", going on after step {state.global_step}" if state.global_step else ""
                print(f"training: {state.max_steps} steps{resumed}", flush=True)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not state.is_world_process_zero or not logs or "loss" not in logs:
                return
            done, tenth = state.global_step, max(1, state.max_steps // 10)
            if time.monotonic() - self.shown < 10 and done % tenth >= max(1, args.logging_steps):
                return
            self.shown = time.monotonic()
            left = (self.shown - self.start) / max(1, done - self.first) * (state.max_steps - done)
            print(f"  step {done}/{state.max_steps}  loss {logs['loss']:.4f}  about {left:.0f} s left", flush=True)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and metrics:
                speed = ("_runtime", "_per_second", "epoch")
                shown = "  ".join(f"{k.partition('_')[2]} {v:.4f}" for k, v in metrics.items() if not k.endswith(speed))
                print(f"  step {state.global_step}: {next(iter(metrics)).partition('_')[0]} {shown}", flush=True)

    return Reporter()
