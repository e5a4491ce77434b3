"""The yardstick: a bare Flask app on gunicorn whose view hands a question to a worker thread.

No authentication, no validation, no deadlines, no journal: what the shape itself costs.
"""

from __future__ import annotations

import queue
import sys
import threading
from concurrent.futures import Future

from flask import Flask, jsonify
from gunicorn.app.base import BaseApplication

_questions: queue.Queue[Future[dict[str, object]]] = queue.Queue()


def _worker() -> None:
    while True:
        _questions.get().set_result({"type": "apiResponse", "ex": None, "pong": True})


def make_app() -> Flask:
    app = Flask("skeleton")

    @app.get("/ping")
    def ping() -> object:
        answer: Future[dict[str, object]] = Future()
        _questions.put(answer)
        return jsonify(answer.result(10))

    return app


class _Server(BaseApplication):  # type: ignore[misc]
    def load_config(self) -> None:
        self.cfg.set("bind", f"127.0.0.1:{sys.argv[1]}")
        self.cfg.set("worker_class", "gthread")
        self.cfg.set("threads", 32)
        self.cfg.set("keepalive", 75)
        self.cfg.set("control_socket_disable", True)
        self.cfg.set("post_worker_init", _start)

    def load(self) -> Flask:
        return make_app()


def _start(worker: object) -> None:
    threading.Thread(target=_worker, daemon=True).start()


if __name__ == "__main__":
    _Server().run()
