"""vera sweep: a grid of runs."""

from typing import TYPE_CHECKING

from typer import Argument, Exit, Option

from .shared import table

if TYPE_CHECKING:
    from ..training.grid import Grid


def sweep(
    grid: str = Argument(..., metavar="GRID.YAML", help="Tasks, methods, rates and seeds."),
    output: str = Option(None, help="Folder for the result files; left out: the grid's own."),
    jobs: int = Option(1, min=1, help="Runs at a time, each on its own GPU, or its share of the cores."),
    shard: str = Option("1/1", help='"3/16": the third of 16 parts, one for each job of a cluster\'s array.'),
    only: str = Option("", help='Only the runs whose "task/method" is this or, where none is, holds it: cola, "mrpc/LoRA r=1".'),
    dry_run: bool = Option(False, "--dry-run", help="List the runs that are missing."),
) -> None:
    """Run a grid; runs that have their result file aren't repeated. Then shows each method at the rate that held-out rows choose.

    Examples:

        vera sweep experiments/glue.yaml --jobs 2

        vera sweep experiments/glue.yaml --jobs 8 --shard $SLURM_ARRAY_TASK_ID/16
    """
    from ..errors import ConfigError
    from ..training.grid import read_grid
    from ..training.sweep import run_grid

    found = read_grid(grid, output)
    try:
        part, parts = (int(n) for n in shard.split("/"))
    except ValueError as e:
        raise ConfigError(f'shard is "{shard}", expected a part of how many, such as 3/16') from e
    if not 1 <= part <= parts:
        raise ConfigError(f'shard is "{shard}", expected a part from 1 to {parts}')
    if dry_run:
        for cell in found.missing(only, (part, parts)):
            print(cell.file(found.output))
        return
    failed = run_grid(found, jobs, (part, parts), only, lambda line: print(line, flush=True))
    _show(found)
    if failed:
        print("\n".join([f"{len(failed)} runs failed; started again, the grid runs them again:", *failed]))
        raise Exit(1)


def _show(grid: "Grid") -> None:
    """Each method at the rate with the best held-out score, where the runs have a test set of their own."""
    import statistics

    from ..paper.compare import chosen
    from ..training.sweep import load_results

    results, rows = load_results(grid.output), []
    for task, metric in grid.metrics.items():
        own = [r for r in results if r["task"] == task and {f"eval_{metric}", f"test_{metric}"} <= r["metrics"].keys()]
        for line in chosen(own, metric):
            held, test = (statistics.mean(by.values()) for by in (line.held_out, line.scores))
            rows.append((task, line.name, f"{line.rate} {line.value:g}", f"{held:.1f}", f"{test:.1f}", str(len(line.scores))))
    if rows:
        columns = ("task", "method", "chosen", "held-out", "test", "seeds")
        table("at the rates that held-out rows choose, × 100", columns, rows, right=columns[3:])
