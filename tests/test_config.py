"""Settings: every fault at once, no secret in an error, and relations where they belong."""

import re

import pytest

from opscore.config import Settings
from opscore.errors import ConfigurationError

GIVEN = {
    "DATABASE_URL": "postgresql://user:s3cret-word@127.0.0.1:1/db",
    "OPSCORE_API_KEY": "k" * 20,
}


def faults(*, threads: int | str = 0, **more: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        Settings.from_env(GIVEN | more, threads=threads)
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


@pytest.mark.parametrize("lease", ["1", "10", "20", "28.5"])
def test_what_a_fault_says_to_set_is_accepted(lease: str) -> None:
    said = faults(OPSCORE_LEASE_SECONDS=lease)
    (renew,) = re.findall(r"set OPSCORE_RENEW_SECONDS=([0-9.]+) ", said)
    Settings.from_env(GIVEN | {"OPSCORE_LEASE_SECONDS": lease, "OPSCORE_RENEW_SECONDS": renew})


@pytest.mark.parametrize("days", ["0", "-1", "1.5", "36501", "many"])
def test_firings_are_kept_for_whole_days(days: str) -> None:
    assert "OPSCORE_FIRING_DAYS" in faults(OPSCORE_FIRING_DAYS=days)
    assert Settings.from_env(GIVEN).firing_days == 90


def test_the_log_level_may_be_written_in_small_letters() -> None:
    assert Settings.from_env(GIVEN | {"OPSCORE_LOG_LEVEL": "debug"}).log_level == "DEBUG"


def test_no_error_shows_a_secret() -> None:
    said = faults(OPSCORE_API_KEY="short-secret", DATABASE_URL="mysql://u:s3cret-word@h/d")
    assert "s3cret-word" not in said and "short-secret" not in said


def test_a_pool_that_is_not_given_is_as_large_as_the_threads_need() -> None:
    def pool(threads: int | str, **more: str) -> int:
        return Settings.from_env(GIVEN | more, threads=threads).database_pool

    assert (pool(2), pool(33), pool("web_threads")) == (2, 33, 16)
    assert pool("web_threads", OPSCORE_WEB_THREADS="50") == 50
    assert pool(9, OPSCORE_DATABASE_POOL="12") == 12
    assert pool(9, OPSCORE_DATABASE_POOL="") == 9, "empty is absent"


def test_a_given_pool_smaller_than_the_threads_is_refused_with_every_other_fault() -> None:
    given = {"OPSCORE_DATABASE_POOL": "8", "OPSCORE_LEASE_SECONDS": "9"}
    said = faults(threads=9, **given)
    assert "OPSCORE_DATABASE_POOL (8) must be at least 9" in said
    assert "set OPSCORE_DATABASE_POOL=9" in said and "OPSCORE_RENEW_SECONDS=3" in said
    assert "must be at least 16" in faults(threads="web_threads", **given)
    assert "OPSCORE_DATABASE_POOL" not in faults(threads=8, **given)


def test_a_pool_that_is_no_number_is_called_that_only() -> None:
    said = faults(threads=50, OPSCORE_DATABASE_POOL="many")
    assert "OPSCORE_DATABASE_POOL: Not a valid integer" in said and "at least" not in said


def test_whoever_needs_no_pool_may_have_any() -> None:
    assert Settings.from_env(GIVEN | {"OPSCORE_DATABASE_POOL": "3"}).database_pool == 3
