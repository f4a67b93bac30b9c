"""vera recipes: what vera train knows by name."""

from .shared import table


def recipes() -> None:
    """List the published recipes that `vera train NAME` runs, and the methods that each has values for.

    Example:

        vera train glue-mrpc-base --method lora --protocol honest
    """
    from ..recipes import RECIPES

    rows = [(r.name, r.title, r.source, ", ".join(r.methods)) for r in RECIPES.values()]
    table("recipes", ("name", "what", "source", "methods"), rows)
