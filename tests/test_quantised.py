"""bitsandbytes' 4-bit and 8-bit bases on the CPU: forward, gradients, merging, the file's checks, Trainer, TRL."""

import functools
import warnings

import pytest
import torch
from torch import nn

from tests.conftest import randomise, tiny_llama, tokens
from tests.trainers import NOT_THE_MODEL, causal_rows, logits, make_trainer, same, vectors
from veralib import AdapterMismatch, VeraConfig, VeraWarning, attach, load_adapter
from veralib.linears import keep_unpacked, read_weight

ALL = VeraConfig(rank=8, targets="all-linear")
KINDS = {
    "nf4": ("bnb-nf4", dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)),
    "fp4 twice": (
        "bnb-fp4",
        dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32),
    ),
    "int8": ("bnb-int8", dict(load_in_8bit=True)),
}
FOUR_BIT = [kind for kind in KINDS if kind != "int8"]


@functools.cache
def _fault() -> str:
    try:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu")
        layer(torch.ones(1, 64, requires_grad=True)).sum().backward()
    except Exception as e:  # whatever a build without these kernels raises
        return f"{type(e).__name__}: {e}"
    return ""


def skip_without_kernels() -> None:
    if _fault():
        pytest.skip(f"bitsandbytes' CPU kernels don't work here: {_fault()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base model, saved as full-precision weights."""
    skip_without_kernels()
    path = tmp_path_factory.mktemp("models") / "tiny-base"
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def load(folder, kind: str = "nf4"):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**KINDS[kind][1]), device_map="cpu", dtype=torch.float32
    ).eval()
    keep_unpacked(model)  # as attach does
    return model


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def stored(module) -> dict:
    """Every stored bit of a quantised weight."""
    weight = module.weight
    bits = {"data": weight.data}
    for holder in (getattr(weight, "quant_state", None), getattr(getattr(weight, "quant_state", None), "state2", None)):
        bits |= {f"{len(bits)} {k}": v for k, v in vars(holder).items() if isinstance(v, torch.Tensor)} if holder else {}
    for name in ("CB", "SCB"):
        for holder in (weight, getattr(module, "state", None)):
            if isinstance(getattr(holder, name, None), torch.Tensor):
                bits[name] = getattr(holder, name)
    return {k: v.clone() for k, v in bits.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_adds_delta_to_what_its_base_gives(folder, kind):
    model = load(folder, kind)
    vera = attach(model, ALL)
    randomise(vera, "default")
    adapter = vera.adapter()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    for name, module in linears(model).items():
        mine = x[:, : module.in_features]
        with torch.no_grad():
            vera.use(None)
            base = module(mine)
            vera.use("default")
            delta = (mine.double() @ adapter.delta(name, torch.float64).t()).float()
            assert (module(mine) - base - delta).abs().max() < 1e-5 * delta.abs().max()
    assert len(adapter.vectors) == len(linears(model)) == 14


def dense_copy(folder, model):
    """The same model in float32, its weights those of `model`, dequantised."""
    plain = tiny_llama(hidden_size=64, intermediate_size=128)
    for name, module in linears(model).items():
        plain.get_submodule(name).weight.data.copy_(read_weight(module))
    return plain


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_logits_and_gradients_equal_those_over_the_dequantised_weights(folder, kind):
    model = load(folder, kind)
    plain = dense_copy(folder, model)
    ids = tokens()
    assert (logits(model, ids) - logits(plain, ids)).abs().max() < 1e-4
    gradients = []
    for each in (model, plain):
        vera = attach(each, ALL)
        randomise(vera, "default", size=0.1)
        each.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad for p in each.parameters() if p.requires_grad]))
    assert (logits(model, ids) - logits(plain, ids)).abs().max() < 1e-4
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_a_base_that_was_used_before_has_all_its_gradients(folder, kind):
    """On CPUs with AVX512-BF16 a forward without gradient repacks the weights, and no gradient passes them: repacked here too."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    ids, gradients = tokens(), []
    for repacked in (False, True):
        model = load(folder, kind)
        for module in linears(model).values() if repacked else ():
            module.support_avx512bf16_for_cpu = True
            state = module.weight.quant_state
            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(module.weight.data, state)
        vera = attach(model, ALL)
        randomise(vera, "default", size=0.1)
        logits(model, ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad for p in model.parameters() if p.requires_grad]))
    assert (gradients[0] - gradients[1]).norm() < 2e-2 * gradients[0].norm()  # the scales were rounded to bf16


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_takes_the_base_lowers_the_loss_and_saves_the_adapter_alone(folder, kind, tmp_path):
    model = load(folder, kind)
    with pytest.raises(ValueError, match="purely quantized"):
        from transformers import Trainer

        Trainer(model)
    vera = attach(model, ALL)
    bits = {name: stored(module) for name, module in linears(model).items()}
    ids = torch.stack([row["input_ids"] for row in causal_rows()])

    @torch.no_grad()
    def loss():
        return float(model.eval()(input_ids=ids, labels=ids).loss)

    before = loss()
    make_trainer(
        model, tmp_path, optimizer=torch.optim.AdamW(vera.parameter_groups(lr=5e-2)), max_steps=20, save_strategy="steps",
        save_steps=20,
    ).train()  # fmt: skip
    assert loss() < before - 0.3
    checkpoint = tmp_path / "checkpoint-20"
    assert {f.name for f in checkpoint.rglob("*") if f.is_file()} - NOT_THE_MODEL == {"model.safetensors"}
    assert load_adapter(checkpoint).base.quantised == KINDS[kind][0]
    for name, module in linears(model).items():
        assert same(stored(module), bits[name])  # the base is frozen


@pytest.mark.parametrize("keep", ["cpu", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_requantises_with_a_report_and_unmerge_restores_every_bit(folder, kind, keep):
    model = load(folder, kind)
    ids = tokens()
    logits(model, ids)  # int8's first forward moves its statistics
    vera = attach(model, ALL)
    randomise(vera, "default", size=0.3)
    bits = {name: stored(module) for name, module in linears(model).items()}
    adapted = logits(model, ids)
    vera.use(None)
    base = logits(model, ids)
    vera.use("default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeraWarning)
        report = vera.merge(keep=keep)
    off = (logits(model, ids) - adapted).norm() / (adapted - base).norm()
    assert 0.9 < report.surviving < 1.1 and 0 < report.error < 1
    if kind != "int8":  # whose forward rounds its input too
        assert 0.3 * report.error < off < 2 * report.error  # what the report says is what the output shows
    changed = [not same(stored(module), bits[name]) for name, module in linears(model).items()]
    assert all(changed)
    vera.unmerge()
    assert all(same(stored(module), bits[name]) for name, module in linears(model).items())
    assert torch.equal(logits(model, ids), adapted)


def test_a_small_delta_drowns_in_4_bits_and_merge_says_so(folder):
    model = load(folder)
    vera = attach(model, ALL)
    randomise(vera, "default", size=0.03)
    with pytest.warns(VeraWarning, match=r"rounding errors are \d+ % of its size: the weights are bnb-nf4"):
        report = vera.merge()
    assert report.error > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_saves_as_a_quantised_one_that_transformers_loads(folder, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model = load(folder, kind)
    ids = tokens()
    before = logits(model, ids)
    vera = attach(model, ALL)
    randomise(vera, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeraWarning)
        vera.merge()
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    keep_unpacked(plain)
    assert plain.is_quantized and not any("vera" in k for k in plain.state_dict())
    assert (logits(plain, ids) - logits(model, ids)).abs().max() < 1e-5 and (logits(model, ids) - before).abs().max() > 0.01


# The file: a quantised base is checked by id and kind


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    model = load(folder)
    vera = attach(model, ALL)
    randomise(vera, "default")
    return vera.save(tmp_path_factory.mktemp("adapter"))


def test_the_same_quantised_base_loads_without_a_word(folder, trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(folder)
        vera = attach(model)
        vera.load(trained, name="a")
    assert vera.adapter("a").base.hashes == {} and vera.adapter("a").base.quantised == "bnb-nf4"
    vera.use("a")
    assert same(vectors(model, "a"), {unit: torch.cat(pair) for unit, pair in load_adapter(trained).vectors.items()})


def test_another_id_is_refused_since_quantised_weights_cannot_be_compared(folder, trained, tmp_path):
    tiny_llama(seed=1, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "tiny-other")
    vera = attach(load(tmp_path / "tiny-other"))
    with pytest.raises(
        AdapterMismatch, match=r'tiny-base", and .*tiny-other"; quantised .*checked by its id and its quantisation'
    ):
        vera.load(trained, name="a")
    assert vera.names == ()
    vera.load(trained, name="a", allow_other_base=True)


def test_another_precision_of_the_same_base_is_warned_about(folder, trained):
    with pytest.warns(VeraWarning, match="quantised as bnb-nf4, and this one is bnb-int8"):
        attach(load(folder, "int8")).load(trained)
    from transformers import AutoModelForCausalLM

    with pytest.warns(VeraWarning, match="quantised as bnb-nf4, and this one is not quantised"):
        attach(AutoModelForCausalLM.from_pretrained(folder)).load(trained)


def test_another_revision_and_a_missing_id_are_warned_about(folder, trained):
    model = load(folder)
    model.config._commit_hash = "bbbb"
    from dataclasses import replace

    adapter = load_adapter(trained)
    with pytest.warns(VeraWarning, match="trained on revision aaaa .* this is bbbb"):
        attach(model).load(replace(adapter, base=replace(adapter.base, revision="aaaa")))
    with pytest.warns(VeraWarning, match="doesn't say which model it was trained on"):
        attach(load(folder)).load(replace(adapter, base=replace(adapter.base, id="")))


def test_trl_leaves_the_vectors_in_float32(folder, tmp_path, monkeypatch):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.test_examples import EXAMPLES

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import tiny

    model = load(folder)
    vera = attach(model, ALL)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            str(tmp_path), max_steps=2, learning_rate=1e-2, use_cpu=True, bf16=False, report_to="none", save_strategy="no"
        ),
        train_dataset=Dataset.from_list(tiny.questions()[:8]),
        processing_class=tiny.tokenizer(),
    )
    trained = [p for group in vera.parameter_groups() for p in group["params"]]
    start = [p.detach().float().clone() for p in trained]
    trainer.train()
    moments = [t for state in trainer.optimizer.state.values() for t in state.values()]
    assert {p.dtype for p in trained} | {t.dtype for t in moments} == {torch.float32}
    assert sum(float((p.detach() - s).norm()) for p, s in zip(trained, start, strict=True)) > 0
