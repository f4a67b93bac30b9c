"""The demo's server: what it says is what the same adapters say outside of it, and a server that doesn't come up is an error."""

import pytest
import torch

from benchmarks import measure
from benchmarks.soak_world import World
from veralib.demo import serve
from veralib.errors import StateError
from veralib.store import open_store

pytest.importorskip("fastapi")
MODEL = measure.ROOT / "models" / "books-4m"


@pytest.mark.slow
def test_the_server_says_what_the_adapters_say_outside(tmp_path):
    world = World(MODEL, 16, 8)
    names = ["torch.nn", "email"]
    with open_store(tmp_path / "store", "packed") as store:
        world.fill(store, names)
    prompt = "Return the"
    ids = world.tokenizer([prompt] * 3, return_tensors="pt")
    for name in names:
        world.vera.load(world.adapter(name, 0), name=name)
    with torch.inference_mode(), world.vera.rows([None, *names]):
        out = world.model.generate(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=8, do_sample=False
        )
    texts = world.tokenizer.batch_decode(out, skip_special_tokens=True)
    expected = {who: " ".join(text.split()) for who, text in zip([MODEL.name, *names], texts, strict=True)}
    assert len(set(expected.values())) == 3
    with serve.running(MODEL, tmp_path / "store") as api:
        said = serve.ask(api, list(expected), prompt, 8)
        with pytest.raises(StateError, match=r'404 for "nobody"'):
            serve.ask(api, ["nobody"], prompt, 8)
    assert said == expected and serve.unlike(said, expected) == []
    assert serve.unlike({**said, "email": "else"}, expected) == ["email"]


def test_a_server_that_ends_shows_what_it_wrote(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text("nonsense")
    with pytest.raises(StateError, match=r"didn't come up[\s\S]*can't be read"), serve.running(MODEL, tmp_path / "store"):
        pass
