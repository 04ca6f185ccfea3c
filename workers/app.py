"""The Celery app as a worker runs it, and what each of its processes holds.

`opscore worker` is the entry point; nothing is read or connected at import. A
connection belongs to one process: after a fork the child makes its own.
"""

import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery, bootsteps, signals

from celeryconfig import VISIBILITY_TIMEOUT_SECONDS, app
from opscore import logs, migrations, tracing, workflows
from opscore.agentkit import Registry, load_agents
from opscore.agentkit.builtin import Page
from opscore.agentkit.llm import LLMAgent, agent_of, check_keys
from opscore.agentkit.mcp_config import load_servers
from opscore.agentkit.running import Means, check_means, offer_of
from opscore.agents import find_definition, register_functions
from opscore.config import Settings
from opscore.db import Database, Tx
from opscore.definition import Definition
from opscore.dispatch import Dispatcher
from opscore.errors import ConfigurationError
from opscore.metrics import Teller
from opscore.remote import UrlPolicy
from workers.keeper import OFFER, Keeper
from workers.leases import Ending, Leases
from workers.trips import Events, Patience

if TYPE_CHECKING:
    from opscore.remote_call import Caller

log = logs.get(__name__)


HAND_BACK_SECONDS = 1.5
"""The processes of a worker look at what is due once a second."""

Read = Callable[[Callable[[Tx], Definition]], Definition]


class Process:
    """What one worker process holds: its settings, connections, agents and leases."""

    def __init__(self, celery: Celery) -> None:
        self.celery = celery
        self.ending = Ending()
        self.teller: Teller | None = None
        self._definitions: dict[tuple[str, int], Definition] = {}
        self._defined: dict[str, LLMAgent] = {}

    @cached_property
    def settings(self) -> Settings:
        return Settings.from_env(os.environ)

    @cached_property
    def database(self) -> Database:
        database = Database(
            self.settings.database_url, pool_size=self.settings.database_pool, application="worker"
        )
        self.teller = Teller(database)
        return database

    @cached_property
    def dispatcher(self) -> Dispatcher:
        return Dispatcher(self.celery, self.database, self.settings)

    @cached_property
    def caller(self) -> "Caller":
        """Calls agents behind HTTP."""
        from opscore.remote_call import Caller  # 5 MiB, for who has such agents

        policy = UrlPolicy(self.settings.agent_hosts)
        return Caller(policy, self.settings.webhook_secret or "")

    @cached_property
    def leases(self) -> Leases:
        return Leases(self.database, self.settings, self.ending, self._tell)

    @cached_property
    def events(self) -> Events:
        return Events(self.celery, self.dispatcher)

    @cached_property
    def patience(self) -> Patience:
        return Patience()

    @cached_property
    def agents(self) -> Registry:
        return load_agents(self.settings.agents)

    def defined_agent(self, agent_id: str, read: Callable[[Callable[[Tx], Any]], Any]) -> Any:
        """Return the newest version of an LLM agent that was defined over the API; None if there is
        none, or this worker has not all that it needs.
        """
        found = read(lambda tx: find_definition(tx, agent_id))
        if found is None:
            return None
        known = self._defined.get(agent_id)
        if known is not None and known.version == str(found.version):
            return known
        try:
            agent = agent_of(found.definition, found.version)
            check_keys([agent], os.environ)
            check_means([agent], self.means)
        except ConfigurationError as error:
            log.warning("agent.not_usable", agent_id=agent_id, faults=list(error.faults))
            return None
        self._defined[agent_id] = agent
        return agent

    @cached_property
    def means(self) -> Means:
        """What LLM agents work with."""
        return Means(
            environment=dict(os.environ),
            servers=load_servers(self.settings.mcp_config, os.environ),
            files=Path(self.settings.files).absolute() if self.settings.files else None,
            fetch=self._fetch,
        )

    def _fetch(
        self, url: str, allows_host: Callable[[str], bool], *, seconds: float, max_bytes: int
    ) -> Page:
        from opscore import pages  # megabytes, for who has such agents

        policy = UrlPolicy(self.settings.agent_hosts)
        return pages.fetch(policy, url, allows_host, seconds=seconds, max_bytes=max_bytes)

    def definition(self, workflow_id: str, version: int, read: Read) -> Definition:
        """Return a workflow version compiled; versions never change, so one look-up lasts."""
        key = (workflow_id, version)
        found = self._definitions.get(key)
        if found is None:
            found = read(lambda tx: workflows.find_workflow(tx, *key).definition)
            if len(self._definitions) >= workflows.CACHED_DEFINITIONS:
                self._definitions.clear()
            self._definitions[key] = found
            _mention_long_tasks(workflow_id, found)
        return found

    def _tell(self) -> None:
        if self.teller is not None:
            self.teller.tell()

    def tell_the_last(self) -> None:
        """Tell what waits to be told with others: events, and what was counted."""
        if "events" in vars(self):
            self.events.flush()
        if self.teller is not None:
            self.teller.stop()

    def after_fork(self) -> None:
        """Start anew in a child: sockets and threads of the parent are not ours."""
        self.teller = None
        for name in ("database", "dispatcher", "caller", "leases", "events", "patience"):
            self.__dict__.pop(name, None)


def _mention_long_tasks(workflow_id: str, definition: Definition) -> None:
    """Redis gives such a task's message out again while it runs; the claim refuses the double."""
    longest = max(task.timeout_seconds for task in definition.tasks)
    if longest > VISIBILITY_TIMEOUT_SECONDS:
        log.info("workflow.outlasts_visibility", workflow_id=workflow_id, timeout_seconds=longest)


process = Process(app)


@signals.setup_logging.connect
def configure_logging(**_: Any) -> None:
    """Log as every opscore process does; Celery then leaves logging alone."""
    logs.configure(process.settings.log_level, process.settings.log_format)
    # One line per transition is ours to write; Celery would add two per message.
    celery = ("celery.worker.strategy", "celery.app.trace")
    # At DEBUG these would write what models are asked and answer.
    models = ("openai", "anthropic", "google_genai", "httpx2", "httpcore2")
    for chatty in (*celery, *models):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for telling in ("httpx2", "mcp"):
        # They log URLs, and what a server said; what failed is ours to tell.
        logging.getLogger(telling).setLevel(logging.CRITICAL)


class Offer(bootsteps.Step):
    """Checks the schema, imports the agents and makes them known, before any child is forked.

    A step, because Celery swallows what a signal's receiver raises: a worker whose agents cannot be
    imported must not start.
    """

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        agents = process.agents
        check_keys(agents.values(), os.environ)
        check_means(agents.values(), process.means)
        setattr(worker, OFFER, asdict(offer_of(process.means)))
        migrations.check(process.settings.database_url)
        with process.database.transaction() as tx:
            register_functions(tx, agents.values())
        log.info("worker.agents", agents=sorted(agents))
        tracing.start("opscore-worker")
        # What is there now is shared with the children; a collection there would copy it.
        gc.collect()
        gc.freeze()


app.steps["worker"].update((Offer, Keeper))


@signals.worker_shutting_down.connect
def give_grace(**_: Any) -> None:
    """End without the agents that do not end in time; their tasks are handed back (see `Leases`).

    Celery would wait for them until somebody kills it, and their attempts would count as lost. Of
    SIGTERM and the first Ctrl-C only: SIGQUIT ends the pool before Celery says so.
    """
    process.ending.set(process.settings.grace_seconds)
    threading.Thread(target=_end_after_grace, name="grace", daemon=True).start()


def _end_after_grace() -> None:
    time.sleep(max(0.0, process.ending.moment - time.monotonic()) + HAND_BACK_SECONDS)
    log.warning("worker.ended_before_its_agents")
    # Nothing of Celery's own waits for less than all of them. An outcome that still waits for a
    # database that is away goes too: its lease runs out.
    os._exit(0)


@signals.worker_process_init.connect
def start_child(**_: Any) -> None:
    process.after_fork()


@signals.worker_process_shutdown.connect
@signals.worker_shutdown.connect
def tell_the_last(**_: Any) -> None:
    """Send the events and the spans that wait to be sent with others; tell the last counts."""
    process.tell_the_last()
    tracing.stop()
