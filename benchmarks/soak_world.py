"""What a soak test knows to be true: which adapters there are, what each one's answers are, and what was live when."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from veralib import Adapter, VeraConfig, attach
from veralib.store import Store

PROMPT_TOKENS = 12
TIE = 1e-4  # nats: nearer than this, rounding decides which of two tokens is the likeliest
MISSING, BROKEN = "missing", "broken"
State = int | str
"""A revision's number, MISSING or BROKEN."""
Truth = dict[tuple, tuple[str, list[float]]]
"""(name, revision, prompt) -> the greedy text, and each token's lead over the next likeliest."""
PROMPTS = (
    "The old man looked at the sea and said that it had never been so quiet before the",
    "She opened the letter with trembling hands, for she knew the writing and feared what it",
    "When the morning came the whole village had gathered before the church to hear the",
    "It was a dark night in November when the stranger knocked at the door of the inn and",
    "There was no doubt in his mind that the money had been taken by somebody in the house",
    "My father used to say that a man who can not keep his word should never give it to",
    "The soldiers marched through the valley, and behind them the smoke of the burning town",
    "He had read the book three times, and each time he found in it something that he had",
)


@dataclass(frozen=True)
class Answer:
    """One request that ended. got: the text, or an HTTP status; a stream that the client left early is partial."""

    name: str | None
    prompt: int
    began: float
    ended: float
    got: str | int
    partial: bool = False
    said: str = ""
    """What came with a status."""


@dataclass
class Timeline:
    """When each name's state changed: between begin and end of a change both the old and the new one are right."""

    changes: dict[str, list[tuple[float, float, State]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, begin: float, end: float, state: State) -> None:
        """A change that was asked for at begin and acknowledged at end."""
        self.changes[name].append((begin, end, state))

    def now(self, name: str) -> State:
        """The last acknowledged state."""
        return self.changes[name][-1][2] if self.changes.get(name) else MISSING

    def possible(self, name: str, began: float, ended: float) -> set[State]:
        """The states that a request in that time may have met."""
        changes = [(float("-inf"), float("-inf"), MISSING), *self.changes.get(name, ())]
        met: set[State] = set()
        for begin, end, state in reversed(changes):
            if begin <= ended:
                met.add(state)
                if end < began:  # it was in force already: nothing older can be met
                    break
        return met


class World:
    """The base model, its adapters by (name, revision), and the right answers, computed without the server by vera.rows."""

    def __init__(self, folder: Path, rank: int, tokens: int) -> None:
        import transformers

        self.tokens = tokens
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.vera = attach(self.model, VeraConfig(rank=rank, targets=["q_proj", "v_proj"]), name="form")
        self.form = self.vera.adapter("form")
        self.vera.use(None)
        self.prompts = [self._cut(text) for text in PROMPTS]

    def _cut(self, text: str) -> str:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
        cut = self.tokenizer.decode(ids)
        assert self.tokenizer(cut, add_special_tokens=False)["input_ids"] == ids, f"{cut!r} isn't read as it was written"
        return cut

    def adapter(self, name: str, revision: int) -> Adapter:
        """An adapter that says something of its own, the same each time it is made."""
        draw = torch.Generator().manual_seed(random.Random(f"{name}/{revision}").getrandbits(62))
        vectors = {
            unit: (0.1 * (1 + torch.randn(d.shape, generator=draw)), 6 * torch.randn(b.shape, generator=draw))
            for unit, (d, b) in self.form.vectors.items()
        }
        return replace(self.form, vectors=vectors, notes={"revision": str(revision)})

    def fill(self, store: Store, names: Iterable[str], revision: int = 0) -> None:
        """Puts a revision of each into the store."""
        store.put_many([(name, self.adapter(name, revision)) for name in names])

    def expected(self, wanted: Sequence[tuple[str | None, State, int]], batch: int = 64) -> Truth:
        """What is right for each (name, revision, prompt)."""
        found = {}
        for start in range(0, len(wanted), batch):
            part = wanted[start : start + batch]
            loaded = {f"{n}/{r}": self.adapter(n, r) for n, r, _ in part if n is not None and isinstance(r, int)}
            for key, adapter in loaded.items():
                self.vera.load(adapter, name=key)
            rows = [None if n is None else f"{n}/{r}" for n, r, _ in part]
            inputs = self.tokenizer([self.prompts[p] for _, _, p in part], return_tensors="pt")
            with torch.inference_mode(), self.vera.rows(rows):
                made = self.model.generate(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                    max_new_tokens=self.tokens, return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
            leads = [logits.float().topk(2, dim=-1).values.diff(dim=-1).abs().squeeze(-1) for logits in made.logits]
            width = inputs["input_ids"].shape[1]
            for i, key in enumerate(part):
                text = self.tokenizer.decode(made.sequences[i, width:], skip_special_tokens=True)
                found[key] = text, [float(lead[i]) for lead in leads]
            for key in loaded:
                self.vera.remove(key)
        return found


def judge(world: World, timeline: Timeline, answers: Sequence[Answer], down: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Every answer against what was right at its time. down: when a process was killed and not yet back.

    wrong: answers that no state which could be met explains. unavailable: 5xx, or no answer, outside of these times.
    ties: texts that differ where two tokens are as likely.
    """
    possible = [timeline.possible(a.name, a.began, a.ended) if a.name is not None else {0} for a in answers]
    wanted = {
        (a.name, state, a.prompt)
        for a, states in zip(answers, possible, strict=True)
        for state in states
        if isinstance(state, int) and isinstance(a.got, str)
    }
    truth = world.expected(sorted(wanted, key=repr))
    counts: dict[str, int] = defaultdict(int)
    wrong: list[str] = []
    for answer, states in zip(answers, possible, strict=True):
        kind = _verdict(answer, states, truth, down)
        counts[kind] += 1
        if kind in ("wrong", "unavailable") and len(wrong) < 20:
            said = {
                str(s): truth[answer.name, s, answer.prompt][0]
                for s in states
                if isinstance(s, int) and isinstance(answer.got, str)
            }
            met = ", ".join(sorted(map(str, states)))
            at = f"{answer.began - answers[0].began:.1f} s, {answer.ended - answer.began:.1f} s long"
            wrong.append(
                f"{at}: {answer.name}, prompt {answer.prompt}: got {answer.got!r} {answer.said}; met: {met}; expected: {said}"
            )
    base = world.expected([(None, 0, p) for p in range(len(world.prompts))])
    own = [truth[k][0] != base[None, 0, k[2]][0] for k in truth if k[0] is not None]
    return {
        "answers": len(answers),
        **{k: counts[k] for k in ("right", "ties", "refused", "while down", "unavailable", "wrong")},
        "unlike_the_base": sum(own) / max(1, len(own)),
        "examples": wrong,
    }


def _verdict(
    answer: Answer, states: set[State], truth: dict[tuple, tuple[str, list[float]]], down: Sequence[tuple[float, float]]
) -> str:
    was_down = any(answer.began <= end and answer.ended >= begin for begin, end in down)
    if isinstance(answer.got, int):
        fits = (answer.got == 404 and MISSING in states) or (answer.got == 422 and BROKEN in states)
        if answer.got >= 500:  # no answer isn't a wrong one, but it is counted where nothing explains it
            return "while down" if was_down else "unavailable"
        return "refused" if fits else "wrong"
    tie = False
    for state in states:
        if isinstance(state, int):
            text, leads = truth[answer.name, state, answer.prompt]
            if _same(answer.got, text, answer.partial):
                return "right"
            tie |= min(leads) < TIE
    return "ties" if tie else "wrong"


def _same(got: str, expected: str, partial: bool) -> bool:
    got, expected = got.rstrip("\ufffd"), expected.rstrip("\ufffd")  # a character whose bytes were cut
    return expected.startswith(got) if partial else got == expected
