"""GLUE: VeRA's rows from Table 8 of the paper, LoRA's from Table 9 of Hu et al. (2022), whose optimiser VeRA took over."""

from .rows import Fields, Recipe, Source

TASKS = ("sst2", "mrpc", "cola", "qnli", "rte", "stsb")
TITLES = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "qnli": "QNLI", "rte": "RTE", "stsb": "STS-B"}
MODELS = {"base": "FacebookAI/roberta-base", "large": "FacebookAI/roberta-large"}
# One value for each of TASKS.
VERA = {
    "base": {
        "epochs": (60, 30, 80, 25, 160, 80),
        "lr_head": (4e-3, 4e-3, 1e-2, 4e-3, 1e-2, 1e-2),
        "lr": (4e-3, 1e-2, 1e-2, 1e-2, 4e-3, 1e-2),
    },
    "large": {
        "epochs": (10, 40, 40, 20, 40, 20),
        "lr_head": (6e-3, 3e-3, 6e-3, 2e-4, 2e-3, 2e-3),
        "lr": (1e-2, 3e-2, 1e-2, 1e-2, 2e-2, 2e-2),
    },
}
# Large: their row with Houlsby et al.'s set-up, whose scores the VeRA paper quotes.
LORA = {
    "base": {
        "batch_size": (16, 16, 32, 32, 32, 16),
        "epochs": (60, 30, 80, 25, 80, 40),
        "lr": (5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 4e-4),
    },
    "large": {
        "batch_size": (4, 4, 4, 4, 4, 4),
        "epochs": (10, 20, 20, 10, 20, 10),
        "lr": (4e-4, 3e-4, 2e-4, 2e-4, 4e-4, 2e-4),
    },
}
SIZES = {
    "base": ({"max_length": 512, "batch_size": 64}, 1024, 8, 1),
    "large": ({"max_length": 128, "batch_size": 32}, 256, 16, 4),
}
"""Common settings, VeRA's rank, LoRA's α, GPUs."""
TEXT = {
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "cola": ("sentence",),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}
# The original files' columns, where they aren't called as on the hub.
FILES: dict[str, Fields] = {
    "mrpc": {"text": ("#1 String", "#2 String"), "label": "Quality"},
    "cola": {"columns": ("source", "label", "mark", "sentence")},
    "stsb": {"label": "score"},
}
METRIC = {"cola": "matthews", "stsb": "pearson"}


def _recipe(task: str, size: str) -> Recipe:
    at = TASKS.index(task)
    common, rank, alpha, processes = SIZES[size]
    fields: Fields = {"text": TEXT[task], "label": "label"}
    vera = {k: v[at] for k, v in VERA[size].items()}
    lora = {k: v[at] for k, v in LORA[size].items()}
    return Recipe(
        name=f"glue-{task}-{size}",
        title=f"GLUE {TITLES[task]}, RoBERTa {size}",
        source="Kopiczko et al. 2024, Table 8; LoRA: Hu et al. 2022, Table 9",
        model=MODELS[size],
        data=Source(
            hub={**fields, "data": "nyu-mll/glue", "data_config": task},
            folder=f"glue/{TITLES[task]}",
            local={**fields, **FILES.get(task, {})},
            dev=("validation", "dev"),
        ),
        common={
            "task": "regression" if task == "stsb" else "classification",
            "metric": METRIC.get(task, "accuracy"),
            "schedule": "linear",
            "warmup": 0.06,
            "epochs": vera["epochs"],
            **common,
        },
        methods={
            "vera": {"rank": rank, **vera},
            # Appendix B: the head alone, at VeRA's own settings.
            "head": {k: v for k, v in vera.items() if k != "lr"},
            "lora": {"rank": 8, "options": {"lora_alpha": alpha}, **lora, "lr_head": lora["lr"], "processes": 1},
        },
        processes=processes,
        like={"lora_fa": "lora", "dvora": "vera"},
        notes=(
            "Weight decay and dropout aren't printed: 0 and the model's own.",
            "VeRA and head have Table 8's epochs, LoRA its own; the others', which the paper doesn't print, are Table 8's too.",
        ),
    )


RECIPES = tuple(_recipe(task, size) for size in MODELS for task in TASKS)
