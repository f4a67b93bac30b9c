"""Which adapter each token of a step uses."""

from collections.abc import Sequence

from ...bank import Member
from ...model import Vera
from ...selection import BASE, Selection


class StepSelections:
    """The selections of a loop's steps."""

    def __init__(self, vera: Vera) -> None:
        self.vera = vera

    def of(self, members: Sequence[Member | None], lengths: Sequence[int]) -> Selection:
        """The selection of a step. members: the adapter of each request, None: the base; lengths: its tokens in this step."""
        kinds = set(members)
        if kinds <= {None}:
            return BASE
        if len(kinds) == 1:
            return Selection("one", members[0], device=self.vera.inside.device)
        tokens = tuple(m for m, n in zip(members, lengths, strict=True) for _ in range(n))
        return Selection("tokens", members=tokens, device=self.vera.inside.device)
