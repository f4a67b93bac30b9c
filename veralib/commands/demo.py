"""vera demo: the main job, and a fleet of adapters."""

from typer import Exit, Option


def demo(
    output: str = Option("demo_out", help="Folder for the table, the data and every run."),
    record: bool = Option(
        False, "--record", help="Also into results/demo and the README of veralib's own checkout.", hidden=True
    ),
) -> None:
    """Fine-tune a real pretrained model on real text, by five methods; then train 64 adapters in one run. No download.

    Seven minutes at most on two cores.

    Example:

        vera demo
    """
    from ..demo import main

    if code := main(output, record):
        raise Exit(code)
