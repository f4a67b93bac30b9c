"""Table 1: what LoRA and VeRA train and store, RoBERTa base and large and GPT-3, query and value, float32."""

from pathlib import Path
from typing import Any

from ..budget import lora_parameters, table_1_shapes, vera_parameters
from .pages import page, write

# As printed: (LoRA parameters, bytes, VeRA parameters, bytes).
PRINTED = {
    ("roberta-base", 1): ("36.8K", "144KB", "18.4K", "72KB"),
    ("roberta-base", 16): ("589.8K", "2MB", "18.8K", "74KB"),
    ("roberta-base", 256): ("9437.1K", "36MB", "24.5K", "96KB"),
    ("roberta-large", 1): ("98.3K", "384KB", "49.2K", "192KB"),
    ("roberta-large", 16): ("1572.8K", "6MB", "49.5K", "195KB"),
    ("roberta-large", 256): ("25165.8K", "96MB", "61.4K", "240KB"),
    ("gpt-3", 1): ("4.7M", "18MB", "2.4M", "9.1MB"),
    ("gpt-3", 16): ("75.5M", "288MB", "2.8M", "10.5MB"),
    ("gpt-3", 256): ("1207.9M", "4.6GB", "8.7M", "33MB"),
}
NOTES = {
    ("roberta-large", 16): "49,920 rounds to 49.9K; its bytes are right",
    ("gpt-3", 1): "printed: L·d + 2·d·r, which counts the shared A and B",
    ("gpt-3", 16): "printed: L·d + 2·d·r, which counts the shared A and B",
    ("gpt-3", 256): "printed: L·d + 2·d·r, which counts the shared A and B; LoRA 4.5 GiB",
    ("roberta-base", 16): "LoRA 2.25 MiB",
}


def make(folder: Path) -> dict[str, Any]:
    """Counts from the formulas beside the printed ones."""
    rows: list[dict[str, Any]] = []
    for (model, rank), printed in PRINTED.items():
        shapes = table_1_shapes(model)
        width = shapes[0][0]
        rows.append(
            {
                **{"model": model, "rank": rank, "lora": lora_parameters(shapes, rank), "vera": vera_parameters(shapes, rank)},
                **{"with_basis": vera_parameters(shapes, 0) + 2 * width * rank, "printed": printed},
                "note": NOTES.get((model, rank), ""),
            }
        )
    columns = ("model", "rank", "LoRA", "printed", "bytes", "printed", "VeRA", "printed", "bytes", "printed", "")
    cells = [
        (
            *(r["model"], str(r["rank"]), f"{r['lora']:,}", r["printed"][0], kib(4 * r["lora"]), r["printed"][1]),
            *(f"{r['vera']:,}", r["printed"][2], kib(4 * r["vera"]), r["printed"][3], r["note"]),
        )
        for r in rows
    ]
    text = page("Table 1: parameters and bytes", "table1", [("", columns, cells)])
    return write(folder, "table1", {"rows": rows}, text)


def kib(count: float) -> str:
    """Binary units, which the paper calls KB, MB, GB."""
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:,.2f} {unit}".replace(".00 ", " ")
    return f"{count:,.2f} GiB"
