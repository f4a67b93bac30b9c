"""Images: ViT on 10 samples a class, Table 11 of the paper."""

from .rows import Fields, Recipe, Source

MODELS = {"base": "google/vit-base-patch16-224-in21k", "large": "google/vit-large-patch16-224-in21k"}
DATA: dict[str, tuple[str, Fields]] = {
    "cifar100": ("CIFAR-100", {"data": "uoft-cs/cifar100", "text": "img", "label": "fine_label", "test": "test"}),
    "food101": ("Food-101", {"data": "ethz/food101", "text": "image", "label": "label", "test": "validation"}),
    "flowers102": ("Flowers-102", {"data": "nelorth/oxford-flowers", "text": "image", "label": "label", "test": "test"}),
    "resisc45": ("RESISC45", {"data": "timm/resisc45", "text": "image", "label": "label", "test": "test"}),
}
# One value for each of DATA: the adapter's (or all weights') rate, the head's.
RATES = {
    "base": {
        "head": (None, (4e-3, 4e-3, 4e-3, 4e-2)),
        "full": ((4e-5, 4e-5, 4e-5, 8e-5), (4e-3, 4e-2, 4e-3, 4e-3)),
        "vera": ((2e-2, 4e-2, 4e-2, 7e-2), (4e-3, 4e-2, 4e-3, 5e-3)),
        "lora": ((4e-3, 4e-3, 4e-3, 4e-3), (4e-3, 4e-3, 4e-3, 4e-3)),
    },
    "large": {
        "head": (None, (4e-4, 4e-3, 4e-3, 4e-3)),
        "full": ((4e-5, 4e-5, 4e-5, 8e-5), (4e-3, 4e-3, 8e-3, 4e-3)),
        "vera": ((4e-2, 4e-2, 4e-2, 7e-2), (2e-3, 2e-3, 2e-3, 3e-3)),
        "lora": ((4e-3, 4e-3, 4e-3, 4e-3), (4e-3, 4e-3, 4e-3, 4e-4)),
    },
}
RANKS = {"vera": {"rank": 256}, "lora": {"rank": 8}}


def _recipe(data: str, size: str) -> Recipe:
    at = list(DATA).index(data)
    title, fields = DATA[data]
    methods = {
        method: {**RANKS.get(method, {}), **({"lr": rates[at]} if rates else {}), "lr_head": heads[at]}
        for method, (rates, heads) in RATES[size].items()
    }
    return Recipe(
        name=f"images-{data}-{size}",
        title=f"{title}, ViT-{size[0].upper()}, 10 samples a class",
        source="Kopiczko et al. 2024, Table 11",
        model=MODELS[size],
        data=Source(hub=fields, folder=data, local={"test": "rest" if data == "resisc45" else "test"}),
        common={
            **{"task": "images", "shots": 10, "epochs": 10, "schedule": "linear", "warmup": 0.0, "weight_decay": 0.01},
            **{"batch_size": 32, "evaluate_every": "never", "save_every": "never"},
        },
        methods=methods,
        notes=(
            "Batch size, warm-up and augmentation aren't printed: 32, none, none.",
            *(
                ("The hub's test split isn't the official one of 6,149 images; the original files' is.",)
                if data == "flowers102"
                else ()
            ),
            *(
                ("The paper's test set is all that isn't trained on, as with the original files; the hub's split is smaller.",)
                if data == "resisc45"
                else ()
            ),
        ),
    )


RECIPES = tuple(_recipe(data, size) for size in MODELS for data in DATA)
