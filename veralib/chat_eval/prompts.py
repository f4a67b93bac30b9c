"""What the judge is asked: the project's own wording, or a judge_prompts.jsonl in FastChat's form.

A prompt is chosen by what it shows: one answer or two models' answers, one turn or two, with or without a reference answer. Its
output_format says what is looked for in the judgement: [[rating]], [[rating_a,rating_b]] or [[A]] (or [[B]], or [[C]] for a tie).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..training.rows import read_rows

REFERENCE_GUIDED = ("math", "reasoning", "coding")
FORMATS = ("[[rating]]", "[[rating_a,rating_b]]", "[[A]]")
Kind = tuple[bool, bool, bool]
"""(two models, two turns, with a reference)"""


@dataclass(frozen=True)
class JudgePrompt:
    """One prompt of the judge's."""

    name: str
    system: str
    template: str
    format: str

    def messages(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """The conversation that the judge gets. DataError where the template asks for something unknown."""
        try:
            text = self.template.format(**values)
        except (KeyError, IndexError, ValueError) as e:
            raise DataError(
                f'the judge prompt "{self.name}" can\'t be filled in ({type(e).__name__}: {e}). It may name '
                f"{', '.join('{' + v + '}' for v in values)}; any other brace is doubled."
            ) from e
        return [*([{"role": "system", "content": self.system}] if self.system else []), {"role": "user", "content": text}]


def built_in() -> dict[Kind, JudgePrompt]:
    """The project's own prompts, one of each kind."""
    return {kind: _own(*kind) for kind in ((a, b, c) for a in (False, True) for b in (False, True) for c in (False, True))}


def read_prompts(path: str | Path) -> dict[Kind, JudgePrompt]:
    """The prompts of a judge_prompts.jsonl. DataError names the row where a field is missing, or two are of one kind."""
    found: dict[Kind, JudgePrompt] = {}
    for number, row in enumerate(read_rows(path), 1):
        at = f"row {number} of {path}"
        texts = {k: row.get(k) for k in ("name", "prompt_template", "output_format")}
        if not all(isinstance(t, str) and t for t in texts.values()):
            raise DataError(f"{at} has {', '.join(map(str, row))}; expected texts as name, prompt_template and output_format")
        template = str(texts["prompt_template"])
        if texts["output_format"] not in FORMATS:
            raise DataError(f'{at} has output_format "{texts["output_format"]}", expected one of {", ".join(FORMATS)}')
        named = set(re.findall(r"{(\w+)}", template))
        kind = (texts["output_format"] != "[[rating]]", "question_2" in named, bool({"ref_answer_1", "ref_answer_2"} & named))
        if kind in found:
            raise DataError(
                f'{at}, "{texts["name"]}", is for the same as "{found[kind].name}" ({describe(kind)}): keep one of them'
            )
        found[kind] = JudgePrompt(str(texts["name"]), str(row.get("system_prompt") or ""), template, str(texts["output_format"]))
    return found


def describe(kind: Kind) -> str:
    """A kind in words."""
    pair, turns, reference = kind
    parts = ("two models" if pair else "one model", "two turns" if turns else "one turn")
    return f"{', '.join(parts)}, {'with' if reference else 'without'} a reference"


def find(prompts: Mapping[Kind, JudgePrompt], kind: Kind) -> JudgePrompt:
    """The prompt of a kind; DataError where there is none."""
    if kind not in prompts:
        raise DataError(
            f"the judge prompts have none for {describe(kind)}. There: {', '.join(p.name for p in prompts.values())}."
        )
    return prompts[kind]


class Unclear(Exception):
    """A judgement that holds no rating; the text says why."""


def rating(format: str, text: str) -> Any:
    """What a judgement says: a number, a pair of numbers, or "A", "B", "tie". The first that stands there, as in FastChat.

    Unclear where none does, or a number isn't from 1 to 10.
    """
    if format == "[[A]]":
        found = re.search(r"\[\[([ABC])\]\]", text)
        if not found:
            raise Unclear(f"no verdict in double square brackets in {text[:80]!r}")
        return {"C": "tie"}.get(found[1], found[1])
    number = r"\s*(\d+(?:\.\d+)?)\s*"
    found = re.search(rf"\[\[{number}\]\]" if format == "[[rating]]" else rf"\[\[{number},{number}\]\]", text)
    if not found:
        raise Unclear(f"no rating in double square brackets in {text[:80]!r}")
    values = [float(v) for v in found.groups()]
    if not all(1 <= v <= 10 for v in values):
        raise Unclear(f"the rating {found[0]} isn't from 1 to 10")
    return values[0] if format == "[[rating]]" else values


def _own(pair: bool, turns: bool, reference: bool) -> JudgePrompt:
    what = "the answers of two assistants, A and B," if pair else "an assistant's answer"
    shown = (
        "a conversation of two turns. Grade the second answer; the first turn is there to be understood"
        if turns
        else "a question"
    )
    task = [
        f"You will read {shown}, and {what}{' to both turns' if turns else ''}.",
        "Weigh whether what it says is right, whether it does what was asked, and whether it helps the person who asked. "
        "Length alone, a confident tone and the order in which things are shown count for nothing.",
    ]
    if reference:
        task.append(
            "A reference answer is given and may be trusted: compare with it first, and name every mistake that you find."
        )
    if pair:
        task.append(
            "Explain in a few sentences what sets the two apart. Then give each a grade from 1 (useless) to 10 (nothing to "
            "improve), A's first, as two numbers in double square brackets, for example: Grades: [[4,7]]"
        )
    else:
        task.append(
            "Explain your view in a few sentences. Then give a grade from 1 (useless) to 10 (nothing to improve) as a number in "
            "double square brackets, for example: Grade: [[5]]"
        )
    parts: list[tuple[str, str]] = []
    for turn in ("1", "2") if turns else ("",):
        of = f", turn {turn}" if turn else ""
        parts.append((f"Question{of}", f"{{question_{turn}}}" if turn else "{question}"))
        if reference:
            parts.append((f"Reference answer{of}", f"{{ref_answer_{turn or 1}}}"))
        for name, slot in (("A", "answer_a"), ("B", "answer_b")) if pair else (("", "answer"),):
            who = f"Answer of assistant {name}" if name else "The assistant's answer"
            parts.append((who + of, f"{{{slot}_{turn}}}" if turn else f"{{{slot}}}"))
    text = "\n\n".join([*task, *(f"--- {title} ---\n{slot}\n--- end ---" for title, slot in parts)])
    name = "-".join(["vera", "pair" if pair else "single", *(["turns"] if turns else []), *(["reference"] if reference else [])])
    return JudgePrompt(name, "You grade the answers of chat assistants.", text, FORMATS[1] if pair else FORMATS[0])
