"""train: one run from settings to an adapter file, result.json and a plot. On transformers' Trainer."""

import contextlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, TrainingDiverged, need, unknown_text
from .data import Data, load_data
from .folder import check_output, open_run, times_resumed, write_json
from .metrics import LOWER_IS_BETTER, METRICS, metrics_of
from .result import Result, commit, draw_plot, hardware, load_result, peak_memory, reset_peak_memory, versions
from .settings import WITH_HEAD, Settings

if TYPE_CHECKING:
    from transformers import TrainingArguments


def train(settings: Settings, callbacks: Sequence[Any] = ()) -> Result:
    """Trains one adapter as the settings say and writes it to settings.output.

    There: adapter_model.safetensors (VeRA, LoRA; head.safetensors, model.safetensors for head and full), result.json,
    plot.png. A run that was killed goes on from its last checkpoint; on one process and the same machine it ends with the
    same bits as an uninterrupted one. callbacks: transformers' TrainerCallback objects.

    Errors: ConfigError, DataError, TrainingDiverged; StateError where the folder holds a finished run, or an interrupted one of
    other settings.
    """
    try:
        import transformers
    except ImportError as e:
        raise need("transformers", "cli", "Training") from e
    from ..baselines import find_method
    from .loading import load_base
    from .tokens import chat_template
    from .trainer import AdapterTrainer, Patience, delete_broken, last_checkpoint

    started = time.perf_counter()
    reset_peak_memory()
    folder, checkpoints = Path(settings.output), Path(settings.output) / "checkpoints"
    check_output(settings, folder)
    data = load_data(settings)
    if data.validation is None and (settings.best or settings.patience):
        raise ConfigError("best and patience need validation data: name a file, a split, or a share such as 0.1")
    args = _arguments(settings, data, checkpoints)
    with args.main_process_first():  # the others must see the folder as the first leaves it
        resumed = open_run(settings, folder, data.hashes) if args.process_index == 0 else times_resumed(folder)
        if args.process_index == 0:
            delete_broken(checkpoints)
        found = last_checkpoint(checkpoints)

    transformers.set_seed(settings.seed)
    base = load_base(settings, data.labels)
    settings = chat_template(settings, base.tokenizer, data.train)
    attached = find_method(settings.method)(base.model, settings, base.head)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    sets, collate = _examples(splits, base, settings, data.labels)

    compute, preprocess = metrics_of(settings.task)
    with _quiet(settings):
        trainer = AdapterTrainer(
            attached,
            settings,
            elapsed=found[1]["seconds"] if found else 0.0,
            args=args,
            train_dataset=sets["train"],
            eval_dataset=sets["validation"],
            data_collator=collate,
            compute_metrics=compute,
            preprocess_logits_for_metrics=preprocess,
            callbacks=[*([Patience(settings.resolved_metric, settings.patience)] if settings.patience else []), *callbacks],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if found and found[1]["stop"]:  # it was killed after its last step: nothing is left to train
            _restore_end(trainer, found[0])
            train_seconds = found[1]["seconds"]
        else:
            trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
            train_seconds = trainer.train_seconds()
        metrics = _final_metrics(trainer, sets)

    result, diverged = None, not all(bool(tensor.isfinite().all()) for tensor in attached.trainable)
    if diverged:
        metrics = dict.fromkeys(metrics, math.nan)
    if trainer.is_world_process_zero():
        files = [] if diverged else attached.save(folder, _notes(settings, data, metrics))
        steps = trainer.state.global_step
        result = Result(
            method=settings.method,
            settings=settings.to_dict(),
            seed=settings.seed,
            metrics=metrics,
            labels=data.labels,
            rows={name: len(rows) for name, rows in splits.items() if rows},
            steps=steps,
            seconds=time.perf_counter() - started + (found[1]["seconds"] if found else 0.0),
            train_seconds=train_seconds,
            seconds_per_step=train_seconds / max(steps, 1),
            peak_memory_bytes=peak_memory(),
            trainable_parameters=sum(p.numel() for p in attached.trainable),
            adapter_parameters=attached.adapter_parameters,
            head_parameters=attached.head_parameters,
            adapter_bytes=sum(f.stat().st_size for f in files),
            files=[f.name for f in files],
            data=data.hashes,
            versions=versions(),
            commit=commit(),
            hardware=hardware(),
            history=trainer.state.log_history,
            resumed=resumed,
            output=str(folder),
        )
        if settings.plot and not diverged:
            draw_plot(result, folder / "plot.png", settings.resolved_metric)
        if not diverged:
            write_json(folder / "result.json", result.to_dict())  # last: from here on the run counts as finished
        if not settings.keep_checkpoints:
            shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if diverged:
        raise TrainingDiverged(
            f"training diverged: what it trained holds NaN or inf after {trainer.state.global_step} steps, so nothing was saved "
            f"to {folder}. Take a lower rate: lr was {settings.resolved_lr:g}, lr_head {settings.resolved_lr_head:g}.",
            result,
        )
    return result or load_result(folder)


def _examples(splits: dict[str, Any], base: Any, settings: Settings, labels: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """(the examples of each split, the function that makes a batch of some)."""
    if settings.task == "images":
        from .pixels import collator as pixel_collator
        from .pixels import pixel_set

        pixels = {
            name: pixel_set(rows, base.processor, settings, labels, f"the {name} data", name == "train") if rows else None
            for name, rows in splits.items()
        }
        return pixels, pixel_collator(base.model.dtype)
    from .tokens import collator, encode

    sets = {
        name: encode(rows, base.tokenizer, settings, labels, base.max_length, f"the {name} data") if rows else None
        for name, rows in splits.items()
    }
    for name in ("validation", "test"):  # rows of like length together: half the padding; the metrics don't see the order
        if found_rows := sets[name]:
            sets[name] = sorted(found_rows, key=lambda row: len(row["input_ids"]))
    return sets, collator(base.tokenizer.pad_token_id or 0)


def _arguments(settings: Settings, data: Data, checkpoints: Path) -> "TrainingArguments":
    """transformers' TrainingArguments for these settings; ConfigError where it refuses them."""
    import torch
    from transformers import TrainingArguments

    def every(kind: str, value: Any) -> dict[str, Any]:
        if value == "never" or (kind == "eval" and data.validation is None):
            return {f"{kind}_strategy": "no"}
        # "epoch" becomes a number of steps in AdapterTrainer, so that one place orders evaluations and checkpoints.
        return {f"{kind}_strategy": "steps", f"{kind}_steps": 1 if value == "epoch" else value}

    metric = settings.resolved_metric
    if metric not in METRICS[settings.task]:
        raise ConfigError(unknown_text(f"metric of {settings.task}", metric, METRICS[settings.task]))
    fields: dict[str, Any] = {
        "output_dir": str(checkpoints.resolve()),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": max(settings.batch_size, 32) if settings.task in WITH_HEAD else settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.resolved_lr,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,
        "seed": settings.seed,
        "load_best_model_at_end": settings.best,
        "metric_for_best_model": metric if data.validation is not None else None,
        "greater_is_better": metric not in LOWER_IS_BETTER,
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),  # or torchrun trains apart, and bf16 is refused
        "disable_tqdm": True,
        "label_names": ["labels"],
        **every("eval", settings.evaluate_every),
        **every("save", settings.save_every),
        **settings.training,
    }
    try:
        return TrainingArguments(**fields)
    except (ValueError, TypeError, ImportError) as e:
        raise ConfigError(f"transformers refuses these training settings: {e}") from e


def _restore_end(trainer: Any, checkpoint: Path) -> None:
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
    trainer._load_from_checkpoint(best or str(checkpoint))


def _final_metrics(trainer: Any, sets: dict[str, Any]) -> dict[str, float]:
    """The kept weights' scores: from the log where they were evaluated already."""
    metrics: dict[str, float] = {}
    state = trainer.state
    if sets["validation"]:
        best = trainer.args.load_best_model_at_end and state.best_global_step
        kept = best or state.global_step
        logged = [h for h in state.log_history if h["step"] == kept and any(k.startswith("eval_") for k in h)]
        metrics |= logged[-1] if logged else trainer.evaluate()
    if sets["test"]:
        metrics |= trainer.evaluate(sets["test"], metric_key_prefix="test")
    speed = ("_runtime", "_per_second", "_time")
    return {k: v for k, v in metrics.items() if k.startswith(("eval_", "test_")) and not k.endswith(speed)}


def _notes(settings: Settings, data: Data, metrics: dict[str, float]) -> dict[str, str]:
    """What travels in the adapter file: enough to predict with it."""
    return {
        "task": settings.task,
        "text": json.dumps(settings.text_columns),
        "labels": json.dumps(list(data.labels), ensure_ascii=False),
        "max_length": str(settings.max_length),
        "metrics": json.dumps(metrics),
        **({"chat_template": "alpaca"} if settings.chat_template == "alpaca" else {}),
    }


@contextlib.contextmanager
def _quiet(settings: Settings) -> Iterator[None]:
    """Without PyTorch's and Trainer's remarks on things that are as they should be here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield
