"""A fresh process: load the adapter, predict, merge it, predict again. python -m veralib.demo.merged RUN ROWS.csv

Prints one JSON object: accuracy (unmerged), rows, agree (rows with the same label before and after), max_difference (of logits)
and spread (the logits' standard deviation, to judge the difference by).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import StateError


def check_merged(run: Path, rows: Path) -> dict[str, Any]:
    """What a fresh Python process prints; StateError with its last words where it fails."""
    command = [sys.executable, "-m", "veralib.demo.merged", str(run), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise StateError(f"a fresh process couldn't load and merge {run}: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(run: Path, rows: Path) -> dict[str, Any]:
    """The comparison, in this process."""
    import torch

    from .. import attach
    from ..training.data import label_ids
    from ..training.loading import load_base
    from ..training.predict import find_source
    from ..training.rows import read_rows
    from ..training.tokens import collator, inputs

    source = find_source(run)
    base = load_base(source.settings, source.labels)
    vera = attach(base.model)
    vera.load(run / "adapter_model.safetensors", name="demo")
    vera.use("demo")
    base.model.eval()
    # Rows of like length share a batch: half the padding.
    table = sorted(read_rows(rows), key=lambda row: len(row[source.settings.text_columns[0]]))
    examples = inputs(table, base.tokenizer, source.settings.text_columns, base.max_length, str(rows))
    collate = collator(base.tokenizer.pad_token_id or 0)

    @torch.inference_mode()
    def logits() -> torch.Tensor:
        batches = [examples[i : i + 32] for i in range(0, len(examples), 32)]
        return torch.cat([base.model(**collate(batch)).logits for batch in batches])

    before = logits()
    vera.merge("demo")
    after = logits()
    truth = torch.tensor(label_ids([row[source.settings.label] for row in table], source.labels, str(rows)))
    return {
        "accuracy": (before.argmax(-1) == truth).double().mean().item(),
        "rows": len(table),
        "agree": int((before.argmax(-1) == after.argmax(-1)).sum()),
        "max_difference": (before - after).abs().max().item(),
        "spread": before.std().item(),
    }


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]))))
