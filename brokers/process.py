"""`isolation = "process"`: a broker in a child process that is started, watched and killed here.

The child runs `httptrading.brokers.child` under this or another interpreter and talks over a socket
pair: a pickled tuple each way. What it sends that makes no sense, or silence beyond the worker's
limit, ends it; the worker's lane then starts a new one.
"""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from httptrading.brokers.base import CHANGES, BaseBroker, Link
from httptrading.brokers.child import PICKLE_PROTOCOL
from httptrading.brokers.worker import Ended
from httptrading.errors import (
    BrokerUnavailable,
    HttpTradingError,
    InternalError,
    OutcomeUnknown,
)

LARGEST_MESSAGE = 64 * 1024 * 1024

_PACKAGE = Path(__file__).resolve().parent.parent

# Loads exactly this copy of httptrading (first argument: its `front_door()`), and nothing else that
# lies beside it, into whatever interpreter runs it: its own site-packages stay its own.
LOADER = """
import importlib.util, sys
init = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "httptrading", init, submodule_search_locations=[init.rpartition("/")[0]])
package = importlib.util.module_from_spec(spec)
sys.modules["httptrading"] = package
spec.loader.exec_module(package)
"""
_BOOTSTRAP = f"""{LOADER}
from httptrading.brokers.child import main
main(int(sys.argv[2]), int(sys.argv[3]))
"""


def front_door() -> Path:
    """`httptrading/__init__.py` of this copy: in a checkout beside this folder, else above it."""
    beside = _PACKAGE / "httptrading" / "__init__.py"
    return beside if beside.is_file() else _PACKAGE / "__init__.py"


def own_paths() -> list[str]:
    """The user's own folders on `sys.path` (for custom brokers), not those of installed packages,
    which another interpreter could not use."""
    roots = (sys.prefix, sys.base_prefix, sys.exec_prefix)
    found = []
    for entry in sys.path:
        path = str(Path(entry or ".").resolve())
        installed = "site-packages" in path or "dist-packages" in path
        inside = any(path.startswith(root + os.sep) for root in roots)
        if not installed and not inside and os.path.isdir(path):
            found.append(path)
    return found


class ChildBroker:
    """The parent's side of one child; used on one lane's loop only, but for `interrupt`."""

    def __init__(
        self,
        prototype: BaseBroker,
        connection: str,
        data_dir: Path,
        link: Link | None,
        python: str | None = None,
    ) -> None:
        self._prototype = prototype
        self._connection = connection
        self._data_dir = data_dir
        self._link = link
        self._python = python or sys.executable
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._lifeline: int | None = None
        self._reply: asyncio.Future[tuple[str, Any]] | None = None
        self._broken = ""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def open(self, seconds: float) -> None:
        display = self._prototype.broker_display
        if type(self._prototype).__module__ == "__main__":
            raise BrokerUnavailable(
                f"{display} is defined in the start script, which a child process does not run: "
                'put the class into a module of its own, or use isolation = "thread"'
            )
        prototype = copy.copy(self._prototype)
        prototype.tokens = []  # the child has no use for them
        prototype._link = None
        # Set anew in the child; a Path pickled by Python 3.13 cannot be read by any other.
        vars(prototype).pop("data_dir", None)
        try:
            broker = pickle.dumps(prototype, PICKLE_PROTOCOL)
        except Exception as error:  # anything may stand in an argument
            raise BrokerUnavailable(
                f"The arguments of {display} cannot be handed to a child process "
                f"({type(error).__name__}): use plain values"
            ) from None
        try:
            self._spawn(broker)
            await self._ask(("open", seconds), seconds)
        except OSError as error:
            raise BrokerUnavailable(
                f"The child process for {display} cannot be started ({type(error).__name__})"
            ) from None
        except _ChildGone as error:
            raise BrokerUnavailable(f"The child process for {display} failed: {error}") from None

    async def run(self, operation: str, arguments: Mapping[str, Any], seconds: float) -> Any:
        display = self._prototype.broker_display
        if self._broken:
            raise BrokerUnavailable(f"The child process for {display} ended")
        try:
            return await self._ask(("run", operation, dict(arguments), seconds), None)
        except _ChildGone:  # the lane finds that by `ended()`
            if operation in CHANGES:
                raise OutcomeUnknown(
                    f"The child process for {display} ended before {display} had answered"
                ) from None
            raise Ended(f"The child process for {display} ended") from None

    def ended(self) -> str:
        """A killed child is found here before its end of the pipe is; a broken one is killed."""
        if self._process is not None and self._process.poll() is not None:
            return f"The child process for {self._prototype.broker_display} ended"
        return ""

    async def close(self) -> None:
        """Asks the child to close its connection and leave; kills it when it does not."""
        if self._pipe is not None and not self._broken:
            try:
                await self._ask(("close",), 1.0)
            except HttpTradingError:
                pass
        self._end()

    def interrupt(self) -> None:
        process = self._process
        if process is not None:
            process.kill()

    # --- the pipe -----------------------------------------------------------------------------
    def _spawn(self, broker: bytes) -> None:
        ours, theirs = socket.socketpair()
        life_end, life_start = os.pipe()
        try:
            self._process = subprocess.Popen(
                [
                    self._python,
                    "-c",
                    _BOOTSTRAP,
                    str(front_door()),
                    str(theirs.fileno()),
                    str(life_end),
                ],
                pass_fds=(theirs.fileno(), life_end),
                stdin=subprocess.DEVNULL,
                stdout=2,  # SDKs print; stdout is not theirs
                start_new_session=True,  # Ctrl-C is for the service, which ends its children itself
            )
        except BaseException:
            ours.close()
            os.close(life_start)
            raise
        finally:
            theirs.close()
            os.close(life_end)
        self._lifeline = life_start
        self._pipe = Connection(ours.detach())
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._on_readable)
        paths = own_paths() if self._python != sys.executable else list(sys.path)
        self._send(("init", paths, broker, self._connection, str(self._data_dir)))

    async def _ask(self, message: tuple[Any, ...], seconds: float | None) -> Any:
        """Sends a request and returns its answer; raises the error the child answered with."""
        self._reply = asyncio.get_running_loop().create_future()
        try:
            self._send(message)
            async with asyncio.timeout(None if seconds is None else seconds + 1.0):
                kind, value = await self._reply
        except TimeoutError:
            self._lose("the child process does not answer")
            raise BrokerUnavailable(
                f"The child process for {self._prototype.broker_display} does not answer"
            ) from None
        finally:
            self._reply = None
        if kind == "error":
            if isinstance(value, HttpTradingError):
                raise value
            raise InternalError("An unexpected error in the child process")
        return value

    def _send(self, message: tuple[Any, ...]) -> None:
        if self._broken or self._pipe is None:
            raise _ChildGone(self._broken)
        try:
            self._pipe.send_bytes(pickle.dumps(message, PICKLE_PROTOCOL))
        except OSError:
            self._lose("its connection is closed")  # and so is told whoever waits for the answer

    def _on_readable(self) -> None:
        """Takes one message; the loop calls again while there is more."""
        assert self._pipe is not None
        try:
            self._take(pickle.loads(self._pipe.recv_bytes(LARGEST_MESSAGE)))
        except _ChildGone:
            pass
        except (EOFError, OSError):
            self._lose("it ended")
        except Exception:  # whatever pickle makes of garbage
            self._lose("it sent something that makes no sense")

    def _take(self, message: Any) -> None:
        match message:
            case ("result" | "error" as kind, value):
                if self._reply is None or self._reply.done():
                    raise ValueError("an answer that nobody asked for")
                self._reply.set_result((kind, value))
            case ("report", reports) if self._link:
                self._link.report(reports)
            case ("fill", fills) if self._link:
                self._link.fill(fills)
            case ("stale",) if self._link:
                self._link.stale()
            case ("lost", str(reason)) if self._link:
                self._link.lost(reason)
            case ("restored",) if self._link:
                self._link.restored()
            case ("take", str(window)):
                answer: tuple[str, Any] = ("taken", None)
                try:
                    if self._link:
                        self._link.take(window)
                except HttpTradingError as error:
                    answer = ("taken", error)
                self._send(answer)
            case _:
                raise ValueError("an unknown message")

    def _lose(self, reason: str) -> None:
        """The child is of no use any more: whoever waits for it learns so now."""
        if self._broken:
            return
        self._broken = reason
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(_ChildGone(reason))
        elif self._link is not None:
            self._link.lost(f"The child process for {self._prototype.broker_display}: {reason}")
        self._end()

    def _end(self) -> None:
        if self._pipe is not None:
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            self._pipe.close()
            self._pipe = None
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._broken = self._broken or "closed"


class _ChildGone(BrokerUnavailable):
    """The child ended, or had to be ended, before it answered."""
