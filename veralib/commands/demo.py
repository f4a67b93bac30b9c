"""vera demo: the main job in about three minutes."""

from typer import Exit, Option


def demo(
    output: str = Option("demo_out", help="Folder for the table, the data and every run."),
    record: bool = Option(
        False, "--record", help="Also into results/demo and the README of veralib's own checkout.", hidden=True
    ),
) -> None:
    """Fine-tune a real pretrained model on real text, by five methods, in about three minutes; no download.

    Example:

        vera demo
    """
    from ..demo import main

    if code := main(output, record):
        raise Exit(code)
