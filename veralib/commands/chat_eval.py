"""vera chat-eval: answer questions with a model, have a judge grade the answers, show the scores."""

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from ..errors import ConfigError, unknown_name
from .shared import fails_clearly, plain_value, table

FIELD = "A further field of each request, NAME=VALUE; once for each. null takes a field out: max_tokens=null."


def answer(
    questions: str = Option(..., help="question.jsonl in FastChat's form: question_id, category, turns."),
    output: str = Option(..., help="The answers' jsonl file; started again, it goes on."),
    model: str = Option(None, help="Local model: hub id or folder. Left out with --adapter: the adapter's base."),
    adapter: str = Option(None, help="A run's folder, an adapter file, a folder that PEFT saved, or a hub id."),
    endpoint: str = Option(None, help="Instead of a local model, an OpenAI-compatible API: https://host/v1."),
    api_model: str = Option(None, help="The model's name at the endpoint."),
    name: str = Option(None, help="The model's name in the answers; left out: the last part of its path."),
    chat_template: str = Option(None, help='A Jinja file, or "alpaca", where the tokenizer has no chat template.'),
    max_new_tokens: int = Option(1024, min=1, help="Tokens of an answer at most."),
    temperature: float = Option(None, min=0, help="One for all questions, 0 is greedy; left out: FastChat's, by category."),
    stop: Annotated[list[str] | None, Option(help="A text before which an answer ends; once for each.")] = None,
    seed: int = Option(None, help="Of what is drawn where the temperature isn't 0; left out: 0, and none sent to an endpoint."),
    batch_size: int = Option(8, min=1, help="Questions at a time (local)."),
    parallel: int = Option(4, min=1, help="Requests at a time (endpoint)."),
    retries: int = Option(6, min=0, help="Tries more after a rate limit, a server error or a timeout (endpoint)."),
    timeout: float = Option(180.0, min=0.1, help="Seconds to wait for a reply (endpoint)."),
    field: Annotated[list[str] | None, Option(help=FIELD)] = None,
    dtype: str = Option(None, help="Type of the weights (local): float32, bfloat16, float16 or auto."),
    quantise: str = Option(None, help="4bit or 8bit (local)."),
    revision: str = Option(None, help="Revision of a hub model (local)."),
) -> None:
    """Answer the questions, both turns, with a local model and adapter or with an API.

    Examples:

        vera chat-eval answer --adapter run --questions q.jsonl --output vera.jsonl

        vera chat-eval answer --endpoint http://localhost:8000/v1 --api-model llama --questions q.jsonl --output llama.jsonl
    """
    _jsonl(output)
    from ..chat_eval import answer_locally, answer_over_http, read_questions
    from ..chat_eval.answers import Sampling

    asked = read_questions(questions)
    sampling = Sampling(temperature, max_new_tokens, tuple(stop or ()), seed)
    if endpoint is not None:
        if model or adapter:
            raise ConfigError("--endpoint answers instead of a local model: leave out --model and --adapter")
        if not api_model:
            raise ConfigError("--endpoint needs the model's name there: --api-model")
        api = _endpoint(endpoint, api_model, retries, timeout, field)
        count = answer_over_http(asked, api, output, name=name or api_model, sampling=sampling, parallel=parallel, progress=_say)
    else:
        from ..chat_eval.local import load_local

        local, about = load_local(model, adapter, chat_template=chat_template, dtype=dtype, quantise=quantise, revision=revision)
        path = Path(adapter or str(model))  # a dot in a name is part of it: Qwen2.5-0.5B
        name = name or (path.parent.name if path.name == "adapter_model.safetensors" else path.name.removesuffix(".safetensors"))
        count = answer_locally(
            asked, local, output, name=name, about=about, sampling=sampling, batch_size=batch_size, progress=_say
        )
    print(f"{count} questions answered, {len(asked) - count} were already: {output}")
    print(f"Next: vera chat-eval judge {output} --questions {questions} --endpoint URL --judge MODEL --output reviews.jsonl")


def judge(
    answers: str = Argument(help="A model's answers: what vera chat-eval answer wrote, or FastChat."),
    questions: str = Option(..., help="question.jsonl in FastChat's form."),
    output: str = Option(..., help="The reviews' jsonl file; started again, it goes on."),
    endpoint: str = Option("https://api.openai.com/v1", help="An OpenAI-compatible API; its key comes from OPENAI_API_KEY."),
    judge: str = Option(..., help="The judge's name there. Name a dated version: scores depend on it."),
    references: str = Option(None, help="Reference answers for math, reasoning and coding: a jsonl file, or its folder."),
    prompts: str = Option(None, help="judge_prompts.jsonl in FastChat's form; left out: veralib's own wording."),
    mode: str = Option("two-turn", help="two-turn, first-turn, or with --against pairwise, pairwise-first-turn."),
    against: str = Option(None, help="A second model's answers, judged beside the first in both orders."),
    parallel: int = Option(4, min=1, help="Requests at a time."),
    retries: int = Option(6, min=0, help="Tries more after a rate limit, a server error or a timeout."),
    tries: int = Option(3, min=1, help="How often a judgement without a rating is asked for in all."),
    again: bool = Option(False, "--again", help="Ask again for the reviews in the file that have no score."),
    timeout: float = Option(180.0, min=0.1, help="Seconds to wait for a reply."),
    temperature: float = Option(0.0, min=0, help="The judge's."),
    max_tokens: int = Option(2048, min=1, help="Tokens of a judgement at most."),
    field: Annotated[list[str] | None, Option(help=FIELD)] = None,
    dry_run: bool = Option(False, "--dry-run", help="Print requests, tokens and cost, and ask nothing."),
    price_in: float = Option(None, min=0, help="Price of a million tokens that the judge reads."),
    price_out: float = Option(None, min=0, help="Price of a million tokens that it writes."),
    judgement_tokens: int = Option(250, min=1, help="A judgement's usual length, for the estimate."),
) -> None:
    """Have a judge grade the answers, from 1 to 10. What is in the output file isn't asked for again.

    Examples:

        vera chat-eval judge vera.jsonl --questions q.jsonl --judge gpt-4-0613 --output reviews.jsonl --dry-run

        vera chat-eval judge vera.jsonl --questions q.jsonl --references answers --judge gpt-4-0613 --output reviews.jsonl
    """
    _jsonl(output)
    from ..chat_eval import judge as run_judge
    from ..chat_eval import plan, read_answers, read_questions
    from ..chat_eval.cost import money
    from ..chat_eval.judge import MODES, missing, without_reference
    from ..chat_eval.prompts import read_prompts

    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    if mode.startswith("pairwise") != (against is not None):
        raise ConfigError(f"--mode {mode} {'needs a' if against is None else 'takes no'} second model's answers (--against)")
    asks = plan(
        read_questions(questions, references),
        read_answers(answers),
        mode,  # type: ignore[arg-type]
        read_answers(against) if against else None,
        read_prompts(prompts) if prompts else None,
    )
    parameters, fields = {"temperature": temperature, "max_tokens": max_tokens}, _fields(field)
    if bare := without_reference(asks):
        print(f"{len(bare)} questions of math, reasoning or coding are judged without a reference answer (--references)")
    if dry_run:
        left = missing(asks, judge, {**parameters, **fields}, output, again)
        _show_estimate(left, len(asks), judgement_tokens, max_tokens, price_in, price_out)
        return
    api = _endpoint(endpoint, judge, retries, timeout, field)
    done = run_judge(asks, api, output, parameters=parameters, parallel=parallel, tries=tries, again=again, progress=_say)
    spent = money(done.input_tokens, done.output_tokens, price_in, price_out)
    print(
        f"{done.asked} reviews asked for, {done.before} were already there, {done.unrated} of {len(asks)} have no score; "
        f"{done.input_tokens:,} tokens read, {done.output_tokens:,} written" + ("" if spent is None else f", cost {spent:.2f}")
    )
    print(f"Next: vera chat-eval show {output}")


def show(
    reviews: Annotated[list[str], Argument(help="Review files; with several, differences to the first.")],
    question: str = Option(None, help="One question in full, as Markdown: answers, reviews and scores side by side."),
    markdown: bool = Option(False, "--markdown", help="Tables as Markdown."),
    output: str = Option(None, help="Write the Markdown to this file."),
    scores: str = Option(None, help="Of one review file: write its mean score to this JSON file, for vera reproduce table4."),
) -> None:
    """Show scores by category and turn, differences between models with 95 % intervals, or one question in full.

    Examples:

        vera chat-eval show lora_reviews.jsonl vera_reviews.jsonl

        vera chat-eval show lora_reviews.jsonl vera_reviews.jsonl --question 81

        vera chat-eval show vera_reviews.jsonl --scores scores.json
    """
    from ..chat_eval import read_reviews
    from ..chat_eval import show as pages
    from ..chat_eval.scores import summary

    found = [read_reviews(path) for path in reviews]
    if scores is not None:
        if len(found) > 1:
            raise ConfigError(f"--scores takes one review file, found {len(found)}")
        _save(scores, json.dumps(summary(found[0]), indent=1, ensure_ascii=False) + "\n")
    lines = pages.remarks(found)
    if question is None and not markdown and output is None:
        for title, columns, rows in pages.tables(found):
            table(title, columns, rows, right=columns[1:])
        print("\n".join(lines))
        return
    text = pages.question(found, question) if question else pages.markdown(pages.tables(found)) + "\n" + "\n".join(lines) + "\n"
    if output is None:
        print(text)
        return
    _save(output, text)


def _save(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"can't write {path}: {e.strerror or e}") from e
    print(f"written: {path}")


def _show_estimate(
    asks: Any, total: int, judgement_tokens: int, max_tokens: int, price_in: float | None, price_out: float | None
) -> None:
    from ..chat_eval.cost import CHARACTERS_A_TOKEN, estimate

    e = estimate(asks, judgement_tokens, max_tokens, price_in, price_out)
    rows = [
        ("requests", f"{e.requests:,} of {total:,}; {total - e.requests:,} are in the output file"),
        ("tokens read", f"about {e.input_tokens:,} ({CHARACTERS_A_TOKEN} characters a token)"),
        ("tokens written", f"about {e.output_tokens:,}, at most {e.output_tokens_at_most:,} for each try"),
        (
            "cost",
            "give --price-in and --price-out, of a million tokens"
            if e.cost is None or e.cost_at_most is None
            else f"about {e.cost:.2f}, at most {e.cost_at_most:.2f} for each try",
        ),
    ]
    table("what the judge would be asked", ("", "value"), rows)


def _endpoint(url: str, model: str, retries: int, timeout: float, field: list[str] | None) -> Any:
    from ..chat_eval.endpoint import Endpoint

    return Endpoint(url, model, retries=retries, timeout=timeout, fields=_fields(field))


def _fields(given: list[str] | None) -> dict[str, Any]:
    found = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--field {pair!r}, expected NAME=VALUE")
        found[name.strip()] = plain_value(value)
    return found


def _say(line: str) -> None:
    print(line, flush=True)


def build() -> Any:
    """The typer application of `vera chat-eval`."""
    app = Typer(help="Chat evaluation with a judge: answer, judge, show.", no_args_is_help=True)
    for command in (answer, judge, show):
        app.command()(fails_clearly(command))
    return app


def _jsonl(output: str) -> None:
    """ConfigError where the next command couldn't read the output."""
    if Path(output).suffix != ".jsonl":
        raise ConfigError(f"output is {output}, expected a .jsonl file")
