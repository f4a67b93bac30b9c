"""The counts of the paper, cell by cell; where a cell is misprinted, ours is right and the misprint is named."""

import pytest

from tests.conftest import tiny_bert, tiny_gpt2
from veralib.budget import (
    Budget,
    basis_parameters,
    budget,
    lora_parameters,
    table_1_shapes,
    vera_parameters,
    weight_parameters,
)
from veralib.config import VeraConfig
from veralib.errors import ConfigError

# Table 1: model, rank, LoRA as printed (parameters, bytes), VeRA as printed (parameters, bytes).
TABLE_1 = [
    ("roberta-base", 1, ("36.8K", "144KB"), ("18.4K", "72KB")),
    ("roberta-base", 16, ("589.8K", "2MB"), ("18.8K", "74KB")),
    ("roberta-base", 256, ("9437.1K", "36MB"), ("24.5K", "96KB")),
    ("roberta-large", 1, ("98.3K", "384KB"), ("49.2K", "192KB")),
    ("roberta-large", 16, ("1572.8K", "6MB"), ("49.5K", "195KB")),
    ("roberta-large", 256, ("25165.8K", "96MB"), ("61.4K", "240KB")),
    ("gpt-3", 1, ("4.7M", "18MB"), ("2.4M", "9.1MB")),
    ("gpt-3", 16, ("75.5M", "288MB"), ("2.8M", "10.5MB")),
    ("gpt-3", 256, ("1207.9M", "4.6GB"), ("8.7M", "33MB")),
]
# The cells of Table 1 that don't follow from its own formula: (model, rank, method, which number) -> why.
MISPRINTS = {
    ("roberta-large", 16, "vera", "parameters"): "24·2·(1024 + 16) = 49,920; the 195 KB beside it are right",
    ("gpt-3", 256, "lora", "bytes"): "4.5 GiB; 4.6 mixes units",
    ("gpt-3", 1, "vera", "bytes"): "9.00 MiB; the printed one counts A and B",
    ("gpt-3", 16, "vera", "parameters"): "2,362,368; the printed one counts A and B",
    ("gpt-3", 16, "vera", "bytes"): "9.01 MiB; the printed one counts A and B",
    ("gpt-3", 256, "vera", "parameters"): "2,408,448; the printed one counts A and B",
    ("gpt-3", 256, "vera", "bytes"): "9.19 MiB; the printed one counts A and B",
}


def follows(count: int, printed: str) -> bool:
    """Whether a count, rounded or cut to the printed digits, is what is printed; K is 1000 of parameters, 1024 of bytes."""
    base = 1024 if printed.endswith("B") else 1000
    digits, unit = printed.rstrip("B")[:-1], printed.rstrip("B")[-1]
    value, places = count / base ** " KMG".index(unit), len(digits.partition(".")[2])
    return float(digits) in (round(value, places), int(value * 10**places) / 10**places)


def test_table_1_cell_by_cell():
    cells, wrong = 0, set()
    for model, rank, lora, vera in TABLE_1:
        shapes = table_1_shapes(model)
        for method, count, printed in (
            ("lora", lora_parameters(shapes, rank), lora),
            ("vera", vera_parameters(shapes, rank), vera),
        ):
            for what, number, text in (("parameters", count, printed[0]), ("bytes", 4 * count, printed[1])):
                cells += 1
                if not follows(number, text):
                    wrong.add((model, rank, method, what))
    assert cells == 36
    assert wrong == set(MISPRINTS)


def test_the_gpt_3_misprints_are_the_counts_with_A_and_B():
    shapes = table_1_shapes("gpt-3")
    for rank, printed in ((16, 2.8e6), (256, 8.7e6)):
        # L·d + 2·d·r: b of every layer, and the shared matrices instead of d.
        b_and_basis = vera_parameters(shapes, 0) + basis_parameters(shapes, rank)
        assert b_and_basis == pytest.approx(printed, rel=0.02)


def square(layers: int, width: int) -> list[tuple[int, int]]:
    return [(width, width)] * layers


def llama(blocks: int, width: int, mlp: int) -> list[tuple[int, int]]:
    return [s for _ in range(blocks) for s in [(width, width)] * 4 + [(mlp, width)] * 2 + [(width, mlp)]]


@pytest.mark.parametrize(
    ("what", "count", "printed"),
    [
        ("RoBERTa base, r 1024", vera_parameters(square(24, 768), 1024), 43_008),
        ("RoBERTa large, r 256", vera_parameters(square(48, 1024), 256), 61_440),
        ("ViT base, r 256", vera_parameters(square(24, 768), 256), 24_576),
        ("GPT-2 medium, r 1024", vera_parameters(square(48, 1024), 1024), 98_304),
        ("GPT-2 large, r 1024, q and v apart", vera_parameters(square(72, 1280), 1024), 165_888),
        ("Llama 7B, r 1024", vera_parameters(llama(32, 4096, 11008), 1024), 1_589_248),
        ("Llama 13B, r 1024", vera_parameters(llama(40, 5120, 13824), 1024), 2_416_640),
        ("Llama 7B, r 256 (T13)", vera_parameters(llama(32, 4096, 11008), 256), 1_417_216),
        ("LoRA r 64, Llama 7B", lora_parameters(llama(32, 4096, 11008), 64), 159_907_840),
        ("LoRA r 64, Llama 13B", lora_parameters(llama(40, 5120, 13824), 64), 250_347_520),
        ("LoRA r 8, RoBERTa base", lora_parameters(square(24, 768), 8), 294_912),
        ("LoRA r 8, RoBERTa large", lora_parameters(square(48, 1024), 8), 786_432),
    ],
)
def test_the_papers_other_counts(what, count, printed):
    assert count == printed, what


def test_counts_equal_a_live_models(tmp_path):
    from veralib import attach

    for i, (make, targets) in enumerate(
        [(tiny_bert, None), (tiny_bert, "all-linear"), (tiny_gpt2, None), (tiny_gpt2, ("c_fc",))]
    ):
        model = make()
        folder = tmp_path / str(i)
        model.save_pretrained(folder)
        config = VeraConfig(rank=5, targets=targets)
        counted = budget(str(folder), config)
        live = attach(make(), config)
        assert counted.rows[0].parameters == live.trainable_parameters()[0]
        assert counted.model_parameters == sum(p.numel() for p in model.parameters())


def test_lora_count_equals_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["query", "value"]))
    counted = budget(str(tmp_path), VeraConfig(rank=4), lora_ranks=(3,))
    assert counted.rows[1].parameters == sum(p.numel() for n, p in wrapped.named_parameters() if "lora_" in n) > 0


def test_weights_are_never_read(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert budget(str(tmp_path)).rows[0].parameters > 0


def test_table_1_models_need_no_config():
    found = budget("roberta-base", VeraConfig(rank=256))
    assert isinstance(found, Budget) and found.rows[0].parameters == 24_576 and found.rows[0].bytes == 96 * 1024
    assert found.rows[-1].parameters == weight_parameters(table_1_shapes("roberta-base"))


@pytest.mark.parametrize("train", ["both", "d", "b"])
def test_what_doesnt_train_is_stored_and_not_counted(tmp_path, train):
    from veralib import attach

    config = VeraConfig(rank=16, train=train)
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    vera = attach(model, config)
    row = budget(str(tmp_path), config).rows[0]
    assert row.parameters == vera.trainable_parameters()[0] > 0
    assert row.bytes == 4 * vera.adapter().parameters


def test_a_name_of_table_1_is_no_shortcut_past_chosen_layers(monkeypatch):
    monkeypatch.setattr("veralib.budget.meta_model", lambda name: tiny_bert())
    assert len(budget("roberta-base", VeraConfig(rank=16, layers=[1])).layers) == 2


def test_faults_name_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="no model folder"):
        budget(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="dtype"):
        budget("roberta-base", dtype="int3")
