"""What of an agent's work is shown to people: shortened, and without what looks like a secret.

Hidden are values of secret names, also inside of text; the process's own secrets, also as URLs and
JSON spell them; and what has the look of a key. It is a net, not a proof: a secret that looks like
any word, and that nobody named, is shown.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "[redacted]"
MAX_TEXT = 500
"""Characters of each text."""
MAX_CALL_TEXT = 4_000
"""The same of a call that somebody is to decide."""
MAX_MEMBERS = 20
"""Of each list and object."""
MAX_LEVELS = 6
MAX_CHARACTERS = 16_000
"""Of all texts and names together; then only the shape is shown."""
MIN_SECRET = 6
"""Characters; hiding a shorter one would hide half of all words."""
_ROOM = 4 * MAX_TEXT
"""Characters beyond the cut that patterns are run over: a secret may begin before it."""
_NAMES = (
    r"pass(?:word|wd|phrase)?|secrets?|token|api_?-?key|access_?-?key|private_?-?key|auth"
    r"|authorization|credentials?|(?:set-)?cookie|session_?-?id|signature"
)
_WORD = r"(?:(?<![A-Za-z0-9])|(?-i:(?<=[a-z])(?=[A-Z])))"
"""Where a word of a name begins."""
_SECRET_NAME = re.compile(
    rf"{_WORD}(?:{_NAMES})$|password|secret|credential|cookie"
    r"|api_?-?key|private_?-?key",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"\b(?:sk|pk|rk|ghp|gho|ghs|xox[abprs]|AKIA|AIza|glpat)[-_]?[A-Za-z0-9_-]{16,}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|(?i:(?<=bearer )[A-Za-z0-9._~+/-]{8,}=*)"
    r"|(?i:(?<=basic )[A-Za-z0-9+/]{8,}=*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
"""Keys of common services, JSON Web Tokens, credentials in URLs and headers, private keys."""
_NAMED = re.compile(
    rf"(?i:({_WORD}(?:{_NAMES})[\"']?\s{{0,4}}[:=]\s{{0,4}}))"
    r"(?:\"((?:[^\"\\]|\\.)*)\"?|'([^']*)'?|([^\s\"',;&{}\[\]]+))"
)
"""A secret name, and its value: as in JSON, YAML, headers, queries and settings."""
_SCHEMES = ("bearer", "basic", "token", "digest")


def redacted(value: Any, secrets: Sequence[str] = (), longest: int = MAX_TEXT) -> Any:
    """Return JSON with texts shortened, values of secret names and known secrets hidden."""
    return _Redaction(secrets, longest).of(value, 0)


def is_shown_whole(value: Any, longest: int) -> bool:
    """Say whether nothing of a value would be left out because there is too much of it."""
    characters = 0
    values: list[tuple[Any, int]] = [(value, 0)]
    while values and characters <= MAX_CHARACTERS:
        one, level = values.pop()
        if isinstance(one, str):
            characters += len(one)
            if len(one) > longest:
                return False
        elif isinstance(one, list | tuple | Mapping):
            if level >= MAX_LEVELS or len(one) > MAX_MEMBERS:
                return False
            parts = (*one, *one.values()) if isinstance(one, Mapping) else one
            values += [(part, level + 1) for part in parts]
    return characters <= MAX_CHARACTERS


class _Redaction:
    def __init__(self, secrets: Sequence[str], longest: int) -> None:
        self._longest = longest
        spelled = {way for one in secrets if len(one) >= MIN_SECRET for way in _spellings(one)}
        self._secrets = sorted(spelled, key=len, reverse=True)
        self._left = MAX_CHARACTERS

    def of(self, value: Any, level: int) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if not isinstance(value, list | tuple | Mapping):
            return value
        if level >= MAX_LEVELS or self._left <= 0:
            return "…"
        rest = len(value) - MAX_MEMBERS
        if not isinstance(value, Mapping):
            shown = [self.of(one, level + 1) for one in value[:MAX_MEMBERS]]
            return [*shown, f"… {rest} more"] if rest > 0 else shown
        kept = list(value.items())[:MAX_MEMBERS]
        members = {self.text(name): self.member(name, one, level) for name, one in kept}
        return members | {"…": f"{rest} more"} if rest > 0 else members

    def member(self, name: str, value: Any, level: int) -> Any:
        if isinstance(value, bool | None) or not is_secret_name(name):
            return self.of(value, level + 1)
        # Numbers of tokens are no secrets, a PIN is.
        is_count = isinstance(value, int | float) and name.lower().endswith("tokens")
        return value if is_count else HIDDEN

    def text(self, text: str) -> str:
        for secret in self._secrets:  # in all of it: quick, and none is cut in two
            text = text.replace(secret, HIDDEN)
        room = self._longest + _ROOM
        shown = _SECRET_TEXT.sub(HIDDEN, text[:room])
        shown = _NAMED.sub(_without_value, shown)
        if len(text) > room and len(shown) <= self._longest:
            # So much was hidden that the cut is seen, and perhaps it is in the midst of a secret.
            shown = shown[: shown.rfind(HIDDEN) + len(HIDDEN)] + "…"
        most = max(0, min(self._longest, self._left))
        self._left -= len(shown)
        return shown if len(shown) <= most else f"{shown[:most]}…"


def is_secret_name(name: str) -> bool:
    """Say whether what has this name is not shown."""
    return _SECRET_NAME.search(name[-100:]) is not None


def _without_value(found: "re.Match[str]") -> str:
    name, *values = found.groups()
    value = next((one for one in values if one is not None), "")
    if value.lower() in _SCHEMES or value in ("", HIDDEN):
        return found[0]
    return f"{name}{found[0][len(name) :].replace(value, HIDDEN, 1)}"


def _spellings(secret: str) -> Iterator[str]:
    """Give the ways a secret may be written."""
    yield secret
    yield from (quote(secret, safe=""), quote_plus(secret))
    yield from (json.dumps(secret, ensure_ascii=plain)[1:-1] for plain in (True, False))
