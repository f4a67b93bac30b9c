"""Speed and memory on a GPU: one script a question, `python -m benchmarks.gpu.run` for all of them.

correctness: is it right there, and how fast do A and B grow? train_step: time and memory of a step. decode: many adapters
in one batch. where: which kernels the time goes to. kernels: veralib's own, op by op, against the plain forms (a command of its
own). resources: their machine code, which needs no GPU. Each writes <out>/<name>.json as it goes; render makes the tables.
Every script also runs on the CPU with --tiny, where its numbers mean nothing.
"""
