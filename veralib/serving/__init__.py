"""Serving: one frozen base model, thousands of adapters, behind the OpenAI API.

    client --OpenAI API--> gateway (tenants, limits, files, jobs) --HTTP--> engine (embedded, or vLLM with our plugin) --> store

The gateway never loads a model: it turns the name that a client gives into the engine's name of the version that is live
(names.py) and passes the request on. Both engines speak the same dialect, vLLM's.
"""
