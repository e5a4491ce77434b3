"""What TWS has said about orders: kept raw, because the SDKs' own view of it is wrong at times.

ib_insync and ib_async mark an order cancelled on any error code outside a short list, so also a
working one (10349), and forget everything when the connection breaks. The book takes the same
messages (openOrder, orderStatus, completedOrder, execDetails, error) and keeps status, quantities
and reasons as TWS sent them. It knows no SDK: its arguments are the SDK's objects, read by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from itertools import takewhile
from typing import Any

from httptrading.model import (
    Contract,
    Fill,
    Lifecycle,
    Order,
    OrderReport,
    OrderType,
    TimeInForce,
    TradeType,
    exact,
)

# --- status words (ib_insync/order.py; interactivebrokers.github.io/tws-api/order_submission.html)
CANCELED = {"Cancelled", "ApiCancelled"}
WORKING = {"PreSubmitted", "Submitted"}
FINAL = {"Filled", *CANCELED}
DEAD_IF_REFUSED = {"Inactive", *CANCELED}
# Everything else, known or new (ApiPending, PendingSubmit, PendingCancel, Inactive …), is alive: an
# Inactive order may become active again unless an error has said why it is dead.

# --- error codes (interactivebrokers.github.io/tws-api/message_codes.html)
CANCEL_CONFIRMED = 202
REJECTED = 201
NOT_ABOUT_FATE = frozenset(
    {
        *(165, 399, 404, 492),  # held, or a remark: the order stays
        *(1100, 1101, 1102, 1300),  # about the connection
        *(10147, 10148, 161),  # about a request to cancel
        10167,  # delayed data
        10349,  # "TIF was set to DAY based on order preset": the order works
        *range(2100, 2200),  # warnings
    }
)
"""Codes that say nothing about whether an order lives. Any other is a refusal when it comes before
the order ever worked, and is none when it works afterwards. 201 is one at any time, but of an order
that works it may be about a change made in TWS, which leaves the order as it was (ib_async's
wrapper.py, error): that is for TWS's lists to say."""

# --- symbols and markets
EXCHANGE_REGIONS = {
    "SEHK": "HK",
    **dict.fromkeys(("SEHKNTL", "SEHKSZSE", "SEHKSTAR", "CHINEXT"), "CN"),
}
CURRENCY_REGIONS = {"USD": "US", "HKD": "HK", "CNH": "CN", "CNY": "CN"}
ORDER_TYPES = {"LMT": OrderType.Limit, "MKT": OrderType.Market}
TIMES_IN_FORCE = {"DAY": TimeInForce.DAY, "GTC": TimeInForce.GTC}
DIRECTIONS = {"BUY": "BUY", "SELL": "SELL", "SSHORT": "SELL"}
SIDES = {"BOT": "BUY", "SLD": "SELL"}  # of executions
OVERNIGHT_VENUE = "OVERNIGHT"


UNSET = 1e15
"""From here on a number is none: an unset one arrives as 1.7976931348623157E308."""


def quantity(value: float) -> Decimal:
    """A quantity as decimal; 0 for an unset one."""
    return exact(value) if 0 < value < UNSET else Decimal(0)


def region_of(currency: str, *exchanges: str) -> str | None:
    """By exchange where that says it, else by currency; never by what the symbol looks like."""
    for exchange in exchanges:
        if exchange in EXCHANGE_REGIONS:
            return EXCHANGE_REGIONS[exchange]
    return CURRENCY_REGIONS.get(currency)


def to_symbol(region: str, ticker: str) -> str:
    """`BRK.B` → `BRK B`; `00700` → `700`; `000001` stays."""
    if region == "US":
        return ticker.replace(".", " ")
    return ticker.lstrip("0") or "0" if region == "HK" else ticker


def to_ticker(region: str, symbol: str) -> str:
    if region == "US":
        return symbol.replace(" ", ".")
    return symbol.zfill(5 if region == "HK" else 6)


def to_contract(wire: Any) -> Contract | None:
    """The unified contract of an SDK contract; None for all but stocks of the three markets."""
    region = region_of(wire.currency, wire.primaryExchange, wire.exchange)
    if wire.secType != "STK" or region is None:
        return None
    return Contract(TradeType.Securities, to_ticker(region, wire.symbol), region)


def split_revision(execution_id: str) -> tuple[str, str]:
    """`0000e0d5.65f1.01.02` is a correction of `0000e0d5.65f1.01.01`: its revision is the last part
    (interactivebrokers.github.io/tws-api/executions_commissions.html)."""
    execution, _, revision = execution_id.rpartition(".")
    return (execution, revision) if execution else (execution_id, "")


class Executions:
    """An order's executions. Their sums are kept: each of its messages asks for them, and a large
    order has many."""

    def __init__(self) -> None:
        self._fills: dict[str, Fill] = {}  # by the execution's id without its revision
        self._revisions: dict[str, str] = {}
        self._cumulative: dict[str, Decimal] = {}
        self.shares = self.paid = Decimal(0)
        self.cumulative = Decimal(0)  # with those of earlier days, which are not listed

    def add(self, execution_id: str, fill: Fill, cumulative: Decimal) -> bool:
        """False for what was known. A correction repeats an execution under a higher revision.
        `cumulative`: what the order had filled with it (cumQty)."""
        key, revision = split_revision(execution_id)
        before = self._fills.get(key)
        if before is not None:
            if self._revisions[key] > revision:
                return False
            self._count(before, -1)
        self._fills[key], self._revisions[key] = fill, revision
        self._cumulative[key] = cumulative
        self._count(fill, 1)
        if before is None:
            self.cumulative = max(self.cumulative, cumulative)
        else:
            self.cumulative = max(self._cumulative.values())
        return fill != before

    def since(self, filled: Decimal) -> list[Fill]:
        """Those after so much of the order had been filled."""
        keys = takewhile(lambda key: self._cumulative[key] > filled, reversed(self._fills))
        return [self._fills[key] for key in keys]

    def _count(self, fill: Fill, times: int) -> None:
        self.shares += times * exact(fill.qty)
        self.paid += times * exact(fill.qty) * exact(fill.price)

    def in_order(self) -> list[Fill]:
        return sorted(self._fills.values(), key=lambda fill: fill.time)


@dataclass(eq=False)
class BookedOrder:
    """One order as TWS tells it. `api_id` and `client_id` are 0 where TWS does not say them."""

    perm_id: int = 0
    client_id: int = 0
    api_id: int = 0
    account: str = ""
    mark: str = ""
    contract: Any = None
    direction: str | None = None
    wire: Any = None  # the SDK's Order; None while only executions have told of it
    status: str = "PendingSubmit"
    total: Decimal = Decimal(0)
    filled: Decimal = Decimal(0)
    average: Decimal = Decimal(0)
    refusal: str = ""  # an error that may be why the order is dead
    note: str = ""  # the last thing said about the order that is no refusal
    is_rejected: bool = False  # for good, whatever the status word
    has_worked: bool = False
    is_completed: bool = False  # listed by reqCompletedOrders
    executions: Executions = field(default_factory=Executions)

    @property
    def is_described(self) -> bool:
        """Whether TWS has said what the order is, or at least whose: an execution carries the
        mark."""
        return self.wire is not None or bool(self.mark)

    @property
    def filled_qty(self) -> Decimal:
        """Status, executions and the completed list each know a part; none ever too much."""
        return max(self.filled, self.executions.shares, self.executions.cumulative)

    @property
    def avg_price(self) -> Decimal:
        """TWS's average where it covers all that is filled, else that of the executions where they
        do, or both together: executions of earlier days are not listed. 0: not known.

        `Execution.avgPrice` is cumulative per execution and no average of anything.
        """
        filled, executions = self.filled_qty, self.executions
        if not filled:
            return Decimal(0)
        if self.filled == filled and self.average:
            return self.average
        if executions.shares == filled:
            return executions.paid / filled
        since = executions.since(self.filled) if self.average else []
        if self.filled + sum(exact(fill.qty) for fill in since) != filled:
            return Decimal(0)
        paid = sum((exact(fill.qty) * exact(fill.price) for fill in since), Decimal(0))
        return (self.filled * self.average + paid) / filled

    @property
    def qty(self) -> Decimal:
        """0 while it is not known: executions may be of a part, and an order for an amount of money
        (cashQty) has no total."""
        if not self.total and self.status != "Filled":
            return Decimal(0)
        # A filled order in the completed list has a total of 0 and a filledQuantity.
        return max(self.total, self.filled_qty)

    @property
    def error_reason(self) -> str:
        if self.status == "Filled" or self.filled_qty >= self.qty > 0:
            return ""
        if self.is_rejected or self.refusal and self.status in DEAD_IF_REFUSED:
            return self.refusal
        if self.is_completed and self.status == "Inactive":
            return self.note or "Inactive"
        return ""

    @property
    def is_refused(self) -> bool:
        """Whether nothing came of it: a part that was filled before is no refusal."""
        return bool(self.error_reason) and not self.filled_qty

    @property
    def is_canceled(self) -> bool:
        return self.status in CANCELED and not self.error_reason

    @property
    def is_pending_cancel(self) -> bool:
        return self.status == "PendingCancel"

    @property
    def is_doubtful(self) -> bool:
        """Whether an error may have ended it, and no status has said so."""
        return bool(self.refusal) and not self.is_final

    @property
    def is_final(self) -> bool:
        return self.order().is_completed

    def order(self) -> Order:
        return Order(
            order_id=str(self.perm_id or ""),
            currency=self.contract.currency if self.contract is not None else "",
            qty=self.qty,
            filled_qty=self.filled_qty,
            avg_price=self.avg_price,
            error_reason=self.error_reason,
            is_canceled=self.is_canceled,
            is_pending_cancel=self.is_pending_cancel,
        )

    def report(self) -> OrderReport:
        wire, contract = self.wire, self.contract
        if wire is None:
            return OrderReport(self.order(), self.mark, to_contract(contract), self.direction)
        order_type = ORDER_TYPES.get(wire.orderType)
        is_priced = order_type is OrderType.Limit and abs(wire.lmtPrice) < UNSET
        lifecycle = Lifecycle.ETH if wire.outsideRth else Lifecycle.RTH
        if contract.exchange == OVERNIGHT_VENUE:
            lifecycle = Lifecycle.OVERNIGHT
        return OrderReport(
            order=self.order(),
            mark=self.mark,
            contract=to_contract(contract),
            direction=self.direction,
            order_type=order_type,
            price=exact(wire.lmtPrice) if is_priced else None,
            time_in_force=TIMES_IN_FORCE.get(wire.tif),
            lifecycle=lifecycle,
        )


class OrderBook:
    """Every order that this connection has heard of, by permId: the account-wide id that survives
    restarts of TWS. An order just sent has none yet and is found by the API's own id."""

    def __init__(self, client_id: int) -> None:
        self._client_id = client_id
        self._by_perm: dict[int, BookedOrder] = {}
        self._by_api: dict[tuple[int, int], BookedOrder] = {}
        self._sent: dict[int, str] = {}  # API id → mark, of this connection's orders
        self._errors: dict[int, list[tuple[int, str]]] = {}  # errors before their order

    def get(self, perm_id: int) -> BookedOrder | None:
        return self._by_perm.get(perm_id)

    def own(self, api_id: int) -> BookedOrder | None:
        """Our order with this API id; its permId may come later."""
        return self._by_api.get((self._client_id, api_id))

    def open_of_ours(self) -> list[BookedOrder]:
        return [
            booked
            for booked in self._by_perm.values()
            if booked.api_id and booked.client_id == self._client_id
            if booked.status not in FINAL and not booked.is_final
        ]

    def fills(self, perm_id: int) -> list[Fill]:
        booked = self._by_perm.get(perm_id)
        made = [] if booked is None else booked.executions.in_order()
        # An execution may have come before the permId.
        return [replace(fill, order_id=str(perm_id)) for fill in made]

    def sending(self, api_id: int, mark: str) -> None:
        """What was said under this id so far was about another order: TWS numbers anew after
        "Reset API order ID sequence", and where its settings are gone."""
        self._sent[api_id] = mark
        self._by_api.pop((self._client_id, api_id), None)
        self._errors.pop(api_id, None)

    def _booked(self, client_id: int, api_id: int, perm_id: int) -> BookedOrder:
        # TWS binds orders made by hand to client 0, under negative ids by default
        # (interactivebrokers.github.io/tws-api/open_orders.html).
        is_named = api_id > 0 or (api_id < 0 and client_id == self._client_id == 0)
        booked = self._by_perm.get(perm_id) if perm_id else None
        if booked is None and is_named:
            booked = self._by_api.get((client_id, api_id))
        if booked is None or perm_id and booked.perm_id not in (0, perm_id):
            booked = BookedOrder()
        if perm_id:
            booked.perm_id = perm_id
            self._by_perm[perm_id] = booked
        if is_named:
            booked.client_id, booked.api_id = client_id, api_id
            self._by_api[client_id, api_id] = booked
        if client_id == self._client_id:
            for code, text in self._errors.pop(api_id, ()):
                self._blame(booked, code, text)
        return booked

    # --- what TWS says ------------------------------------------------------------------------
    def bound(self, perm_id: int, client_id: int, api_id: int) -> None:
        """An order made by hand has got an API id."""
        self._booked(client_id, api_id, perm_id)

    def open_order(self, contract: Any, order: Any, state: Any) -> BookedOrder:
        booked = self._booked(order.clientId, order.orderId, order.permId)
        self._describe(booked, contract, order)
        booked.total = quantity(order.totalQuantity)
        self._move(booked, state.status)
        return booked

    def order_status(
        self,
        api_id: int,
        status: str,
        filled: float,
        average: float,
        perm_id: int,
        client_id: int,
    ) -> BookedOrder:
        booked = self._booked(client_id, api_id, perm_id)
        shares = quantity(filled)
        if shares >= booked.filled:  # messages are repeated, and may overtake each other
            booked.filled, booked.average = shares, quantity(average)
        self._move(booked, status)
        return booked

    def completed_order(self, contract: Any, order: Any, state: Any) -> BookedOrder:
        booked = self._booked(0, 0, order.permId)
        self._describe(booked, contract, order)
        booked.is_completed = True
        if (shares := quantity(order.filledQuantity)) > booked.filled:
            booked.filled, booked.average = shares, Decimal(0)  # the average was of a part
        booked.total = max(booked.total, quantity(order.totalQuantity))
        self._move(booked, state.status)
        if "reject" in state.completedStatus.lower():
            booked.refusal, booked.is_rejected = booked.refusal or state.completedStatus, True
        booked.note = state.completedStatus or booked.note
        return booked

    def execution(self, contract: Any, execution: Any) -> tuple[BookedOrder, Fill | None]:
        """The order, and its fill if that is news.

        It may be all that TWS says of an order: one that fills at once commonly has no orderStatus
        (interactivebrokers.github.io/tws-api/order_submission.html), and after a reconnect a filled
        one may be in no other list (erdewit/ib_insync#130, #365).

        Its API id counts only beside the mark sent with that id: executions of a whole day are
        listed, and the numbers may have begun anew since. ValueError for one without numbers: it
        would stay in the sums, and what is filled never goes back.
        """
        if not (abs(execution.shares) < UNSET and abs(execution.price) < UNSET):
            raise ValueError("an execution without shares or price")
        is_sent = bool(execution.orderRef) and (
            self._sent.get(execution.orderId) == execution.orderRef
        )
        api_id = execution.orderId if is_sent and execution.clientId == self._client_id else 0
        booked = self._booked(execution.clientId, api_id, execution.permId)
        if booked.wire is None:
            booked.contract, booked.direction = contract, SIDES.get(execution.side)
            booked.account, booked.mark = execution.acctNumber, execution.orderRef
        fill = Fill(
            # Without the revision: whoever keeps fills by their id counts a correction once.
            fill_id=split_revision(execution.execId)[0],
            order_id=str(booked.perm_id),
            qty=exact(execution.shares),
            price=exact(execution.price),
            time=_aware(execution.time),
        )
        is_news = booked.executions.add(execution.execId, fill, quantity(execution.cumQty))
        return booked, fill if is_news else None

    def error(self, api_id: int, code: int, text: str) -> BookedOrder | None:
        """Keeps the words; None when no order with this id of ours is known, or not yet: a
        rejection may come before the first openOrder (erdewit/ib_insync#554)."""
        booked = self._by_api.get((self._client_id, api_id))
        if booked is None:
            self._errors.setdefault(api_id, []).append((code, text))
        else:
            self._blame(booked, code, text)
        return booked

    @staticmethod
    def _blame(booked: BookedOrder, code: int, text: str) -> None:
        if code == REJECTED or is_refusal(code) and not booked.has_worked:
            may_live = booked.status in WORKING or booked.has_worked and booked.is_pending_cancel
            booked.refusal, booked.is_rejected = text, code == REJECTED and not may_live
        else:
            booked.note = text

    @staticmethod
    def _describe(booked: BookedOrder, contract: Any, order: Any) -> None:
        booked.contract, booked.wire = contract, order
        booked.direction = DIRECTIONS.get(order.action)
        booked.account, booked.mark = order.account, order.orderRef

    @staticmethod
    def _move(booked: BookedOrder, status: str) -> None:
        if booked.status in FINAL and status not in FINAL:
            return  # a late repetition of an earlier state
        booked.status = status
        if status in WORKING:  # whatever was said before was no refusal, or one of a change
            booked.has_worked, booked.is_rejected, booked.refusal = True, False, ""


def is_refusal(code: int) -> bool:
    """Whether an error code may mean that an order was not taken."""
    return code not in NOT_ABOUT_FATE and code != CANCEL_CONFIRMED


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.astimezone()
