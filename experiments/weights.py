"""How methods change the weights: figures 3 and 5, intruder dimensions, and time and memory at rank 64 (table 12).

    VERALIB_DATA=… python -m experiments.weights [--task cola] [--epochs 3] [--runs out/weights] [--results results/weights]

Full fine-tuning, LoRA and VeRA of rank 64 train MiniLM-L6 on one of GLUE's tasks at rates near those that results/glue chose,
LoRA r=64 at the lowest of LoRA's, since at 1.5e-3 it ends with one answer for everything; then ΔW of query and value is compared.
Runs are kept and not repeated. `vera reproduce fig3`, `fig5`, `intruders` and `table12` draw what this writes.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parents[1] / "results" / "weights"
TASKS: dict[str, dict[str, Any]] = {
    "cola": {"data": "glue/CoLA", "columns": "source,label,mark,sentence", "text": "sentence", "metric": "matthews"},
    "mrpc": {"data": "glue/MRPC", "text": ("#1 String", "#2 String"), "label": "Quality", "max_length": 128},
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "lr": 5e-5, "lr_head": 5e-5},
    "LoRA r=64": {"method": "lora", "rank": 64, "lr": 5e-4, "lr_head": 1e-2},
    "LoRA r=1": {"method": "lora", "rank": 1, "lr": 1.5e-3, "lr_head": 1e-2},
    "VeRA r=64": {"method": "vera", "rank": 64, "lr": 3e-2, "lr_head": 1e-2},
}
TOP = 10
"""Leading singular vectors of W0 + ΔW that are looked at."""
NEAR = 0.5
"""An intruder's largest |cosine| with any singular vector of W0 (Shuttleworth et al. 2024 vary it; this is in their range)."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Trains, compares, writes weights.json."""
    from veralib.training import Settings, train
    from veralib.training.loading import load_base
    from veralib.training.result import hardware, load_result, versions

    home = os.environ.get("VERALIB_DATA", "")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), default="cola")
    parser.add_argument("--data", default=home, help="folder that holds glue/")
    parser.add_argument("--model", default=os.path.join(home, "minilm_l6_fp16"))
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--runs", type=Path, default=Path("out/weights"), help="the trained runs; finished ones aren't repeated")
    parser.add_argument("--results", type=Path, default=RESULTS)
    a = parser.parse_args(arguments)
    fields = {**TASKS[a.task], "data": os.path.join(a.data, TASKS[a.task]["data"])}
    common = {"model": a.model, "max_length": 64, "batch_size": 32, "group_by_length": True, "epochs": a.epochs, **fields}
    common |= {"validation": "dev", "evaluate_every": "never", "save_every": "never", "plot": False}
    deltas: dict[str, dict[str, Tensor]] = {}
    runs: dict[str, Any] = {}
    norms: dict[str, float] = {}
    metric = fields.get("metric", "accuracy")
    for name, method in METHODS.items():
        run = a.runs / f"{a.task}-{name}-lr{method['lr']:g}-epochs{a.epochs:g}".replace(" ", "-")
        settings = Settings(**common, **method, output=run)
        if not (run / "result.json").exists():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:  # or its peak memory would be the last one's
                own.submit(train, settings).result()
        result = load_result(run)
        changed = {k for k, v in settings.to_dict().items() if k != "output" and result.settings.get(k) != v}
        if changed:
            raise SystemExit(
                f"{run} was trained with other settings ({', '.join(sorted(changed))}): delete it, or name other --runs"
            )
        kept = ("metrics", "adapter_parameters", "adapter_bytes", "seconds_per_step", "peak_memory_bytes", "train_seconds")
        runs[name] = {"lr": method["lr"], "score": result.metrics[f"eval_{metric}"], **{k: getattr(result, k) for k in kept}}
        base = load_base(settings, result.labels).model
        deltas[name], found = changes(base, run, method["method"])
        norms |= found
        print(name, json.dumps(runs[name]["metrics"]), flush=True)
    weights = {layer: base.get_submodule(layer).weight.detach().float() for layer in deltas["LoRA r=1"]}
    found_all = {
        **{"task": a.task, "model": Path(a.model).name, "epochs": a.epochs, "metric": metric, "runs": runs, "d_norms": norms},
        "cosines": cosines(deltas),
        "intruders": {name: {layer: intruders(weights[layer], d) for layer, d in of.items()} for name, of in deltas.items()},
        "change": {name: {k: float(d.norm() / weights[k].norm()) for k, d in of.items()} for name, of in deltas.items()},
        **{"rank": METHODS["VeRA r=64"]["rank"], "blocks": base.config.num_hidden_layers, "hidden": base.config.hidden_size},
        **{"top": TOP, "near": NEAR, "versions": versions(), "hardware": hardware()},
    }
    a.results.mkdir(parents=True, exist_ok=True)
    (a.results / "weights.json").write_text(json.dumps(found_all, indent=1) + "\n", encoding="utf-8")
    return found_all


def changes(base: Any, run: Path, method: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """({layer: ΔW of query and value}, {layer: ‖d‖₂ of VeRA}) of a finished run."""
    from safetensors.torch import load_file

    names = [n for n, _ in base.named_modules() if n.endswith(("attention.self.query", "attention.self.value"))]
    if method == "vera":
        from veralib import load_adapter

        adapter = load_adapter(run / "adapter_model.safetensors")
        place = {unit: next(n for n in names if n.endswith(unit) or unit.endswith(n)) for unit in adapter.vectors}
        norms = {place[unit]: float(d.norm()) for unit, (d, _) in adapter.vectors.items()}
        return {place[unit]: adapter.delta(unit) for unit in adapter.vectors}, norms
    if method == "lora":
        import peft

        config = peft.PeftConfig.from_pretrained(str(run))
        tensors = load_file(run / "adapter_model.safetensors")
        scale = config.lora_alpha / config.r

        def of(layer: str) -> Tensor:
            A, B = (next(t for k, t in tensors.items() if f"{layer}.lora_{x}." in k) for x in "AB")
            return scale * B @ A

        return {n: of(n) for n in names}, {}
    tensors = load_file(run / "model.safetensors")
    return {n: tensors[n + ".weight"].float() - base.get_submodule(n).weight.detach().float() for n in names}, {}


def cosines(deltas: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Cosine of the flattened ΔW by query layer: VeRA and full with LoRA, and LoRA with a random matrix of its size."""
    generator = torch.Generator().manual_seed(0)
    queries = [n for n in deltas["LoRA r=64"] if n.endswith("query")]
    reference = deltas["LoRA r=64"]

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))

    random = {n: torch.randn(reference[n].shape, generator=generator) for n in queries}
    return {
        "VeRA r=64": {n: cosine(deltas["VeRA r=64"][n], reference[n]) for n in queries},
        "LoRA r=1": {n: cosine(deltas["LoRA r=1"][n], reference[n]) for n in queries},
        "full": {n: cosine(deltas["full"][n], reference[n]) for n in queries},
        "random": {n: cosine(random[n], reference[n]) for n in queries},
    }


def intruders(W: Tensor, delta: Tensor) -> int:
    """How many of the TOP left singular vectors of W + ΔW have no singular vector of W within |cosine| NEAR."""
    before, after = torch.linalg.svd(W)[0], torch.linalg.svd(W + delta)[0][:, :TOP]
    return int(((after.T @ before).abs().max(1).values < NEAR).sum())


if __name__ == "__main__":
    main()
