"""The command `vera`. Here: the list of commands and how an error looks. Each command is in veralib/commands."""

import logging
import sys


def main() -> None:
    """The entry point of `vera`; exits with 1 after one red line where veralib raised an error of its own."""
    for stream in (sys.stdout, sys.stderr):  # help and tables hold characters that an ASCII terminal would choke on
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # PEFT imports bitsandbytes, which asks some CPUs' owners for a kernel that 4-bit layers here don't use (keep_unpacked).
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as e:
        sys.exit(f"Error: the command vera needs the package {e.name}: pip install 'veralib[cli]'")
    from .errors import VeraError

    try:
        app = build()
    except VeraError as e:  # a package of the extra is missing
        sys.exit(f"Error: {e}")
    app(prog_name="vera")


def build():
    """The typer application with every command in it."""
    import typer

    from .commands import chat_eval, fleet, serve
    from .commands.adapters import convert, inspect, merge
    from .commands.budget import make_budget
    from .commands.demo import demo
    from .commands.evaluate import evaluate
    from .commands.params import params
    from .commands.predict import predict
    from .commands.recipes import recipes
    from .commands.reproduce import reproduce
    from .commands.shared import fails_clearly
    from .commands.sweep import sweep
    from .commands.train import make_train

    app = typer.Typer(
        name="vera",
        help="VeRA adapters: kilobyte fine-tunes that share one frozen model.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    commands = (make_train(), predict, evaluate, merge, convert, inspect, params, sweep, make_budget(), recipes, reproduce, demo)
    for command in commands:
        app.command()(fails_clearly(command))

    app.add_typer(fleet.build(), name="fleet")
    app.add_typer(chat_eval.build(), name="chat-eval")
    app.add_typer(serve.build(), name="serve")

    @app.callback(invoke_without_command=True)
    def version(show: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
        if show:
            from . import __version__

            typer.echo(f"veralib {__version__}")
            raise typer.Exit()

    return app


if __name__ == "__main__":
    main()
