"""gunicorn's settings for httptrading: `gunicorn` in this directory starts the service.

Everything that users change (address, port, threads, instances) stands in the TOML file that
HTTPTRADING_CONFIG names. Options on gunicorn's command line still win over this file.
"""

import os
import sys
from pathlib import Path

from httptrading.app import hooks
from httptrading.app.bulkhead import SPARE
from httptrading.app.config import address, load_settings
from httptrading.app.config_checks import ConfigurationError
from httptrading.app.logs import log_to_stderr, secrets_of
from httptrading.brokers.gateway import Gateway

try:
    settings = load_settings(None, os.environ)
    log_to_stderr(secrets_of(settings.instances))
except ConfigurationError as error:
    sys.exit(f"httptrading: {error}")

# --- what runs ---------------------------------------------------------------------------------
wsgi_app = "wsgi:app"
bind = address(settings.host, settings.port)
proc_name = "httptrading"

# One process owns the brokers' sessions, with a thread for each request that is under way.
# `on_starting` refuses another number of workers or another class, wherever it was set.
workers = 1
worker_class = hooks.WORKER_CLASS  # gthread, hardened against clients that stall
threads = settings.threads + SPARE  # those beyond are for orders and cancellations alone

# The application is loaded in the worker process. preload_app = True works as well: no thread
# starts and no SDK is imported before the fork.
preload_app = False

# --- time --------------------------------------------------------------------------------------
# A worker process whose main loop gives no sign of life for so long is killed. This is no limit on
# requests: each has its own deadline (HT-TIMEOUT), at most 30 s.
timeout = 60
# From SIGTERM to the end, whatever the SDKs do.
graceful_timeout = hooks.STOP_WITHIN
# Longer than nginx keeps its connections to us (60 s), so that nginx never writes into one that we
# are just closing.
keepalive = 75

# --- limits ------------------------------------------------------------------------------------
# Waiting connections beyond this are refused by the kernel instead of queueing for minutes.
backlog = 256
limit_request_line = 4094
limit_request_fields = 50
limit_request_field_size = 4096

# --- files and logs ----------------------------------------------------------------------------
# The heartbeat file on a RAM disk: on a slow disk, gunicorn would take a stalled write for a
# stalled process.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None
# No control socket: whoever can open it may change the number of workers.
control_socket_disable = True
# Paths hold instance ids, so gunicorn's access log stays off: the service writes a JSON line of its
# own for each request, and deploy/nginx.conf masks the ids in nginx's log.
accesslog = None
errorlog = "-"
loglevel = "info"


# --- the gateway's life ------------------------------------------------------------------------
worker_exit = hooks.worker_exit


def on_starting(server):
    """Refuses a second process, of this service or of another one with the same accounts."""
    hooks.on_starting(server)
    hooks.refuse_second_owner(Gateway(settings.instances, settings.data_dir))
    hooks.refuse_taken_address(server)
    hooks.reload_only_what_loads(server, lambda: load_settings(None, os.environ))


def post_worker_init(worker):
    """The service listens and answers from here on."""
    hooks.post_worker_init(worker)
    if settings.generated:
        print(first_steps(worker.sockets[0].getsockname()), file=sys.stderr, flush=True)


def first_steps(listening):
    """What to try with the made-up paper account; `make run` alone shows its token."""
    broker = settings.instances[0].broker
    if not os.environ.get("HTTPTRADING_SHOW_TOKEN"):
        return f"httptrading: no configuration, so one paper account runs: see {settings.data_dir}"
    host, port = listening[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # one cannot call everywhere
    return (
        "\nhttptrading listens, with one paper account (模拟交易) and no configuration. Try:\n\n"
        f"  curl -H 'HT-TOKEN: {broker.tokens[0]}' "
        f"http://{address(host, port)}/httptrading/api/{broker.instance_id}/cash/state\n"
    )
