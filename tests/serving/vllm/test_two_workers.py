"""Tensor parallel 2: each worker has its shard of A, B, b."""

import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm builds an environment with it and runs this there")


@pytest.mark.slow
def test_greedy_tokens_equal_the_merged_models_at_tensor_parallel_2(tmp_path):
    command = [sys.executable, "-m", "tests.serving.vllm.two_workers", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert "as without the plugin: True" in done.stdout, done.stderr[-3000:]
    assert "equal: 32" in done.stdout, done.stderr[-3000:]
    assert "refused: " in done.stdout and "has rank 64, and this server takes up to 32" in done.stdout
