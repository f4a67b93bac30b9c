"""python -m veralib.serving.embedded --model M --store S --port P: the embedded engine over HTTP, until SIGTERM."""

import argparse
import os
import signal
import sys
import threading
import warnings

from ...errors import VeraError, VeraWarning, need


def main(arguments: list[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT, then drains; 0. 1 where it can't start, 3 where the model's thread died."""
    asked = _parser().parse_args(arguments)
    try:
        import uvicorn

        from .app import make_app
    except ImportError as e:
        raise need(e.name or "fastapi", "serve", "the embedded engine's server") from e
    import torch

    from ...store import open_store
    from .open import open_engine

    # Every adapter's warning has a text of its own, and Python keeps each for ever.
    warnings.filterwarnings("ignore", category=VeraWarning)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    options = {
        k: v for k, v in vars(asked).items() if k not in ("model", "store", "host", "port", "served_model_name", "threads")
    }
    options |= {"name": asked.served_model_name, "device": asked.device}
    try:
        store = open_store(asked.store) if asked.store else None
        engine = open_engine(asked.model, store, **options)
    except VeraError as e:
        print(f"Error: {e}", file=sys.stderr)
        return 1
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(engine),
            host=asked.host,
            port=asked.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=30,
            timeout_keep_alive=75,  # longer than a gateway keeps an idle connection, so that it doesn't send into a closed one
        )
    )
    died = threading.Event()

    def stop() -> None:
        died.set()
        server.should_exit = True
        # What still waits for the dead thread was told so; a connection that is held open must not keep the process.
        threading.Timer(5.0, lambda: os._exit(3)).start()

    engine.on_death = stop
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn drains first and then raises it again
    print(f"serving {engine.name} on http://{asked.host}:{asked.port}", flush=True)
    try:
        if engine.alive:
            server.run()
    finally:
        if not died.is_set():
            engine.close()
    if died.is_set():
        print("Error: the thread that runs the model has died; start the engine again.", file=sys.stderr, flush=True)
        os._exit(3)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m veralib.serving.embedded", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the base model: a folder or a hub id")
    add("--store", default="", help="the store with the adapters: a folder or an fsspec URL")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--served-model-name", default=None, help="the base model's name in requests; the model's path unless told")
    add("--slots", type=int, default=256, help="adapters that stay in memory when nobody uses them")
    add("--max-rank", type=int, default=1024)
    add("--max-bases", type=int, default=8, help="different pairs A, B (seeds, kinds) in memory at once")
    add("--max-model-len", type=int, default=None, help="tokens of a prompt and its answer; the model's own length unless told")
    add("--max-requests", type=int, default=1024, help="requests that run or wait; more get a 429")
    add("--cache-tokens", dest="cache_tokens_limit", type=int, default=None, help="room for keys and values, in tokens")
    add("--max-batch-tokens", type=int, default=None, help="tokens of one step: 512 on a CPU")
    add("--max-batch-requests", type=int, default=None, help="requests of one step: 64 on a CPU")
    add("--dtype", default=None, choices=("float32", "bfloat16", "float16"))
    add("--device", default=None, help="cpu, cuda, cuda:1; the GPU where there is one")
    add("--threads", type=int, default=0, help="torch's threads")
    add("--pooling", default=None, choices=("mean", "cls"), help="encoders: how a text's embedding is made")
    add("--labels", type=int, default=None, help="encoders: load the model with a head for so many classes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
