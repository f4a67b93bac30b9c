"""What 4 bits cost: adapters trained on the NF4 base, measured there, merged, and on the same base in 32, 16 and 8 bits.

    python -m experiments.four_bit TEXT [--model models/books-4m] [--steps 150] [--results results/four_bit]

TEXT is any plain text that the base hasn't read, WikiText-2 say; its last tenth measures. The quantised base is bitsandbytes' NF4
with double quantisation, as in the paper's instruction tuning. The figures are of a model of 4 million parameters.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

RESULTS = Path(__file__).parents[1] / "results" / "four_bit"
LENGTH = 128
METHODS: dict[str, dict[str, Any]] = {
    "VeRA r=256": {"method": "vera", "rank": 256, "lr": 3e-2},
    "LoRA r=1": {"method": "lora", "rank": 1, "lr": 3e-3},
    "LoRA r=8": {"method": "lora", "rank": 8, "lr": 3e-3},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Trains, measures, writes four_bit.json and README.md."""
    from veralib.training import Settings, train
    from veralib.training.loading import load_base
    from veralib.training.result import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path, default=Path("models/books-4m"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--results", type=Path, default=RESULTS)
    a = parser.parse_args(arguments)
    text = a.text.read_text(encoding="utf-8")
    cut = 9 * len(text) // 10
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "train.txt").write_text(text[:cut], encoding="utf-8")
        common = {"model": a.model, "data": place / "train.txt", "task": "causal-lm", "max_length": LENGTH, "batch_size": 16}
        common |= {"targets": "all-linear", "save_every": "never", "evaluate_every": "never", "plot": False}
        common |= {"training": {"max_steps": a.steps}}
        plain = Settings(**common)
        bases = {"float32": plain, "bfloat16": plain.replace(dtype="bfloat16")}
        bases |= {"8-bit": plain.replace(quantise="8bit"), "4-bit": plain.replace(quantise="4bit")}
        loaded = {name: load_base(s) for name, s in bases.items()}
        ids = torch.tensor(loaded["float32"].tokenizer(text[cut:])["input_ids"])
        held_out = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        before = {name: loss(base.model, held_out) for name, base in loaded.items()}
        sizes = {name: sum(t.nbytes for t in base.model.parameters()) for name, base in loaded.items()}
        for name, fields in METHODS.items():
            for trained_on in ("4-bit", "float32"):
                run = place / f"{name}-{trained_on}"
                began = time.perf_counter()
                result = train(bases[trained_on].replace(output=run, **fields))
                seconds = time.perf_counter() - began
                losses, merged = {}, None
                for base_name, settings in bases.items():
                    model, merge = adapted(load_base(settings).model, run, fields["method"])
                    losses[base_name] = loss(model, held_out)
                    if base_name == "4-bit" and merge is not None:
                        merged = {**merge(), "loss": loss(model, held_out)}
                row = {"method": name, "trained_on": trained_on, "parameters": result.adapter_parameters, "seconds": seconds}
                rows.append({**row, "bytes": result.adapter_bytes, "losses": losses, "merged_into_4_bits": merged})
                print(json.dumps(rows[-1]), flush=True)
    found = {"model": a.model.name, "steps": a.steps, "held_out_tokens": held_out.numel(), "before": before, "bytes": sizes}
    found |= {"rows": rows, "versions": versions(), "hardware": hardware()}
    a.results.mkdir(parents=True, exist_ok=True)
    (a.results / "four_bit.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (a.results / "README.md").write_text(render(found), encoding="utf-8")
    print(render(found))
    return found


def adapted(model: Any, run: Path, method: str) -> Any:
    """(the base with a run's adapter, a function that merges it and reports, for VeRA)."""
    import warnings

    if method == "lora":
        import peft

        return peft.PeftModel.from_pretrained(model, str(run)), None
    from veralib import attach

    vera = attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the base is stored otherwise: what is measured here
        vera.load(run / "adapter_model.safetensors", name="trained", allow_other_base=True)
    vera.use("trained")

    def merge() -> dict[str, float]:
        report = vera.merge("trained")
        return {"surviving": report.surviving, "error": report.error}

    return model, merge


@torch.no_grad()
def loss(model: Any, rows: torch.Tensor) -> float:
    """Mean cross-entropy a token, in nats."""
    model.eval()
    total = 0.0
    for part in rows.split(32):
        logits = model(input_ids=part).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / rows[:, 1:].numel()


def render(found: dict[str, Any]) -> str:
    """The Markdown page."""
    bases = list(found["before"])
    none = " | ".join(f"{found['before'][b]:.3f}" for b in bases)
    lines = [
        "# Adapters on a 4-bit base",
        "",
        "Rendered by `python -m experiments.four_bit`; nothing here is typed.",
        "",
        f"Base: {found['model']}; {found['steps']} steps of 16 rows of {LENGTH} tokens, all linears; held-out loss a token over "
        f"{found['held_out_tokens']:,} tokens of text that neither the base nor the adapters read, in nats. Columns: what the "
        "adapter is served on.",
        "",
        f"| adapter | trained on | trained parameters | adapter bytes | {' | '.join(bases)} | merged into 4 bits |",
        "|" + "---|" * (5 + len(bases)),
        f"| none | | | | {none} | |",
    ]
    for row in found["rows"]:
        losses = " | ".join(f"{row['losses'][b]:.3f}" for b in bases)
        m = row["merged_into_4_bits"]
        merged = "" if m is None else f"{m['loss']:.3f} ({100 * m['surviving']:.0f} % of ΔW left, noise {100 * m['error']:.0f} %)"
        lines.append(
            f"| {row['method']} | {row['trained_on']} | {row['parameters']:,} | {row['bytes']:,} | {losses} | {merged} |"
        )
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found["bytes"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"Weights in memory: {sizes} (embeddings stay as they are; the 4-bit scales aside). One rate a method.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
