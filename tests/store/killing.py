"""Children that put adapters until they are killed: python -m tests.store.killing KIND FOLDER TIMES. Prints what was seen."""

import os
import random
import select
import signal
import struct
import sys
import time
from dataclasses import replace

import torch

from tests.conftest import tiny_llama
from veralib import VeraConfig, attach
from veralib.store import open_store

torch.set_num_threads(1)


def filled(adapter, value: float):
    """The adapter with every entry of every vector `value`: a mixture of two would show."""
    vectors = {u: (torch.full_like(d, value), torch.full_like(b, value)) for u, (d, b) in adapter.vectors.items()}
    return replace(adapter, vectors=vectors)


def put_for_ever(kind: str, folder: str, adapter, first: int, pipe: int) -> None:
    store = open_store(folder, kind=kind)
    os.write(pipe, struct.pack("q", 0))
    value = first
    while True:
        store.put_many([("ann", filled(adapter, float(value))), ("bob", filled(adapter, float(value)))])
        os.write(pipe, struct.pack("q", value))
        value += 1


def main(kind: str, folder: str, times: int) -> None:
    adapter = attach(tiny_llama(), VeraConfig(rank=64, targets="all-linear")).adapter()
    chooser = random.Random(0)
    open_store(folder, kind=kind).close()
    acknowledged, seen, broken = 0, set(), 0
    for _ in range(times):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                put_for_ever(kind, folder, adapter, acknowledged + 1, writing)
            finally:
                os._exit(1)
        os.close(writing)
        for _ in range(chooser.randrange(4)):  # so many puts, and then somewhere in the next one: on a slow machine too
            acknowledged = max(acknowledged, struct.unpack("q", os.read(reading, 8))[0])
        time.sleep(chooser.uniform(0.0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while select.select([reading], [], [], 0)[0] and (data := os.read(reading, 8 * 4096)):
            acknowledged = max(acknowledged, struct.unpack("q", data[-8:])[0])
        os.close(reading)
        with open_store(folder) as store:
            for name in ("ann", "bob") if acknowledged else ():
                flat = torch.cat([t for pair in store.get(name).vectors.values() for t in pair])
                value = int(flat[0])
                if not (flat == flat[0]).all() or value not in (acknowledged, acknowledged + 1):
                    broken += 1
                seen.add(value)
    print(f"{times} kills, {acknowledged} puts acknowledged, {len(seen)} values seen, {broken} broken")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
