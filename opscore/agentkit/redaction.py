"""What of an agent's work is shown to people: shortened, and without what looks like a secret."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "[redacted]"
MAX_TEXT = 500
"""Characters of each text."""
MAX_MEMBERS = 20
"""Of each list and object."""
MAX_LEVELS = 6
_SECRET_NAME = re.compile(
    r"pass(word|wd|phrase)?$|secret|token$|api_?key|auth(orization)?$|credential|cookie|private_?key",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"\b(?:sk|pk|rk|ghp|gho|ghs|xox[abprs]|AKIA|AIza)[-_]?[A-Za-z0-9_-]{16,}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|(?i:(?<=bearer )[A-Za-z0-9._~+/-]{8,}=*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
"""Keys of common services, JSON Web Tokens, credentials in URLs, bearer tokens, private keys."""


def redacted(value: Any, secrets: Sequence[str] = ()) -> Any:
    """Return JSON with texts shortened, values of secret names and known secrets hidden."""
    return _Redaction([one for one in secrets if len(one) >= 8]).of(value, 0)


class _Redaction:
    def __init__(self, secrets: Sequence[str]) -> None:
        self._secrets = sorted(secrets, key=len, reverse=True)

    def of(self, value: Any, level: int) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if not isinstance(value, list | Mapping):
            return value
        if level >= MAX_LEVELS:
            return "…"
        rest = len(value) - MAX_MEMBERS
        if isinstance(value, list):
            shown = [self.of(one, level + 1) for one in value[:MAX_MEMBERS]]
            return [*shown, f"… {rest} more"] if rest > 0 else shown
        kept = list(value.items())[:MAX_MEMBERS]
        members = {self.text(name): self.member(name, one, level) for name, one in kept}
        return members | {"…": f"{rest} more"} if rest > 0 else members

    def member(self, name: str, value: Any, level: int) -> Any:
        is_secret = _SECRET_NAME.search(name) and not isinstance(value, int | float | None)
        return HIDDEN if is_secret else self.of(value, level + 1)

    def text(self, text: str) -> str:
        # Shortened first, with room for a secret that begins before the cut: a pattern is not run
        # over a megabyte.
        shown = text[: 4 * MAX_TEXT]
        for secret in self._secrets:
            shown = shown.replace(secret, HIDDEN)
        shown = _SECRET_TEXT.sub(HIDDEN, shown)
        return shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]}…"
