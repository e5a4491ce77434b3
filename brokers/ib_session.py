"""One connection to TWS: the SDK, what is asked through it, and what TWS says unasked.

A new SDK object is made for every connection, and the connection counts as open only when every
open order is known; as long as lists of what is over are missing, none is answered. The SDK is used
for the socket, the coding of messages and request ids.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from httptrading.brokers.ib_answers import (
    ABOUT_A_CANCEL,
    ABOUT_A_REQUEST,
    NOT_CONNECTED,
    PARTLY_UNSUBSCRIBED,
    Ticks,
    execution_time,
    refusal,
)
from httptrading.brokers.ib_book import UNSET, BookedOrder, OrderBook, is_refusal
from httptrading.brokers.sockets import Options, acknowledge_at_once, drop_unsent_at_end
from httptrading.errors import BrokerUnavailable, HttpTradingError, Rejected, TimedOut
from httptrading.model import Fill, Order

log = logging.getLogger("httptrading.interactive_brokers")

DELAYED_IF_NOT_LIVE = 3
"""reqMarketDataType: TWS sends live data where the account may see it, else delayed data
(interactivebrokers.github.io/tws-api/market_data_type.html)."""

CLIENT_ID_IN_USE = 326
LINK_LOST = {1100, 2110}  # TWS runs but has no connection to IB's servers
LINK_RESTORED = {1101, 1102}
PORT_CHANGED = 1300
UNLINKED = "TWS is running but has no connection to IB's servers; it reconnects by itself"

UNLINKED_LIMIT = 60.0
"""Seconds since TWS last said so (it repeats it, IbcAlpha/IBC#143) for which it is believed."""

ALIVE_LIMIT = 4.0
"""Seconds within which TWS must tell the time."""

ASK_LIMIT = 5.0
"""Seconds within which TWS must answer anything else; a connection serves one operation at a time,
and a cancellation may be waiting."""

DOUBT_GRACE = 0.5
"""Seconds for an order's status after an error that may be a refusal."""

UNANSWERED = "TWS did not answer in time"
HUNG_UP = "TWS closed the connection"

EXECUTION = 11
EXECUTION_TIME = 15  # its field (decoder.py, execDetails)
POSITION = 61
LISTED_MESSAGES = (5, EXECUTION, 101, POSITION)
"""openOrder, execDetails, completedOrder, position: what cannot be read is missing in a list."""

HEARTBEAT = 20.0
"""Seconds between looks whether a silent TWS is still there, and our open orders."""

_Answer = TypeVar("_Answer")


def load_sdk() -> Any:
    """ib_insync, or its successor where that is what is installed; they share their interface."""
    name = "ib_insync" if importlib.util.find_spec("ib_insync") else "ib_async"
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET:
        # It reports every refused attempt to connect, and warnings as errors; we say it ourselves.
        logger.setLevel(logging.CRITICAL)
    return importlib.import_module(name)


@dataclass(frozen=True)
class Ears:
    """Whom a session tells what it learns; all are called on its loop."""

    on_lost: Callable[[str], None]
    on_order: Callable[[BookedOrder], None]
    on_fill: Callable[[Fill], None]


class TwsSession:
    """From connecting to closing; never used twice. `account` is known once it is open."""

    def __init__(
        self,
        host: str,
        port: int,
        client_id: int,
        timeout: float,
        account: str,
        zone: ZoneInfo | None,
        ears: Ears,
    ) -> None:
        self.client_id = client_id
        self.account = account
        self.book = OrderBook(client_id)
        self.sdk = load_sdk()
        self._host, self._port, self._timeout = host, port, timeout
        self._zone = zone
        self._ears = ears
        self._changed = asyncio.Event()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._named: dict[str, asyncio.Future[Any]] = {}
        self._told: dict[str, Order] = {}
        self._lists: list[dict[BookedOrder, None]] = []  # being made, in TWS's order
        self._late: set[str] = set()  # lists that did not come in time for the start
        self._doubtful: set[BookedOrder] = set()  # an error may have ended them
        self._unread = 0  # messages about orders and positions that could not be read
        self._quotes: dict[int, Ticks] = {}
        self._heard: dict[int, list[tuple[int, str]]] = {}  # errors about orders being watched
        self._is_live = False  # synchronised, and not closing
        self._is_linked = True
        self._unlinked_at = 0.0
        self._lost_by = HUNG_UP
        self._failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.ib = self._new_client()

    # --- life -------------------------------------------------------------------------------
    async def open(self) -> None:
        """Connects and synchronises, or raises BrokerUnavailable with what to do about it."""
        await _end_of_outage()
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            async with asyncio.timeout_at(deadline):
                await self._shake_hands()
            with self._listing() as listed:
                await self._synchronise(deadline)
        except TimeoutError:
            raise BrokerUnavailable(
                f"TWS at {self._host}:{self._port} does not answer: is it logged in, is the API "
                "enabled (Configure > API > Settings), is no dialog waiting for an answer?"
            ) from None
        except TimedOut as late:
            raise BrokerUnavailable(
                f"{late.text}; TWS at {self._host}:{self._port} took the connection: is no dialog "
                "waiting for an answer?"
            ) from None
        except ConnectionError:
            raise BrokerUnavailable(f"TWS at {self._host}:{self._port} hung up") from None
        except Rejected as refused:  # the Read-Only API does not even list orders
            raise BrokerUnavailable(f"TWS does not let the gateway in: {refused.text}") from None
        self._is_live = True
        self._start(self._beat())
        if self._late:  # whoever lists orders now is refused, and would not learn of these
            for booked in listed:
                if booked.perm_id and self.shows(booked):
                    self._ears.on_order(booked)

    def _new_client(self) -> Any:
        """A fresh SDK object whose messages pass our ears first.

        A used one keeps the orders of its earlier connection, with a permId of 0 where they had
        none. Its own reaction to 1102 is taken out: each time it opens one account summary more,
        and TWS refuses the third.
        """
        ib = self.sdk.IB()
        ib.errorEvent -= ib._onError
        ib.RaiseRequestErrors = True
        ib.wrapper.clientId = self.client_id
        ib.wrapper.completedOrder = _only_asked_for(ib.wrapper)
        for name, ear in (
            ("openOrder", self._on_open_order),
            ("completedOrder", self._on_completed_order),
            ("execDetails", self._on_execution),
            ("orderBound", self.book.bound),
            ("error", self._on_error),
        ):
            setattr(ib.wrapper, name, self._first(ear, getattr(ib.wrapper, name)))
        # The SDKs write the order with all its fills so far into a line for the log, with each
        # status (wrapper.py, orderStatus): the loop would stand still under a large order's fills.
        ib.wrapper.orderStatus = self._first(self._on_order_status, lambda *_: None)
        for name, take in (
            ("priceSizeTick", Ticks.price),
            ("tickString", Ticks.string),
            ("tickGeneric", Ticks.number),
            ("tickSnapshotEnd", Ticks.end),
            ("marketDataType", Ticks.kind),
        ):
            setattr(ib.wrapper, name, self._quote_ear(take, getattr(ib.wrapper, name)))
        handlers = ib.client.decoder.handlers
        handlers[EXECUTION] = self._timed(handlers[EXECUTION])
        for number in LISTED_MESSAGES:
            handlers[number] = self._counted(handlers[number])
        ib.client.conn.hasData += self._on_data
        ib.client.apiError += self._on_api_error
        ib.disconnectedEvent += self._on_disconnected
        return ib

    async def _shake_hands(self) -> None:
        """Opens the socket and starts the API session.

        A client id in use surfaces in the SDK as a time-out only: the error that says so, and the
        end of the socket, are awaited beside it.
        """
        connecting = asyncio.ensure_future(
            self.ib.client.connectAsync(self._host, self._port, self.client_id, self._timeout)
        )
        try:
            await asyncio.wait({connecting, self._failure}, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                raise BrokerUnavailable(self._failure.result())
            await connecting
        except (TimeoutError, BrokerUnavailable):
            raise
        except OSError:
            raise BrokerUnavailable(
                f"Nothing listens at {self._host}:{self._port}: start TWS or IB Gateway and enable "
                "its API"
            ) from None
        finally:
            connecting.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await connecting
        self._set(drop_unsent_at_end)
        managed = self.ib.client.getAccounts()
        if not self.account and len(managed) == 1:
            self.account = managed[0]
        if self.account not in managed:
            raise BrokerUnavailable(
                "The login of TWS does not manage the account in account_id"
                if self.account
                else "The login of TWS manages several accounts: choose one with account_id"
            )

    async def _synchronise(self, deadline: float) -> None:
        """Learns every order TWS knows. Own orders first: that binds them to this connection.

        Some TWS never end the lists of what is over (ib_async#54, #82, ib_insync#224, #355, #638):
        these are waited for until the deadline, and then the gateway trades without them.
        """
        ib, now = self.ib, asyncio.get_running_loop().time
        if self.client_id == 0:
            ib.client.reqAutoOpenOrders(True)  # orders made by hand in TWS become ours
        ib.client.reqMarketDataType(DELAYED_IF_NOT_LIVE)
        await self.ask_named("openOrders", ib.reqOpenOrdersAsync, deadline - now())
        await self.ask_named("openOrders", ib.reqAllOpenOrdersAsync, deadline - now())
        over = {
            self._start(self._completed(None)): "completedOrders",
            self._start(self._executions_at_last()): "executions",
        }
        answered, late = await asyncio.wait(
            over, timeout=deadline - now(), return_when=asyncio.FIRST_EXCEPTION
        )
        for task in answered:
            task.result()
        if not self._is_linked:
            raise BrokerUnavailable(UNLINKED)
        for task in late:
            log.warning("TWS has not answered %s: orders cannot be listed before", over[task])
            self._late.add(over[task])
            task.add_done_callback(lambda task: self._arrived(over[task], task))

    def _arrived(self, name: str, task: asyncio.Task[None]) -> None:
        self._late.discard(name)
        if not task.cancelled():
            task.exception()  # noted: the next list meets the same

    async def close(self) -> None:
        """Keeps the socket while TWS has no connection to IB's servers: it tells its open
        connections of the end (1101, 1102), and a new one perhaps not even of the outage."""
        if self.awaits_link:
            _UNLINKED[asyncio.get_running_loop()] = self
            return
        self._is_live = False
        ib, self.ib = self.ib, None
        if ib is None:
            return
        for task in self._tasks:
            task.cancel()
        ib.client.disconnect()  # the one of IB itself raises when the session was not complete
        await asyncio.sleep(0)  # the transport closes in the loop's next turn

    def abort(self) -> None:
        """Breaks the socket; from any thread."""
        transport = self._transport()
        if transport is not None:
            with suppress(OSError):
                transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def _lose(self, reason: str) -> None:
        """Gives the connection up: whoever waits for an answer hears of it at once."""
        if self._lost_by == HUNG_UP:
            self._lost_by = reason
        self._ears.on_lost(reason)
        self._hang_up()

    def _hang_up(self) -> None:
        transport = self._transport()
        if transport is not None:
            transport.abort()

    def _transport(self) -> Any:
        return self.ib.client.conn.transport if self.ib is not None else None

    def _set(self, option: Callable[[Options], None]) -> None:
        transport = self._transport()
        if transport is not None:
            with suppress(OSError):  # closed meanwhile
                option(transport.get_extra_info("socket"))

    def _start(self, work: Coroutine[Any, Any, _Answer]) -> asyncio.Task[_Answer]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _beat(self) -> None:
        """Notices a TWS that is gone without closing its socket, and an order of ours that ended
        without a word."""
        try:
            while True:
                await asyncio.sleep(HEARTBEAT)
                if await self.check_alive():
                    with suppress(HttpTradingError):
                        await self._look_for_ours()
        finally:  # also when the worker ends in an outage, see `close`
            if _UNLINKED.get(asyncio.get_running_loop()) is self:
                del _UNLINKED[asyncio.get_running_loop()]
            self._hang_up()

    async def _look_for_ours(self) -> None:
        """Asks what became of our open orders that TWS does not list as open: "There are not
        guaranteed to be orderStatus callbacks for every change" (tws-api/order_submission.html)."""
        ours = self.book.open_of_ours()
        if not ours:
            return
        with self._listing() as listed:
            await self.ask_named("openOrders", self.ib.reqAllOpenOrdersAsync)
        if any(booked not in listed and not booked.is_final for booked in ours):
            for booked in await self.list_orders():
                self._tell(booked)

    async def check_alive(self, seconds: float = ALIVE_LIMIT) -> bool:
        """Whether TWS answers and has a connection to IB's servers."""
        if self.awaits_link:
            return False
        try:
            async with asyncio.timeout(seconds):
                await self.current_time()
        except (TimeoutError, HttpTradingError):
            self._lose("TWS does not answer")
            return False
        return self._is_linked

    @property
    def is_open(self) -> bool:
        return self._has_socket and self._is_linked

    @property
    def awaits_link(self) -> bool:
        """Whether TWS has said that IB's servers are away, and can still say that they are back."""
        is_recent = asyncio.get_running_loop().time() < self._unlinked_at + UNLINKED_LIMIT
        return self._is_live and self._has_socket and not self._is_linked and is_recent

    @property
    def _has_socket(self) -> bool:
        return self.ib is not None and bool(self.ib.client.isReady())

    def client(self) -> Any:
        """The SDK's client, when it can reach IB's servers."""
        if not self._is_linked:
            raise BrokerUnavailable(UNLINKED)
        if not self._has_socket:
            raise BrokerUnavailable("The connection to TWS is broken; nothing was sent")
        return self.ib.client

    # --- asking -----------------------------------------------------------------------------
    async def ask_named(
        self,
        name: str,
        request: Callable[[], Awaitable[_Answer]],
        seconds: float | None = ASK_LIMIT,
    ) -> _Answer:
        """A request without an id: the SDK keeps one future under its name, so one at a time.

        Its answer is awaited even when nobody wants it any more: it would be taken for the next
        one's. When none comes the connection is replaced.
        """
        lock = self._locks[name]
        await lock.acquire()
        asking = self._start(self._answer(name, request, seconds))

        def ended(asked: asyncio.Task[_Answer]) -> None:
            lock.release()
            if not asked.cancelled():
                asked.exception()  # looked at: there may be nobody who still waits

        asking.add_done_callback(ended)
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self.doubt()
            raise

    async def _answer(
        self, name: str, request: Callable[[], Awaitable[_Answer]], seconds: float | None
    ) -> _Answer:
        self.client()
        try:
            self._named[name] = asyncio.ensure_future(request())
            async with asyncio.timeout(seconds):
                answer: _Answer = await self._named[name]
            return answer
        except TimeoutError:
            self._lose(f"TWS left {name} unanswered")
            raise TimedOut(f"{UNANSWERED} ({name})") from None
        except ConnectionError:
            raise BrokerUnavailable(self._lost_by) from None
        finally:
            self._named.pop(name, None)

    async def ask(
        self,
        request: Callable[[], Awaitable[_Answer]],
        *,
        absent: int = 0,
    ) -> _Answer | None:
        """A request with an id of its own; None for the error that means "there is none"."""
        self.client()
        try:
            async with asyncio.timeout(ASK_LIMIT):
                return await request()
        except asyncio.CancelledError:
            self.doubt()
            raise
        except TimeoutError:
            self.doubt()
            raise TimedOut(UNANSWERED) from None
        except ConnectionError:
            raise BrokerUnavailable(self._lost_by) from None
        except self.sdk.wrapper.RequestError as error:
            if error.code == absent:
                return None
            raise refusal(error.code, error.message) from None

    async def current_time(self) -> datetime:
        now: datetime = await self.ask_named("currentTime", self.ib.reqCurrentTimeAsync)
        return now

    async def positions(self) -> list[Any]:
        """The SDK's positions of all accounts, complete; TimedOut when one could not be read, or
        has no quantity that is one (an unset number arrives as a huge one)."""
        unread = self._unread
        held: list[Any] = await self.ask_named("positions", self.ib.reqPositionsAsync)
        if self.is_open:
            self.ib.client.cancelPositions()
        if self._unread != unread or not all(abs(each.position) < UNSET for each in held):
            raise TimedOut(
                "TWS told of a position that could not be read, and a list without it would not be "
                "true; look in TWS itself"
            )
        return held

    def doubt(self) -> None:
        """Something was not answered in time: is TWS still there?"""
        if self._is_live:
            self._start(self.check_alive(ALIVE_LIMIT / 2))

    async def list_orders(self) -> list[BookedOrder]:
        """Refreshes the book with every open and completed order and today's executions; the
        orders TWS told of. TimedOut when one of them could not be read: the list is not complete
        then, and an order must not count as missing."""
        if self._late:
            raise TimedOut(f"{UNANSWERED} ({', '.join(sorted(self._late))})")
        unread, doubtful = self._unread, set(self._doubtful)
        with self._listing() as listed:
            await self.ask_named("openOrders", self.ib.reqAllOpenOrdersAsync)
            await self._completed(ASK_LIMIT)
            await self._executions()
        if self._unread != unread and self._is_live:
            raise TimedOut("TWS listed an order that could not be read; the log has more")
        for booked in doubtful - listed.keys():
            if booked.is_doubtful:
                booked.is_rejected = True
                self._tell(booked)
        self._doubtful = {each for each in self._doubtful if each.is_doubtful}
        return list(listed)

    async def _settle_doubts(self) -> None:
        """After an error that may have ended an order: TWS's lists tell, unless a status does."""
        await asyncio.sleep(DOUBT_GRACE)
        if any(each.is_doubtful for each in self._doubtful):
            with suppress(HttpTradingError):
                await self.list_orders()

    async def _completed(self, seconds: float | None) -> None:
        ib = self.ib
        await self.ask_named("completedOrders", lambda: ib.reqCompletedOrdersAsync(False), seconds)

    async def list_executions(self) -> None:
        """Refreshes the book with today's executions; TimedOut when one could not be read."""
        unread = self._unread
        await self._executions()
        if self._unread != unread:
            raise TimedOut("TWS listed an execution that could not be read; the log has more")

    async def _executions(self) -> None:
        await self.ask(self.ib.reqExecutionsAsync)

    async def _executions_at_last(self) -> None:
        """Asks until there is an answer: each request has an id, so no answer is mistaken."""
        while True:
            with suppress(TimedOut):
                return await self._executions()

    @contextmanager
    def _listing(self) -> Iterator[dict[BookedOrder, None]]:
        """Collects the orders that TWS tells of."""
        listed: dict[BookedOrder, None] = {}
        self._lists.append(listed)
        try:
            yield listed
        finally:
            self._lists = [each for each in self._lists if each is not listed]

    def _list(self, booked: BookedOrder) -> BookedOrder:
        for listed in self._lists:
            listed[booked] = None
        return booked

    # --- what TWS says ------------------------------------------------------------------------
    def _on_data(self, _data: bytes) -> None:
        self._set(acknowledge_at_once)

    def _on_open_order(self, _api_id: int, contract: Any, order: Any, state: Any) -> None:
        if not order.whatIf:
            self._tell(self._list(self.book.open_order(contract, order, state)))

    def _on_order_status(
        self,
        api_id: int,
        status: str,
        filled: float,
        _remaining: float,
        average: float,
        perm_id: int,
        _parent_id: int,
        _last_price: float,
        client_id: int,
        *_: Any,
    ) -> None:
        self._tell(self.book.order_status(api_id, status, filled, average, perm_id, client_id))

    def _on_completed_order(self, contract: Any, order: Any, state: Any) -> None:
        self._tell(self._list(self.book.completed_order(contract, order, state)))

    def _on_execution(self, request_id: int, contract: Any, execution: Any) -> None:
        booked, fill = self.book.execution(contract, execution)
        self._list(booked)
        if execution.acctNumber != self.account:
            return
        if fill is not None and booked.perm_id:  # listed as well: TWS forgets it at midnight
            self._ears.on_fill(fill)
        is_push = request_id < 0
        if is_push and self._is_live:
            self._tell(booked)

    def _on_error(self, request_id: int, code: int, text: str, *_: Any) -> None:
        if code == CLIENT_ID_IN_USE:
            self._fail(
                f"Client id {self.client_id} is in use by another program at this TWS: close that "
                "one or choose another client_id (trying again)"
            )
        elif code in LINK_LOST:
            self._is_linked = False
            self._unlinked_at = asyncio.get_running_loop().time()
            self._fail_named(BrokerUnavailable(UNLINKED))
            if self._is_live:
                self._lost_by = UNLINKED
                for future in self.ib.wrapper._futures.values():
                    if not future.done():
                        future.set_exception(ConnectionError(UNLINKED))
                self._ears.on_lost(UNLINKED)
        elif code in LINK_RESTORED:
            self._is_linked = True
            if self._is_live:
                self._lose("TWS is connected to IB's servers again; reading everything anew")
        elif code == PORT_CHANGED:
            self._lost_by = text
        elif request_id in self._quotes:
            if code in PARTLY_UNSUBSCRIBED:
                self._quotes[request_id].advice = (code, text)
            elif is_refusal(code):
                self._quotes[request_id].error = (code, text)
        elif self._is_about_order(request_id, code):
            if request_id in self._heard:
                self._heard[request_id].append((code, text))
            booked = self.book.error(request_id, code, text)
            if booked is not None:
                self._tell(booked)
                if booked.is_doubtful and self._is_live:
                    self._doubtful.add(booked)
                    self._start(self._settle_doubts())
        elif request_id > 0 and is_refusal(code):
            # ib_async takes 321 for a warning (wrapper.py, error): the request would wait for ever.
            failed = self.sdk.wrapper.RequestError(request_id, code, text)
            self.ib.wrapper._endReq(request_id, failed, success=False)
        elif request_id <= 0 and code in ABOUT_A_REQUEST:
            self._fail_named(refusal(code, text))
        elif request_id <= 0 and code == NOT_CONNECTED:
            self._fail_named(BrokerUnavailable(f"{text} (IB error {code})"))
        self._changed.set()

    def _is_about_order(self, number: int, code: int) -> bool:
        """Orders and the SDK's own requests are numbered together; an order made by hand has a
        negative number, and -1 is said of nothing in particular as well."""
        if number < 0:
            return self.book.own(number) is not None and (number < -1 or code in ABOUT_A_CANCEL)
        return number > 0 and self.ib is not None and number not in self.ib.wrapper._futures

    def _fail_named(self, error: HttpTradingError) -> None:
        for future in self._named.values():
            if not future.done():
                future.set_exception(error)

    def _on_api_error(self, text: str) -> None:
        if text.startswith("API connection failed"):
            return  # raised as well
        self._fail(
            f"TWS at {self._host}:{self._port} hung up at once: is this host among its trusted "
            "IPs, and is it logged in?"
        )

    def _fail(self, text: str) -> None:
        if not self._failure.done():
            self._failure.set_result(text)

    def _on_disconnected(self) -> None:
        self._changed.set()
        if self._is_live:
            self._ears.on_lost(self._lost_by)

    def _tell(self, booked: BookedOrder) -> None:
        """Wakes who waits for an order, and reports what is new: TWS repeats itself a lot."""
        self._changed.set()
        if (
            booked.is_canceled
            and booked.api_id in self._heard
            and self.book.own(booked.api_id) is booked
        ):
            return  # the reason may follow; see `hearing`
        order = booked.order()
        if booked.perm_id and self.shows(booked) and self._told.get(order.order_id) != order:
            self._told[order.order_id] = order
            if self._is_live:
                self._ears.on_order(booked)

    def is_ours(self, booked: BookedOrder) -> bool:
        return booked.account == self.account

    def shows(self, booked: BookedOrder) -> bool:
        """Whether an order is reported. One that has no permanent id yet only when it may be the
        gateway's: some that others made never get one."""
        may_be_known = booked.perm_id or booked.mark or booked.client_id == self.client_id
        return bool(may_be_known) and booked.is_described and self.is_ours(booked)

    def _first(self, ear: Callable[..., None], then: Callable[..., Any]) -> Callable[..., Any]:
        """Calls ours, then the SDK's own handler of a message."""

        def hear(*arguments: Any) -> Any:
            try:
                ear(*arguments)
            except Exception:
                self._unread += 1
                log.exception("a message of TWS could not be understood")
            return then(*arguments)

        return hear

    def _timed(self, handler: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
        """Spells the time of an execution so that the SDK reads it right."""

        def decode(fields: list[str]) -> None:
            time = execution_time(fields[EXECUTION_TIME], self._zone)
            handler([*fields[:EXECUTION_TIME], time, *fields[EXECUTION_TIME + 1 :]])

        return decode

    def _counted(self, handler: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
        """Notes what the SDK cannot decode; it only logs it and goes on."""

        def decode(fields: list[str]) -> None:
            try:
                handler(fields)
            except Exception:
                self._unread += 1
                raise

        return decode

    def _quote_ear(self, take: Callable[..., None], then: Callable[..., Any]) -> Callable[..., Any]:
        """Takes a tick of our own quotes; the SDK would complain that it knows no such request."""

        def hear(request_id: int, *values: Any) -> Any:
            ticks = self._quotes.get(request_id)
            if ticks is None:
                return then(request_id, *values)
            take(ticks, *values)
            self._changed.set()
            return None

        return hear

    async def change(self, seconds: float | None = None) -> bool:
        """Waits until TWS says something of orders or quotes; False when it did not in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True

    @contextmanager
    def receiving(self, request_id: int) -> Iterator[Ticks]:
        """Collects the ticks that answer one quote request."""
        ticks = self._quotes[request_id] = Ticks()
        try:
            yield ticks
        finally:
            del self._quotes[request_id]
            if self.is_open and not (ticks.is_ended or ticks.error):
                self.ib.client.cancelMktData(request_id)

    @contextmanager
    def hearing(self, api_id: int) -> Iterator[list[tuple[int, str]]]:
        """Collects the errors about one order while it is placed or cancelled. That it is cancelled
        is reported afterwards: final as it is, a reason that comes behind it would be too late."""
        heard = self._heard[api_id] = []
        try:
            yield heard
        except asyncio.CancelledError:
            self.doubt()
            raise
        finally:
            del self._heard[api_id]
            booked = self.book.own(api_id)
            if booked is not None:
                self._tell(booked)


_UNLINKED: dict[asyncio.AbstractEventLoop, TwsSession] = {}
"""The session that awaits the end of an outage, by the loop of its worker, which has one only."""


async def _end_of_outage() -> None:
    """Raises BrokerUnavailable while an earlier session still awaits the end of the outage."""
    waiting = _UNLINKED.get(asyncio.get_running_loop())
    if waiting is not None:
        if waiting.awaits_link:
            raise BrokerUnavailable(UNLINKED)
        await waiting.close()


def _only_asked_for(wrapper: Any) -> Callable[..., None]:
    """The SDK's own handler of completedOrder fails without a request that is running, and TWS
    tells of some unasked (ib_insync#683, ib_async#128, #150)."""
    take = wrapper.completedOrder

    def handle(*arguments: Any) -> None:
        if "completedOrders" in wrapper._results:
            take(*arguments)

    return handle
