"""Runs every benchmark, writes results/bench/*.json, renders the tables: `python -m benchmarks.bench` (make bench)."""

import argparse
import json
import os
import tempfile
from pathlib import Path

# Before torch is imported: its profiler reports each start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

from . import adapters, measure, render, train_step

THREADS = 2
MAX_LOAD = 3.0


def main(arguments: list[str] | None = None) -> int:
    """Runs what the arguments ask for; 0, or 2 for an unknown name."""
    options = _parse(arguments)
    settings = train_step.QUICK if options.quick else train_step.SETTINGS
    names = [s.name for s in settings] + ["adapters"]
    unknown = [name for name in options.only if name not in names]
    if unknown:
        print(f"there is no benchmark {', '.join(unknown)}. Known: {', '.join(names)}")
        return 2
    wanted = options.only or names
    out = options.out or (Path(tempfile.mkdtemp(prefix="veralib-bench-")) if options.quick else measure.ROOT / "results/bench")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1 if options.quick else options.threads)
    with measure.alone():
        for setting in (s for s in settings if s.name in wanted):
            _start(setting.name)
            _write(train_step.run(setting, _log, tuple(options.skip), own_process=not options.quick), out)
        if "adapters" in wanted:
            _start("adapters")
            rows = [r for r in (adapters.QUICK if options.quick else adapters.ROWS) if r.contestant.method not in options.skip]
            _write(adapters.run(rows, "tiny-llama" if options.quick else "llama", _log, own_process=not options.quick), out)
    render_tables(out, None if options.quick or options.out else measure.ROOT / "README.md")
    _log(f"results in {out}")
    return 0


def render_tables(out: Path, readme: Path | None) -> None:
    """Writes out/README.md from the result files in out, and the summary into the project's README where it has the markers."""
    found = render.load_results(out)
    order = [s.name for s in train_step.SETTINGS + train_step.QUICK] + ["adapters"]
    results = {name: found[name] for name in order if name in found}
    (out / "README.md").write_text(render.report(results))
    if readme is not None and readme.exists():
        text = readme.read_text()
        changed = render.put_between_markers(text, render.summary(results))
        if changed != text:
            readme.write_text(changed)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run this benchmark alone; repeatable")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for tests: the numbers mean nothing")
    parser.add_argument("--skip", action="append", default=[], metavar="METHOD", help="leave out veralib, peft-vera, full, …")
    parser.add_argument("--threads", type=int, default=THREADS, help="1: processor time, for a busy machine")
    parser.add_argument("--out", type=Path, help="folder for the result files; default results/bench")
    return parser.parse_args(arguments)


def _start(name: str) -> None:
    load = os.getloadavg()[0]
    busy = f" (load average {load:.1f}: other work disturbs this)" if load > MAX_LOAD else ""
    _log(f"{name}{busy}")


def _log(line: str) -> None:
    print(line, flush=True)


def _write(result: dict, out: Path) -> None:
    path = out / f"{result['run']}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
