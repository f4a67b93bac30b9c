"""Starts one run again and again in forked children and kills them with SIGKILL; prints kills and broken checkpoints.

The delays grow, from the first checkpoint's appearance on, so that kills fall into every part of a run.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import transformers  # noqa: F401  (imported once, before the forks)

torch.set_num_threads(1)
LATEST = 40
"""A run of 48 steps is killed no more from this one on: one that has finished can't go on."""


def main() -> None:
    from veralib.training import Settings, train
    from veralib.training.trainer import unsealed

    settings = Settings(**json.loads(sys.argv[1]))
    checkpoints = Path(settings.output) / "checkpoints"
    kills = broken = 0
    while True:
        before = {p.name for p in checkpoints.glob("checkpoint-*")}
        child = os.fork()
        if child == 0:
            train(settings)
            os._exit(0)
        deadline = None
        may_kill = kills < 8
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if deadline is None and {p.name for p in checkpoints.glob("checkpoint-*")} - before:
                deadline = time.monotonic() + 0.02 * kills
            if may_kill and deadline is not None and time.monotonic() >= deadline:
                steps = [int(p.name.partition("-")[2]) for p in checkpoints.glob("checkpoint-*")]
                if max(steps, default=LATEST) >= LATEST:  # none: they went with the end of the run
                    may_kill = False
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                broken += any(unsealed(p) is None for p in checkpoints.glob("checkpoint-*"))
                break
            time.sleep(0.001)
        else:
            break
    print(kills, broken)


if __name__ == "__main__":
    main()
