# The image of every opscore process; docs/deploy.md explains it.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
# What LLM agents need comes with --build-arg AGENTS=yes.
ARG AGENTS=
RUN python -m venv /opt/opscore
ENV PATH=/opt/opscore/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
# Pins first: they change less often than the code.
COPY requirements.txt ./
COPY requirements/otel.txt requirements/agents.txt requirements/
RUN pip install -r requirements/otel.txt ${AGENTS:+-r requirements/agents.txt}
COPY pyproject.toml setup.cfg README.md LICENSE NOTICE celeryconfig.py ./
COPY opscore opscore
COPY web web
COPY workers workers
RUN pip install --no-deps .

FROM python:${PYTHON}-slim
# tini is process 1: it reaps what agents leave behind, and a signal ends also what has not set up
# its handlers yet. It passes signals on to opscore alone, which tells its own children.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/opscore /opt/opscore
ENV PATH=/opt/opscore/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Agents' modules are looked for here. Nothing is written but in /tmp and /files.
WORKDIR /app
# A volume here belongs to the one who writes to it.
RUN install --directory --owner=10001 --group=10001 /files
# A number, so that Kubernetes sees that it is not root.
USER 10001:10001
EXPOSE 8000 5555
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "opscore"]
CMD ["web", "--host", "0.0.0.0", "--port", "8000"]
