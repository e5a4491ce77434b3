"""The TWS socket protocol's tables: message numbers, status words, the order of fields.

As ib_insync 0.9.86 and ib_async 2.1.0 write and read them (client.py, decoder.py).
"""

from __future__ import annotations

from decimal import Decimal

from simulators.exchange import OrderStatus

# The status words of orderStatus and openOrder (ib_insync/order.py).
WIRE_STATUS = {
    OrderStatus.PENDING: "PendingSubmit",
    OrderStatus.WORKING: "Submitted",
    OrderStatus.PENDING_CANCEL: "PendingCancel",
    OrderStatus.FILLED: "Filled",
    OrderStatus.CANCELED: "Cancelled",
    OrderStatus.REJECTED: "Inactive",
    OrderStatus.EXPIRED: "Cancelled",
}
# Incoming message numbers and the operation word each is recorded under.
OPERATIONS = {
    1: "quote",
    2: "cancelMktData",
    3: "place",
    4: "cancel",
    5: "orders",
    6: "cash",
    7: "fills",
    9: "contract",
    15: "reqAutoOpenOrders",
    16: "orders",
    49: "ping",
    59: "reqMarketDataType",
    61: "positions",
    62: "cash",
    63: "cancelAccountSummary",
    64: "cancelPositions",
    71: "connect",
    76: "cash",
    99: "orders",
}
PLACE_FIELDS = (
    "orderId conId symbol secType lastTradeDateOrContractMonth strike right multiplier exchange "
    "primaryExchange currency localSymbol tradingClass secIdType secId action totalQuantity "
    "orderType lmtPrice auxPrice tif ocaGroup account openClose origin orderRef transmit parentId "
    "blockOrder sweepToFill displaySize triggerMethod outsideRth hidden"
).split()
CONTRACT_FIELDS = (
    "conId symbol secType lastTradeDateOrContractMonth strike right multiplier exchange "
    "primaryExchange currency localSymbol tradingClass"
).split()
# The fields of openOrder and completedOrder in their order (Decoder.openOrder, .completedOrder).
ORDER_CONTRACT = (
    "conId symbol secType lastTradeDateOrContractMonth strike right multiplier exchange currency "
    "localSymbol tradingClass"
).split()
OPEN_ORDER = [
    "orderId",
    *ORDER_CONTRACT,
    *"action totalQuantity orderType lmtPrice auxPrice tif ocaGroup account".split(),
    *"openClose origin".split(),
    *"orderRef clientId permId outsideRth hidden discretionaryAmt goodAfterTime _ faGroup".split(),
    *"faMethod faPercentage faProfile modelCode goodTillDate rule80A percentOffset".split(),
    *"settlingFirm shortSaleSlot designatedLocation exemptCode auctionStrategy".split(),
    *"startingPrice stockRefPrice delta stockRangeLower stockRangeUpper displaySize".split(),
    *"blockOrder sweepToFill allOrNone minQty ocaType eTradeOnly firmQuoteOnly".split(),
    *"nbboPriceCap parentId triggerMethod volatility volatilityType".split(),
    *"deltaNeutralOrderType deltaNeutralAuxPrice continuousUpdate referencePriceType".split(),
    *"trailStopPrice trailingPercent basisPoints basisPointsType comboLegsDescrip".split(),
    *"comboLegs orderComboLegs smartComboRoutingParams scaleInitLevelSize".split(),
    *"scaleSubsLevelSize scalePriceIncrement hedgeType optOutSmartRouting".split(),
    *"clearingAccount clearingIntent notHeld deltaNeutralContract algoStrategy solicited".split(),
    *"whatIf status initMarginBefore maintMarginBefore equityWithLoanBefore".split(),
    *"initMarginChange maintMarginChange equityWithLoanChange initMarginAfter".split(),
    *"maintMarginAfter equityWithLoanAfter commission minCommission maxCommission".split(),
    *"commissionCurrency warningText randomizeSize randomizePrice conditions".split(),
    *"adjustedOrderType triggerPrice trailStopPrice lmtPriceOffset adjustedStopPrice".split(),
    *"adjustedStopLimitPrice adjustedTrailingAmount adjustableTrailingUnit".split(),
    *"softDollarTierName softDollarTierVal softDollarTierDisplayName cashQty".split(),
    *"dontUseAutoPriceForHedge isOmsContainer discretionaryUpToLimitPrice".split(),
    *"usePriceMgmtAlgo duration postToAts autoCancelParent minTradeQty minCompeteSize".split(),
    *"competeAgainstBestOffset midOffsetAtWhole midOffsetAtHalf".split(),
]
COMPLETED_ORDER = [
    *ORDER_CONTRACT,
    *"action totalQuantity orderType lmtPrice auxPrice tif ocaGroup account".split(),
    *"openClose origin".split(),
    *"orderRef permId outsideRth hidden discretionaryAmt goodAfterTime faGroup faMethod".split(),
    *"faPercentage faProfile modelCode goodTillDate rule80A percentOffset settlingFirm".split(),
    *"shortSaleSlot designatedLocation exemptCode startingPrice stockRefPrice delta".split(),
    *"stockRangeLower stockRangeUpper displaySize sweepToFill allOrNone minQty ocaType".split(),
    *"triggerMethod volatility volatilityType deltaNeutralOrderType".split(),
    *"deltaNeutralAuxPrice continuousUpdate referencePriceType trailStopPrice".split(),
    *"trailingPercent comboLegsDescrip comboLegs orderComboLegs".split(),
    *"smartComboRoutingParams scaleInitLevelSize scaleSubsLevelSize".split(),
    *"scalePriceIncrement hedgeType clearingAccount clearingIntent notHeld".split(),
    *"deltaNeutralContract algoStrategy solicited status randomizeSize randomizePrice".split(),
    *"conditions trailStopPrice lmtPriceOffset cashQty dontUseAutoPriceForHedge".split(),
    *"isOmsContainer autoCancelDate filledQuantity refFuturesConId autoCancelParent".split(),
    *"shareholder imbalanceOnly routeMarketableToBbo parentPermId completedTime".split(),
    *"completedStatus minTradeQty minCompeteSize competeAgainstBestOffset".split(),
    *"midOffsetAtWhole midOffsetAtHalf".split(),
]
# What TWS sends in the fields of an order that has nothing to say about them.
ORDER_DEFAULTS: dict[str, object] = {
    "origin": 0,
    "auxPrice": 0,
    "exemptCode": -1,
    "ocaType": 3,
    "clearingIntent": "IB",
    "adjustedOrderType": "None",
    "shareholder": "Not an insider or substantial shareholder",
    # Counts of what follows, and flags.
    **dict.fromkeys(
        "comboLegs orderComboLegs smartComboRoutingParams conditions deltaNeutralContract "
        "whatIf".split(),
        0,
    ),
}


def written(field: object) -> str:
    """A field as TWS writes it."""
    if isinstance(field, bool):
        return "1" if field else "0"
    if isinstance(field, Decimal):
        return format(field, "f")
    return str(field)
