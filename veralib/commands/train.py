"""vera train: its flags are the fields of Settings, with their descriptions as help."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .flags import flags, pairs, set_option, settings_argument
from .shared import human_bytes, table

HELP = """Train an adapter on your data; writes it, result.json and plot.png to the output folder.

Settings come from flags, from a YAML file with the same names, or from a recipe, published hyperparameters by name (vera recipes
lists them); flags win. A killed run goes on when started again.

Examples:

    vera train --model sentence-transformers/all-MiniLM-L6-v2 --data reviews.csv --validation 0.1 --output run

    vera train run.yaml --epochs 10 --set training.bf16=true

    vera train glue-rte-base --method lora --dry-run

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
PROTOCOL = "A recipe's choice of the epoch: published, on the development set that is scored; honest, on a tenth of train."
DICTS = ("options", "training")  # set by --set name.key=value


def make_train() -> Callable[..., None]:
    """The command, built from Settings."""

    from ..training.settings import Settings

    def train(**given: Any) -> None:
        file, sets, protocol, dry = (given.pop(k) for k in ("settings_file", "set", "protocol", "dry_run"))
        chosen, notes = resolve(file, sets, protocol, {k: v for k, v in given.items() if v is not None})
        show_plan(chosen, notes) if dry else run_train(chosen, notes)

    parameters = [settings_argument(), *flags(Settings, PANELS, DICTS), set_option("training.bf16=true"), *_recipe_options()]
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}
    train.__doc__ = HELP
    return train


def _recipe_options() -> list[inspect.Parameter]:
    import typer

    protocol = typer.Option(None, "--protocol", metavar="published|honest", help=PROTOCOL, rich_help_panel="Recipe")
    dry = typer.Option(False, "--dry-run", help="Print the settings, the counts and the memory, and train nothing.")
    return [
        inspect.Parameter("protocol", inspect.Parameter.KEYWORD_ONLY, default=protocol, annotation=str | None),
        inspect.Parameter("dry_run", inspect.Parameter.KEYWORD_ONLY, default=dry, annotation=bool),
    ]


def resolve(source: str | None, sets: list[str], protocol: str | None, given: dict[str, Any]) -> tuple[Any, list[str]]:
    """The settings of a YAML file, a recipe or flags alone, and what a reader of a recipe must know."""
    from ..recipes import RECIPES, find_recipe, remarks, settings_of
    from ..training import Settings, load_settings

    given = {**given, **pairs(sets, DICTS)}
    if source is None or source not in RECIPES:
        if protocol is not None:
            raise ConfigError("--protocol belongs to a recipe: vera train RECIPE --protocol honest; vera recipes lists them")
        if source is not None and not Path(source).exists() and not source.endswith((".yaml", ".yml")):
            find_recipe(source)
        return (load_settings(source, **given) if source else Settings(**given)), []
    method, kind = given.pop("method", "vera"), protocol or "published"
    return settings_of(source, method, kind, **given), remarks(source, method, kind)  # type: ignore[arg-type]


def show_plan(settings: Any, notes: list[str]) -> None:
    """What a run would do: its settings, counts and memory."""
    from ..training.data import check_there
    from ..training.plan import plan

    check_there(settings)
    rows = [(name, str(value)) for name, value in sorted(settings.given().items())]
    rows += [
        (f"{n} (default)", str(getattr(settings, f"resolved_{n}")))
        for n in ("rank", "lr", "lr_head")
        if n not in settings.given()
    ]
    table("settings", ("", "value"), rows)
    for note in notes:
        print(note)
    labels = _labels(settings)
    found = plan(settings, labels=labels or 2)
    assumed = "" if labels or settings.task not in ("classification", "images") else " (of 2 classes, assumed)"
    table(
        "counts and memory",
        ("", "value"),
        [
            ("base parameters", f"{found.base_parameters:,}"),
            ("trained parameters", f"{found.adapter_parameters:,}"),
            ("of the head, beside them", f"{found.head_parameters:,}{assumed}"),
            ("weights", human_bytes(found.weights_bytes)),
            ("trained values, gradients, moments", human_bytes(found.training_bytes)),
            ("activations (estimate)", human_bytes(found.activations_bytes)),
            ("in all (estimate)", human_bytes(found.bytes)),
        ],
        right=("value",),
    )


def _labels(settings: Any) -> int:
    """How many classes local texts have; 0 where it isn't known: data of the hub, or images, which would all be read."""
    from ..training.data import load_data

    here = settings.task == "classification" and all(Path(p).expanduser().exists() for p in settings.data)
    return len(load_data(settings).labels) if here else 0


def run_train(settings: Any, notes: Sequence[str] = ()) -> None:
    """One run; prints the notes on its recipe, and what came out."""
    from ..training import train
    from ..training.folder import is_main_process

    for note in notes if is_main_process() else ():
        print(note)
    result = train(settings, callbacks=[_reporter()])
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
