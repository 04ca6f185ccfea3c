"""Measurements of opscore: `make bench` for its speed beside bare Celery's."""
