"""What talks to opscore over HTTP alone. Loads neither Flask, Celery nor SQLAlchemy."""
