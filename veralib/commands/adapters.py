"""vera merge, convert and inspect: what one does with an adapter file."""

from pathlib import Path
from typing import Any

from typer import Argument, Option

from ..errors import ConfigError
from .shared import human_bytes, table


def merge(
    adapter: str = Argument(help="A run's folder, an adapter file, a folder that PEFT saved, or a hub id."),
    output: str = Argument(help="Folder for the merged model."),
    model: str = Option(None, help="Base model, if it is elsewhere than in training."),
    dtype: str = Option(None, help="Type of the weights: float32 (as trained), bfloat16, float16, auto (the checkpoint's)."),
    task: str = Option(None, help="classification, regression, images or a language task; known of our own files."),
    labels: str = Option(None, help="Label names in the order of their ids, with commas; known of our own files."),
    model_class: str = Option(
        None, "--class", help="transformers' class of the base, AutoModelForTokenClassification for one; else the task's."
    ),
) -> None:
    """Write an adapter into its base model's weights: a plain model that transformers loads without veralib.

    Runs of all methods but the bottleneck adapters, which no weight can stand for. Says which share of the change survived the
    weights' precision.

    Example:

        vera merge run merged
    """
    import torch

    from .. import attach
    from ..merge_report import MergeReport
    from ..training.classes import check_new, load_by_class
    from ..training.loading import load_base, quiet_transformers
    from ..training.predict import find_source, read_adapter, restore
    from ..training.tokens import chat_template

    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and isn't empty: name another output folder")
    names = [part.strip() for part in labels.split(",")] if labels else None
    source = find_source(adapter, {"model": model, "dtype": dtype, "task": task, "labels": names})
    torch.manual_seed(0)
    loaded = read_adapter(source.path) if source.settings.method == "vera" else None
    if loaded is not None and (model_class or not source.told):
        known = source.labels if source.told and "Classification" in (model_class or "") else ()
        base = load_by_class(source.settings, loaded, model_class, names or known)
    elif model_class:
        raise ConfigError(f"--class is for VeRA adapters, and {adapter} was trained with {source.settings.method}")
    else:
        base = load_base(source.settings, source.labels)
    if base.tokenizer is not None and source.settings.chat_template:
        chat_template(source.settings, base.tokenizer)  # saved with the tokenizer: the merged model is prompted as it was trained
    if loaded is not None:
        vera = attach(base.model)
        vera.load(loaded, name="adapter")
        check_new(base, loaded, adapter, "Name it with --class (AutoModelForTokenClassification, say).")
        report: MergeReport | None = vera.merge("adapter", keep=None)
    else:
        attached = restore(source, base)
        if attached.merge is None:
            raise ConfigError(
                f"{adapter} was trained with {source.settings.method}, which adds modules of its own: no weight of the base "
                "model can stand for them, so it can't be merged. vera predict runs it as it is."
            )
        report = attached.merge()
    try:
        with quiet_transformers():
            base.model.save_pretrained(folder)
            if prepares := base.tokenizer or base.processor:
                prepares.save_pretrained(folder)
    except OSError as e:
        raise ConfigError(f"can't write {folder}: {e.strerror or e}") from e
    if report is None:
        print(f"{source.settings.method}, in the weights themselves, written to {folder}")
        return
    layer, share = report.worst
    print(f"merged {report.layers} layers into {folder}; {report.surviving:.2%} of the change survived ({share:.2%} in {layer})")


def convert(
    source: str = Argument(metavar="SRC", help="A veralib file, a run's folder, a folder that PEFT saved, or a hub id."),
    target: str = Argument(metavar="DST", help="veralib: a .safetensors file or a folder; peft and lora: a folder."),
    to: str = Option(..., "--to", help="veralib, peft (PEFT's VeRA) or lora (PEFT's LoRA)."),
    rank: int = Option(None, help="lora: cut to this rank."),
    energy: float = Option(None, help="lora: cut to the share of ΔW's energy, 0.99 for one."),
    model: str = Option(None, help="Base model's folder or hub id: shapes of PEFT's layers, rows of fused linears."),
) -> None:
    """Convert an adapter between veralib's file, PEFT's VeRA folder and a LoRA folder.

    To LoRA it is exact without --rank and --energy; what a cut loses is reported.

    Examples:

        vera convert peft_folder adapter.safetensors --to veralib --model base_folder

        vera convert run lora_folder --to lora --energy 0.99
    """
    from ..errors import unknown_name

    kinds = ("veralib", "peft", "lora")
    if to not in kinds:
        raise unknown_name("adapter kind (--to)", to, kinds)
    if to != "lora" and (rank is not None or energy is not None):
        raise ConfigError("--rank and --energy cut a LoRA: they go with --to lora alone")
    adapter, skeleton = _read(source, model)
    if to == "veralib":
        from ..format import save_adapter

        path = save_adapter(adapter, target)
        print(f"{path}: {path.stat().st_size:,} bytes, {adapter.parameters:,} parameters")
    elif to == "peft":
        from ..interop.peft import write_peft

        folder = write_peft(adapter, target)
        print(f"{folder}: {sum(p.stat().st_size for p in folder.iterdir()):,} bytes, A and B included where PEFT needs them")
    else:
        from ..interop.lora import to_lora

        report = to_lora(adapter, target, rank, energy, model=skeleton)
        ranks = sorted(set(report.ranks.values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        print(f"{report.folder}: {report.bytes:,} bytes, {shown}, relative error {report.error:.3g}")


def _read(source: str, model: str | None) -> tuple[Any, Any]:
    """The adapter, and its base model without weights if one is named."""
    from ..interop.folder import is_peft_folder
    from ..interop.peft import read_peft
    from ..training.predict import read_adapter

    adapter = read_adapter(source)
    if model is None:
        return adapter, None
    from ..budget import meta_model

    skeleton = meta_model(model, adapter.base.layers)
    return (read_peft(source, skeleton) if is_peft_folder(source) else adapter), skeleton


def inspect(
    file: str = Argument(help="A veralib file, a run's folder, a folder that PEFT saved, or a hub id."),
) -> None:
    """Show an adapter's card: config, base model, bytes, fingerprints, and the norms of d and b in each layer.

    Example:

        vera inspect run/adapter_model.safetensors
    """
    from ..adapter import layer_of
    from ..training.predict import read_adapter

    adapter = read_adapter(file)
    settled = adapter.basis.kind != "peft" or adapter.basis.max_in > 0
    config = {k: v for k, v in adapter.config.to_dict().items() if v not in (None, [], "")}
    rows = [
        ("file", f"{file} ({human_bytes(_size(file))})" if _size(file) else file),
        ("parameters", f"{adapter.parameters:,} in d and b, {human_bytes(adapter.bytes)} with everything"),
        ("base model", f"{adapter.base.id or '(not named)'} {adapter.base.revision}".strip()),
        ("quantised base", adapter.base.quantised or "no"),
        ("config", ", ".join(f"{k}={v}" for k, v in config.items())),
        ("basis", f"{adapter.basis.kind}, seed {adapter.basis.seed}" + (", A and B in the file" if adapter.basis.stored else "")),
        ("fingerprint of A and B", adapter.basis.fingerprint() if settled else "(grows with the base model's shapes)"),
        ("base weights known by", f"{len(adapter.base.hashes)} hashes" if adapter.base.hashes else "names and shapes"),
    ]
    for name, state in adapter.modules.items():
        shapes = ", ".join(f"{k} {tuple(t.shape)}" for k, t in state.items())
        rows.append((f"module {name}", shapes))
    for name, value in adapter.notes.items():
        rows.append((name, value if len(value) < 400 else value[:400] + " …"))
    table("adapter", ("", "value"), rows)
    table(
        f"{len(adapter.vectors)} adapted layers",
        ("layer", "m", "n", "r", "‖d‖", "‖b‖", "largest |b|"),
        (
            (
                unit,
                str(b.numel()),
                str(adapter.base.layers.get(layer_of(unit), (0, 0))[1] or "?"),
                str(d.numel()),
                f"{d.norm():.4g}",
                f"{b.norm():.4g}",
                f"{b.abs().max():.4g}",
            )
            for unit, (d, b) in adapter.vectors.items()
        ),
        right=("m", "n", "r", "‖d‖", "‖b‖", "largest |b|"),
    )


def _size(file: str) -> int:
    path = Path(file)
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    return path.stat().st_size if path.is_file() else 0
