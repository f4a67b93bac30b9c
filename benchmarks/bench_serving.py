"""Both engines' measurements and one page of all that was measured of serving: `python -m benchmarks.bench_serving [--render]`.

Runs benchmarks.bench_embedded here and benchmarks.bench_vllm in .venv-vllm where `make test-vllm` has built it, fifteen minutes
on an idle machine, and writes results/serving/README.md from the result files: these two, the soak's and experiments.rounds'.
"""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import measure

RESULTS = measure.ROOT / "results" / "serving"
VLLM_PYTHON = measure.ROOT / ".venv-vllm" / "bin" / "python"


def main(arguments: list[str] | None = None) -> None:
    """Runs what isn't left out, then renders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only the page, from the result files")
    a = parser.parse_args(arguments)
    if not a.render:
        subprocess.run([sys.executable, "-m", "benchmarks.bench_embedded"], check=True, cwd=measure.ROOT)
        if VLLM_PYTHON.exists():
            subprocess.run([VLLM_PYTHON, "-m", "benchmarks.bench_vllm"], check=True, cwd=measure.ROOT)
        else:
            print(f"no {VLLM_PYTHON}: vLLM is left out; `make test-vllm` builds it")
    (RESULTS / "README.md").write_text(page(RESULTS), encoding="utf-8")


def page(folder: Path) -> str:
    """The Markdown page of what is there; what isn't is named with its command."""
    parts: list[tuple[str, str, str, Callable[[dict[str, Any]], str]]] = [
        *(
            (f"vLLM, on a processor {what}", name, "python -m benchmarks.bench_vllm", _table_of("benchmarks.bench_vllm"))
            for what, name in (("with bf16 arithmetic", "vllm-bf16.json"), ("without bf16 arithmetic", "vllm.json"))
        ),
        ("The embedded engine", "embedded.json", "python -m benchmarks.bench_embedded", _table_of("benchmarks.bench_embedded")),
    ]
    lines = ["# Serving, measured", "", "Rendered by `python -m benchmarks.bench_serving --render`; nothing here is typed.", ""]
    for title, name, command, table in parts:
        lines += [f"## {title}", ""]
        path = folder / name
        if path.exists():
            lines += [f"By `{command}` ([{name}]({name})).", "", table(json.loads(path.read_text(encoding="utf-8"))), ""]
        else:
            lines += [f"Not run here: `{command}`.", ""]
    others = {
        "soak-embedded.md": ("a soak through the gateway, embedded engine", "python -m benchmarks.soak"),
        "soak-vllm.md": ("the same on vLLM", "python -m benchmarks.soak --engine vllm --engine-python .venv-vllm/bin/python"),
        "vllm-memory.md": ("where vLLM's memory goes while it serves", "python -m benchmarks.vllm_memory"),
        "rounds.md": ("ten rounds of updates of one user's model", "python -m experiments.rounds"),
    }
    lines += ["## Beside these", ""]
    for name, (what, command) in others.items():
        lines.append(f"- [{what}]({name})" if (folder / name).exists() else f"- {what}: not run here, `{command}`")
    return "\n".join(lines) + "\n"


def _table_of(module: str) -> Callable[[dict[str, Any]], str]:
    return lambda found: importlib.import_module(module).table(found)


if __name__ == "__main__":
    main()
