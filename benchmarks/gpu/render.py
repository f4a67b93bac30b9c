"""Markdown from the GPU's result files: `python -m benchmarks.gpu.render` writes results/gpu/README.md."""

import argparse
import json
from pathlib import Path
from typing import Any

from .. import measure
from . import common, floors

Result = dict[str, Any]
GOALS = (
    # what, precision, (contestant, field), (contestant, field), at most
    ("time: veralib r=256 ÷ PEFT LoRA r=16", "bf16", "veralib-256", "lora-16", "ms", 1.00),
    ("time: veralib r=256 ÷ PEFT LoRA r=16", "autocast", "veralib-256", "lora-16", "ms", 1.00),
    ("peak memory: veralib r=256 ÷ PEFT LoRA r=16", "bf16", "veralib-256", "lora-16", "peak_bytes", 1.00),
    ("peak memory: veralib r=256 ÷ PEFT LoRA r=16", "autocast", "veralib-256", "lora-16", "peak_bytes", 1.00),
    ("time: veralib r=1024 ÷ PEFT VeRA r=1024", "bf16", "veralib-1024", "peft-vera-1024", "ms", 0.35),
    ("time: veralib r=1024 ÷ PEFT VeRA r=1024", "autocast", "veralib-1024", "peft-vera-1024", "ms", 0.75),
    ("activations added: veralib r=1024 ÷ PEFT VeRA r=1024", "bf16", "veralib-1024", "peft-vera-1024", "added", 0.05),
    ("activations added: veralib r=1024 ÷ PEFT VeRA r=1024", "autocast", "veralib-1024", "peft-vera-1024", "added", 0.05),
)


def load(folder: Path) -> dict[str, Result]:
    """The result files of a folder by their question."""
    found = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    return {r["question"]: r for r in found if "question" in r}


def report(results: dict[str, Result]) -> str:
    """The whole page, Markdown."""
    parts = ["# On a GPU", "Written by `python -m benchmarks.gpu.render` from the JSON files beside it; see benchmarks/gpu."]
    if not results.keys() - {"kernels_code"}:
        parts.append("No GPU has been measured yet.")
    tables = {
        "correctness": _correctness,
        "train_step": _train,
        "paper_step": _paper,
        "fleet_step": _fleet,
        "decode": _decode,
        "kernels": _kernels,
        "where": _where,
    }
    for question, table in tables.items():
        if question in results:
            result = results[question]
            tiny = ["**Small shapes on the CPU, a test of the scripts: the numbers mean nothing.**"] if result["tiny"] else []
            parts += [*tiny, *table(result), *_failures(result), _machine(result)]
    if "kernels_code" in results:
        parts += _code(results["kernels_code"])
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _ceilings(result: Result) -> floors.Ceilings:
    found = result["environment"].get("ceilings", {})
    return floors.Ceilings(found.get("copy_GBs", floors.COPY_GBs), found.get("bf16_TFLOPs", floors.BF16_TFLOPs))


def _size(result: Result) -> common.Size:
    return common.Size(**{k: result["size"][k] for k in ("name", "hidden", "mlp", "heads", "layers")})


def _machine(result: Result) -> str:
    e = result["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in e["versions"].items() if v != "absent")
    ceilings = ", ".join(f"{k} {v:.0f}" for k, v in e.get("ceilings", {}).items())
    measured = f" Measured: {ceilings}." if ceilings else ""
    return f"{e['device']}; Python {e['python']}, {versions}; commit {e['commit']}, {e['date']}.{measured}"


def _failures(result: Result) -> list[str]:
    return [f"Failed: {f['what']}: {f['error']}" for f in result.get("failures", [])]


def _correctness(result: Result) -> list[str]:
    parts = [
        "## Right, and how long A and B take",
        _table(["check", ""], [[k, "fine" if v else "**wrong**"] for k, v in result.get("checks", {}).items()]),
    ]
    for b in result.get("basis", []):
        parts.append(
            f"A and B of {b['A and B']} in bf16, on the device{', by the kernel' * b['kernels']}: {min(b['ms']):.1f} ms "
            f"(bit-identical: {b['bit-identical']})."
        )
    for m in result.get("merging", []):
        c = _ceilings(result)
        # merge keeps the old weights (read, write) and writes the new ones (read, write): twice the weights each way
        least = 4 * m["weight_bytes"] / c.copy_GBs / 1e6
        times = ", ".join(f"{k} {t[0]:.1f} ms" for k, t in m["ms"].items())
        how = ", by the kernel" if m["kernels"] else ""
        parts.append(
            f"Of {m['weight_bytes'] / 1e9:.2f} GB of weights{how}: {times}; merging moves them in {least:.1f} ms at least."
        )
    return parts


def _added(table: Result, name: str) -> float:
    return table["contestants"][name]["held_bytes"] - table["contestants"]["frozen"]["held_bytes"]


def _train(result: Result) -> list[str]:
    parts, c, size = ["## A training step"], _ceilings(result), _size(result)
    for table in result.get("tables", []):
        found = table["contestants"]
        reference, floor = found[table["reference"]], found["frozen"]
        rows = []
        for name, f in found.items():
            method, _, rank = name.removesuffix("-bf16").removesuffix("-kernels").rpartition("-")
            least = c.ms(floors.train_flops(size, table["tokens"], int(rank) if method == "veralib" else 0), 0)
            rows.append(
                [
                    name,
                    f"{f['ms']['median']:.2f} [{f['ms']['low']:.2f}–{f['ms']['high']:.2f}]",
                    f"{f['host_ms']:.1f}",
                    f"{f['ms']['median'] / floor['ms']['median']:.2f}",
                    f"{f['ms']['median'] / reference['ms']['median']:.2f}",
                    f"{least:.1f}" if method == "veralib" or name == "frozen" else "",
                    f"{_added(table, name) / 2**20:.0f}",
                    f"{f['peak_bytes'] / 2**20:.0f}",
                    f"{f['parameters']:,}",
                ]
            )
        head = [
            "",
            "ms",
            "host ms",
            "÷ frozen",
            f"÷ {table['reference']}",
            "least ms",
            "activations added MiB",
            "peak MiB",
            "trained",
        ]
        title = {"bf16": "bf16", "autocast": "bf16 base under autocast"}[table["precision"]]
        parts += [f"### {size.layers} layers, 1 × {table['tokens']} tokens, {title}", _table(head, rows)]
        goals = [
            _goal(table, *rest) for what, precision, *rest in GOALS if precision == table["precision"] for rest in [[what, *rest]]
        ]
        parts.append(_table(["goal", "measured", "at most"], [g for g in goals if g]))
    return parts


def _steps(table: Result, frozen: Result | None) -> list[list[str]]:
    """A row for each contestant of a table; frozen: the base alone, where it was measured."""
    reference = table["contestants"][table["reference"]]
    return [
        [
            name,
            f"{f['ms']['median']:.2f} [{f['ms']['low']:.2f}–{f['ms']['high']:.2f}]",
            f"{f['host_ms']:.1f}",
            f"{f['ms']['median'] / frozen['ms']['median']:.2f}" if frozen else "–",
            f"{f['ms']['median'] / reference['ms']['median']:.2f}",
            f"{f['peak_bytes'] / 2**20:.0f}",
            f"{f['parameters']:,}",
        ]
        for name, f in table["contestants"].items()
    ]


def _paper(result: Result) -> list[str]:
    parts = ["## A training step at the paper's shapes"]
    for t in result.get("tables", []):
        head = ["", "ms", "host ms", "÷ frozen", f"÷ {t['reference']}", "peak MiB", "trained"]
        how = {"autocast": "float32 under bf16 autocast", "float32": "float32"}[t["precision"]]
        parts += [
            f"### {t['shape']}, {t['rows']} × {t['length']} tokens, {how}",
            _table(head, _steps(t, t["contestants"].get("frozen"))),
        ]
    return parts


def _fleet(result: Result) -> list[str]:
    tables = result.get("tables", [])
    if not tables:
        return []
    first, size = tables[0], _size(result)
    head = ["", "ms", "host ms", "÷ frozen", f"÷ {first['reference']} in the same run", "peak MiB", "trained at once"]
    frozen = first["contestants"].get("frozen")
    rows = [row for t in tables for row in _steps(t, frozen) if t is first or row[0] != t["reference"]]
    what = f"{size.layers} layers, {first['rows']} × {first['length']} tokens, bf16"
    return [f"## A fleet's training step: {what}", _table(head, rows)]


def _goal(table: Result, what: str, ours: str, theirs: str, field: str, most: float) -> list[str]:
    found = table["contestants"]
    if ours not in found or theirs not in found:
        return []
    if field == "added":
        a, b = _added(table, ours), _added(table, theirs)
    else:
        a, b = (found[n][field]["median"] if field == "ms" else found[n][field] for n in (ours, theirs))
    return [what, f"{a / b:.3f}" if b else "–", f"{most:.2f}"]


def _decode(result: Result) -> list[str]:
    c, size = _ceilings(result), _size(result)
    parts = ["## A decode step, each row its own adapter"]
    for mode in ("graph", "eager"):
        steps = [s for s in result.get("steps", []) if f"base {mode}" in s["contestants"]]
        names = list(dict.fromkeys(n for s in steps for n in s["contestants"] if n.endswith(mode) and n != f"base {mode}"))
        rows = []
        for s in sorted(steps, key=lambda s: (s.get("flatness", False), s["registered"], s["batch"], s["distinct"])):
            base = s["contestants"][f"base {mode}"]["ms"]["median"]
            cells = [f"{s['contestants'][n]['ms']['median'] / base:.3f}" if n in s["contestants"] else "–" for n in names]
            least = floors.decode_ms(size, s["batch"], 256, s["distinct"], "veralib", c) / floors.decode_ms(
                size, s["batch"], 0, 0, "base", c
            )
            rows.append([str(s["batch"]), str(s["distinct"]), str(s["registered"]), f"{base:.3f}", *cells, f"{least:.3f}"])
        if rows:
            head = ["batch", "distinct", "registered", "base ms", *(n.removesuffix(mode).strip() for n in names), "least, r=256"]
            title = "as a CUDA graph" if mode == "graph" else "without a graph"
            parts += [f"### Step ÷ base, {title}", _table(head, rows)]
    why = {f"{n}: {reason}" for s in result.get("steps", []) for n, reason in s["failed"].items()}
    parts += [f"Not captured or run: {w}" for w in sorted(why)[:6]]
    rows = []
    for name, m in result.get("memory", {}).items():
        a, per = m["tensor_bytes"], m["resident_bytes"] / m["adapters"]
        rows.append([name, f"{a / 1e6:.2f}", f"{per / 1e6:.2f}", f"{1e9 / per:.0f}" if per else "–"])
    head = ["", "MB of tensors", "MB resident", f"adapters per GB ({size.layers} layers)"]
    return [*parts, "### Memory an adapter (A and B of one seed counted in, shared by all)", _table(head, rows)]


def _kernels(result: Result) -> list[str]:
    parts, c = ["## The kernels alone, µs, inputs not in the cache"], _ceilings(result)
    for section in ("mixed", "rank_space"):
        rows = []
        for entry in result.get(section, []):
            m, n, r, T, found = entry["m"], entry["n"], entry["r"], entry["T"], entry["us"]
            side, other = (m, 2 * T * (2 * r + 3 * m)) if section == "mixed" else (n, 2 * T * (n + r))
            least = 1e3 * c.ms(2 * T * r * side, 2 * r * side + other)
            best = {s: _best(found, s) for s in ("numbers", "bytes", "grown")}
            cells = [_us(found, name) for name in ("frozen linear", "plain", "compiled")]
            rows.append([str(m), str(n), str(r), str(T), *cells, *best.values(), f"{least:.1f}"])
        if rows:
            head = [
                "m",
                "n",
                "r",
                "tokens",
                "frozen linear",
                "plain",
                "torch.compile",
                "read as bf16",
                "as bytes",
                "grown",
                "least, bf16",
            ]
            what = "out += b ∘ B(d ∘ u), each token its own adapter" if section == "mixed" else "u = A x"
            parts += [f"### {what}; a kernel's best tile, and the one that is chosen", _table(head, rows)]
    for section in ("fold", "vector_gradients", "grow"):
        rows = [
            [str(e["m"]), str(e["r"]), *(_us(e["us"], name) for name in ("plain", "compiled", "kernel"))]
            for e in result.get(section, [])
        ]
        if rows:
            parts += [f"### {section}", _table(["m", "r", "plain", "torch.compile", "kernel"], rows)]
    rows = [
        [str(e["m"]), str(e["n"]), str(e["r"]), *(_us(e["us"], name) for name in ("copy", "plain")), _best(e["us"], "kernel")]
        for e in result.get("merge", [])
    ]
    if rows:
        parts += ["### W0 + ΔW into a bf16 weight", _table(["m", "n", "r", "a copy of W0", "plain", "kernel"], rows)]
    return parts


def _code(result: Result) -> list[str]:
    head = ["kernel", "dtype", "matrix", "levels", "tokens", "registers", "stack bytes", "shared KiB", "matrix instructions"]
    rows = [
        [
            *(str(e.get(k, "")) for k in ("what", "dtype", "source", "levels", "T", "registers", "stack_bytes")),
            f"{e['shared_bytes'] / 1024:.1f}",
            f"{e['wgmma']} wgmma, {e['mma']} mma",
        ]
        for e in result["kernels"]
    ]
    title = f"## What the kernels compile to, for {result['target']} by Triton {result['triton']}"
    return [title, "Compiled where there is no GPU: `python -m benchmarks.gpu.resources`.", _table(head, rows)]


def _us(found: dict[str, Any], name: str) -> str:
    return f"{found[name]['median']:.1f}" if name in found else "–"


def _best(found: dict[str, Any], source: str) -> str:
    """The fastest tile's time, and where that isn't the chosen tile's, both."""
    times = {name: t["median"] for name, t in found.items() if name.split()[0] == source}
    if not times:
        return "–"
    best = min(times, key=lambda name: times[name])
    chosen = "" if best == source or source not in times else f" (chosen {times[source]:.1f}; {best.split()[1]})"
    return f"{times[best]:.1f}{chosen}"


def _where(result: Result) -> list[str]:
    parts = ["## Where the time goes"]
    for section in ("train_step", "decode"):
        for name, found in result.get(section, {}).items():
            rows = [[f"`{r['kernel'][:80]}`", f"{r['count']:.0f}", f"{r['ms']:.3f}"] for r in found["top"][:10]]
            parts += [
                f"### {section}, {name}: {found['ms']:.2f} ms in {found['launches']:.0f} launches",
                _table(["kernel", "times", "ms"], rows),
            ]
    return parts


def main(arguments: list[str] | None = None) -> int:
    """Writes README.md into the folder of the result files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=measure.ROOT / "results/gpu")
    folder = parser.parse_args(arguments).folder
    (folder / "README.md").write_text(report(load(folder)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
