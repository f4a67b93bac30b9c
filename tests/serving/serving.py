"""A served application on a free port, for tests."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import uvicorn


@contextlib.contextmanager
def served(app):
    """The address of an application that runs in a thread."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def call(url, body=None, data=None, timeout=60, headers=()):
    """(status, answer): GET, or POST with a JSON body or raw bytes; the answer as JSON where it is some."""
    data = json.dumps(body).encode() if body is not None else data
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json", **dict(headers)})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        status, text = e.code, e.read().decode()
    with contextlib.suppress(ValueError):
        return status, json.loads(text)
    return status, text
