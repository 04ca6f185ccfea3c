"""Settings: every fault at once, no secret in an error, and relations where they belong."""

import pytest

from opscore.config import Settings
from opscore.errors import ConfigurationError
from web.app import create_app

GIVEN = {
    "DATABASE_URL": "postgresql://user:s3cret-word@127.0.0.1:1/db",
    "OPSCORE_API_KEY": "k" * 20,
}


def faults(**more: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        Settings.from_env(GIVEN | more)
    return "\n".join(refused.value.faults)


def test_what_is_required_and_missing_is_named_together() -> None:
    with pytest.raises(ConfigurationError) as refused:
        Settings.from_env({"REDIS_URL": "ftp://x", "DATABASE_URL": ""})
    said = str(refused.value)
    assert "DATABASE_URL is not set" in said and "OPSCORE_API_KEY is not set" in said
    assert "REDIS_URL: must be a URL such as" in said


def test_wrong_values_and_broken_relations_are_named_together_with_the_way_out() -> None:
    said = faults(OPSCORE_LEASE_SECONDS="9", OPSCORE_MAX_LOST="many")
    assert "OPSCORE_MAX_LOST" in said
    assert "OPSCORE_LEASE_SECONDS (9) must be at least three times" in said
    assert "set OPSCORE_RENEW_SECONDS=3" in said


def test_no_error_shows_a_secret() -> None:
    said = faults(OPSCORE_API_KEY="short-secret", DATABASE_URL="mysql://u:s3cret-word@h/d")
    assert "s3cret-word" not in said and "short-secret" not in said


def test_a_worker_may_have_a_small_pool_whatever_web_needs() -> None:
    assert Settings.from_env(GIVEN | {"OPSCORE_DATABASE_POOL": "3"}).database_pool == 3


def test_web_refuses_a_pool_smaller_than_its_threads() -> None:
    settings = Settings.from_env(GIVEN | {"OPSCORE_DATABASE_POOL": "3"})
    with pytest.raises(ConfigurationError, match="OPSCORE_DATABASE_POOL"):
        create_app(settings)
