"""The resources, one file each."""

from web.api import agents, health, runs, tasks, webhook, workflows
from web.openapi import Blueprint

BLUEPRINTS: tuple[Blueprint, ...] = (
    workflows.blueprint,
    runs.blueprint,
    tasks.blueprint,
    agents.blueprint,
    webhook.blueprint,
    health.blueprint,
)
