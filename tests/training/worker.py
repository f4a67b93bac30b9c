"""One process of a distributed run: torchrun worker.py SETTINGS."""

import json
import sys

from veralib.training import Settings, train

if __name__ == "__main__":
    result = train(Settings(**json.loads(sys.argv[1])))
    print(f"finished {result.steps}\n", end="", flush=True)
