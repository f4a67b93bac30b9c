"""The model class that an adapter of no known task fits: what vera merge loads where neither file nor user names a task."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, VeraError, unknown_name
from .loading import Base, check_model_name, head_modules, new_modules, quiet_transformers

if TYPE_CHECKING:
    from ..adapter import Adapter
    from .settings import Settings

# PEFT's task_type -> the class it stands for.
_OF_TASK_TYPE = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_by_class(settings: "Settings", adapter: "Adapter", name: str | None = None, labels: Sequence[str] = ()) -> Base:
    """The base model in a class of transformers. name: that class; else the one by PEFT's task_type, or the checkpoint's own.

    Errors: UnknownName where transformers has no such class; ConfigError where the model can't be loaded or the adapter's layers
    or heads aren't in it.
    """
    import transformers

    check_model_name(settings.model)
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(settings.model, revision=settings.revision)
            guess = "AutoModelForSequenceClassification" if adapter.modules else "AutoModelForCausalLM"
            by_task = _OF_TASK_TYPE.get(adapter.notes.get("peft.task_type", "").strip('"'))
            chosen = name or by_task or (config.architectures or [guess])[0]
            cls: Any = getattr(transformers, chosen, None)
            if not _makes_models(cls, chosen):
                known = [n for n in dir(transformers) if "For" in n or n.startswith("AutoModel")]
                raise unknown_name("model class in transformers", chosen, known)
            options: dict[str, Any] = _labels(adapter if "Classification" in chosen else None, labels)
            if name is None:
                _check_fit(cls, config, options, adapter, settings.model)
            model, info = cls.from_pretrained(
                settings.model,
                revision=settings.revision,
                dtype=_dtype(settings),
                output_loading_info=True,
                ignore_mismatched_sizes=bool(options),
                **options,
            )
        except VeraError:
            raise
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as e:
            raise ConfigError(f'can\'t load the model "{settings.model}": {e}') from e
        processor = _processor(settings)
    pad = getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None)
    if getattr(model.config, "pad_token_id", 0) is None:  # without one a decoder classifies no batch
        model.config.pad_token_id = pad
    new = new_modules(info)
    return Base(model, processor, head_modules(model, new), settings.max_length, new=new)


def check_new(base: Base, adapter: "Adapter", source: Any, advice: str) -> None:
    """ConfigError where a module of the model starts at random and the adapter brings none: it was trained on another class.
    advice: what to do then."""
    brought = tuple(adapter.modules)
    random = [n for n in base.new if not any(n == b or n.startswith(b + ".") for b in brought)]
    if random:
        raise ConfigError(
            f"{type(base.model).__name__} would start at random in {', '.join(random[:4])}, of which neither the checkpoint nor "
            f"{source} has weights: the adapter was trained on another class of model. {advice}"
        )


def _check_fit(cls: Any, config: Any, options: dict[str, Any], adapter: "Adapter", model: str) -> None:
    """ConfigError where a model of the class, made without weights, lacks a layer or a head of the adapter."""
    import torch

    config = type(config).from_dict({**config.to_dict(), **options})
    with torch.device("meta"):
        make = cls.from_config if hasattr(cls, "from_config") else cls
        names = {n for n, _ in make(config).named_modules()}
    if lacking := [n for n in (*adapter.modules, *adapter.base.layers) if n not in names]:
        raise ConfigError(
            f'the checkpoint "{model}" is a {cls.__name__}, which has no "{lacking[0]}" for the adapter: name the class it was '
            "trained on with --class (AutoModelForTokenClassification, say), or the task with --task (classification, "
            "regression, images, causal-lm)."
        )


def _makes_models(cls: Any, name: str) -> bool:
    import transformers

    return isinstance(cls, type) and (name.startswith("AutoModel") or issubclass(cls, transformers.PreTrainedModel))


def _labels(adapter: "Adapter | None", labels: Sequence[str]) -> dict[str, Any]:
    """The number of a classifier's outputs, by the labels or by the adapter's own head."""
    if labels:
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    count = head_outputs(adapter) if adapter else 0
    return {"num_labels": count} if count else {}


def head_outputs(adapter: "Adapter") -> int:
    """The number of classes of an adapter's head: the outputs of its last weight; 0 without a head. A layer before the classifier
    is no head (DistilBERT's pre_classifier)."""
    heads = sorted(adapter.modules.items(), key=lambda item: not item[0].rpartition(".")[2].startswith("pre_"))
    weights = [t for _, state in heads for k, t in state.items() if k.endswith("weight") and t.dim() == 2]
    return weights[-1].shape[0] if weights else 0


def _dtype(settings: "Settings") -> Any:
    import torch

    return settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)


def _processor(settings: "Settings") -> Any:
    """What prepares the model's inputs: a processor, a tokenizer, or None where the checkpoint has neither."""
    import transformers

    for auto in (transformers.AutoProcessor, transformers.AutoTokenizer):
        try:
            return auto.from_pretrained(settings.model, revision=settings.revision)
        except (OSError, ValueError, KeyError, ImportError):
            continue
    return None
