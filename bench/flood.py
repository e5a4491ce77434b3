"""A process of its own that asks every broker far more often than it may be asked, until killed."""

from __future__ import annotations

import json
import sys
import threading
import time

from bench.load import Connection, paced, prepare

CLIENTS, PER_SECOND = 4, 12.5
"""Of each instance, and of each client; none of them waits longer than a second for an answer."""

APART = 0.005
"""Seconds between one client's requests and the next one's: strangers do not ask in step."""


def main() -> None:
    port, *instances = sys.argv[1:]
    for instance in map(json.loads, instances):
        request = prepare(
            "GET",
            f"/httptrading/api/{instance['id']}/market/quote"
            "?tradeType=Securities&region=US&ticker=AAPL",
            headers={
                "HT-TOKEN": instance["tokens"][0],
                "HT-TIMEOUT": "1",
                "Cache-Control": "no-cache",
            },
        )
        for _ in range(CLIENTS):
            connection = Connection(int(port))
            threading.Thread(
                target=paced,
                args=(lambda _, c=connection, r=request: c.ask(r), PER_SECOND, 3600.0),
            ).start()
            time.sleep(APART)
    print("asking", flush=True)


if __name__ == "__main__":
    main()
