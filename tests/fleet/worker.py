"""One fleet run with the settings given as JSON; with a second argument, kills itself after that many mixed batches."""

import json
import os
import signal
import sys

import torch

torch.set_num_threads(1)

from veralib.fleet import run, standing  # noqa: E402
from veralib.fleet.settings import FleetSettings  # noqa: E402


def main() -> None:
    standing.STANDING_SECONDS = 0.0
    if len(sys.argv) > 2:
        steps = int(sys.argv[2])
        saved = standing.Standing.__call__

        def then_die(self, trainer) -> None:
            saved(self, trainer)
            if trainer.steps == steps:
                os.kill(os.getpid(), signal.SIGKILL)

        standing.Standing.__call__ = then_die
    result = run.train_fleet(FleetSettings(**json.loads(sys.argv[1])))
    print(json.dumps({"steps": result.steps, "skipped": result.skipped}))


main()
