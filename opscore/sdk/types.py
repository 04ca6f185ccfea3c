"""The JSON of the API, made of its description at `/openapi.json` by `make sdk`.

Later versions of the API may add members to what they answer.
"""

from typing import Any, Literal, NotRequired, TypedDict


class Accepted(TypedDict):
    taskId: str
    status: Literal["accepted"]


class Holder(TypedDict):
    slot: int
    taskId: str
    runId: str
    taskDefinitionId: str
    attempt: int
    leaseExpiresAt: str


class Waiter(TypedDict):
    position: int
    taskId: str
    runId: str
    taskDefinitionId: str
    waitingSince: str | None
    priority: Literal["low", "normal", "high"]
    estimatedStartAt: str | None


class Agent(TypedDict):
    agentId: str
    agentName: str
    kind: Literal["function", "llm", "remote"]
    version: str
    capabilities: list[str]
    capacity: int | None
    state: Literal["UNKNOWN", "initializing", "idle", "active", "error", "finished"]
    stateAt: str | None
    available: bool
    unavailableBecause: str | None
    paused: bool
    draining: bool
    contactEndpoint: str | None
    metadata: Any
    heartbeatSeconds: float | None
    requireToken: bool
    seenAt: str
    busyUntil: str | None
    running: int
    holders: list[Holder]
    waiting: int
    line: list[Waiter]
    registeredAt: str
    updatedAt: str


class AgentAskedFor(TypedDict):
    agentId: str | None
    agentCapability: str | None


class AgentChange(TypedDict):
    capacity: NotRequired[int]
    paused: NotRequired[bool]
    draining: NotRequired[bool]
    heartbeatSeconds: NotRequired[float | None]
    requireToken: NotRequired[bool]


class AgentCounts(TypedDict):
    total: int
    available: int
    paused: int
    draining: int
    silent: int
    error: int


class AgentDetails(TypedDict):
    agentId: str
    agentName: str
    version: str
    capabilities: NotRequired[list[str]]
    contactEndpoint: str
    metadata: NotRequired[dict[str, Any] | None]


class AgentPage(TypedDict):
    items: list[Agent]
    nextCursor: str | None


class LLMPermissions(TypedDict):
    mcp: NotRequired[list[str]]
    hosts: NotRequired[list[str]]


class LLMLimits(TypedDict):
    maxSteps: NotRequired[int]
    maxTokens: NotRequired[int | None]
    maxCostUsd: NotRequired[float | None]
    maxSeconds: NotRequired[float]
    callSeconds: NotRequired[float]
    windowTokens: NotRequired[int]
    corrections: NotRequired[int]


class LLMDefinition(TypedDict):
    agentId: str
    name: NotRequired[str]
    model: str
    fallbackModels: NotRequired[list[str]]
    instructions: NotRequired[str]
    tools: NotRequired[list[str]]
    mcpServers: NotRequired[list[str]]
    memory: NotRequired[str | None]
    outputSchema: NotRequired[dict[str, Any] | None]
    permissions: NotRequired[LLMPermissions]
    limits: NotRequired[LLMLimits]
    capabilities: NotRequired[list[str]]
    capacity: NotRequired[int | None]


class AgentVersion(TypedDict):
    agentId: str
    version: int
    definition: LLMDefinition
    by: str
    createdAt: str


class AgentVersionPage(TypedDict):
    items: list[AgentVersion]
    nextCursor: str | None


class ApprovalAsked(TypedDict):
    taskId: str
    runId: str
    taskDefinitionId: str
    index: int | None
    workflowId: str
    since: str


class AttemptFault(TypedDict):
    code: str
    message: str
    traceback: str | None


class LogLine(TypedDict):
    line: int
    at: str
    message: str
    fields: dict[str, Any]


class Attempt(TypedDict):
    number: int
    agentId: str | None
    worker: str
    status: Literal["running", "completed", "failed", "lost", "cancelled"]
    progress: float | None
    progressMessage: str | None
    startedAt: str
    finishedAt: str | None
    error: AttemptFault | None
    taskId: str
    logs: list[LogLine]


class Fault(TypedDict):
    code: str
    message: str


class AttemptSummary(TypedDict):
    number: int
    agentId: str | None
    worker: str
    status: Literal["running", "completed", "failed", "lost", "cancelled"]
    progress: float | None
    progressMessage: str | None
    startedAt: str
    finishedAt: str | None
    error: Fault | None


class Budget(TypedDict):
    maxTokens: NotRequired[int | None]
    maxCostUsd: NotRequired[float | None]


class BusyPolicy(TypedDict):
    backoffSeconds: NotRequired[float]
    maxBackoffSeconds: NotRequired[float]
    maxWaitSeconds: NotRequired[float]


class CallAskedAbout(TypedDict):
    number: int
    tool: str
    arguments: Any
    again: bool


Step = str | dict[str, Any]


class Join(TypedDict):
    taskId: str
    after: list[str]


class CanvasOutline(TypedDict):
    messages: list[Step]
    joins: list[Join]
    later: list[str]


class Comment(TypedDict):
    call: NotRequired[int | None]
    comment: NotRequired[str | None]


class DatabaseStatus(TypedDict):
    revision: str | None
    newestRevision: str
    clockSkewSeconds: float


class Event(TypedDict):
    seq: int
    at: str
    type: str
    taskId: str | None
    taskDefinitionId: str | None
    index: int | None
    by: str | None
    reason: str | None
    data: dict[str, Any]


class EventPage(TypedDict):
    items: list[Event]
    nextAfter: int


class Firing(TypedDict):
    moment: str
    status: Literal["waiting", "started", "skipped", "failed"]
    by: str
    error: Fault | None
    runId: str | None
    runStatus: str | None
    decidedAt: str


class FiringPage(TypedDict):
    items: list[Firing]
    nextCursor: str | None


class SlotCounts(TypedDict):
    held: int
    total: int


class LineLength(TypedDict):
    agentId: str | None
    agentCapability: str | None
    waiting: int
    oldestSeconds: float
    unservedBecause: str | None


class FleetStatus(TypedDict):
    agents: AgentCounts
    states: dict[str, int]
    slots: SlotCounts
    lines: list[LineLength]


class ForEachDefinition(TypedDict):
    items: Any
    maxParallel: NotRequired[int]
    tolerate: NotRequired[int | str]


class Forgotten(TypedDict):
    forgotten: int


class GraphTask(TypedDict):
    taskId: str
    type: Literal["agent", "approval", "delay", "workflow"]
    agent: AgentAskedFor | None
    forEach: bool
    dependsOn: list[str]
    when: str | None


class Health(TypedDict):
    status: Literal["ok"]


class Heartbeat(TypedDict):
    taskId: str
    leaseExpiresAt: str
    cancelled: bool


class ItemCounts(TypedDict):
    total: int
    pending: int
    waiting: int
    running: int
    completed: int
    failed: int
    cancelled: int


class JobArguments(TypedDict):
    taskType: Literal["agent_run"]
    agentId: NotRequired[str | None]
    agentCapability: NotRequired[str | None]
    inputData: NotRequired[dict[str, Any]]
    labels: NotRequired[dict[str, str]]
    priority: NotRequired[Literal["low", "normal", "high"]]
    timeoutSeconds: NotRequired[float]
    budget: NotRequired[Budget | None]


class KeeperStatus(TypedDict):
    holder: str | None
    renewedAt: str | None
    lateSeconds: float | None


class Memory(TypedDict):
    memoryId: str
    namespace: str
    text: str
    score: float | None
    addedAt: str
    expiresAt: str | None


class MemoryPage(TypedDict):
    items: list[Memory]
    nextCursor: str | None


class Notice(TypedDict):
    event_type: Literal["REGISTER", "DEREGISTER"]
    agent_details: AgentDetails


class OpenRuns(TypedDict):
    status: Literal["queued", "running", "paused", "completed", "failed", "cancelled"]
    reason: str | None
    count: int
    oldestSeconds: float
    oldestRunId: str


class Preview(TypedDict):
    items: list[str]


class Problem(TypedDict):
    type: str
    title: str
    status: int
    detail: str
    code: str
    requestId: str
    errors: NotRequired[dict[str, list[str]]]


class Proof(TypedDict):
    agentId: NotRequired[str | None]
    opscore_attempt_token: NotRequired[str | None]
    attemptToken: NotRequired[str | None]


class QueueDepth(TypedDict):
    name: str
    ready: int | None
    unacked: int | None
    workers: int


class QueuePlace(TypedDict):
    position: int | None
    estimatedStartAt: str | None


class Ready(TypedDict):
    status: Literal["ready", "unready"]
    database: Literal["ok", "down", "behind"]
    broker: Literal["ok", "down"]
    workers: Literal["ok", "none", "unknown"]


class RetryArguments(TypedDict):
    parameters: NotRequired[dict[str, dict[str, Any]]]


class RetryPolicy(TypedDict):
    maxAttempts: NotRequired[int]
    backoffSeconds: NotRequired[float]
    maxBackoffSeconds: NotRequired[float]


class RunFault(TypedDict):
    code: str
    message: str
    taskId: str | None


class Usage(TypedDict):
    replies: int
    inputTokens: int
    outputTokens: int
    costUsd: float | None


class Run(TypedDict):
    runId: str
    workflowId: str
    version: int
    agentId: str | None
    status: Literal["queued", "running", "paused", "completed", "failed", "cancelled"]
    reason: str | None
    error: RunFault | None
    labels: dict[str, str]
    priority: Literal["low", "normal", "high"]
    requestId: str | None
    cancelRequestedAt: str | None
    parentTaskId: str | None
    rerunOf: str | None
    schedule: str | None
    startAt: str | None
    deadlineAt: str | None
    createdAt: str
    startedAt: str | None
    finishedAt: str | None
    budget: Budget | None
    usage: Usage | None
    input: Any
    output: Any


class RunArguments(TypedDict):
    workflowId: str
    version: NotRequired[int]
    input: NotRequired[Any]
    labels: NotRequired[dict[str, str]]
    priority: NotRequired[Literal["low", "normal", "high"]]
    startAt: NotRequired[str | None]
    deadlineAt: NotRequired[str | None]
    budget: NotRequired[Budget | None]


class Task(TypedDict):
    taskId: str
    runId: str
    taskDefinitionId: str
    index: int | None
    agentId: str | None
    agentCapability: str | None
    type: Literal["agent", "approval", "delay", "workflow"]
    childRunId: str | None
    status: Literal["pending", "waiting", "running", "completed", "failed", "cancelled", "skipped"]
    reason: str | None
    wakeAt: str | None
    waitingFor: str | None
    queue: QueuePlace | None
    output: Any
    error: Fault | None
    createdAt: str
    startedAt: str | None
    finishedAt: str | None
    attempts: list[AttemptSummary]
    items: ItemCounts | None
    usage: Usage | None
    call: CallAskedAbout | None


class RunDetail(TypedDict):
    runId: str
    workflowId: str
    version: int
    agentId: str | None
    status: Literal["queued", "running", "paused", "completed", "failed", "cancelled"]
    reason: str | None
    error: RunFault | None
    labels: dict[str, str]
    priority: Literal["low", "normal", "high"]
    requestId: str | None
    cancelRequestedAt: str | None
    parentTaskId: str | None
    rerunOf: str | None
    schedule: str | None
    startAt: str | None
    deadlineAt: str | None
    createdAt: str
    startedAt: str | None
    finishedAt: str | None
    budget: Budget | None
    usage: Usage | None
    input: Any
    output: Any
    tasks: list[Task]


class RunSummary(TypedDict):
    runId: str
    workflowId: str
    version: int
    agentId: str | None
    status: Literal["queued", "running", "paused", "completed", "failed", "cancelled"]
    reason: str | None
    error: RunFault | None
    labels: dict[str, str]
    priority: Literal["low", "normal", "high"]
    requestId: str | None
    cancelRequestedAt: str | None
    parentTaskId: str | None
    rerunOf: str | None
    schedule: str | None
    startAt: str | None
    deadlineAt: str | None
    createdAt: str
    startedAt: str | None
    finishedAt: str | None


class RunSummaryPage(TypedDict):
    items: list[RunSummary]
    nextCursor: str | None


class Schedule(TypedDict):
    name: str
    workflowId: str
    version: int | None
    agentId: str | None
    cron: str | None
    everySeconds: float | None
    timezone: str
    input: Any
    labels: dict[str, str]
    priority: Literal["low", "normal", "high"]
    enabled: bool
    startAt: str | None
    endAt: str | None
    jitterSeconds: float
    overlap: Literal["skip", "queue", "cancel_previous", "allow"]
    catchUp: Literal["none", "last", "all"]
    catchUpWindowSeconds: float
    nextAt: str | None
    createdAt: str
    updatedAt: str


class ScheduleArguments(TypedDict):
    workflowId: NotRequired[str]
    version: NotRequired[int | None]
    agentId: NotRequired[str | None]
    cron: NotRequired[str | None]
    everySeconds: NotRequired[float | None]
    timezone: NotRequired[str]
    input: NotRequired[Any]
    labels: NotRequired[dict[str, str]]
    priority: NotRequired[Literal["low", "normal", "high"]]
    enabled: NotRequired[bool]
    startAt: NotRequired[str | None]
    endAt: NotRequired[str | None]
    jitterSeconds: NotRequired[float]
    overlap: NotRequired[Literal["skip", "queue", "cancel_previous", "allow"]]
    catchUp: NotRequired[Literal["none", "last", "all"]]
    catchUpWindowSeconds: NotRequired[float]
    name: str


class ScheduleChange(TypedDict):
    workflowId: NotRequired[str]
    version: NotRequired[int | None]
    agentId: NotRequired[str | None]
    cron: NotRequired[str | None]
    everySeconds: NotRequired[float | None]
    timezone: NotRequired[str]
    input: NotRequired[Any]
    labels: NotRequired[dict[str, str]]
    priority: NotRequired[Literal["low", "normal", "high"]]
    enabled: NotRequired[bool]
    startAt: NotRequired[str | None]
    endAt: NotRequired[str | None]
    jitterSeconds: NotRequired[float]
    overlap: NotRequired[Literal["skip", "queue", "cancel_previous", "allow"]]
    catchUp: NotRequired[Literal["none", "last", "all"]]
    catchUpWindowSeconds: NotRequired[float]


class ScheduleCounts(TypedDict):
    enabled: int
    due: int
    late: int
    worstLagSeconds: float


class ScheduleEventPage(TypedDict):
    items: list[Event]
    nextCursor: str | None


class SchedulePage(TypedDict):
    items: list[Schedule]
    nextCursor: str | None


class ScheduleWithWarnings(TypedDict):
    name: str
    workflowId: str
    version: int | None
    agentId: str | None
    cron: str | None
    everySeconds: float | None
    timezone: str
    input: Any
    labels: dict[str, str]
    priority: Literal["low", "normal", "high"]
    enabled: bool
    startAt: str | None
    endAt: str | None
    jitterSeconds: float
    overlap: Literal["skip", "queue", "cancel_previous", "allow"]
    catchUp: Literal["none", "last", "all"]
    catchUpWindowSeconds: float
    nextAt: str | None
    createdAt: str
    updatedAt: str
    warnings: list[str]


class StateOfAgent(TypedDict):
    agentId: str
    state: Literal["UNKNOWN", "initializing", "idle", "active", "error", "finished"]
    details: Any
    timestamp: str


class StateReport(TypedDict):
    agentId: NotRequired[str | None]
    timestamp: NotRequired[str | None]
    state: str
    details: NotRequired[Any]


class StateReported(TypedDict):
    agentId: str
    state: Literal["UNKNOWN", "initializing", "idle", "active", "error", "finished"]
    details: Any
    timestamp: str
    receivedAt: str


class StateReportedPage(TypedDict):
    items: list[StateReported]
    nextCursor: str | None


class Trouble(TypedDict):
    code: str
    sentence: str
    hint: str


class WorkerThatLives(TypedDict):
    name: str
    host: str
    pid: int
    pool: str
    concurrency: int
    queues: list[str]
    version: str | None
    startedAt: str
    seenAt: str


class WaitingTasks(TypedDict):
    reason: str
    count: int
    oldestSeconds: float
    nextWakeAt: str | None


class Stuck(TypedDict):
    code: Literal["upkeep_late", "nobody_wakes", "visit_lost", "nobody_serves", "turn_blocked"]
    runId: str
    taskId: str | None
    taskDefinitionId: str | None
    index: int | None
    since: str
    sentence: str
    hint: str


class Status(TypedDict):
    problems: list[Trouble]
    workers: list[WorkerThatLives]
    queues: list[QueueDepth]
    brokerError: str | None
    fleet: FleetStatus
    waiting: list[WaitingTasks]
    runs: list[OpenRuns]
    approvals: list[ApprovalAsked]
    stuck: list[Stuck]
    keeper: KeeperStatus
    schedules: ScheduleCounts
    database: DatabaseStatus


class Success(TypedDict):
    status: Literal["success"]
    message: str


class TaskDefinition(TypedDict):
    taskId: str
    name: NotRequired[str]
    type: NotRequired[Literal["agent", "approval", "delay", "workflow"]]
    when: NotRequired[str]
    agentId: NotRequired[str]
    agentCapability: NotRequired[str]
    fallback: NotRequired[list[str]]
    parameters: NotRequired[dict[str, Any] | str]
    dependsOn: NotRequired[list[str]]
    nextTaskId: NotRequired[str | None]
    forEach: NotRequired[ForEachDefinition]
    retry: NotRequired[RetryPolicy]
    busy: NotRequired[BusyPolicy]
    timeoutSeconds: NotRequired[float]
    onTimeout: NotRequired[Literal["reject", "approve"]]
    seconds: NotRequired[float | str]
    until: NotRequired[str]
    workflowId: NotRequired[str]
    version: NotRequired[int]
    onFailure: NotRequired[Literal["fail", "continue"]]


class TaskDetail(TypedDict):
    taskId: str
    runId: str
    taskDefinitionId: str
    index: int | None
    agentId: str | None
    agentCapability: str | None
    type: Literal["agent", "approval", "delay", "workflow"]
    childRunId: str | None
    status: Literal["pending", "waiting", "running", "completed", "failed", "cancelled", "skipped"]
    reason: str | None
    wakeAt: str | None
    waitingFor: str | None
    queue: QueuePlace | None
    output: Any
    error: Fault | None
    createdAt: str
    startedAt: str | None
    finishedAt: str | None
    attempts: list[AttemptSummary]
    items: ItemCounts | None
    usage: Usage | None
    call: CallAskedAbout | None
    logs: list[LogLine]


class TaskPage(TypedDict):
    items: list[Task]
    nextCursor: str | None


class TaskResult(TypedDict):
    agentId: NotRequired[str | None]
    opscore_attempt_token: NotRequired[str | None]
    attemptToken: NotRequired[str | None]
    status: NotRequired[Literal["completed", "failed", "success", "error", None]]
    result: NotRequired[Any]
    error: NotRequired[Any]


class TriggerArguments(TypedDict):
    workflowDefinitionId: NotRequired[str | None]
    workflowDefinition: NotRequired[dict[str, Any] | None]
    initialPayload: NotRequired[dict[str, Any] | None]


class Triggered(TypedDict):
    sessionId: str
    runId: str
    workflowId: str
    message: str


class Verdict(TypedDict):
    valid: bool
    workflowId: str
    version: int
    isNew: bool
    tasks: list[str]
    graph: list[GraphTask]
    canvas: CanvasOutline


class Workflow(TypedDict):
    workflowId: str
    version: int
    name: str | None
    definition: dict[str, Any]
    createdAt: str
    archivedAt: str | None


class WorkflowDefinition(TypedDict):
    id: NotRequired[str]
    name: NotRequired[str]
    description: NotRequired[str]
    version: NotRequired[str]
    inputSchema: NotRequired[dict[str, Any]]
    maxConcurrentRuns: NotRequired[int]
    tasks: list[TaskDefinition]
    deadlineSeconds: NotRequired[float]
    output: NotRequired[Any]


class WorkflowPage(TypedDict):
    items: list[Workflow]
    nextCursor: str | None


class WorkflowVersionPage(TypedDict):
    items: list[Workflow]
    nextCursor: str | None
