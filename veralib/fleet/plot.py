"""The picture of a fleet run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import need


def draw(owners: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Each owner's held-out loss before and after, over its number of examples."""
    try:
        import matplotlib
    except ImportError as e:
        raise need("matplotlib", "cli", "plot.png (or --no-plot)") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [o for o in owners.values() if o["status"] != "diverged" and o["loss_after"] is not None]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for o in shown:
        axes.plot([o["examples"]] * 2, [o["loss_before"], o["loss_after"]], color="0.8", lw=0.8, zorder=1)
    for key, label, colour in (("loss_before", "before", "0.5"), ("loss_after", "after", "C0")):
        axes.scatter([o["examples"] for o in shown], [o[key] for o in shown], s=9, color=colour, label=label, zorder=2)
    axes.set_xscale("log")
    axes.set_xlabel("examples of the owner")
    axes.set_ylabel("loss a token, held out")
    axes.set_title(f"{len(shown)} owners")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
