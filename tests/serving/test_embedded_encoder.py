"""Encoders: embeddings and classes, each row with its own adapter and head, beside merged models one by one."""

import base64
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.conftest import randomise, tiny_bert
from tests.serving.serving import call, served
from veralib import VeraConfig, attach
from veralib.serving.embedded import BadAdapter, BadRequest
from veralib.serving.embedded.app import make_app
from veralib.serving.embedded.encoder import EncoderEngine, sentence_transformers_settings
from veralib.serving.embedded.open import open_engine
from veralib.store import open_store

NAMES = ("a", "b", "c")
TEXTS = ["abc", "k", "the longest of all"]


class Letters:
    """A tokenizer of 64 tokens, one letter each."""

    pad_token_id, model_max_length = 0, 64

    def encode(self, text, add_special_tokens=True):
        return [3 + ord(c) % 60 for c in text]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(engine, address, {name or None: (embeddings of TEXTS, probabilities)} by merged models)."""
    store = open_store(tmp_path_factory.mktemp("store"))
    model = tiny_bert()
    vera, adapters = attach(model), {}
    for seed, name in enumerate(NAMES):
        heads = ["classifier"] if name != "c" else []
        vera.add(VeraConfig(rank=3 + seed, seed=seed % 2, targets=["query", "value"], train_modules=heads), name)
        randomise(vera, name, seed, 0.8)
        for head in heads:
            with torch.no_grad():
                for p in vera.inside.head(head, vera.member(name)).parameters():
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        adapters[name] = vera.adapter(name)
        store.put(name, adapters[name])
    vera.detach()
    expected = {}
    for name in (None, *NAMES):
        vera = attach(tiny_bert())
        if name:
            vera.load(adapters[name], name)
            vera.use(name)
        rows = []
        with torch.no_grad():
            for text in TEXTS:  # one by one: no padding, no mask
                out = vera.model(torch.tensor([Letters().encode(text)]), output_hidden_states=True)
                pooled = out.hidden_states[-1][0].mean(0)
                rows.append((pooled / pooled.norm(), out.logits[0].softmax(-1)))
        expected[name] = rows
        vera.detach()
    with EncoderEngine(model, store, tokenizer=Letters(), name="bert", slots=2) as engine, served(make_app(engine)) as url:
        yield engine, url, expected


def test_rows_of_one_batch_equal_single_models(place):
    engine, _, expected = place
    gate = threading.Event()
    engine.between_steps(gate.wait)  # all of them wait, and then are one batch
    before, texts = engine.steps, [engine.encode(t) for t in TEXTS]
    answers = {name: engine.submit(texts, name) for name in (None,)}
    with ThreadPoolExecutor(3) as threads:
        waiting = {name: threads.submit(engine.submit, texts, name) for name in NAMES}
        time.sleep(0.2)
        gate.set()
        answers |= {name: w.result() for name, w in waiting.items()}
    compared = 0
    for name, futures in answers.items():
        for future, (embedding, probabilities) in zip(futures, expected[name], strict=True):
            said = future.result()
            torch.testing.assert_close(said.embedding, embedding, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(said.logits.softmax(-1), probabilities, atol=1e-5, rtol=1e-5)
            compared += 1
    assert compared == 12 and engine.steps - before <= 4
    assert (expected["a"][0][0] - expected[None][0][0]).abs().max() > 0.01
    assert (expected["a"][0][1] - expected["b"][0][1]).abs().max() > 0.01


def test_embeddings_over_http(place):
    import openai

    engine, url, expected = place
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    for name in (None, "c"):  # the client asks for base64 and decodes it
        answer = client.embeddings.create(model=name or "bert", input=TEXTS)
        made = torch.tensor([d.embedding for d in answer.data])
        torch.testing.assert_close(made, torch.stack([e for e, _ in expected[name]]), atol=1e-5, rtol=1e-5)
        assert answer.usage.prompt_tokens == sum(map(len, TEXTS)) and [d.index for d in answer.data] == [0, 1, 2]
    status, answer = call(url + "/v1/embeddings", {"model": "a", "input": engine.encode(TEXTS[0]), "encoding_format": "base64"})
    raw = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert status == 200 and np.allclose(raw, expected["a"][0][0], atol=1e-5)


def test_classes_over_http(place):
    _, url, expected = place
    status, answer = call(url + "/classify", {"model": "b", "input": TEXTS})
    assert status == 200 and [d["num_classes"] for d in answer["data"]] == [3, 3, 3]
    for said, (_, probabilities) in zip(answer["data"], expected["b"], strict=True):
        assert said["probs"] == pytest.approx(probabilities.tolist(), abs=1e-5)
        assert said["label"] == f"LABEL_{int(probabilities.argmax())}"


@pytest.mark.parametrize(
    "route,change,status",
    [
        ("/v1/embeddings", {"model": "nobody"}, 404),
        ("/v1/embeddings", {"input": []}, 400),
        ("/v1/embeddings", {"input": "x" * 100}, 400),
        ("/v1/embeddings", {"input": [64]}, 400),
        ("/v1/embeddings", {"input": 3}, 400),
        ("/v1/embeddings", {"dimensions": 7}, 400),
        ("/v1/embeddings", {"encoding_format": "hex"}, 400),
        ("/classify", {"input": None}, 400),
        ("/classify", {"model": "a/b"}, 404),
        ("/v1/completions", {"prompt": "x"}, 404),
    ],
)
def test_bad_requests_are_refused(place, route, change, status):
    got, answer = call(place[1] + route, {"model": "bert", "input": "abc", **change})
    assert got == status and answer["error"]["message"]


def test_a_bad_adapter_spoils_its_own_rows_alone(place):
    engine, url, expected = place
    vera = attach(tiny_bert())
    vera.add(VeraConfig(rank=2, targets=["value"]), "huge")
    with torch.no_grad():
        for unit in vera.member("huge").layout.units:
            for v in vera.member("huge").vectors(unit.unit):
                v.fill_(1e30)
    engine.residents.store.put("huge", vera.adapter("huge"))
    with ThreadPoolExecutor(8) as threads:
        names = ["huge", "a"] * 4
        answers = list(threads.map(lambda n: call(url + "/v1/embeddings", {"model": n, "input": TEXTS[0]}), names))
    assert [a[0] for a in answers] == [422, 200] * 4 and "overflowed" in answers[0][1]["error"]["message"]
    for _, answer in answers[1::2]:
        assert answer["data"][0]["embedding"] == pytest.approx(expected["a"][0][0].tolist(), abs=1e-5)


def test_a_head_of_other_classes_and_no_head(tmp_path):
    """Labels are those of the base's head; without one there is nothing to classify with."""
    store = open_store(tmp_path)
    vera = attach(tiny_bert(labels=5))
    vera.add(VeraConfig(rank=2, targets=["query"], train_modules=["classifier"]), "five")
    store.put("five", vera.adapter("five"))
    with EncoderEngine(tiny_bert(), store, tokenizer=Letters()) as engine:
        with pytest.raises(BadAdapter, match="number of labels"):
            engine.classify(["abc"], "five")
        assert len(engine.classify(["abc"])[0]) == 3
    with (
        EncoderEngine(tiny_bert().bert, None, tokenizer=Letters()) as engine,
        pytest.raises(BadRequest, match="no classification"),
    ):
        engine.classify(["abc"])


def test_an_adapter_without_a_head_has_no_classes_where_the_base_has_none(tmp_path):
    """The bare encoder, loaded with --labels: its head is random."""
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    store = open_store(tmp_path / "store")
    vera = attach(tiny_bert())
    for name, heads in (("with", ["classifier"]), ("without", [])):
        vera.add(VeraConfig(rank=2, targets=["query"], train_modules=heads), name)
        store.put(name, vera.adapter(name))
    with EncoderEngine(str(tmp_path / "base"), store, tokenizer=Letters(), labels=3, device="cpu") as engine:
        assert len(engine.classify(["abc"], "with")[0]) == 3
        assert len(engine.embed(["abc"], "without")[0]) == 32
        with pytest.raises(BadAdapter, match='"without" brings no classification head'):
            engine.classify(["abc"], "without")
        with served(make_app(engine)) as url:
            status, answer = call(url + "/classify", {"model": "without", "input": "abc"})
            assert (status, answer["error"]["code"]) == (422, "bad_adapter")
            assert call(url + "/classify", {"model": "with", "input": "abc"})[0] == 200
        assert all(not entry.pins for entry in engine.residents.entries.values()) and not engine.load


GPT2 = dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
LLAMA = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)


@pytest.mark.parametrize("kind, shape", [("GPT2", GPT2), ("Llama", LLAMA)])
@pytest.mark.parametrize("pads", [(None, None), (2, None), (2, 0), (None, 0), (-1, None)])
def test_a_decoder_classifies_a_text_alike_alone_and_beside_a_longer_one(kind, shape, pads):
    """pads: the config's and the tokenizer's."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=64, num_labels=3, pad_token_id=pads[0], **shape)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    tokenizer = Letters()
    tokenizer.pad_token_id = pads[1]
    with EncoderEngine(model, None, tokenizer=tokenizer) as engine:
        texts = [engine.encode(t) for t in TEXTS]
        alone = [engine.submit([t])[0].result().logits for t in texts]
        gate = threading.Event()
        engine.between_steps(gate.wait)
        together = engine.submit(texts)
        gate.set()
        for one, answer in zip(alone, together, strict=True):
            torch.testing.assert_close(answer.result().logits, one, atol=1e-5, rtol=1e-5)
        assert (alone[0] - alone[2]).abs().max() > 1e-3
    assert model.config.pad_token_id == pads[0]


def test_pooling_as_sentence_transformers_wrote_it(tmp_path):
    assert sentence_transformers_settings(str(tmp_path)) == ("mean", True)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert sentence_transformers_settings(str(tmp_path)) == ("cls", False)
    kinds = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Normalize"}]
    (tmp_path / "modules.json").write_text(json.dumps(kinds))
    assert sentence_transformers_settings(str(tmp_path)) == ("cls", True)


def test_minilm_puts_like_beside_like(data):
    with open_engine(str(data / "minilm_l6_fp16"), name="minilm") as engine:
        one, two, other = engine.embed(["A cat sits on the mat.", "There is a cat on a rug.", "Interest rates rose by a point."])
        assert np.dot(one, one) == pytest.approx(1, abs=1e-4) and np.dot(one, two) > 0.5 > np.dot(one, other) + 0.2
        with pytest.raises(BadRequest, match="no classification head"):
            engine.classify(["x"])
    with open_engine(str(data / "minilm_l6_fp16"), labels=4) as engine, pytest.raises(BadRequest, match="never trained"):
        engine.classify(["x"])
