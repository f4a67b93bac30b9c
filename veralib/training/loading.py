"""The base model and its tokenizer or image processor for one run, and which of its modules are the head."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, VeraError, need
from ..linears import keep_unpacked
from .settings import WITH_HEAD, Settings


@dataclass(frozen=True)
class Base:
    """A loaded base model. head: modules trained in full, a classification head and whatever the checkpoint lacks."""

    model: Any
    tokenizer: Any
    """None where it reads images."""
    head: tuple[str, ...]
    max_length: int
    processor: Any = None
    """transformers' image processor where it reads images."""
    new: tuple[str, ...] = ()
    """Modules that start at random: the checkpoint has no weights for them, or of another size."""


def load_base(settings: Settings, labels: Sequence[str] = ()) -> Base:
    """The model and tokenizer (image processor) that a run's settings name; a new head starts from the seed that was set before.

    Errors: ConfigError where the model can't be loaded, with the hub's or transformers' reason.
    """
    import torch
    import transformers

    classifies, images = settings.task in WITH_HEAD, settings.task == "images"
    auto: Any = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    if images:
        auto = transformers.AutoModelForImageClassification
    # "auto" would take the type of the checkpoint: Adam on fp16 weights of a head underflows.
    options: dict[str, Any] = {"dtype": settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)}
    if settings.revision:
        options["revision"] = settings.revision
    if classifies:
        options["num_labels"] = 1 if settings.task == "regression" else len(labels)
        if settings.task == "regression":
            options["problem_type"] = "regression"
        else:
            options["problem_type"] = "single_label_classification"
            options["id2label"] = dict(enumerate(labels))
            options["label2id"] = {label: i for i, label in enumerate(labels)}
    if settings.quantise:
        options["quantization_config"] = _quantisation(settings, _heads_by_config(settings, auto) if classifies else None)
    check_model_name(settings.model)
    with quiet_transformers():
        try:
            if images:
                return _load_image_base(settings, auto, options, labels)
            tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model, revision=settings.revision)
            model, info = auto.from_pretrained(settings.model, output_loading_info=True, **options)
        except VeraError:
            raise
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as e:
            raise ConfigError(f'can\'t load the model "{settings.model}" for {settings.task}: {e}') from e
    keep_unpacked(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    # A classifier reads the last token that isn't padding: it must know the padding by the tokenizer's id, whatever its own was.
    if classifies or model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(model.config, "max_position_embeddings", None) or settings.max_length
    longest = min(settings.max_length, tokenizer.model_max_length, positions)
    new = new_modules(info)
    return Base(model, tokenizer, head_modules(model, new) if classifies else (), longest, new=new)


def _load_image_base(settings: Settings, auto: Any, options: dict[str, Any], labels: Sequence[str]) -> Base:
    import transformers

    from .pixels import is_image_model, load_processor

    config = transformers.AutoConfig.from_pretrained(settings.model, revision=settings.revision)
    if not is_image_model(config):
        raise ConfigError(
            f'the model "{settings.model}" is a {config.model_type} and takes no images; task images needs an image model, '
            "google/vit-base-patch16-224-in21k for one"
        )
    # A checkpoint that was trained on other classes has a head of another size: the head starts anew, the base must fit.
    model, info = auto.from_pretrained(settings.model, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    keep_unpacked(model)
    resized = [key for key, *_ in info["mismatched_keys"]]
    new = new_modules(info)
    if inside := [key for key in resized if key.startswith(f"{model.base_model_prefix}.")]:
        raise ConfigError(f'the weights of "{settings.model}" don\'t fit its config: {", ".join(inside[:4])} differ in shape')
    if [config.id2label[i] for i in sorted(config.id2label)] != list(labels):
        new += _renew(model, len(labels))
    head = head_modules(model, new)
    return Base(model, None, head, settings.max_length, load_processor(settings.model, settings.revision, config), new)


def _renew(model: Any, classes: int) -> tuple[str, ...]:
    """New starting values for the head's last linears, which hold other classes' weights, as transformers draws missing ones;
    their names."""
    renewed = []
    for name in head_modules(model):
        for inner, module in model.get_submodule(name).named_modules(prefix=name):
            if isinstance(module, nn.Linear) and module.out_features == classes:
                renewed.append(inner)
                for parameter in module.parameters():
                    parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # transformers leaves what it has loaded alone
                model._init_weights(module)
    return tuple(renewed)


def new_modules(info: Any) -> tuple[str, ...]:
    """Of transformers' loading info: the modules that the checkpoint had no weights for, or weights of another size."""
    keys = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    return tuple(dict.fromkeys(key.rpartition(".")[0] for key in keys if "." in key))


def head_modules(model: nn.Module, new: Sequence[str] = ()) -> tuple[str, ...]:
    """The modules outside the base of a model with a task head, and those inside it that start at random."""
    prefix = getattr(model, "base_model_prefix", "")
    names = [n for n, child in model.named_children() if n != prefix and any(True for _ in child.parameters())]
    for module in new:
        if not any(module == n or module.startswith(n + ".") for n in names):
            names.append(module)
    return tuple(dict.fromkeys(names))


def check_model_name(name: str) -> None:
    """ConfigError where a name can only be a folder and isn't there: transformers would ask the hub for it."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise ConfigError(f"there is no model folder {name}")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ConfigError(f"the folder {name} holds no config.json, so it is no transformers model")


def _heads_by_config(settings: Settings, auto: Any) -> list[str]:
    """The heads of the model without its weights: they start at random and train in full, so they stay unquantised."""
    import torch
    import transformers

    check_model_name(settings.model)
    try:
        config = transformers.AutoConfig.from_pretrained(settings.model, revision=settings.revision)
        with torch.device("meta"), quiet_transformers():
            return list(head_modules(auto.from_config(config)))
    except (OSError, ValueError) as e:
        raise ConfigError(f'can\'t load the model "{settings.model}" for {settings.task}: {e}') from e


def _quantisation(settings: Settings, unquantised: list[str] | None) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as e:
        raise need("bitsandbytes", "quantised", f"quantise: {settings.quantise}") from e
    import torch
    from transformers import BitsAndBytesConfig

    if settings.quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=unquantised)
    compute = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=unquantised,
    )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' own errors alone, without its progress bars and its report of a head that is new on purpose."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
