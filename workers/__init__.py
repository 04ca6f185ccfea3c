"""When things happen: the Celery side of opscore."""
