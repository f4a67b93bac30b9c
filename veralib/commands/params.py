"""vera params: what an adapter would cost, without loading a weight."""

import re

from typer import Option

from .shared import human_bytes, table


def params(
    model: str = Option(..., help="Folder, config.json or hub id; or roberta-base, roberta-large, gpt-3 (paper, Table 1)."),
    rank: int = Option(256, min=1, help="VeRA's rank."),
    targets: str = Option(
        None, help='Linears to adapt: names with commas, a regular expression, or "all-linear". Left out: query and value.'
    ),
    lora_ranks: str = Option("1,8,16", help="LoRA's ranks to compare with."),
    dtype: str = Option("float32", help="Type of the stored numbers: float32, bfloat16 or float16."),
    layers: bool = Option(False, "--layers", help="List the adapted layers too."),
) -> None:
    """Count the parameters and bytes of VeRA, LoRA and full fine-tuning for a model, exactly and without its weights.

    Examples:

        vera params --model roberta-base --rank 1024

        vera params --model path/to/model --rank 256 --targets all-linear
    """
    from ..budget import budget
    from ..config import VeraConfig
    from ..errors import ConfigError

    try:
        ranks = [int(r) for r in lora_ranks.split(",") if r.strip()]
    except ValueError as e:
        raise ConfigError(f"lora-ranks is {lora_ranks!r}, expected whole numbers with commas, such as 1,8") from e
    # As vera train reads them: anything that isn't names with commas is one regular expression.
    names = targets and targets != "all-linear" and re.fullmatch(r"[\w.:, -]+", targets)
    chosen = tuple(t.strip() for t in targets.split(",")) if names else targets
    found = budget(model, VeraConfig(rank=rank, targets=chosen), ranks, dtype)
    if layers:
        table("adapted layers", ("layer", "outputs m", "inputs n"), ((k, str(m), str(n)) for k, (m, n) in found.layers.items()))
    vera = found.rows[0]
    table(
        f"{found.model}: {len(found.layers)} adapted layers"
        + (f" of a model of {found.model_parameters:,} parameters" if found.model_parameters else ""),
        ("method", "rank", "parameters", f"bytes ({dtype})", "", "× vera"),
        (
            (
                r.method,
                str(r.rank or "–"),
                f"{r.parameters:,}",
                f"{r.bytes:,}",
                human_bytes(r.bytes),
                f"{r.parameters / vera.parameters:,.2f}",
            )
            for r in found.rows
        ),
        right=("rank", "parameters", f"bytes ({dtype})", "", "× vera"),
    )
