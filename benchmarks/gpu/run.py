"""Runs the scripts one after the other, each in a process of its own so that a crash costs one alone, within a time limit."""

import subprocess
import sys
import time

from . import common

# name, share of the time that is left when its turn comes
SCRIPTS = (("correctness", 0.2), ("train_step", 0.45), ("decode", 0.7), ("where", 1.0))
# Commands of their own: kernels, since most of its time is compiling; paper_step and fleet_step, for another run of ten minutes.


def main(arguments: list[str] | None = None) -> int:
    """0 if all scripts ended well."""
    given = sys.argv[1:] if arguments is None else arguments
    options = common.options(__doc__, given)
    limit = min(options.seconds, 3600.0)
    bad = []
    for name, share in SCRIPTS:
        left = limit - (time.monotonic() - options.started)
        if left < 5:
            bad.append(name)
            continue
        print(f"== {name}: {share * left:.0f} s of {left:.0f}", flush=True)
        # A script begins nothing new after 0.7 of its share; what it began may take the rest.
        command = [sys.executable, "-m", f"{__package__}.{name}", *given, "--seconds", str(0.7 * share * left)]
        try:
            done = subprocess.run(command, timeout=max(5.0, left if share == 1.0 else share * left + 20)).returncode
        except subprocess.TimeoutExpired:
            done = -1
        if done:
            bad.append(name)
    print("all done" if not bad else f"not well: {', '.join(bad)}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
