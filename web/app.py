"""The Flask application: everything in `web` put together for one process.

Nothing is read from the environment at import. gunicorn calls `app_from_env` in each worker, after
the fork, so that no connection crosses it.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from flask import Flask

from celeryconfig import make_app
from opscore import logs, migrations, tracing
from opscore.config import Settings
from opscore.db import Database
from opscore.dispatch import Dispatcher
from opscore.errors import OpsCoreError
from opscore.metrics import Teller
from web import auth, errors, requests
from web.api import BLUEPRINTS
from web.current import Parts, attach
from web.openapi import make_api
from web.polls import LongPolls
from web.ready import Readiness
from web.scrapes import Scrapes
from web.streams import Streams

GUNICORN_BOOT_ERROR = 3
"""gunicorn stops, instead of starting its worker again and again, if the worker ends with this."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
"""After the last two it ends at once, but not before its threads have."""


def create_app(settings: Settings) -> Flask:
    """Make the application of this process.

    Raises:
        ConfigurationError: the database does not answer, or its schema is not the newest.
    """
    migrations.check(settings.database_url)
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    # A path with // in it names nothing; the default redirects, with a page, to one without.
    app.url_map.merge_slashes = False
    app.json.sort_keys = False  # type: ignore[attr-defined]
    parts = _make_parts(settings)
    attach(app, parts)
    requests.register(app, parts.database.tally)
    auth.register(app, settings.api_key, settings.metrics_token)
    errors.register(app)
    api = make_api(app)
    for blueprint in BLUEPRINTS:
        api.register_blueprint(blueprint)
    return app


def app_from_env() -> Flask:
    """Make the application from the environment's settings; what gunicorn calls."""
    try:
        settings = Settings.from_env(os.environ, threads="web_threads")
        logs.configure(settings.log_level, settings.log_format)
        app = create_app(settings)
        tracing.start("opscore-web")
    except OpsCoreError as error:
        print(error, file=sys.stderr)
        sys.exit(GUNICORN_BOOT_ERROR)
    _stop_waiting_on_signals(app)
    atexit.register(app.extensions["opscore"].teller.stop)
    return app


def _make_parts(settings: Settings) -> Parts:
    pool = settings.database_pool
    database = Database(settings.database_url, pool_size=pool, application="opscore-web")
    dispatcher = Dispatcher(make_app(settings), database, settings)
    # Half the threads at most, so that the other half is free for short requests.
    places = threading.BoundedSemaphore(settings.web_threads // 2)
    readiness = Readiness(settings, dispatcher)
    return Parts(
        settings=settings,
        database=database,
        dispatcher=dispatcher,
        polls=LongPolls(places),
        streams=Streams(database, places),
        readiness=readiness,
        teller=Teller(database),
        scrapes=Scrapes(settings, readiness),
    )


def _stop_waiting_on_signals(app: Flask) -> None:
    """Let a stop not wait for clients that wait for runs."""
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            _act_before(number, app.extensions["opscore"].stop_waiting)


def _act_before(number: int, act: Callable[[], None]) -> None:
    """Have `act` called before a signal's handler, if it has one."""
    then = signal.getsignal(number)
    if callable(then):

        def handle(number: int, frame: Any) -> None:
            act()
            then(number, frame)

        signal.signal(number, handle)
