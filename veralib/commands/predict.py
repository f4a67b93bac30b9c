"""vera predict: predictions for the rows of a file, as jsonl, csv or tsv."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from typer import Argument, Option

from ..errors import ConfigError


def predict(
    adapter: str = Argument(help="A run's folder, an adapter file, a folder that PEFT saved, or a hub id."),
    data: str = Argument(help="csv, tsv, jsonl or txt file with the rows; for images paths in it, or a folder of images."),
    output: str = Option(None, help="File to write: .jsonl, .csv or .tsv. Left out: jsonl on the screen."),
    model: str = Option(None, help="Base model, if it is elsewhere than in training."),
    adapter_column: str = Option(None, help="Column that names an adapter for each row: a path; empty: the base model."),
    text: str = Option(None, help="Text column or columns, if they are called otherwise than in training."),
    columns: str = Option(None, help="Column names of a csv or tsv file without a header."),
    task: str = Option(
        None, help="classification, regression, images, causal-lm, prompt-completion or chat; known of our own files."
    ),
    labels: str = Option(None, help="Label names in the order of their ids, with commas; known of our own files."),
    batch_size: int = Option(32, min=1, help="Rows at a time."),
    max_new_tokens: int = Option(64, min=1, help="Tokens to generate at most."),
) -> None:
    """Predict the rows of a file; each row may use an adapter of its own, also within one batch.

    Adds prediction (a label, a number or generated text) and, for labels, score (its probability).

    Examples:

        vera predict run new_rows.csv --output predictions.csv

        vera predict run/adapter_model.safetensors rows.jsonl --model path/to/base --adapter-column adapter
    """
    from ..training.predict import predict as predict_rows

    suffix = Path(output).suffix if output else ".jsonl"
    if suffix not in (".jsonl", ".csv", ".tsv"):
        raise ConfigError(f"output is {output}, expected a .jsonl, .csv or .tsv file")
    found = predict_rows(
        adapter,
        data,
        adapter_column=adapter_column,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        model=model,
        text=text,
        columns=columns,
        task=task,
        labels=[part.strip() for part in labels.split(",")] if labels else None,
    )
    if output is None:
        write_rows(found, sys.stdout, suffix)
        return
    partial = Path(output + ".partial")  # renamed at the end: an interrupted command leaves no half file of that name
    try:
        with open(partial, "w", encoding="utf-8", newline="") as f:
            count = write_rows(found, f, suffix)
        partial.replace(output)
    except OSError as e:
        raise ConfigError(f"can't write {output}: {e.strerror or e}") from e
    finally:
        partial.unlink(missing_ok=True)
    print(f"{count} rows in {output}")


def write_rows(rows: Iterator[dict[str, Any]], f: IO[str], suffix: str) -> int:
    """Writes rows as they come; how many there were. The first row names the columns of csv and tsv."""
    count = 0
    names: list[str] = []
    table = csv.writer(f, lineterminator="\n")
    for row in rows:
        count += 1
        if suffix == ".jsonl":
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
            continue
        if not names:
            names = list(row)
            f.write("\t".join(names) + "\n") if suffix == ".tsv" else table.writerow(names)
        values = [row.get(name, "") for name in names]
        if suffix == ".csv":
            table.writerow(values)
        else:  # tsv has no quotes: a tab or a line end inside a value becomes a space
            f.write("\t".join(re.sub(r"[\t\r\n]", " ", str(v)) for v in values) + "\n")
    return count
