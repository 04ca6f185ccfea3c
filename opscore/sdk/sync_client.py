"""The client of the API; made of `async_client` by `make sdk`: change it there.

    with OpsCoreClientSync("http://127.0.0.1:8000", key) as client:
        run = client.runs.submit("report", {"topic": "queues"})
        print(run.wait(timeout=60).output)

How calls are made, and what they raise, is said there.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import datetime
from math import inf
from time import monotonic
from typing import Any, Literal, Self, cast
from weakref import WeakSet

import httpx2

from opscore.sdk import types
from opscore.sdk.errors import (
    ConflictError,
    ConnectionError,
    OpsCoreSDKError,
    RunFailed,
    WaitTimeout,
    read_retry_after,
)
from opscore.sdk.transport import (
    EVENT_STREAM,
    LONG_POLL_SECONDS,
    PAGE_SIZE,
    RETRIES,
    SILENCE_SECONDS,
    Call,
    Definition,
    EventParser,
    Patience,
    check_stream,
    filled,
    given,
    headers_of,
    moment,
    path,
    pause_after,
    read,
    read_event,
    root_of,
    seconds_of,
    trouble,
)

Priority = Literal["low", "normal", "high"]
RunStatus = Literal["queued", "running", "paused", "completed", "failed", "cancelled"]
TaskStatus = Literal["pending", "waiting", "running", "completed", "failed", "cancelled", "skipped"]
Labels = Mapping[str, str]
Budget = types.Budget


class OpsCoreClientSync:
    """A client of one opscore. Use it as a context manager, or close it."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        timeout: float = 10.0,
        *,
        retries: int = RETRIES,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """`base_url` with or without `/v1`; `timeout` in seconds, for each part of a call."""
        self._root, self._timeout = root_of(base_url), seconds_of(timeout)
        self._retries = retries
        self._http = httpx2.Client(
            headers=headers_of(api_key), timeout=timeout, transport=transport
        )
        self._streams: WeakSet[Generator[Any, None]] = WeakSet()
        self.workflows = Workflows(self)
        self.runs = Runs(self)
        self.tasks = Tasks(self)
        self.agents = Agents(self)
        self.schedules = Schedules(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections, also those of streams that were not read to their end."""
        for events in tuple(self._streams):
            with suppress(RuntimeError, ValueError):  # somebody waits for the next one
                events.close()
        self._http.close()

    def update_state(self, agent_id: str, state: str, details: Any = None) -> types.Success:
        """Report an agent's state, as the agent itself would."""
        return self.agents.update_state(agent_id, state, details)

    def get_state(self, agent_id: str) -> types.StateOfAgent:
        """Return the state an agent reported last."""
        return self.agents.get_state(agent_id)

    def trigger_workflow(
        self,
        agent_id: str,
        workflow_definition_id: str | None = None,
        initial_payload: Mapping[str, Any] | None = None,
        *,
        workflow_definition: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> types.Triggered:
        """Start a workflow for an agent: one that was created, or a definition that comes along.

        `sessionId` in the answer is the run's id.
        """
        if workflow_definition_id == "":
            raise ValueError("workflow_definition_id is empty.")
        body = given(
            workflowDefinitionId=workflow_definition_id,
            workflowDefinition=workflow_definition,
            initialPayload=initial_payload,
        )
        call = Call.start(path("agent", agent_id, "workflow"), body, idempotency_key)
        return cast(types.Triggered, self.send(call))

    def status(self) -> types.Status:
        """Return how everything is: workers, queues, agents, what waits, what is the matter."""
        return cast(types.Status, self.send(Call.get(path("status"))))

    def health(self) -> types.Health:
        """Return whether the API is up. It asks nobody for that, and is asked once."""
        return cast(types.Health, read(self.attempt(Call.get("/health"))))

    def ready(self) -> types.Ready:
        """Return which parts answer that the API needs, and whether all do. It is asked once."""
        answer = self.attempt(Call.get("/ready"))
        return cast(types.Ready, read(answer, also=503))

    def send(self, call: Call) -> Any:
        """Make a call, again and again where that helps; return the value it answers."""
        tried = 0
        while True:
            tried += 1
            outcome: httpx2.Response | ConnectionError
            try:
                outcome = self.attempt(call)
            except ConnectionError as error:
                outcome = error
            pause = pause_after(outcome, call, tried, self._retries)
            if pause is not None:
                time.sleep(pause)
            elif isinstance(outcome, ConnectionError):
                raise outcome
            else:
                return read(outcome)

    def attempt(self, call: Call) -> httpx2.Response:
        """Make a call once, whatever comes of it.

        Raises:
            ConnectionError: there is no answer.
            ValueError: what it asks for is longer than a URL may be.
        """
        content, headers = call.content()
        try:
            return self._http.request(
                call.method,
                self._root + call.path,
                params=call.query,
                content=content,
                headers=headers,
                timeout=httpx2.Timeout(self._timeout, read=self._timeout + call.waits),
            )
        except httpx2.InvalidURL as error:
            raise ValueError(f"With this no URL can be made: {error}.") from error
        except httpx2.RequestError as error:
            raise trouble(error, self._root, content or b"") from error

    def pages(self, where: str, **query: Any) -> Iterator[Any]:
        """Yield the items of a list, newest first; a page is fetched when it is needed."""
        cursor: str | None = None
        while True:
            page = self.send(Call.get(where, **query, limit=PAGE_SIZE, cursor=cursor))
            yield from page["items"]
            cursor = page["nextCursor"]
            if cursor is None:
                return

    def stream(self, where: str, after: int) -> Generator[Any, None]:
        """Yield the events of a stream after a seq, until the API says that there are no more.

        A connection that breaks is made anew, with `Last-Event-ID`.
        """
        patience = Patience()
        while True:
            try:
                with closing(self._connection(where, after, patience)) as events:
                    self._streams.add(events)
                    for event in events:
                        if event is None:
                            return
                        after = event["seq"]
                        patience.moved()
                        yield event
                pause = patience.pause()
            except OpsCoreSDKError as error:
                pause = patience.pause(error)
            time.sleep(pause)

    def _connection(self, where: str, after: int, patience: Patience) -> Generator[Any, None]:
        """Yield the events of one connection; None if it says that there will be no more."""
        headers = {"Accept": EVENT_STREAM, "Last-Event-ID": str(after)}
        timeout = httpx2.Timeout(self._timeout, read=SILENCE_SECONDS)
        url, parser = self._root + where, EventParser()
        try:
            with self._http.stream("GET", url, headers=headers, timeout=timeout) as answer:
                if answer.status_code == 204:
                    yield None
                    return
                if not answer.is_success:
                    answer.read()
                check_stream(answer)
                patience.answered()
                for line in answer.iter_lines():
                    if (text := parser.feed(line)) is not None:
                        yield read_event(answer, text)
        except httpx2.RequestError as error:
            raise trouble(error, self._root) from error


class Run:
    """A run, as it was when it was last read. `data` is all that the API said of it."""

    def __init__(self, client: OpsCoreClientSync, data: types.Run | types.RunDetail) -> None:
        self.data = data
        self._client = client

    def __repr__(self) -> str:
        return f"<Run {self.id} of {self.workflow_id}: {self.status}>"

    @property
    def id(self) -> str:
        return self.data["runId"]

    @property
    def workflow_id(self) -> str:
        return self.data["workflowId"]

    @property
    def status(self) -> RunStatus:
        return self.data["status"]

    @property
    def reason(self) -> str | None:
        return self.data["reason"]

    @property
    def output(self) -> Any:
        return self.data["output"]

    @property
    def error(self) -> types.RunFault | None:
        """`{code, message, taskId}` of a run that failed."""
        return self.data["error"]

    @property
    def is_over(self) -> bool:
        return self.data["finishedAt"] is not None

    def raise_for_status(self) -> Self:
        """Return the run if it is not over or was completed.

        Raises:
            RunFailed
        """
        if self.status in ("failed", "cancelled"):
            raise RunFailed(self.id, self.status, self.error)
        return self

    def refresh(self) -> Self:
        """Read it again."""
        self.data = self._client.runs.detail(self.id)
        return self

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until it is over; `timeout` in seconds, 0 for a look, None for as long as it takes.

        Outlives an API that is away for two minutes. One that does not answer may make it late, by
        the client's own timeout at most.

        Raises:
            WaitTimeout: it goes on.
        """
        until, patience = inf if timeout is None else monotonic() + timeout, Patience()
        while not self.is_over:
            left = max(0.0, until - monotonic())
            pause = self._look(min(left, LONG_POLL_SECONDS), patience)
            if left == 0 and not self.is_over:
                raise WaitTimeout(f"Run {self.id} is {self.status} after {timeout:g} s.")
            time.sleep(max(0.0, min(pause, until - monotonic())))
        return self

    def _look(self, seconds: float, patience: Patience) -> float:
        """Wait so long for its end; return for how long to rest before the next look."""
        began = monotonic()
        try:
            self.data, asked = self._client.runs.watch(self.id, seconds)
        except OpsCoreSDKError as error:
            return patience.pause(error)
        if monotonic() - began >= seconds:
            patience.moved()
        else:  # it did not wait, and might not do so the next time
            patience.answered()
        return 0.0 if self.is_over else max(asked, patience.pause())

    def events(self, *, after: int = 0) -> Generator[types.Event, None]:
        """Yield what happened and happens in it, until it is over; `after` is a `seq`."""
        return self._client.runs.events(self.id, after=after)

    def tasks(self) -> Iterator[types.Task]:
        """Yield its tasks and items, in the order of the definition."""
        return self._client.runs.tasks(self.id)

    def cancel(self) -> Self:
        """Cancel it: nothing of it starts any more."""
        return self._become(self._client.runs.cancel(self.id))

    def pause(self) -> Self:
        """Let what runs end, and start nothing new."""
        return self._become(self._client.runs.pause(self.id))

    def resume(self) -> Self:
        """Let it go on."""
        return self._become(self._client.runs.resume(self.id))

    def retry(self, parameters: Mapping[str, Mapping[str, Any]] | None = None) -> Self:
        """Have what failed tried again, with other `parameters` of tasks by id."""
        return self._become(self._client.runs.retry(self.id, parameters))

    def rerun(self, *, idempotency_key: str | None = None) -> "Run":
        """Start another run of the same version with the same input."""
        return self._client.runs.rerun(self.id, idempotency_key=idempotency_key)

    def _become(self, other: "Run") -> Self:
        self.data = other.data
        return self


class Task:
    """A task that was submitted for one agent, as it was when it was last read."""

    def __init__(self, client: OpsCoreClientSync, data: types.Task | types.TaskDetail) -> None:
        self.data = data
        self._client = client

    def __repr__(self) -> str:
        return f"<Task {self.id}: {self.status}>"

    @property
    def id(self) -> str:
        return self.data["taskId"]

    @property
    def run_id(self) -> str:
        return self.data["runId"]

    @property
    def status(self) -> TaskStatus:
        return self.data["status"]

    @property
    def output(self) -> Any:
        return self.data["output"]

    @property
    def error(self) -> types.Fault | None:
        return self.data["error"]

    @property
    def is_over(self) -> bool:
        return self.data["finishedAt"] is not None

    def raise_for_status(self) -> Self:
        """Return the task if it is not over or was completed.

        Raises:
            RunFailed
        """
        if self.status in ("failed", "cancelled"):
            raise RunFailed(self.run_id, self.status, self.error)
        return self

    def refresh(self) -> Self:
        """Read it again."""
        self.data = self._client.tasks.get(self.id)
        return self

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until its run is over; as `Run.wait`."""
        run = self._client.runs.get(self.run_id)
        run.wait(timeout)
        return self.refresh()


class _Resource:
    def __init__(self, client: OpsCoreClientSync) -> None:
        self._client = client


class Workflows(_Resource):
    """Definitions: named, versioned, never changed."""

    def create(self, definition: Definition) -> types.Workflow:
        """Create a workflow or its next version; the newest document again is no new version."""
        call = Call.define(path("workflows"), definition)
        return cast(types.Workflow, self._client.send(call))

    def validate(self, definition: Definition) -> types.Verdict:
        """Check a definition as `create` would, and write nothing.

        Raises:
            ValidationError: `errors` has all that is wrong with it, by place.
        """
        call = Call.define(path("workflows", "validate"), definition)
        return cast(types.Verdict, self._client.send(call))

    def list(self, *, archived: bool = False) -> Iterator[types.Workflow]:
        """Yield the newest version of each workflow, or of those that are archived."""
        return self._client.pages(path("workflows"), archived=archived or None)

    def get(self, workflow_id: str, version: int | None = None) -> types.Workflow:
        """Return a version of a workflow, the newest by default."""
        call = Call.get(path("workflows", workflow_id), version=version)
        return cast(types.Workflow, self._client.send(call))

    def archive(self, workflow_id: str) -> types.Workflow:
        """Let a workflow get no new runs and versions; what there is of it goes on."""
        return self._put(workflow_id, "archive")

    def restore(self, workflow_id: str) -> types.Workflow:
        """Let an archived workflow get runs and versions again."""
        return self._put(workflow_id, "restore")

    def _put(self, workflow_id: str, what: str) -> types.Workflow:
        call = Call("POST", path("workflows", workflow_id, what), repeatable=True)
        return cast(types.Workflow, self._client.send(call))

    def versions(self, workflow_id: str) -> Iterator[types.Workflow]:
        """Yield the versions of a workflow."""
        return self._client.pages(path("workflows", workflow_id, "versions"))


class Runs(_Resource):
    """Executions of workflows."""

    def submit(
        self,
        workflow_id: str,
        input: Any = None,
        *,
        version: int | None = None,
        labels: Labels | None = None,
        priority: Priority | None = None,
        start_at: datetime | None = None,
        deadline_at: datetime | None = None,
        budget: Budget | None = None,
        idempotency_key: str | None = None,
    ) -> Run:
        """Start a run. With the same `idempotency_key` the same run is given again."""
        body = given(
            workflowId=workflow_id,
            version=version,
            input=input,
            labels=labels,
            priority=priority,
            startAt=moment(start_at),
            deadlineAt=moment(deadline_at),
            budget=budget,
        )
        return self._run(Call.start(path("runs"), body, idempotency_key))

    def get(self, run_id: str) -> Run:
        """Return a run."""
        return Run(self._client, self.detail(run_id))

    def list(
        self,
        *,
        workflow_id: str | None = None,
        status: RunStatus | Sequence[RunStatus] | None = None,
        labels: Labels | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> Iterator[types.RunSummary]:
        """Yield runs, newest first."""
        return self._client.pages(
            path("runs"),
            workflowId=workflow_id,
            status=status,
            label=[f"{name}:{value}" for name, value in (labels or {}).items()] or None,
            createdAfter=moment(created_after),
            createdBefore=moment(created_before),
        )

    def detail(self, run_id: str) -> types.RunDetail:
        """Return a run with its tasks, as JSON."""
        return cast(types.RunDetail, self._client.send(Call.get(path("runs", run_id))))

    def watch(self, run_id: str, seconds: float) -> tuple[types.RunDetail, float]:
        """Return a run once it is over, or as it is after so many seconds.

        Also how long the API asks to rest before it is asked again. Asks once only.
        """
        call = Call.get(path("runs", run_id), waitSeconds=seconds)
        answer = self._client.attempt(replace(call, waits=seconds))
        return cast(types.RunDetail, read(answer)), read_retry_after(answer.headers) or 0.0

    def tasks(
        self,
        run_id: str,
        *,
        status: TaskStatus | Sequence[TaskStatus] | None = None,
        task_definition_id: str | None = None,
    ) -> Iterator[types.Task]:
        """Yield a run's tasks and items, in the order of the definition."""
        where = path("runs", run_id, "tasks")
        return self._client.pages(where, status=status, taskDefinitionId=task_definition_id)

    def events(self, run_id: str, *, after: int = 0) -> Generator[types.Event, None]:
        """Yield what happened and happens in a run, until it is over; `after` is a `seq`.

        Outlives an API that is away for two minutes, and goes on where it was.
        """
        return self._client.stream(path("runs", run_id, "events"), after)

    def history(self, run_id: str, *, after: int = 0) -> Iterator[types.Event]:
        """Yield what happened in a run so far; `after` is a `seq`."""
        while True:
            call = Call.get(path("runs", run_id, "events"), after=after, limit=PAGE_SIZE)
            page = cast(types.EventPage, self._client.send(call))
            yield from page["items"]
            if len(page["items"]) < PAGE_SIZE:
                return
            after = page["nextAfter"]

    def cancel(self, run_id: str) -> Run:
        """Cancel a run: nothing of it starts any more. One that is cancelled stays so."""
        try:
            return self._act(run_id, "cancel", repeatable=True)
        except ConflictError:
            run = self.get(run_id)
            if run.status != "cancelled":
                raise
            return run

    def pause(self, run_id: str) -> Run:
        """Let what runs end, and start nothing new."""
        return self._act(run_id, "pause", repeatable=True)

    def resume(self, run_id: str) -> Run:
        """Let a paused run go on."""
        return self._act(run_id, "resume")

    def retry(self, run_id: str, parameters: Mapping[str, Mapping[str, Any]] | None = None) -> Run:
        """Have what failed of a failed run tried again, with other `parameters` of tasks by id."""
        return self._act(run_id, "retry", {"parameters": parameters or {}})

    def rerun(self, run_id: str, *, idempotency_key: str | None = None) -> Run:
        """Start another run of the same version with the same input."""
        return self._run(Call.start(path("runs", run_id, "rerun"), None, idempotency_key))

    def _act(self, run_id: str, what: str, body: Any = None, *, repeatable: bool = False) -> Run:
        return self._run(Call("POST", path("runs", run_id, what), body, repeatable=repeatable))

    def _run(self, call: Call) -> Run:
        return Run(self._client, self._client.send(call))


class Tasks(_Resource):
    """Single tasks: those of runs, and those submitted for one agent without a workflow."""

    def submit(
        self,
        input: Mapping[str, Any],
        *,
        agent_id: str | None = None,
        agent_capability: str | None = None,
        labels: Labels | None = None,
        priority: Priority | None = None,
        timeout_seconds: float | None = None,
        budget: Budget | None = None,
        idempotency_key: str | None = None,
    ) -> Task:
        """Start a task for an agent, or for one that has a capability."""
        body = given(
            taskType="agent_run",
            agentId=agent_id,
            agentCapability=agent_capability,
            inputData=input,
            labels=labels,
            priority=priority,
            timeoutSeconds=timeout_seconds,
            budget=budget,
        )
        call = Call.start(path("tasks"), body, idempotency_key)
        return Task(self._client, self._client.send(call))

    def list(
        self,
        *,
        status: TaskStatus | Sequence[TaskStatus] | None = None,
        reason: str | Sequence[str] | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
    ) -> Iterator[types.Task]:
        """Yield tasks of all runs, newest first; those that are over of one run only."""
        return self._client.pages(
            path("tasks"), status=status, reason=reason, agentId=agent_id, runId=run_id
        )

    def get(self, task_id: str) -> types.TaskDetail:
        """Return a task with its attempts and the newest one's log."""
        return cast(types.TaskDetail, self._client.send(Call.get(path("tasks", task_id))))

    def attempt(self, task_id: str, number: int) -> types.Attempt:
        """Return an attempt with its log."""
        call = Call.get(path("tasks", task_id, "attempts", str(number)))
        return cast(types.Attempt, self._client.send(call))

    def approve(
        self, task_id: str, comment: str | None = None, *, call: int | None = None
    ) -> types.TaskDetail:
        """Let the run go on behind an approval; with `call`, decide that call's number alone."""
        return self._decide(task_id, "approve", comment, call)

    def reject(
        self, task_id: str, comment: str | None = None, *, call: int | None = None
    ) -> types.TaskDetail:
        """Fail an approval; with `call`, decide that call's number alone."""
        return self._decide(task_id, "reject", comment, call)

    def report_result(self, task_id: str, token: str, result: Any) -> types.Accepted:
        """Complete an attempt, as the agent whose it is; `token` is the attempt's."""
        return self._report(task_id, token, {"status": "completed", "result": result})

    def report_error(
        self, task_id: str, token: str, message: str, code: str = "agent_error"
    ) -> types.Accepted:
        """Fail an attempt, as the agent whose it is."""
        error = {"code": code, "message": message}
        return self._report(task_id, token, {"status": "failed", "error": error})

    def heartbeat(self, task_id: str, token: str) -> types.Heartbeat:
        """Keep an attempt, as the agent whose it is.

        Raises:
            ConflictError: nobody wants it any more.
        """
        where, body = path("tasks", task_id, "heartbeat"), {"opscore_attempt_token": token}
        call = Call("POST", where, body, repeatable=True)
        return cast(types.Heartbeat, self._client.send(call))

    def _decide(
        self, task_id: str, what: str, comment: str | None, number: int | None
    ) -> types.TaskDetail:
        body = given(comment=comment, call=number)
        call = Call("POST", path("tasks", task_id, what), body)
        return cast(types.TaskDetail, self._client.send(call))

    def _report(self, task_id: str, token: str, said: Mapping[str, Any]) -> types.Accepted:
        where = path("tasks", task_id, "result")
        call = Call("POST", where, {"opscore_attempt_token": token, **said}, repeatable=True)
        return cast(types.Accepted, self._client.send(call))


class Agents(_Resource):
    """Who does the work."""

    def list(self, *, capability: str | None = None) -> Iterator[types.Agent]:
        """Yield agents."""
        return self._client.pages(path("agents"), capability=capability)

    def get(self, agent_id: str) -> types.Agent:
        """Return an agent with who holds it and who waits for it."""
        return cast(types.Agent, self._client.send(Call.get(path("agents", agent_id))))

    def define(self, definition: types.LLMDefinition) -> types.AgentVersion:
        """Define an LLM agent, or its next version; the same again changes nothing."""
        call = Call("POST", path("agents"), definition, repeatable=True)
        return cast(types.AgentVersion, self._client.send(call))

    def versions(self, agent_id: str) -> Iterator[types.AgentVersion]:
        """Yield the versions of an LLM agent that was defined over the API, newest first."""
        return self._client.pages(path("agents", agent_id, "versions"))

    def change(self, agent_id: str, changes: types.AgentChange) -> types.Agent:
        """Change an agent's capacity, heartbeat and so on; what is not named stays."""
        call = Call("PATCH", path("agents", agent_id), changes, repeatable=True)
        return cast(types.Agent, self._client.send(call))

    def pause(self, agent_id: str) -> types.Agent:
        """Give an agent nothing new until it is resumed."""
        return self.change(agent_id, {"paused": True})

    def drain(self, agent_id: str) -> types.Agent:
        """Give an agent nothing new, since it is to go away."""
        return self.change(agent_id, {"draining": True})

    def resume(self, agent_id: str) -> types.Agent:
        """Give an agent work again that was paused or drained."""
        return self.change(agent_id, {"paused": False, "draining": False})

    def history(self, agent_id: str) -> Iterator[types.StateReported]:
        """Yield what an agent reported of its state, newest first."""
        return self._client.pages(path("agents", agent_id, "state", "history"))

    def memories(
        self, agent_id: str, *, query: str | None = None, namespace: str | None = None
    ) -> Iterator[types.Memory]:
        """Yield what an LLM agent remembers, newest first; or what it finds with a query."""
        where = path("agents", agent_id, "memories")
        return self._client.pages(where, query=query, namespace=namespace)

    def forget_memory(self, agent_id: str, memory_id: str) -> None:
        """Have an agent forget a memory."""
        self._client.send(Call("DELETE", path("agents", agent_id, "memories", memory_id)))

    def forget_memories(self, agent_id: str, *, namespace: str | None = None) -> int:
        """Have an agent forget all, or all of a namespace; return how many those were."""
        query = given(namespace=namespace)
        call = Call("DELETE", path("agents", agent_id, "memories"), query=query)
        return cast(types.Forgotten, self._client.send(call))["forgotten"]

    def get_state(self, agent_id: str) -> types.StateOfAgent:
        """Return the state an agent reported last."""
        call = Call.get(path("agent", agent_id, "state"))
        return cast(types.StateOfAgent, self._client.send(call))

    def update_state(
        self, agent_id: str, state: str, details: Any = None, timestamp: datetime | None = None
    ) -> types.Success:
        """Report an agent's state, as the agent itself would."""
        body = given(state=filled("state", state), details=details, timestamp=moment(timestamp))
        call = Call("POST", path("agent", agent_id, "state"), body)
        return cast(types.Success, self._client.send(call))


class Schedules(_Resource):
    """Recurring workflows."""

    def create(self, schedule: types.ScheduleArguments) -> types.ScheduleWithWarnings:
        """Create a schedule; `warnings` say what in it looks as if something else was meant."""
        return self._changed(Call("POST", path("schedules"), schedule))

    def list(self) -> Iterator[types.Schedule]:
        """Yield schedules."""
        return self._client.pages(path("schedules"))

    def get(self, name: str) -> types.Schedule:
        """Return a schedule."""
        return cast(types.Schedule, self._client.send(Call.get(path("schedules", name))))

    def change(self, name: str, changes: types.ScheduleChange) -> types.ScheduleWithWarnings:
        """Change a schedule; what is not named stays. Other times count from now."""
        return self._changed(Call("PATCH", path("schedules", name), changes, repeatable=True))

    def delete(self, name: str) -> None:
        """Delete a schedule with the history of its firings; its runs stay."""
        self._client.send(Call("DELETE", path("schedules", name)))

    def pause(self, name: str) -> types.ScheduleWithWarnings:
        """Let a schedule not fire; what is missed meanwhile is not caught up."""
        call = Call("POST", path("schedules", name, "pause"), repeatable=True)
        return self._changed(call)

    def resume(self, name: str) -> types.ScheduleWithWarnings:
        """Let a schedule fire again, from now on."""
        call = Call("POST", path("schedules", name, "resume"), repeatable=True)
        return self._changed(call)

    def trigger(self, name: str, *, idempotency_key: str | None = None) -> Run:
        """Have a schedule fire now, whatever its times and its `overlap` say."""
        call = Call.start(path("schedules", name, "trigger"), None, idempotency_key)
        return Run(self._client, self._client.send(call))

    def preview(self, name: str, count: int = 10) -> Sequence[str]:
        """Return the next moments at which a schedule fires."""
        call = Call.get(path("schedules", name, "preview"), count=count)
        return cast(types.Preview, self._client.send(call))["items"]

    def firings(self, name: str) -> Iterator[types.Firing]:
        """Yield what became of a schedule's moments, newest first."""
        return self._client.pages(path("schedules", name, "firings"))

    def events(self, name: str) -> Iterator[types.Event]:
        """Yield what happened to a schedule, newest first, also to one that was deleted."""
        return self._client.pages(path("schedules", name, "events"))

    def _changed(self, call: Call) -> types.ScheduleWithWarnings:
        return cast(types.ScheduleWithWarnings, self._client.send(call))
