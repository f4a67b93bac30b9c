"""Run by test_two_workers.py: an engine with tensor parallel 2 in a process of its own, since it starts others."""

import sys
from pathlib import Path


def main(folder: str) -> None:
    from .test_engine import ADAPTERS, world_of
    from .world import close, qwen

    world = world_of(Path(folder), qwen, fay=dict(draw=5, seed=3))
    options = dict(tensor_parallel_size=2, slots=6, enable_prefix_caching=False)
    plain = world.engine(plain=True, **options)
    want = world.base_numbers(plain, [None, None])
    close(plain)
    llm = world.engine(settings={"max_bases": 2}, **options)
    print("as without the plugin:", world.base_numbers(llm, [None, None]) == want == world.base_numbers(llm, ["ann", "bob"]))
    equal = world.check(llm, [None, *ADAPTERS, "fay"])
    world.put("large", 5, rank=64)
    try:
        world.ask(llm, [("large", [1, 2])])
    except Exception as e:
        print("refused:", e)
    equal += world.check(llm, [None, "fay"])  # the refusal left no worker out of step
    print("equal:", equal)
    close(llm)


if __name__ == "__main__":
    main(sys.argv[1])
