"""vera merge of files that name no task: the model class is the checkpoint's own where the adapter fits it, else asked for."""

import json

import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

from tests.conftest import randomise
from veralib import VeraConfig, attach
from veralib.cli import build
from veralib.errors import ConfigError
from veralib.training.predict import predict

from . import tiny


def vera(*args):
    done = CliRunner().invoke(build(), [str(a) for a in args])
    return done.exit_code, " ".join(done.output.split())


def small(kind, **more):
    common = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.AutoConfig.for_model(kind, **{**common, **more})
    return config


def t5():
    return small("t5", d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)


def clip():
    part = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = {**part, "vocab_size": 40, "max_position_embeddings": 16}
    return small("clip", text_config=text, vision_config={**part, "image_size": 8, "patch_size": 4}, projection_dim=8)


def file_of(model, path, targets, **config):
    handle = attach(model, VeraConfig(rank=4, targets=targets, **config))
    randomise(handle, "default")
    handle.save(path)
    return handle


CHECKPOINTS = {
    "a masked language model": (lambda: small("bert"), "BertForMaskedLM", ["query", "value"]),
    "question answering": (lambda: small("bert"), "BertForQuestionAnswering", ["query", "value"]),
    "a sequence-to-sequence model": (t5, "T5ForConditionalGeneration", ["q", "v"]),
    "two towers": (clip, "CLIPModel", ["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_the_checkpoints_own_class_is_merged_where_the_adapter_fits_it(what, tmp_path):
    config, name, targets = CHECKPOINTS[what]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config())
    model.save_pretrained(tmp_path / "base")
    handle = file_of(model, tmp_path / "a.safetensors", targets)
    code, out = vera("merge", tmp_path / "a.safetensors", tmp_path / "merged", "--model", tmp_path / "base")
    assert code == 0 and "100.00% of the change survived" in out, out
    merged, info = getattr(transformers, name).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and merged.config.architectures == [name]
    handle.merge("default", keep=None)
    want = handle.detach().state_dict()
    assert want.keys() == merged.state_dict().keys()
    assert all(torch.equal(merged.state_dict()[k], v) for k, v in want.items())


def test_a_trained_output_layer_gives_a_language_model_no_labels(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(small("llama", num_key_value_heads=2, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "base")
    file_of(model, tmp_path / "a.safetensors", ["q_proj"], train_modules=("lm_head",))
    code, out = vera("merge", tmp_path / "a.safetensors", tmp_path / "merged", "--model", tmp_path / "base")
    assert code == 0, out
    assert "id2label" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_checkpoint_that_names_no_class_is_a_language_model(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(small("llama", num_key_value_heads=2))
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    file_of(model, tmp_path / "a.safetensors", ["q_proj"])
    code, out = vera("merge", tmp_path / "a.safetensors", tmp_path / "merged", "--model", tmp_path / "base")
    assert code == 0 and "merged 1 layers" in out, out


@pytest.fixture
def tagger(tmp_path):
    """A checkpoint with a masked language model's head and a pooler, and an adapter of a token classifier with five labels."""
    torch.manual_seed(0)
    config = small("bert")
    base = transformers.BertForPreTraining(config)
    base.config.architectures = ["BertForMaskedLM"]
    base.save_pretrained(tmp_path / "base")
    tiny.make_tokenizer(tmp_path / "base", causal=False)
    model = transformers.BertForTokenClassification.from_pretrained(tmp_path / "base", num_labels=5)
    handle = file_of(model, tmp_path / "tags.safetensors", ["query", "value"], train_modules=("classifier",))
    ids = torch.arange(6, 14)[None]
    handle.use("default")
    with torch.no_grad():
        return tmp_path / "base", tmp_path / "tags.safetensors", ids, model.eval()(input_ids=ids).logits


def test_a_token_classifiers_class_is_asked_for_and_then_merged(tagger, tmp_path):
    base, file, ids, expected = tagger
    code, out = vera("merge", file, tmp_path / "merged", "--model", base)
    assert code == 1 and '"classifier"' in out and "--class" in out and not (tmp_path / "merged").exists(), out
    labels = "person,place,firm,date,none"
    code, out = vera(
        "merge", file, tmp_path / "merged", "--model", base, "--class", "BertForTokenClassification", "--labels", labels
    )
    assert code == 0, out
    merged = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.id2label[1] == "place" and (tmp_path / "merged" / "tokenizer.json").exists()
    code, out = vera("merge", file, tmp_path / "again", "--model", base, "--class", "AutoModelForTokenClassification")
    assert code == 0 and transformers.AutoConfig.from_pretrained(tmp_path / "again").num_labels == 5


def test_a_class_that_starts_at_random_somewhere_is_refused(tmp_path):
    torch.manual_seed(0)
    transformers.BertModel(small("bert"), add_pooling_layer=False).save_pretrained(tmp_path / "base")
    model = transformers.BertForTokenClassification.from_pretrained(tmp_path / "base", num_labels=2)
    file_of(model, tmp_path / "a.safetensors", ["query"], train_modules=("classifier",))
    for more in (("--task", "classification"), ("--class", "BertForSequenceClassification")):
        tiny.make_tokenizer(tmp_path / "base", causal=False)
        code, out = vera("merge", tmp_path / "a.safetensors", tmp_path / "merged", "--model", tmp_path / "base", *more)
        assert code == 1 and "would start at random in bert.pooler.dense" in out and "--class" in out, out
        assert not (tmp_path / "merged").exists()
    with pytest.raises(ConfigError, match=r"would start at random in bert\.pooler\.dense.*vera merge --class"):
        predict(tmp_path / "a.safetensors", [{"text": "the cat"}], model=str(tmp_path / "base"))


@pytest.mark.parametrize(
    "given, said",
    [
        (["--class", "BertForTokenClasification"], 'Did you mean "BertForTokenClassification"?'),
        (["--class", "AutoTokenizer"], 'There is no model class in transformers "AutoTokenizer"'),
        (["--class", "AutoModelForTokens"], "Did you mean"),
        (["--class", "BertForMaskedLM"], 'carries a fully trained module "classifier"'),
        (["--class", "BertForTokenClassification", "--labels", "a,b"], "classifier"),
    ],
)
def test_wrong_classes_and_labels_are_refused(given, said, tagger, tmp_path):
    base, file, *_ = tagger
    code, out = vera("merge", file, tmp_path / "merged", "--model", base, *given)
    assert code == 1 and said in out and not (tmp_path / "merged").exists(), out


def test_a_peft_folders_task_type_names_the_class(tagger, tmp_path):
    peft = pytest.importorskip("peft")
    base, _, ids, _ = tagger
    model = transformers.BertForTokenClassification.from_pretrained(base, num_labels=3)
    config = peft.VeraConfig(r=4, target_modules=["query"], task_type="TOKEN_CLS", projection_prng_key=1)
    wrapped = peft.get_peft_model(model, config).eval()
    wrapped.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
    code, out = vera("merge", tmp_path / "peft", tmp_path / "merged", "--model", base)
    assert code == 0, out
    merged = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_merged_decoder_classifies_a_batch(tmp_path):
    """A PEFT folder names its task type alone; the padding token is the tokenizer's."""
    base = tiny.make_llama(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    config = peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", projection_prng_key=1)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    code, out = vera("merge", tmp_path / "peft", tmp_path / "merged", "--model", base)
    assert code == 0, out
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.pad_token_id is not None
    assert merged(
        input_ids=torch.tensor([[5, 6, 7], [5, merged.config.pad_token_id, merged.config.pad_token_id]])
    ).logits.shape == (2, 2)


def test_a_trained_norm_of_a_language_model_asks_for_no_labels(tmp_path):
    base = tiny.make_llama(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    file_of(model, tmp_path / "norm.safetensors", ["q_proj"], train_modules=("model.norm",))
    code, out = vera("merge", tmp_path / "norm.safetensors", tmp_path / "merged", "--model", base)
    assert code == 0, out
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.architectures == ["LlamaForCausalLM"] and "x" not in config.id2label.values()


@pytest.mark.parametrize("words", [("--task", "classification"), ("--class", "DistilBertForSequenceClassification")])
def test_distilberts_first_head_layer_isnt_counted_for_its_classes(words, tmp_path):
    config = small("distilbert", dim=16, hidden_dim=24, n_layers=1, n_heads=2, num_labels=3)
    model = transformers.DistilBertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    tiny.make_tokenizer(tmp_path / "base", causal=False)
    file_of(model, tmp_path / "a.safetensors", ["q_lin"], train_modules=("pre_classifier", "classifier"))
    code, out = vera("merge", tmp_path / "a.safetensors", tmp_path / "merged", "--model", tmp_path / "base", *words)
    assert code == 0, out
    merged = transformers.DistilBertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 3 and merged.classifier.weight.shape == (3, 16)
