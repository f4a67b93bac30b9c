"""A tiny base model on disk, a store with adapters that change its answers much, and what the merged models answer."""

import gc
from pathlib import Path

import torch

from veralib import VeraConfig, attach
from veralib.store import open_store

PROMPTS = ([3, 5, 7, 9, 11], [1, 2, 3], [100, 90, 80, 70, 60, 50, 40], [7] * 9)
TOKENS = 12


def llama():
    """GQA, no biases; heads of 32, the smallest that vLLM's attention takes on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SHAPE)).eval()


def qwen():
    """Biases on q, k, v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**_SHAPE)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_proj.bias"):
                p.copy_(torch.randn(p.shape))
    return model


_SHAPE = dict(
    hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
    max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip


def adapter(build, draw, **config):
    """An adapter with random vectors, far from its start; `draw` seeds those, `seed` is the basis's."""
    vera = attach(build(), VeraConfig(**({"rank": 16, "targets": "all-linear"} | config)), name="a")
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for p in vera.parameter_groups()[0]["params"]:
            p.copy_(2 * torch.randn(p.shape, generator=generator))
    return vera.adapter("a")


class World:
    """build's model and a store in a folder."""

    def __init__(self, folder: Path, build=llama) -> None:
        self.folder, self.build = folder, build
        build().save_pretrained(folder / "base")
        self.store = open_store(folder / "store")

    def put(self, name, draw, **config):
        """A new version of an adapter."""
        return self.store.put(name, adapter(self.build, draw, **config))

    def model(self, name):
        """The merged model in float32, in transformers; the base for None."""
        model = self.build()
        if name is not None:
            vera = attach(model)
            vera.load(self.store.get(name), "a")
            vera.merge("a", keep=None)
            model = vera.detach()
        return model

    @torch.no_grad()
    def merged(self, name, prompts=PROMPTS, tokens=TOKENS):
        """Greedy tokens of the merged model."""
        model, out = self.model(name), []
        for prompt in prompts:
            ids = model.generate(
                torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            out.append(ids[0, len(prompt) :].tolist())
        return out

    def engine(self, slots=4, memory=8, plain=False, settings=None, dtype="float32", **options):
        """vLLM in this process."""
        from vllm import LLM

        vera = {"store": str(self.folder / "store"), "max_rank": 32, **(settings or {})}
        extra = {} if plain else {"additional_config": {"vera": vera}}
        return LLM(
            str(self.folder / "base"), dtype=dtype, max_model_len=128, max_num_seqs=16, enforce_eager=True,
            skip_tokenizer_init=True, enable_lora=True, max_loras=slots, max_cpu_loras=memory, **extra, **options,
        )  # fmt: skip

    def ask(self, llm, rows, tokens=TOKENS):
        """[tokens] for rows of (adapter's name or None, prompt), all in one batch."""
        from vllm import TokensPrompt

        from veralib.serving.vllm import lora_request

        requests = [None if name is None else lora_request(self.store, name) for name, _ in rows]
        prompts = [TokensPrompt(prompt_token_ids=list(prompt)) for _, prompt in rows]
        outputs = llm.generate(prompts, greedy(tokens), lora_request=requests, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]

    def base_numbers(self, llm, beside):
        """Log-probabilities of four steps of every prompt by the base, in one batch with rows of the adapters in `beside`."""
        from veralib.serving.vllm import lora_request

        requests = [None] * len(PROMPTS) + [None if name is None else lora_request(self.store, name) for name in beside]
        prompts = [{"prompt_token_ids": p} for p in (PROMPTS + PROMPTS[: len(beside)])]
        out = llm.generate(prompts, greedy(4, logprobs=5), lora_request=requests, use_tqdm=False)
        return [[{k: v.logprob for k, v in step.items()} for step in o.outputs[0].logprobs] for o in out[: len(PROMPTS)]]

    def check(self, llm, names):
        """Every prompt with every adapter, in one batch, against the merged models; how many sequences were equal."""
        want = {name: self.merged(name) for name in names}
        rows = [(name, i) for i in range(len(PROMPTS)) for name in names]
        got = self.ask(llm, [(name, PROMPTS[i]) for name, i in rows])
        equal = [tokens == want[name][i] for (name, i), tokens in zip(rows, got, strict=True)]
        assert all(equal), [row for row, ok in zip(rows, equal, strict=True) if not ok]
        assert len({str(w) for w in want.values()}) == len(names)  # the adapters do differ
        return len(equal)


def greedy(tokens=TOKENS, **options):
    """Sampling parameters: the likeliest token, and no end before the last."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, **options)


def manager(llm):
    """The worker's manager of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.lora_manager


def close(llm):
    """Frees an engine."""
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
