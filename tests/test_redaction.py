"""What is shown of an agent's work: without secrets, and not much of it."""

import json
import random
import string
from time import monotonic
from typing import Any

import pytest

from opscore.agentkit.redaction import (
    HIDDEN,
    MAX_CHARACTERS,
    MAX_MEMBERS,
    MAX_TEXT,
    is_shown_whole,
    redacted,
)

SECRET = 's3cret/with "quotes"&more'
KEY = "sk-proj-" + "aB3" * 12


@pytest.mark.parametrize(
    "name",
    [
        *("password", "Password", "db_password", "dbPassword", "passwd", "pass", "passphrase"),
        *("secret", "client_secret", "token", "accessToken", "auth-token", "api_key", "apiKey"),
        *("apikey", "X-Api-Key", "Authorization", "auth", "credentials", "cookie", "Set-Cookie"),
        *("private_key", "privateKey", "AWS_SECRET_ACCESS_KEY", "sessionId", "signature"),
    ],
)
@pytest.mark.parametrize("value", ["hunter2", 1234, ["hunter2"], {"a": "hunter2"}])
def test_what_has_a_secret_name_is_hidden(name: str, value: Any) -> None:
    assert redacted({name: value, "other": 1}) == {name: HIDDEN, "other": 1}


@pytest.mark.parametrize(
    "name",
    ["author", "authors", "tokens", "inputTokens", "passenger", "compass", "keyboard", "path"],
)
def test_what_has_another_name_is_shown(name: str) -> None:
    assert redacted({name: "hunter2", "n": {name: 7}}) == {name: "hunter2", "n": {name: 7}}


@pytest.mark.parametrize("value", [True, None])
def test_that_there_is_a_secret_is_none(value: bool | None) -> None:
    assert redacted({"password": value}) == {"password": value}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"key {KEY}.", f"key {HIDDEN}."),
        ("ghp_" + "a" * 36, HIDDEN),
        ("AKIA" + "A" * 16, HIDDEN),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl", HIDDEN),
        ("postgresql://ada:hunter2@db/x", f"postgresql://{HIDDEN}@db/x"),
        ("Authorization: Bearer abcdefgh12345678", f"Authorization: Bearer {HIDDEN}"),
        ("authorization: basic YWRhOmh1bnRlcjI=", f"authorization: basic {HIDDEN}"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII", HIDDEN),
        ('{"password": "hunter2", "user": "ada"}', f'{{"password": "{HIDDEN}", "user": "ada"}}'),
        ('{"password": "hun\\"ter2", "a": 1}', f'{{"password": "{HIDDEN}", "a": 1}}'),
        ("{'api_key': 'hunter2'}", f"{{'api_key': '{HIDDEN}'}}"),
        ("accessToken=hunter2", f"accessToken={HIDDEN}"),
        ("MY_OWN_AWS_SECRET_ACCESS_KEY: hunter2", f"MY_OWN_AWS_SECRET_ACCESS_KEY: {HIDDEN}"),
        ("compass: north, author: ada", "compass: north, author: ada"),
        ("DB_PASSWORD=hunter2 make", f"DB_PASSWORD={HIDDEN} make"),
        ("https://x.example/?a=1&token=hunter2&b=2", f"https://x.example/?a=1&token={HIDDEN}&b=2"),
        ("password: hunter2\nuser: ada", f"password: {HIDDEN}\nuser: ada"),
        ("the token of the day is sunny", "the token of the day is sunny"),
        ("3 tokens: a, b", "3 tokens: a, b"),
    ],
)
def test_what_looks_like_a_secret_in_text_is_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted([{"a": text}]) == [{"a": shown}]


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        f"before {SECRET} after",
        json.dumps({"a": SECRET}),
        "https://x.example/?q=s3cret%2Fwith%20%22quotes%22%26more",
        "q=s3cret%2Fwith+%22quotes%22%26more",
    ],
)
def test_the_process_own_secrets_are_hidden_however_they_are_spelled(text: str) -> None:
    shown = redacted({"a": [text], text: 1}, [SECRET])
    assert "s3cret" not in json.dumps(shown)
    assert HIDDEN in json.dumps(shown)


def test_a_short_secret_does_not_hide_every_word() -> None:
    assert redacted("a cat", ["a", ""]) == "a cat"


def test_no_part_of_a_secret_is_seen_where_a_text_is_cut() -> None:
    secret = "Zq9" * 30
    for before in range(0, 2100, 7):
        assert "Zq9" not in redacted("x " * (before // 2) + secret * 5, [secret]), before
        assert "aB3aB3" not in redacted("x" * (before % 400) + f" {KEY}" * 100), before


def test_texts_and_structures_are_shortened() -> None:
    assert redacted("x" * 1000) == "x" * MAX_TEXT + "…"
    assert len(redacted(list(range(100)))) == MAX_MEMBERS + 1
    assert redacted(list(range(100)))[-1] == "… 80 more"
    assert redacted({str(n): n for n in range(30)})["…"] == "10 more"
    deep: Any = "end"
    for _ in range(1000):
        deep = [deep]
    assert redacted(deep) == [[[[[["…"]]]]]]
    wide: Any = "y" * 400
    for _ in range(4):
        wide = [wide] * 20
    assert len(json.dumps(redacted(wide))) < 4 * MAX_CHARACTERS


random.seed(4)
NOISE = "".join(random.choices(string.ascii_letters + string.digits + "+/", k=1_000_000))


@pytest.mark.parametrize(
    "text",
    [
        NOISE,
        "a" * 1_000_000,
        "eyJ" * 333_333,
        "sk-" * 333_333,
        "://" + "a:" * 500_000,
        "password" * 125_000,
        "a_" * 500_000 + "token=",
        "-----BEGIN PRIVATE KEY-----" * 40_000,
        'token="' + "\\" * 1_000_000,
        "token = " * 125_000,
    ],
    ids=range(10),
)
def test_a_megabyte_of_noise_takes_no_time(text: str) -> None:
    began = monotonic()
    shown = redacted({"a": [text] * 20, text: text}, ["no-such-secret", SECRET])
    assert monotonic() - began < 2
    assert len(json.dumps(shown)) < 4 * MAX_CHARACTERS


@pytest.mark.parametrize(
    ("value", "is_whole"),
    [
        ("x" * 100, True),
        ("x" * 101, False),
        ({"x" * 101: 1}, False),
        ([1] * 20, True),
        ([1] * 21, False),
        ({str(n): n for n in range(21)}, False),
        ([[[[[["deep"]]]]]], True),
        ([[[[[[["deeper"]]]]]]], False),
        ([["x" * 100] * 20] * 9, False),
        (None, True),
    ],
)
def test_what_is_shown_whole_is_shown_as_it_is(value: object, is_whole: bool) -> None:
    assert is_shown_whole(value, 100) == is_whole
    if is_whole:
        assert redacted(value, (), 100) == value
