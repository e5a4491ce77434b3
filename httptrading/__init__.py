"""One self-hosted HTTP API over several brokers: the public names, and nothing else.

Names are imported on first use, so that `import httptrading` costs nothing and a child process for
an SDK needs neither Flask nor SQLAlchemy.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout app/, brokers/ and schemas/ lie beside this folder; in an installed copy, inside it.
if not Path(__file__).with_name("brokers").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

_HOMES = {
    "run": "httptrading.app.server",
    "create_app": "httptrading.app",
    "create_blueprint": "httptrading.app",
    "InstanceSettings": "httptrading.brokers.settings",
    "BaseBroker": "httptrading.brokers.base",
    "Combination": "httptrading.brokers.base",
    "Window": "httptrading.brokers.base",
    "combine": "httptrading.brokers.base",
    "broker_register": "httptrading.brokers.registry",
    "Paper": "httptrading.brokers.paper",
    "Futu": "httptrading.brokers.futu",
    "Moomoo": "httptrading.brokers.futu",
    "InteractiveBrokers": "httptrading.brokers.interactive_brokers",
    "LongBridge": "httptrading.brokers.longbridge",
    "Tiger": "httptrading.brokers.tiger",
    "HttpTradingError": "httptrading.errors",
    "InvalidRequest": "httptrading.errors",
    "Unsupported": "httptrading.errors",
    "OrderNotFound": "httptrading.errors",
    "BrokerError": "httptrading.errors",
    "Rejected": "httptrading.errors",
    "RateLimited": "httptrading.errors",
    "BrokerUnavailable": "httptrading.errors",
    "Busy": "httptrading.errors",
    "TimedOut": "httptrading.errors",
    "OutcomeUnknown": "httptrading.errors",
}

if TYPE_CHECKING:
    from httptrading.app import create_app as create_app
    from httptrading.app import create_blueprint as create_blueprint
    from httptrading.app.server import run as run
    from httptrading.brokers.base import BaseBroker as BaseBroker
    from httptrading.brokers.base import Combination as Combination
    from httptrading.brokers.base import Window as Window
    from httptrading.brokers.base import combine as combine
    from httptrading.brokers.futu import Futu as Futu
    from httptrading.brokers.futu import Moomoo as Moomoo
    from httptrading.brokers.interactive_brokers import InteractiveBrokers as InteractiveBrokers
    from httptrading.brokers.longbridge import LongBridge as LongBridge
    from httptrading.brokers.paper import Paper as Paper
    from httptrading.brokers.registry import broker_register as broker_register
    from httptrading.brokers.settings import InstanceSettings as InstanceSettings
    from httptrading.brokers.tiger import Tiger as Tiger
    from httptrading.errors import BrokerError as BrokerError
    from httptrading.errors import BrokerUnavailable as BrokerUnavailable
    from httptrading.errors import Busy as Busy
    from httptrading.errors import HttpTradingError as HttpTradingError
    from httptrading.errors import InvalidRequest as InvalidRequest
    from httptrading.errors import OrderNotFound as OrderNotFound
    from httptrading.errors import OutcomeUnknown as OutcomeUnknown
    from httptrading.errors import RateLimited as RateLimited
    from httptrading.errors import Rejected as Rejected
    from httptrading.errors import TimedOut as TimedOut
    from httptrading.errors import Unsupported as Unsupported

__version__ = "2.0.0"
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
