"""What the demo says on the screen: bars on a terminal, lines in a log."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import fleet_report, report
from .data import Data
from .methods import METHODS
from .runs import Show

EVERY_S = 10
"""Seconds between two lines of progress where there is no terminal."""


class Screen:
    """Plain words for someone who has never heard of adapters."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    def say(self, text: str = "") -> None:
        """One paragraph, wrapped."""
        self.console.print(text, markup=False)

    def opening(self) -> None:
        """What will happen, while the first files are read."""
        self.say(
            "This fine-tunes MiniLM-L6, a real language model of 22.7 million weights, to tell which package of Python's "
            f"standard library a sentence of documentation is from. It does so in {len(METHODS)} ways and compares them. About "
            "three minutes on two cores; nothing is downloaded."
        )

    def data(self, data: Data) -> None:
        """The data set and one example."""
        rows, example = data.rows, min(data.split("test"), key=lambda s: (abs(len(s.text) - 70), s.text))
        self.say(
            f"\nData: {len(data.sentences):,} sentences about {', '.join(data.labels)}; these names are masked in the text. "
            f"{rows['train']:,} are for training, {rows['test']:,} for the test, from other functions and classes than those "
            f"trained on; {rows['validation']:,} served to choose learning rates beforehand and aren't used now."
        )
        self.say(f'For example: "{example.text}" -> {example.package}\n')

    @contextlib.contextmanager
    def training(self, title: str) -> Iterator[Show]:
        """A function to call with (step, steps, loss)."""
        if not self.console.is_terminal:
            yield self._lines(title)
            return
        columns = (TextColumn(f"{title:<16}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn())
        bars = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console, transient=True)
        with bars:
            task = bars.add_task(title, total=None)
            yield lambda step, steps, loss: bars.update(task, completed=step, total=steps)

    def _lines(self, title: str) -> Show:
        last = time.monotonic()

        def show(step: int, steps: int, loss: float) -> None:
            nonlocal last
            if step == steps or time.monotonic() - last > EVERY_S:
                last = time.monotonic()
                self.say(f"{title}: step {step} of {steps}, loss {loss:.2f}")

        self.say(f"{title}: starts")
        return show

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Something that takes seconds and has no steps."""
        if self.console.is_terminal:
            with self.console.status(text):
                yield
        else:
            self.say(text)
            yield

    def trained(self, title: str, accuracy: float, rows: int) -> None:
        """One method's result, as soon as it is there."""
        self.say(f"{title:<16} {100 * accuracy:.1f} % of {rows} test sentences right")

    def table(self, result: report.Result) -> None:
        """The table and how to read it."""
        self.say()
        self._print(report.COLUMNS, report.cells(result))
        for text in [*report.remarks(result), report.provenance(result)]:
            self.say(text)

    def _print(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)  # narrow: it fits 80 columns
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)

    def merged(self, merged: Mapping[str, Any], result: report.Result, file: Path) -> bool:
        """Whether the loaded adapter scores as in training and no prediction changed by merging; says so either way."""
        trained = next(row["accuracy"] for row in result["rows"] if row["name"] == "vera")
        same = abs(merged["accuracy"] - trained) * merged["rows"] < 0.5
        kept = merged["agree"] == merged["rows"]
        self.say(
            f"\nA fresh process loaded {file} ({file.stat().st_size:,} bytes): {100 * merged['accuracy']:.1f} % right, "
            f"{'as' if same else 'NOT as'} in training. Merged into the model's weights, {merged['agree']} of {merged['rows']} "
            f"predictions stayed the same; the largest difference of a logit is {merged['max_difference']:.1e}, their spread "
            f"{merged['spread']:.1f}."
        )
        return same and kept

    def fleet_opening(self, model: str) -> None:
        """What the second part does."""
        self.say(
            f"\nPart two: an adapter for everyone. A small language model ({model}) that has only read books learns how 64 "
            "packages of the standard library, torch and transformers write their documentation: one adapter for each of them, "
            "all in one run, beside one shared adapter on everybody's text. Four minutes or so.\n"
        )

    @contextlib.contextmanager
    def phases(self) -> Iterator[Callable[..., None]]:
        """A function to call with a phase, and with the steps taken and in all where it has some."""
        terminal = self.console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not terminal) as bars:
            task, now, last = bars.add_task("", total=None), "", 0.0

            def say(phase: str, step: int | None = None, steps: int | None = None) -> None:
                nonlocal now, last
                if terminal:
                    bars.update(task, description=phase, completed=step or 0, total=steps)
                elif phase != now:
                    self.say(phase)
                elif step == steps or time.monotonic() - last > EVERY_S:
                    self.say(f"{phase}: step {step} of {steps}")
                else:
                    return
                now, last = phase, time.monotonic()

            yield say

    def fleet(self, result: fleet_report.Result) -> None:
        """Tables, remarks and continuations."""
        for sheet in fleet_report.sheets(result):
            self.say(f"\n{sheet.title}")
            self._print(sheet.columns, sheet.rows)
        for text in fleet_report.remarks(result):
            self.say(text)
        told = result["continuations"]
        self.say(f'\nGoing on from "{told["prompt"]}", in one batch:')
        for who, text in told["texts"].items():
            self.say(f"  {who}: {text}")

    def served(self, command: Sequence[str], said: Mapping[str, str], unlike: Sequence[str]) -> bool:
        """What the server said, and how to start it; whether that is what the adapters had said outside of it."""
        self.say("\nThe same adapters behind the OpenAI API, the request names the adapter as its model:")
        for who, text in said.items():
            self.say(f"  {who}: {text}")
        self.say(
            f"Not what {', '.join(unlike)} said outside of the server: this is an error, please report it."
            if unlike
            else f"All {len(said)} answers are what the adapters say outside of the server. Start it yourself:\n"
        )
        print("  " + " ".join(_short(Path(w)) if os.sep in w else w for w in command), flush=True)
        return not unlike

    def fleet_missing(self, why: str) -> None:
        """The second part can't run, and why."""
        self.say(f"\nPart two, a fleet of adapters, is left out: {why}")

    def written(self, paths: list[Path]) -> None:
        """The files that --record changed."""
        self.say("Recorded: " + ", ".join(str(p) for p in paths))

    def closing(self, output: Path, model: Path, seconds: float) -> None:
        """Where everything is, and what to type next."""
        rate = {k: v for k, v in METHODS["vera"].settings.items() if k != "method"}
        flags = " ".join(f"--{k.replace('_', '-')} {v if isinstance(v, str) else format(v, 'g')}" for k, v in rate.items())
        self.say(
            f"\nDone in {seconds:.0f} s. The table is in {output / 'table.md'} and {output / 'table.png'}, the adapter in "
            f"{output / 'vera'}."
        )
        self.say("\nNow with your own data, a CSV file with the columns text and label:\n")
        # Not through rich: it would wrap what has to be copied whole.
        print(f"  vera train --model {_short(model)} --data my.csv --validation 0.1 {flags} --output my_run")
        print("  vera predict my_run new.csv --output predictions.csv", flush=True)


def _short(path: Path) -> str:
    """The path from here where that is shorter, quoted where a shell would split it."""
    try:
        near = os.path.relpath(path)
    except ValueError:  # another drive
        near = str(path)
    text = min(str(path), near, key=len)
    return f'"{text}"' if " " in text else text
