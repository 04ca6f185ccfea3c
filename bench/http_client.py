"""Submitting over HTTP: a client that keeps its connection."""

import http.client
import json
import time
from contextlib import AbstractContextManager

TIMEOUT_SECONDS = 30


class HttpClient(AbstractContextManager["HttpClient"]):
    """One connection to `opscore web`."""

    def __init__(self, port: int, api_key: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
        self._headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def is_served(self) -> bool:
        try:
            self._connection.request("GET", "/health")
            return self._connection.getresponse().read() != b""
        except OSError:
            return False

    def submit(self, workflow_id: str) -> tuple[str, float]:
        """Submit a run; return its id and the seconds until the answer was read."""
        body = json.dumps({"workflowId": workflow_id})
        began = time.perf_counter()
        self._connection.request("POST", "/v1/opscore/runs", body, self._headers)
        answer = self._connection.getresponse()
        text = answer.read()
        seconds = time.perf_counter() - began
        if answer.status != 202:
            raise RuntimeError(f"POST answered {answer.status}: {text[:500]!r}")
        return str(json.loads(text)["runId"]), seconds
