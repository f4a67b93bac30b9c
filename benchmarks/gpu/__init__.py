"""Speed and memory on a GPU: one script a question, `python -m benchmarks.gpu.run` for the first four of them.

correctness: is it right there, and how fast do A and B grow, merge and switch? train_step: time and memory of a step. decode:
many adapters in one batch. where: which kernels the time goes to. Commands of their own: kernels, veralib's against the plain
forms, op by op; paper_step, RoBERTa-large and GPT-2 large at the paper's settings; fleet_step, 1 to 512 owners in a batch;
resources, the kernels' machine code, which needs no GPU. Each writes <out>/<name>.json as it goes; render makes the tables.
Every script also runs on the CPU with --tiny, where its numbers mean nothing.
"""
