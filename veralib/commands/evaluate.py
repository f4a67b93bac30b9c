"""vera evaluate: texts that a run writes for a test set, scored against several references each."""

from typer import Argument, Option

from .shared import table


def evaluate(
    run: str = Argument(help="A run's folder or an adapter file, trained for task prompt-completion."),
    data: str = Option(
        ...,
        help="A file with prompts and references, a folder with such a file of the split's name, or the E2E release.",
    ),
    output: str = Option("evaluation.json", help="Result file, .json; the texts go into a .texts.jsonl beside it."),
    split: str = Option("test", help="Split of a folder or of the E2E release."),
    beams: int = Option(10, help="Beams of the search; 1: greedy."),
    length_penalty: float = Option(0.8, help="A beam's score is its log-probability over its length to this power."),
    no_repeat: int = Option(4, help="No n-gram of so many tokens twice in a text; 0: anything goes."),
    max_new_tokens: int = Option(64, help="Tokens to generate at most."),
    limit: int = Option(None, help="So many of the prompts, evenly spread; left out: all."),
    batch_size: int = Option(16, min=1, help="Prompts at a time; each has as many rows as beams."),
    model: str = Option(None, help="Base model, if it is elsewhere than in training."),
) -> None:
    """Write a text for every distinct prompt of a test set, and score them: BLEU, NIST, METEOR, ROUGE-L, CIDEr.

    The defaults are the decoding published for E2E (Hu et al., 2021).

    Example:

        vera evaluate run --data e2e-dataset.zip --output results.json
    """
    from ..evaluation import evaluate as evaluate_run
    from ..evaluation.run import output_path
    from ..training.decoding import Decoding

    output_path(output)
    decoding = Decoding(max_new_tokens, beams, length_penalty, no_repeat)
    found = evaluate_run(run, data, decoding=decoding, split=split, limit=limit, batch_size=batch_size, model=model)
    texts = found.save(output)
    facts = found.to_dict()
    rows = [(name, f"{value:.2f}") for name, value in found.scores.items()]
    rows += [
        ("texts", f"{facts['texts']:,}, {facts['references']:,} references"),
        ("seconds to write them", f"{found.seconds:.1f}"),
    ]
    table(f"{run} on {data}", ("", "value"), rows)
    print(f"{output}, {texts}")
