"""The resources, one file each."""

from web.api import agents, health, metrics, runs, schedules, status, tasks, webhook, workflows
from web.openapi import Blueprint

BLUEPRINTS: tuple[Blueprint, ...] = (
    workflows.blueprint,
    runs.blueprint,
    tasks.blueprint,
    schedules.blueprint,
    agents.blueprint,
    webhook.blueprint,
    status.blueprint,
    health.blueprint,
    metrics.blueprint,
)
