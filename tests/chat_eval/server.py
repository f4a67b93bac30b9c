"""A chat endpoint of the tests' own on 127.0.0.1: it counts what is asked and answers as a test says."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | tuple[int, dict[str, str], str]


class Server:
    """url, and every request that came. reply: (the request's JSON, its number) -> a text, or (status, headers, body)."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Answer]) -> None:
        self.reply, self.asked, self.headers = reply, [], []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.asked.append(body)
                    self.headers.append(dict(handler.headers))
                    number = len(self.asked)
                answer = self.reply(body, number)
                status, headers, text = (200, {}, completion(answer)) if isinstance(answer, str) else answer
                data = text.encode()
                handler.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    handler.send_header(name, value)
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(handler, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "Server":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    @property
    def texts(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.asked]


def completion(text: str, read: int = 10, written: int = 5) -> str:
    """A chat completion in OpenAI's form."""
    return json.dumps(
        {
            "model": "mock-2024-01-01",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": read, "completion_tokens": written},
        }
    )
