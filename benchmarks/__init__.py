"""Speed and memory of veralib beside Hugging Face PEFT: `python -m benchmarks.bench` (docs/benchmarks.md)."""
