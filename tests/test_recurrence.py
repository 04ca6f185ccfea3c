"""When a schedule fires, told by a slow reference that walks through time minute by minute."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opscore.errors import InvalidRequest
from opscore.recurrence import (
    ALIASES,
    GRACE_SECONDS,
    MAX_CRON_LENGTH,
    MAX_EVERY_SECONDS,
    Due,
    Recurrence,
    jitter,
    missed,
)

CREATED = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
FIRST_DAY, DAYS = datetime(2026, 1, 1, tzinfo=UTC), 3_652
"""Ten years, for the reference."""
EVERYTHING = 1_000_000


def cron(text: str, timezone: str = "UTC", **more: Any) -> Recurrence:
    return Recurrence.parse(CREATED, cron=text, timezone=timezone, **more)


def every(seconds: float, **more: Any) -> Recurrence:
    return Recurrence.parse(CREATED, every_seconds=seconds, **more)


def at(text: str) -> datetime:
    """Read `2026-03-29T02:30+01:00`, or without an offset a moment in UTC."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def faults(**said: Any) -> dict[str, list[str]]:
    with pytest.raises(InvalidRequest) as caught:
        Recurrence.parse(CREATED, **said)
    return dict(caught.value.errors)


# --- the reference


@dataclass(frozen=True)
class Wanted:
    """A cron as text, and what each of its fields lets through."""

    texts: tuple[str, ...]
    values: tuple[frozenset[int], ...]

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @cached_property
    def names_times(self) -> bool:
        return self.texts[0][0] != "*" and self.texts[1][0] != "*"

    def fits(self, local: datetime) -> bool:
        minutes, hours, days, months, weekdays = self.values
        if local.minute not in minutes or local.hour not in hours or local.month not in months:
            return False
        day, weekday = local.day in days, local.isoweekday() % 7 in weekdays
        if self.texts[2][0] == "*" or self.texts[4][0] == "*":
            return day and weekday
        return day or weekday


@dataclass
class Clock:
    """A clock on the wall, looked at in every step of real time."""

    wanted: Wanted
    step: timedelta
    shown: datetime
    """The latest time it has shown so far."""
    fired: list[datetime] = field(default_factory=list)

    def look(self, moment: datetime, local: datetime) -> None:
        if self._reaches(local) if self.wanted.names_times else self.wanted.fits(local):
            self.fired.append(moment)
        self.shown = max(self.shown, local)

    def _reaches(self, local: datetime) -> bool:
        """Answer whether it shows or skips a time that fits, for the first time."""
        time = self.shown + self.step
        while time <= local:
            if self.wanted.fits(time):
                return True
            time += self.step
        return False


def walked(
    wanted: list[Wanted], zone: str, begin: datetime, until: datetime, step: timedelta
) -> list[list[datetime]]:
    """Return what each fires after `begin` and not after `until`."""
    # A clock that begins in the middle of an overlap must know that it showed these times before.
    moment, tz = begin.replace(minute=0, second=0, microsecond=0) - 2 * DAY, ZoneInfo(zone)
    local = moment.astimezone(tz).replace(tzinfo=None)
    clocks = [Clock(each, step, local) for each in wanted]
    while moment + step <= until:
        moment += step
        local = moment.astimezone(tz).replace(tzinfo=None)
        for clock in clocks:
            clock.look(moment, local)
    return [[moment for moment in clock.fired if moment > begin] for clock in clocks]


FIELDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
WEEKDAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")


def spelled(position: int, value: int) -> str:
    if position == 3 and value % 2:
        return MONTHS[value - 1].lower()
    return WEEKDAYS[value] if position == 4 and 0 < value < 7 else str(value)


@st.composite
def terms(draw: st.DrawFn, position: int) -> tuple[str, set[int]]:
    first, last = FIELDS[position]
    # Clocks are changed at night, and a random hour seldom is one of these.
    low = draw(st.integers(first, last) | st.integers(first, first + 3))
    high = draw(st.integers(low, last) | st.integers(low, min(low + 3, last)))
    step = draw(st.integers(1, 40))
    span = f"{spelled(position, low)}-{spelled(position, high)}"
    choices: list[tuple[str, set[int]]] = [
        (spelled(position, low), {low}),
        (span, set(range(low, high + 1))),
        (f"{span}/{step}", set(range(low, high + 1, step))),
        (f"{low}/{step}", set(range(low, last + 1, step))),
        (f"*/{step}", set(range(first, last + 1, step))),
    ]
    return draw(st.sampled_from(choices))


@st.composite
def crons(draw: st.DrawFn) -> Wanted:
    texts, values = [], []
    for position, (first, last) in enumerate(FIELDS):
        most = 2 if position < 2 else draw(st.sampled_from([0, 0, 2]))
        several = draw(st.lists(terms(position), max_size=most))
        found = set().union(*(found for _, found in several)) or set(range(first, last + 1))
        texts.append(",".join(text for text, _ in several) or "*")
        values.append(frozenset(value % 7 for value in found) if position == 4 else found)
    return Wanted(tuple(texts), tuple(map(frozenset, values)))


ALL_DAYS, ALL_MONTHS, ALL_WEEK = range(1, 32), range(1, 13), range(7)
LONG_WALKED = ("Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Asia/Beirut")
ZONES = (
    *("UTC", *LONG_WALKED, "America/New_York", "Asia/Kathmandu", "Africa/Casablanca"),
    *("Africa/Cairo", "America/Havana", "America/Santiago", "Antarctica/Troll", "Pacific/Apia"),
)


@cache
def changes(zone: str) -> list[datetime]:
    """Return the days within the ten years before which the zone's clock was changed."""
    days = [FIRST_DAY + n * DAY for n in range(DAYS)]
    offsets = [day.astimezone(ZoneInfo(zone)).utcoffset() for day in days]
    return [day for day, (a, b) in zip(days[1:], pairwise(offsets), strict=True) if a != b]


@st.composite
def moments(draw: st.DrawFn, zone: str) -> datetime:
    """Draw a moment of the ten years, mostly around a change of the clock."""
    days = changes(zone)
    if days and draw(st.integers(0, 3)):
        day = draw(st.sampled_from(days)) - DAY
        return day + draw(st.integers(0, 86_400 * 1_000)) * timedelta(milliseconds=1)
    return FIRST_DAY + draw(st.integers(0, DAYS * 86_400)) * timedelta(seconds=1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(ZONES), crons())
def test_crons_fire_when_the_reference_does(data: st.DataObject, zone: str, wanted: Wanted) -> None:
    begin = data.draw(moments(zone))
    until = begin + data.draw(st.integers(0, 60)) * HOUR
    try:
        recurrence = cron(wanted.text, zone)
    except InvalidRequest as error:
        assert error.errors == {
            "/cron": ["This never fires: there is no such day in these months."]
        }
        return
    (expected,) = walked([wanted], zone, begin, until, MINUTE)
    assert recurrence.between(begin, until, EVERYTHING) == (expected, False)
    assert recurrence.last_between(begin, until) == (expected[-1] if expected else None)
    following = recurrence.next_after(begin)
    assert following == expected[0] if expected else following is None or following > until
    limit = data.draw(st.integers(1, 5))
    assert recurrence.between(begin, until, limit) == (expected[:limit], len(expected) > limit)


@pytest.mark.parametrize("zone", [zone for zone in ZONES if changes(zone)])
@pytest.mark.parametrize("hours", ["0-4,22-23", "*"])
def test_the_next_moment_is_the_same_from_wherever_one_looks(zone: str, hours: str) -> None:
    texts = ("5-59/20", hours, "*", "*", "*")
    values = (range(5, 60, 20), range(24) if hours == "*" else {0, 1, 2, 3, 4, 22, 23})
    wanted = Wanted(texts, tuple(map(frozenset, (*values, ALL_DAYS, ALL_MONTHS, ALL_WEEK))))
    recurrence = cron(wanted.text, zone)
    for change in changes(zone)[:3]:
        (fired,) = walked([wanted], zone, change - 2 * DAY, change + 2 * DAY, MINUTE)
        for n in range(2 * 24 * 6):
            begin = change - DAY + n * 10 * MINUTE + timedelta(seconds=n % 60, microseconds=n)
            assert recurrence.next_after(begin) == next(due for due in fired if due > begin)


HALVES = {"*/30": {0, 30}, "0": {0}, "30": {30}}


def half_hourly(text: str, *values: Any) -> Wanted:
    texts = tuple(text.split())
    return Wanted(texts, (frozenset(HALVES[texts[0]]), *map(frozenset, values)))


@pytest.mark.parametrize("zone", LONG_WALKED)
def test_ten_years_are_as_the_reference_has_them(zone: str) -> None:
    wanted = [
        half_hourly("30 2 * * *", {2}, ALL_DAYS, ALL_MONTHS, ALL_WEEK),
        half_hourly("30 */3 * * SUN", {0, 3, 6, 9, 12, 15, 18, 21}, ALL_DAYS, ALL_MONTHS, {0}),
        half_hourly("*/30 1-2 * * FRI-7", {1, 2}, ALL_DAYS, ALL_MONTHS, {5, 6, 0}),
        half_hourly("0 0-23 * 3,4,10 7", range(24), ALL_DAYS, {3, 4, 10}, {0}),
        half_hourly("30 23 31 * *", {23}, {31}, ALL_MONTHS, ALL_WEEK),
        half_hourly("0 0 13 * FRI", {0}, {13}, ALL_MONTHS, {5}),
    ]
    until = FIRST_DAY + DAYS * DAY
    expected = walked(wanted, zone, FIRST_DAY, until, 30 * MINUTE)
    for each, fired in zip(wanted, expected, strict=True):
        assert cron(each.text, zone).between(FIRST_DAY, until, EVERYTHING).moments == fired


# --- when clocks are changed

BERLIN, LORD_HOWE, APIA = "Europe/Berlin", "Australia/Lord_Howe", "Pacific/Apia"

CHANGES = [
    # Spring: 02:00 becomes 03:00.
    (BERLIN, "30 2 * * *", "2026-03-28T12:00", "2026-03-29T03:00+02:00 2026-03-30T02:30+02:00"),
    (BERLIN, "0,30 2 * * *", "2026-03-28T12:00", "2026-03-29T03:00+02:00 2026-03-30T02:00+02:00"),
    (BERLIN, "30 2,3 * * *", "2026-03-28T12:00", "2026-03-29T03:00+02:00 2026-03-29T03:30+02:00"),
    (BERLIN, "0 2,3 * * *", "2026-03-28T12:00", "2026-03-29T03:00+02:00 2026-03-30T02:00+02:00"),
    (BERLIN, "30 2 29 3 *", "2026-03-01T12:00", "2026-03-29T03:00+02:00 2027-03-29T02:30+02:00"),
    (BERLIN, "30 1 * * *", "2026-03-28T12:00", "2026-03-29T01:30+01:00 2026-03-30T01:30+02:00"),
    (BERLIN, "0 * * * *", "2026-03-29T00:00", "2026-03-29T03:00+02:00 2026-03-29T04:00+02:00"),
    (BERLIN, "*/30 * * * *", "2026-03-29T00:00", "2026-03-29T01:30+01:00 2026-03-29T03:00+02:00"),
    (BERLIN, "* * * * *", "2026-03-29T00:58", "2026-03-29T01:59+01:00 2026-03-29T03:00+02:00"),
    (BERLIN, "0 */2 * * *", "2026-03-28T22:00", "2026-03-29T00:00+01:00 2026-03-29T04:00+02:00"),
    (BERLIN, "*/30 2 * * *", "2026-03-28T12:00", "2026-03-30T02:00+02:00 2026-03-30T02:30+02:00"),
    (BERLIN, "0 0-23 * * *", "2026-03-29T00:00", "2026-03-29T03:00+02:00 2026-03-29T04:00+02:00"),
    # Autumn: 03:00 becomes 02:00.
    (BERLIN, "30 2 * * *", "2026-10-24T12:00", "2026-10-25T02:30+02:00 2026-10-26T02:30+01:00"),
    (BERLIN, "30 2 * * *", "2026-10-25T00:29:59", "2026-10-25T02:30+02:00 2026-10-26T02:30+01:00"),
    (BERLIN, "30 2 * * *", "2026-10-25T01:10", "2026-10-26T02:30+01:00 2026-10-27T02:30+01:00"),
    (BERLIN, "0 3 * * *", "2026-10-24T12:00", "2026-10-25T03:00+01:00 2026-10-26T03:00+01:00"),
    (BERLIN, "0 0-23 * * *", "2026-10-24T23:00", "2026-10-25T02:00+02:00 2026-10-25T03:00+01:00"),
    (BERLIN, "0 * * * *", "2026-10-24T23:30", "2026-10-25T02:00+02:00 2026-10-25T02:00+01:00"),
    (BERLIN, "*/30 * * * *", "2026-10-25T00:20", "2026-10-25T02:30+02:00 2026-10-25T02:00+01:00"),
    (BERLIN, "* * * * *", "2026-10-25T00:58", "2026-10-25T02:59+02:00 2026-10-25T02:00+01:00"),
    (BERLIN, "30 */2 * * *", "2026-10-25T00:00", "2026-10-25T02:30+02:00 2026-10-25T02:30+01:00"),
    (BERLIN, "*/30 2 25 10 *", "2026-10-25T00:20", "2026-10-25T02:30+02:00 2026-10-25T02:00+01:00"),
    # The other side of the ocean.
    (
        *("America/New_York", "30 2 * * *", "2026-03-07T12:00"),
        "2026-03-08T03:00-04:00 2026-03-09T02:30-04:00",
    ),
    (
        *("America/New_York", "30 1 * * *", "2026-10-31T12:00"),
        "2026-11-01T01:30-04:00 2026-11-02T01:30-05:00",
    ),
    # Newfoundland changed its clocks a minute past midnight: 00:01 to 01:01, 00:01 to 23:01.
    (
        *("America/St_Johns", "30 0 * * *", "2010-03-13T12:00"),
        "2010-03-14T01:01-02:30 2010-03-15T00:30-02:30",
    ),
    (
        *("America/St_Johns", "30 23 * * *", "2010-11-06T12:00"),
        "2010-11-06T23:30-02:30 2010-11-07T23:30-03:30",
    ),
    (
        *("America/St_Johns", "0 0 * * *", "2010-11-06T12:00"),
        "2010-11-07T00:00-02:30 2010-11-08T00:00-03:30",
    ),
    # Half an hour: 02:00 becomes 02:30, and 02:00 becomes 01:30.
    (LORD_HOWE, "15 2 * * *", "2026-10-03T00:00", "2026-10-04T02:30+11:00 2026-10-05T02:15+11:00"),
    (
        LORD_HOWE,
        "15 */3 * * *",
        "2026-10-03T14:00",
        "2026-10-04T03:15+11:00 2026-10-04T06:15+11:00",
    ),
    (LORD_HOWE, "45 1 * * *", "2026-04-04T00:00", "2026-04-05T01:45+11:00 2026-04-06T01:45+10:30"),
    (LORD_HOWE, "45 * * * *", "2026-04-04T14:30", "2026-04-05T01:45+11:00 2026-04-05T01:45+10:30"),
    (
        LORD_HOWE,
        "15 */2 * * *",
        "2026-04-04T14:00",
        "2026-04-05T02:15+10:30 2026-04-05T04:15+10:30",
    ),
    (
        LORD_HOWE,
        "*/30 * * * *",
        "2026-04-04T14:10",
        "2026-04-05T01:30+11:00 2026-04-05T01:30+10:30",
    ),
    # Two hours: 01:00 becomes 03:00.
    (
        *("Antarctica/Troll", "0,30 1,2 * * *", "2025-03-29T12:00"),
        "2025-03-30T03:00+02:00 2025-03-31T01:00+02:00",
    ),
    # Summer time pauses in Ramadan: 03:00 becomes 02:00, and a month later back.
    (
        *("Africa/Casablanca", "30 2 * * *", "2024-03-09T12:00"),
        "2024-03-10T02:30+01:00 2024-03-11T02:30+00:00",
    ),
    (
        *("Africa/Casablanca", "30 2 * * *", "2024-04-13T12:00"),
        "2024-04-14T03:00+01:00 2024-04-15T02:30+01:00",
    ),
    # A day that begins at 01:00.
    (
        *("Africa/Cairo", "0 0 * * *", "2023-04-27T12:00"),
        "2023-04-28T01:00+03:00 2023-04-29T00:00+03:00",
    ),
    (
        *("Africa/Cairo", "*/30 */6 28 4 *", "2023-04-27T12:00"),
        "2023-04-28T06:00+03:00 2023-04-28T06:30+03:00",
    ),
    # A day that ends twice: midnight becomes 23:00 of the day before, or 01:00 becomes 00:00.
    (
        *("Asia/Beirut", "30 23 * * *", "2025-10-25T12:00"),
        "2025-10-25T23:30+03:00 2025-10-26T23:30+02:00",
    ),
    (
        *("America/Havana", "0 0 * * *", "2025-11-01T12:00"),
        "2025-11-02T00:00-04:00 2025-11-03T00:00-05:00",
    ),
    # A day that never was, 30 December, and before it 29 hours of real time.
    (APIA, "0 10 * * *", "2011-12-30T00:00", "2011-12-31T00:00+14:00 2011-12-31T10:00+14:00"),
    (APIA, "0 0 * * *", "2011-12-29T12:00", "2011-12-31T00:00+14:00 2012-01-01T00:00+14:00"),
    (APIA, "0 12 30 12 *", "2011-12-01T00:00", "2011-12-31T00:00+14:00 2012-12-30T12:00+14:00"),
    (APIA, "0 * * * *", "2011-12-30T08:30", "2011-12-29T23:00-10:00 2011-12-31T00:00+14:00"),
    # A summer of a week, which the search must not step over.
    (
        *("America/Recife", "*/30 23 14 10 *", "2000-10-01T00:00"),
        "2000-10-14T23:00-02:00 2000-10-14T23:30-02:00 2000-10-14T23:00-03:00",
    ),
    # Offsets that are no whole hours, once moved by a quarter of one.
    (
        *("Asia/Kathmandu", "0 0 * * *", "2026-06-01T00:00"),
        "2026-06-02T00:00+05:45 2026-06-03T00:00+05:45",
    ),
    (
        *("Asia/Kathmandu", "10 0 * * *", "1985-12-31T00:00"),
        "1986-01-01T00:15+05:45 1986-01-02T00:10+05:45",
    ),
    ("America/St_Johns", "0 9 * * *", "2026-07-01T00:00", "2026-07-01T09:00-02:30"),
]


@pytest.mark.parametrize(("zone", "text", "after", "expected"), CHANGES)
def test_crons_and_changed_clocks(zone: str, text: str, after: str, expected: str) -> None:
    wanted = expected.split()
    found = cron(text, zone).preview(at(after), len(wanted))
    assert [m.astimezone(ZoneInfo(zone)).isoformat(timespec="minutes") for m in found] == wanted
    assert all(moment.tzinfo is UTC for moment in found)


@pytest.mark.parametrize("text", ["*/30 * * * *", "* * * * *", "*/5 * * * *"])
@pytest.mark.parametrize("zone", [BERLIN, "America/New_York", "Africa/Casablanca", "Asia/Beirut"])
def test_crons_of_every_so_many_minutes_keep_real_time(zone: str, text: str) -> None:
    steps = set()
    for change in changes(zone)[:6]:
        found = cron(text, zone).between(change - DAY, change + DAY, EVERYTHING).moments
        steps |= {later - earlier for earlier, later in pairwise(found)}
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("text", "after", "expected"),
    [
        ("0 0 29 2 *", "2026-01-01", "2028-02-29 2032-02-29"),
        ("0 0 29 2 *", "2096-02-28", "2096-02-29 2104-02-29"),
        ("0 0 29 2 */7", "2026-01-01", "2032-02-29 2060-02-29 2088-02-29 2128-02-29"),
        ("0 0 31 * *", "2026-01-30", "2026-01-31 2026-03-31 2026-05-31 2026-07-31 2026-08-31"),
        ("0 0 L * *", "2028-01-30", "2028-01-31 2028-02-29 2028-03-31 2028-04-30"),
        ("0 0 LW * *", "2026-01-01", "2026-01-30 2026-02-27 2026-03-31"),
        ("0 0 * * 5L", "2026-01-01", "2026-01-30 2026-02-27 2026-03-27"),
        ("0 0 * * MON#5", "2026-01-01", "2026-03-30 2026-06-29 2026-08-31"),
        ("0 0 * * 7", "2026-01-01", "2026-01-04 2026-01-11"),
        ("0 0 13 * FRI", "2026-02-01", "2026-02-06 2026-02-13 2026-02-20 2026-02-27 2026-03-06"),
        ("0 0 */7 * MON", "2026-01-01", "2026-06-01 2026-06-08 2026-06-15 2026-06-22 2026-06-29"),
        ("0 0 30 2 FRI", "2026-01-01", "2026-02-06 2026-02-13"),
        ("@yearly", "2026-01-01", "2027-01-01 2028-01-01"),
        ("@Monthly", "2026-01-01", "2026-02-01 2026-03-01"),
        ("@weekly", "2026-01-01", "2026-01-04 2026-01-11"),
        ("  @daily ", "2026-01-01", "2026-01-02 2026-01-03"),
    ],
)
def test_crons_on_the_calendar(text: str, after: str, expected: str) -> None:
    wanted = [at(day) for day in expected.split()]
    assert cron(text).preview(at(after), len(wanted)) == wanted


def test_all_aliases_are_read() -> None:
    assert all(cron(alias) == cron(fields) for alias, fields in ALIASES.items())


def test_a_range_of_one_value_is_that_value_whatever_its_step() -> None:
    assert cron("5-5/2 6 * * MON-MON/3") == cron("5 6 * * MON")
    assert cron("5-59/2 6 * * *") != cron("5 6 * * *")


# --- intervals


@settings(deadline=None, derandomize=True)
@given(
    st.floats(1, 100_000) | st.integers(1, 100_000),
    st.integers(-1_000, 1_000),
    st.integers(0, 10**6),
)
def test_intervals_are_whole_steps_from_their_anchor(
    seconds: float, steps: int, microseconds: int
) -> None:
    recurrence = every(seconds)
    moment = CREATED + steps * timedelta(seconds=seconds) + timedelta(microseconds=microseconds)
    expected = next(
        due
        for n in range(steps, steps + 3)
        if (due := CREATED + n * timedelta(seconds=seconds)) > moment
    )
    assert recurrence.next_after(moment) == expected
    following = CREATED + 10**6 * timedelta(seconds=seconds)
    assert recurrence.next_after(following - timedelta(microseconds=1)) == following


def test_an_interval_counts_from_its_start_or_else_from_its_creation() -> None:
    start = at("2026-01-05T06:30")
    assert every(3600).preview(CREATED, 2) == [CREATED + HOUR, CREATED + 2 * HOUR]
    assert every(3600, start_at=start).preview(CREATED, 2) == [start, start + HOUR]
    before = at("2025-12-31T22:40")
    assert every(3600, start_at=before).preview(CREATED, 1) == [at("2026-01-01T00:40")]


def test_an_interval_keeps_real_time_where_clocks_are_changed() -> None:
    start = at("2026-03-28T02:30+01:00")
    moments = every(86_400, start_at=start).preview(start, 2)
    local = [moment.astimezone(ZoneInfo(BERLIN)).strftime("%d %H:%M") for moment in moments]
    assert local == ["29 03:30", "30 03:30"]


# --- start, end, limits


def test_start_and_end_both_belong_to_the_schedule() -> None:
    start, end = at("2026-01-02T00:00"), at("2026-01-04T00:00")
    daily = cron("0 0 * * *", start_at=start, end_at=end)
    assert daily.preview(CREATED, 9) == [start, start + DAY, end]
    assert daily.next_after(end) is None
    assert daily.last_between(CREATED, end + DAY) == end
    assert daily.between(CREATED - DAY, end + DAY, 3) == ([start, start + DAY, end], False)
    once = every(60, start_at=start, end_at=start)
    assert once.preview(CREATED, 9) == [start]


def test_moments_go_in_with_any_offset_and_come_out_in_utc() -> None:
    moment = at("2026-06-01T12:00")
    for zone in (BERLIN, "Asia/Kathmandu"):
        local = moment.astimezone(ZoneInfo(zone))
        for recurrence in (cron("0 3 * * *", BERLIN), every(90.5), every(60, start_at=local)):
            found = recurrence.next_after(local)
            assert found == recurrence.next_after(moment) and found
            assert found.tzinfo is UTC
    with pytest.raises(ValueError, match="offset"):
        every(60).next_after(moment.replace(tzinfo=None))


def test_the_limit_leaves_the_later_moments_and_says_so() -> None:
    hourly = cron("@hourly")
    until = CREATED + 3 * HOUR
    assert hourly.between(CREATED, until, 3) == ([CREATED + n * HOUR for n in (1, 2, 3)], False)
    assert hourly.between(CREATED, until, 2) == ([CREATED + n * HOUR for n in (1, 2)], True)
    assert hourly.between(until, until, 2) == ([], False)


def test_the_last_of_billions_is_found_as_fast_as_the_last_of_two() -> None:
    century = CREATED + 36_525 * DAY
    assert every(1).last_between(CREATED, century) == century
    assert every(7.5).last_between(CREATED, CREATED + timedelta(seconds=20)) == CREATED + timedelta(
        seconds=15
    )
    assert cron("* * * * *", BERLIN).last_between(CREATED, century) == century
    assert cron("0 0 29 2 *").last_between(CREATED, century) == at("2124-02-29")
    assert cron("0 0 29 2 *").last_between(CREATED, CREATED + DAY) is None


def test_time_ends_with_the_year_9999() -> None:
    assert every(MAX_EVERY_SECONDS).next_after(at("9999-12-31T12:00")) is None
    assert cron("0 0 * * *", BERLIN).next_after(at("9999-12-31T23:30")) is None
    assert cron("*/5 * 29 2 *", BERLIN).next_after(at("9999-12-01T00:00")) is None
    assert cron("0 0 29 2 *").next_after(at("9996-03-01")) is None


# --- what was missed

LIMIT = 100


def due(recurrence: Recurrence, decided: str, now: str, catch_up: Any, **more: Any) -> Due:
    said: dict[str, Any] = {"window_seconds": 86_400.0, "limit": LIMIT, **more}
    return missed(recurrence, at(decided), at(now), catch_up, **said)


DECIDED, NOW = "2026-01-10T00:00", "2026-01-10T05:00:20"
HOURS = [at(f"2026-01-10T0{n}:00") for n in range(7)]


def test_without_catching_up_only_what_is_hardly_late_fires() -> None:
    assert due(cron("@hourly"), DECIDED, NOW, "none") == (HOURS[5:6], HOURS[6])
    late = (HOURS[5] + timedelta(seconds=GRACE_SECONDS)).isoformat()
    assert due(cron("@hourly"), DECIDED, late, "none") == (HOURS[5:6], HOURS[6])
    later = (HOURS[5] + timedelta(seconds=GRACE_SECONDS + 0.001)).isoformat()
    assert due(cron("@hourly"), DECIDED, later, "none") == ([], HOURS[6])


def test_catching_up_with_the_last_fires_one_however_old() -> None:
    assert due(cron("@hourly"), DECIDED, "2026-01-10T05:59", "last") == (HOURS[5:6], HOURS[6])
    assert due(every(1), "2026-01-07T00:00", DECIDED, "last") == (
        [at(DECIDED)],
        at(DECIDED) + timedelta(seconds=1),
    )
    assert due(cron("@yearly"), "2025-12-31", "2026-12-31", "last").moments == [CREATED]


def test_catching_up_with_all_fires_those_within_the_window_oldest_first() -> None:
    assert due(cron("@hourly"), DECIDED, NOW, "all") == (HOURS[1:6], HOURS[6])
    hours = 3 * 3600.0
    assert due(cron("@hourly"), DECIDED, NOW, "all", window_seconds=hours).moments == HOURS[3:6]
    exact = due(cron("@hourly"), DECIDED, "2026-01-10T05:00", "all", window_seconds=hours)
    assert exact.moments == HOURS[2:6]
    assert due(cron("@hourly"), DECIDED, NOW, "all", window_seconds=0.0).moments == HOURS[5:6]


def test_windows_are_real_time_in_whatever_zone_now_is_given() -> None:
    now = at("2026-03-29T10:00")
    for same in (now, now.astimezone(ZoneInfo(BERLIN))):
        found = missed(cron("@hourly"), CREATED, same, "all", 12 * 3600.0, LIMIT)
        assert found.moments == [now - n * HOUR for n in range(12, -1, -1)]
        assert found.next_at == now + HOUR


def test_what_is_beyond_the_limit_comes_next_and_is_due_already() -> None:
    first = due(cron("@hourly"), DECIDED, NOW, "all", limit=3)
    assert first == (HOURS[1:4], HOURS[4])
    rest = due(cron("@hourly"), first.moments[-1].isoformat(), NOW, "all", limit=3)
    assert rest == (HOURS[4:6], HOURS[6])


@pytest.mark.parametrize("catch_up", ["none", "last", "all"])
def test_nothing_is_due_before_its_moment_or_after_the_end(catch_up: str) -> None:
    assert due(cron("@hourly"), DECIDED, "2026-01-10T00:59:59", catch_up) == ([], HOURS[1])
    ended = cron("@hourly", end_at=HOURS[2])
    assert due(ended, HOURS[2].isoformat(), NOW, catch_up) == ([], None)


@pytest.mark.parametrize("catch_up", ["none", "last", "all"])
def test_a_clock_that_is_set_back_fires_nothing_again(catch_up: str) -> None:
    decided = HOURS[5].isoformat()
    assert due(cron("@hourly"), decided, "2026-01-10T02:00:10", catch_up) == ([], HOURS[6])
    assert due(cron("@hourly"), decided, "2026-01-10T06:00:10", catch_up).moments == [HOURS[6]]


JUMPS = st.lists(st.integers(-7_200, 20_000) | st.integers(0, 70), min_size=1, max_size=30)


@settings(deadline=None, derandomize=True)
@given(
    st.sampled_from([cron("*/7 * * * *", BERLIN), cron("30 */2 * * *"), every(444.5)]),
    JUMPS,
    st.integers(1, 5),
)
def test_ticks_of_a_jumping_clock_fire_each_moment_once_when_all_are_caught_up(
    recurrence: Recurrence, jumps: list[int], limit: int
) -> None:
    begin = latest = now = decided = at("2026-10-24T22:00")
    fired: list[datetime] = []
    for jump in jumps:
        now += timedelta(seconds=jump)
        latest = max(latest, now)
        is_over = False
        while not is_over:
            found = missed(recurrence, decided, now, "all", 10.0**7, limit)
            fired += found.moments
            decided = (fired or [begin])[-1]
            assert found.next_at and found.next_at > decided
            is_over = found.next_at > now
    assert fired == recurrence.between(begin, latest, EVERYTHING).moments


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(["none", "last"]), JUMPS)
def test_ticks_of_a_jumping_clock_never_fire_twice(catch_up: Any, jumps: list[int]) -> None:
    recurrence = cron("*/7 * * * *", BERLIN)
    begin = now = decided = at("2026-10-24T22:00")
    fired: list[datetime] = []
    for jump in jumps:
        now += timedelta(seconds=jump)
        found = missed(recurrence, decided, now, catch_up, 86_400.0, LIMIT)
        assert len(found.moments) <= 1 and found.moments <= [now]
        fired += found.moments
        decided = (fired or [begin])[-1]
    assert all(earlier < later for earlier, later in pairwise(fired))
    assert all(recurrence.next_after(moment - MINUTE) == moment for moment in fired)


# --- jitter

JITTER_OF_A = timedelta(seconds=17, microseconds=597_737)


@settings(deadline=None, derandomize=True)
@given(st.uuids(), st.datetimes(timezones=st.just(UTC)), st.floats(0, 10**6))
def test_jitter_is_within_its_bounds_and_the_same_for_all(
    schedule_id: Any, moment: datetime, seconds: float
) -> None:
    found = jitter(schedule_id, moment, seconds)
    assert timedelta() <= found and (found.total_seconds() < seconds or seconds < 1e-6)
    assert found == jitter(str(schedule_id), moment, seconds)


def test_jitter_is_what_it_was_in_every_release_and_spreads() -> None:
    moment = at("2026-06-01T12:00")
    assert jitter("a", moment, 300) == JITTER_OF_A
    assert jitter("a", moment.astimezone(ZoneInfo(BERLIN)), 300) == JITTER_OF_A
    tenths = {jitter(str(n), moment, 10) // timedelta(seconds=1) for n in range(200)}
    assert tenths == set(range(10))
    assert len({jitter("a", moment + n * DAY, 10) for n in range(50)}) == 50


# --- what is refused


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("*/10 * * * * *", "A cron has five fields, this has 6: minute, hour, day of the month,"),
        ("0 0 * *", "A cron has five fields, this has 4: minute, hour, day of the month,"),
        ("", "A cron has five fields, this has 0: minute, hour, day of the month,"),
        ("hourly", "A cron has five fields, this has 1: minute, hour, day of the month,"),
        ("@dayly", "There is no alias '@dayly'; did you mean '@daily'?"),
        ("@every 5m", "There is no alias '@every 5m'; there are @annually, @daily,"),
        ("60 * * * *", "'60' is no minute: write 0 to 59, as in 0, */15, 10-40 or 0,30."),
        ("*/0 * * * *", "'*/0' is no minute: write 0 to 59,"),
        ("1,,2 * * * *", "'1,,2' is no minute: write 0 to 59,"),
        ("-1 * * * *", "'-1' is no minute: write 0 to 59,"),
        ("1.5 * * * *", "'1.5' is no minute: write 0 to 59,"),
        ("٣ * * * *", "'٣' is no minute: write 0 to 59,"),
        ("0 24 * * *", "'24' is no hour: write 0 to 23,"),
        ("0 22-6 * * *", "22-6 as the hour goes backwards; write 22-23,0-6."),
        ("0 0 ? * *", "'?' is no day of the month: write 1 to 31, L for the last day"),
        ("0 0 15W * *", "'15W' is no day of the month: write 1 to 31,"),
        ("0 0 0 * *", "'0' is no day of the month: write 1 to 31,"),
        ("0 0 1 JANUARY *", "'JANUARY' is no month: write 1 to 12, or JAN to DEC."),
        ("0 0 * * 8", "'8' is no day of the week: write 0 to 7 (both Sunday), SUN to SAT,"),
        ("0 0 * * FRI-MON", "FRI-MON as the day of the week goes backwards; write FRI-7,0-MON."),
        ("0 0 31 2 *", "This never fires: there is no such day in these months."),
        ("0 0 30,31 2 *", "This never fires: there is no such day in these months."),
        ("0 0 31 4,6,9,11 *", "This never fires: there is no such day in these months."),
        ("0 0 */30 * MON#3", "This never fires: there is no such day in these months."),
        ("9" * 9_999 + " * * * *", f"This is longer than {MAX_CRON_LENGTH} characters."),
    ],
)
def test_a_cron_that_cannot_be_meant_is_refused(text: str, sentence: str) -> None:
    found = faults(cron=text)
    assert list(found) == ["/cron"]
    assert len(found["/cron"]) == 1 and found["/cron"][0].startswith(sentence)


def test_every_bad_field_of_a_cron_is_told() -> None:
    assert len(faults(cron="60 24 32 13 8")["/cron"]) == 5


def test_six_fields_are_told_where_seconds_go() -> None:
    (sentence,) = faults(cron="0 0 2 * * *")["/cron"]
    assert sentence.endswith("such as 30 2 * * 1-5. There is none for seconds; say everySeconds.")


def test_what_is_said_to_write_instead_of_a_backward_range_is_accepted() -> None:
    for text in ("0 22-23,0-6 * * *", "0 0 * * FRI-7,0-MON", "0 0 * 11-12,1-DEC *"):
        assert cron(text).next_after(CREATED)


@pytest.mark.parametrize(
    ("zone", "way"),
    [
        ("europe/berlin", "did you mean 'Europe/Berlin'?"),
        ("Europe/Berln", "did you mean 'Europe/Berlin'?"),
        ("new york", "did you mean 'America/New_York'?"),
        ("kathmandu", "did you mean 'Asia/Kathmandu'?"),
        ("", "write its IANA name, such as Europe/Berlin."),
        ("+02:00", "write its IANA name, such as Europe/Berlin."),
        ("../../etc/passwd", "write its IANA name, such as Europe/Berlin."),
        ("localtime", "write its IANA name, such as Europe/Berlin."),
        ("posix/Europe/Berlin", "did you mean 'Europe/Berlin'?"),
        ("x" * 9_999, "write its IANA name, such as Europe/Berlin."),
    ],
)
def test_a_zone_that_there_is_not_is_refused_with_a_near_one(zone: str, way: str) -> None:
    sentence = f"There is no time zone {zone[:64]!r}; {way}"
    assert faults(cron="@daily", timezone=zone) == {"/timezone": [sentence]}


@pytest.mark.parametrize(
    "seconds", [0, 0.999, -5, float("nan"), float("inf"), MAX_EVERY_SECONDS + 1, 1e300]
)
def test_intervals_have_bounds(seconds: float) -> None:
    sentence = "This must be a number of seconds from 1 to 31,622,400."
    assert faults(every_seconds=seconds) == {"/everySeconds": [sentence]}


def test_a_schedule_has_a_cron_or_an_interval() -> None:
    assert list(faults()) == ["/cron"]
    assert "either" in faults(cron="@daily", every_seconds=60)["/cron"][0]
    assert list(faults(every_seconds=60, timezone=BERLIN)) == ["/timezone"]
    assert every(60, timezone="UTC") == every(60)


def test_an_end_that_leaves_nothing_is_refused() -> None:
    start = at("2026-02-01T01:00")
    early = faults(cron="@daily", start_at=start, end_at=start - MINUTE)
    assert early == {"/endAt": ["This must not be before startAt."]}
    nothing = {"/endAt": ["This leaves no moment to fire at."]}
    assert faults(cron="@daily", start_at=start, end_at=start + HOUR) == nothing
    assert faults(every_seconds=3600, end_at=CREATED + MINUTE) == nothing
    assert list(faults(cron="@yearly", start_at=at("9999-06-01"))) == ["/startAt"]


def test_all_faults_come_at_once_under_the_pointer_that_is_given() -> None:
    found = faults(cron="x", timezone="Mars/Base", every_seconds=0, pointer="/when")
    assert found.keys() == {"/when/cron", "/when/timezone", "/when/everySeconds"}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="0123456789*/,-L#W?@ MONJADE\t٣", max_size=20) | st.text(max_size=10))
def test_any_text_is_a_cron_that_fires_or_is_refused_with_sentences(text: str) -> None:
    try:
        recurrence = cron(text)
    except InvalidRequest as error:
        assert all(error.errors["/cron"])
    else:
        assert recurrence.next_after(CREATED) and recurrence.warnings() is not None


# --- what is accepted with a warning


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (
            "*/90 * * * *",
            "*/90 as the minute is 0 only: it ends at 59."
            " For every 90 minutes say everySeconds 5400.",
        ),
        (
            "*/7 * * * *",
            "*/7 as the minute begins anew every hour: after 56 comes 0."
            " For every 7 minutes say everySeconds 420.",
        ),
        ("10-20/30 * * * *", "10-20/30 as the minute is 10 only: it ends at 20."),
        ("5/7 * * * *", "5/7 as the minute begins anew every hour: after 54 comes 5."),
        (
            "0 */5 * * *",
            "*/5 as the hour begins anew every day: after 20 comes 0."
            " For every 5 hours say everySeconds 18000.",
        ),
        (
            "0 0 */7 * *",
            "*/7 as the day of the month begins anew every month: after 29 comes 1."
            " For every 7 days say everySeconds 604800.",
        ),
        ("0 0 1 */5 *", "*/5 as the month begins anew every year: after 11 comes 1."),
        (
            "0 0 * * */2",
            "*/2 as the day of the week begins anew every week: after 6 comes 0."
            " For every 2 days say everySeconds 172800.",
        ),
        (
            "0 0 * * */7",
            "*/7 as the day of the week is 0 only: it ends at 6."
            " For every 7 days say everySeconds 604800.",
        ),
        (
            "* 3 * * *",
            "* as the minute is every minute of the hour; for once write 0, or another minute.",
        ),
        (
            "0 0 13 * 5",
            "Either day of the month or day of the week is enough here, as none begins with *.",
        ),
        (
            "0 0 31 * *",
            "It leaves out months without a day 31; L is the last day of every month.",
        ),
        (
            "0 0 29 2 *",
            "It leaves out months without a day 29; L is the last day of every month.",
        ),
    ],
)
def test_a_cron_that_may_not_be_meant_is_accepted_with_a_warning(text: str, warning: str) -> None:
    assert cron(text).warnings() == [warning]


def test_a_step_in_the_days_and_a_weekday_are_two_warnings() -> None:
    step, both = cron("0 0 */7 * MON").warnings()
    assert step.startswith("*/7 as the day of the month begins anew every month")
    assert both == "Day of the month and day of the week must both fit here, as one begins with *."


@pytest.mark.parametrize(
    "text",
    [
        *ALIASES,
        *("* * * * *", "*/15 * * * *", "*/5 9-17 * * MON-FRI", "5/15 * * * *", "0 */6 * * *"),
        *("0 9-17/3 * * *", "0 0 1,15 * *", "0 0 L * *", "0 0 1-31 * *", "0 0 30 4 *"),
        *("0 0 1 */3 *", "*/1 * * * *", "* 9-17 * * *", "0 0 */1 * *"),
    ],
)
def test_common_crons_have_no_warnings(text: str) -> None:
    assert cron(text).warnings() == []


def test_intervals_have_no_warnings() -> None:
    assert every(90.5).warnings() == []
