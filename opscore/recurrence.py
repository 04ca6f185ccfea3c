"""When a schedule fires: cron and intervals, time zones, catch-up, jitter. Pure.

Moments go in with their offset and come out in UTC; `now` is always an argument.

- An interval follows real time from its anchor, in every zone alike, and does not drift.
- A cron is what Debian's cron makes of five fields, on the clock of its zone. If neither minute nor
  hour begins with `*`, it names times, and each fires once: what the clock skips, at the first
  instant after the gap (all that was skipped together, once); what it shows twice, the first time.
- Any other cron follows the clock: it fires in each minute of real time that fits. A gap is not
  made up for, and what the clock shows twice fires twice, so that `*/30 * * * *` fires every half
  hour of real time. (`*/30 2 * * *` too: nothing on a day without that hour; `0,30 2 * * *` does.)
- `startAt` and `endAt` both belong to the schedule: what falls on them fires.
"""

import re
from bisect import bisect_left
from calendar import monthrange
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import cache
from hashlib import blake2b
from itertools import islice, takewhile
from typing import Literal, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from opscore.errors import InvalidRequest
from opscore.json_values import Faults, at, unknown

CatchUp = Literal["none", "last", "all"]

GRACE_SECONDS = 60.0
"""A moment this old is late, not missed: ticks come every second, but a beat or a server that is
replaced, or a machine that stood still, may take a minute, which shall cost no daily run."""
MIN_EVERY_SECONDS = 1.0
MAX_EVERY_SECONDS = 31_622_400.0
"""A leap year; what is rarer is said with cron."""
MAX_CRON_LENGTH = 500
"""Characters; all values of all fields, one by one, take less."""
ALIASES: Mapping[str, str] = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_SHAPE = "minute, hour, day of the month, month, day of the week, such as 30 2 * * 1-5"
_BASE = datetime(2000, 1, 1)
"""From here every day that there is comes within 28 years, also a 29 February on a Sunday."""
_SECOND = timedelta(seconds=1)
_MICROSECOND = timedelta(microseconds=1)
_DAY_SECONDS = 86_400
"""Since 1970 no zone has changed its offset twice within a week."""


# --- the rules


@dataclass(frozen=True, slots=True)
class Cron:
    """Whenever the clock of a zone shows what five fields say."""

    fields: str
    zone: ZoneInfo

    def after(self, moment: datetime) -> datetime | None:
        """Return the first moment after this one; None if 50 years have none."""
        minute, hour = self.fields.split()[:2]
        names_times = not minute.startswith("*") and not hour.startswith("*")
        return self._named_after(moment) if names_times else self._shown_after(moment)

    def _named_after(self, after: datetime) -> datetime | None:
        for local in CronSim(self.fields, self._local(after)):
            # When the clock shows times again that it has shown, they come from before `after`.
            if (moment := self._first(local)) > after:
                return moment
        return None

    def _first(self, local: datetime) -> datetime:
        """Return when the clock first shows a time, or jumps over it."""
        moment = local.replace(tzinfo=self.zone).astimezone(UTC)
        if self._local(moment) == local:
            return moment
        before = local.replace(tzinfo=self.zone, fold=1).astimezone(UTC)
        return self._change(before, moment) or moment

    def _shown_after(self, after: datetime) -> datetime | None:
        """Go on from each change of the clock anew: from there on it shows other times."""
        begin, local = after, self._local(after)
        while found := next(CronSim(self.fields, local), None):
            moment = begin + (found - self._local(begin))
            change = self._change(begin, moment)
            if change is None:
                return moment
            begin, local = change, self._local(change) - _SECOND
        return None

    def _change(self, begin: datetime, end: datetime) -> datetime | None:
        """Return when the clock is changed first, after `begin` and not after `end`."""
        begin = begin.replace(microsecond=0)
        offset = self._offset(begin)

        def is_other(seconds: int) -> bool:
            return self._offset(begin + seconds * _SECOND) != offset

        while (span := min((end - begin) // _SECOND, _DAY_SECONDS)) > 0:
            if is_other(span):
                return begin + bisect_left(range(span), True, key=is_other) * _SECOND
            begin += span * _SECOND
        return None

    def _offset(self, moment: datetime) -> timedelta:
        return self._local(moment) - moment.replace(tzinfo=None)

    def _local(self, moment: datetime) -> datetime:
        return moment.astimezone(self.zone).replace(tzinfo=None)

    def warnings(self) -> list[str]:
        """Say what looks as if something else was meant."""
        return list(_warnings(self.fields))


@dataclass(frozen=True, slots=True)
class Every:
    """Whole steps of real time from an anchor, in both directions."""

    step: timedelta
    anchor: datetime

    def after(self, moment: datetime) -> datetime:
        """Return the first moment after this one."""
        return self.anchor + ((moment - self.anchor) // self.step + 1) * self.step

    def warnings(self) -> list[str]:
        return []


class Moments(NamedTuple):
    """Moments, oldest first, and whether the limit left some out."""

    moments: list[datetime]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A rule, and the first and the last instant at which it may fire. All times are UTC."""

    rule: Cron | Every
    start_at: datetime | None = None
    end_at: datetime | None = None

    @classmethod
    def parse(
        cls,
        created_at: datetime,
        *,
        cron: str | None = None,
        timezone: str | None = None,
        every_seconds: float | None = None,
        start_at: datetime | None = None,
        end_at: datetime | None = None,
        pointer: str = "",
    ) -> "Recurrence":
        """Read what a schedule says of its moments; without a timezone it is UTC.

        `created_at` is the schedule's: an interval without `start_at` counts from it. `pointer` is
        where the members stand. Raises InvalidRequest with every fault.
        """
        faults = Faults()
        _check_kind(cron, every_seconds, timezone, faults)
        for sentence in _cron_faults(cron):
            faults.add("cron", sentence)
        for sentence in _timezone_faults(timezone):
            faults.add("timezone", sentence)
        if start_at and end_at and end_at < start_at:
            faults.add("endAt", "This must not be before startAt.")
        if not faults:
            start, end = start_at and _utc(start_at), end_at and _utc(end_at)
            recurrence = cls(_rule(cron, timezone, every_seconds, start or created_at), start, end)
            if recurrence.next_after(created_at):
                return recurrence
            faults.add("endAt" if end else "startAt", "This leaves no moment to fire at.")
        raise InvalidRequest({at(pointer, key): said for key, said in faults.items()})

    def next_after(self, moment: datetime) -> datetime | None:
        """Return the first moment after this one; None if there is none, or 50 years have none."""
        moment = _utc(moment)
        if self.start_at and moment < self.start_at:
            moment = self.start_at - _MICROSECOND
        try:
            found = self.rule.after(moment)
        except OverflowError:  # the year 10,000
            return None
        return None if found and self.end_at and found > self.end_at else found

    def between(self, after: datetime, until: datetime, limit: int) -> Moments:
        """Return at most `limit` moments after one instant and not after another."""
        due = takewhile(lambda moment: moment <= until, self._after(after))
        found = list(islice(due, limit + 1))
        return Moments(found[:limit], len(found) > limit)

    def last_between(self, after: datetime, until: datetime) -> datetime | None:
        """Return the newest moment after one instant and not after another.

        It takes a few dozen steps, however many moments there are.
        """
        last = self.next_after(after)
        if last is None or last > until:
            return None
        low, high = last, until
        while high - low >= _SECOND:  # moments are no closer than that
            middle = low + (high - low) / 2
            found = self.next_after(middle)
            if found and found <= until:
                low = last = found
            else:
                high = middle
        return last

    def preview(self, now: datetime, count: int) -> list[datetime]:
        """Return the next moments, at most `count`."""
        return list(islice(self._after(now), count))

    def _after(self, moment: datetime) -> Iterator[datetime]:
        while found := self.next_after(moment):
            yield (moment := found)

    def warnings(self) -> list[str]:
        """Say what is accepted and looks as if something else was meant."""
        return self.rule.warnings()


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("A moment carries its offset.")
    return moment.astimezone(UTC)


def _rule(
    cron: str | None, timezone: str | None, every_seconds: float | None, anchor: datetime
) -> Cron | Every:
    if cron is not None:
        return Cron(_expanded(cron), ZoneInfo(timezone or "UTC"))
    return Every(timedelta(seconds=every_seconds or MIN_EVERY_SECONDS), _utc(anchor))


# --- what is due


class Due(NamedTuple):
    """What to fire now, oldest first, and the first moment that is not decided by it."""

    moments: list[datetime]
    next_at: datetime | None


def missed(
    recurrence: Recurrence,
    decided: datetime,
    now: datetime,
    catch_up: CatchUp,
    window_seconds: float,
    limit: int,
) -> Due:
    """Decide what fires now, of the moments after `decided`, the last that was decided.

    `none` fires the newest if it is not older than GRACE_SECONDS; `last` the newest, however old;
    `all` at most `limit` (from 1) of those within the window, which has at least GRACE_SECONDS, and
    if there are more, `next_at` is due already. For a new schedule `decided` is its creation. Up to
    there nothing fires again, also if the clock was set back; set forward is like having been away.
    """
    decided, now = _utc(decided), _utc(now)
    grace = timedelta(seconds=GRACE_SECONDS)
    reached = max(decided, now)
    if catch_up == "all":
        window = max(timedelta(seconds=window_seconds), grace)
        due = recurrence.between(max(decided, now - window - _MICROSECOND), now, limit)
        reached = due.moments[-1] if due.has_more else reached
        return Due(due.moments, recurrence.next_after(reached))
    last = recurrence.last_between(decided, now)
    fires = last is not None and (catch_up == "last" or now - last <= grace)
    return Due([last] if last and fires else [], recurrence.next_after(reached))


def jitter(schedule_id: UUID | str, moment: datetime, jitter_seconds: float) -> timedelta:
    """Return how long after its moment a firing starts: less than `jitter_seconds`.

    It depends on nothing else than what is given, so that any number of beats agree.
    """
    most = timedelta(seconds=jitter_seconds) // _MICROSECOND
    if most < 1:
        return timedelta()
    text = f"{schedule_id} {_utc(moment).isoformat()}"
    number = int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
    return timedelta(microseconds=number % most)


# --- what can be wrong


class _Field(NamedTuple):
    name: str
    first: int
    last: int
    size: int
    """How many there are in a period; Sunday is 0 and 7."""
    period: str
    seconds: int | None
    """Of one, where all are of a length."""
    words: str


_FIELDS = (
    _Field("minute", 0, 59, 60, "hour", 60, "0 to 59, as in 0, */15, 10-40 or 0,30"),
    _Field("hour", 0, 23, 24, "day", 3_600, "0 to 23, as in 2, */6, 9-17 or 8,20"),
    _Field(
        *("day of the month", 1, 31, 31, "month", 86_400),
        "1 to 31, L for the last day or LW for the last from Monday to Friday",
    ),
    _Field("month", 1, 12, 12, "year", None, "1 to 12, or JAN to DEC"),
    _Field(
        *("day of the week", 0, 7, 7, "week", 86_400),
        "0 to 7 (both Sunday), SUN to SAT, 5L for the last Friday, MON#2 for the second Monday",
    ),
)


def _expanded(cron: str) -> str:
    fields = " ".join(ALIASES.get(cron.strip().lower(), cron).split())
    # cronsim takes the range of one value with a step (5-5/2) for an open one (5-59/2).
    return re.sub(r"\b(\w+)-\1/[1-9]\d*", r"\1", fields)


def _check_kind(
    cron: str | None, every_seconds: float | None, timezone: str | None, faults: Faults
) -> None:
    if every_seconds is None:
        if cron is None:
            faults.add("cron", "A schedule needs cron, such as 30 2 * * 1-5, or everySeconds.")
        return
    if not MIN_EVERY_SECONDS <= every_seconds <= MAX_EVERY_SECONDS:
        bounds = f"from {MIN_EVERY_SECONDS:g} to {MAX_EVERY_SECONDS:,.0f}"
        faults.add("everySeconds", f"This must be a number of seconds {bounds}.")
    if cron is not None:
        faults.add("cron", "Say either cron or everySeconds, not both.")
    elif timezone not in (None, "UTC"):
        faults.add("timezone", "This goes with cron; everySeconds is the same in every zone.")


def _timezone_faults(timezone: str | None) -> Iterator[str]:
    zones = _zones()
    if timezone is None or timezone in zones:
        return
    city = timezone.replace(" ", "_").lower()
    near = [
        zone for zone in sorted(zones) if city in (zone.lower(), zone.rpartition("/")[2].lower())
    ]
    near += get_close_matches(timezone[:64], zones, 1)
    way = f"did you mean {near[0]!r}?" if near else "write its IANA name, such as Europe/Berlin."
    yield f"There is no time zone {timezone[:64]!r}; {way}"


@cache
def _zones() -> frozenset[str]:
    """Return the names that mean the same everywhere."""
    return frozenset(available_timezones() - {"localtime", "Factory"})


def _cron_faults(cron: str | None) -> Iterator[str]:
    if cron is None:
        return
    fields = _expanded(cron).split()
    if len(cron) > MAX_CRON_LENGTH:
        yield f"This is longer than {MAX_CRON_LENGTH} characters."
    elif fields and fields[0].startswith("@"):
        sentence = unknown(cron.strip(), ALIASES, "There is no alias")
        yield f"{sentence} For an interval say everySeconds."
    elif len(fields) != len(_FIELDS):
        seconds = " There is none for seconds; say everySeconds." if len(fields) == 6 else ""
        yield f"A cron has five fields, this has {len(fields)}: {_SHAPE}.{seconds}"
    elif any(not _is_read(n, text) for n, text in enumerate(fields)):
        yield from (_field_fault(n, text) for n, text in enumerate(fields) if not _is_read(n, text))
    elif not _ever_fires(" ".join(fields)):
        yield "This never fires: there is no such day in these months."


def _is_read(position: int, text: str) -> bool:
    """Answer whether a field can be read by itself."""
    fields = ["*"] * len(_FIELDS)
    fields[position] = text
    try:
        CronSim(" ".join(fields), _BASE)
    except CronSimError:
        return False
    return True


def _ever_fires(fields: str) -> bool:
    try:
        return next(CronSim(fields, _BASE), None) is not None
    except CronSimError:  # of fields that can be read, it refuses such as 31 February
        return False


def _field_fault(position: int, text: str) -> str:
    field = _FIELDS[position]
    for first, last in re.findall(r"(\w+)-(\w+)", text):
        if _is_read(position, first) and _is_read(position, last):
            way = f"{first}-{field.last},{field.first}-{last}"
            return f"{first}-{last} as the {field.name} goes backwards; write {way}."
    return f"{text[:64]!r} is no {field.name}: write {field.words}."


# --- what may not be meant

_STEP = re.compile(r"(\*|\d+)(?:-(\d+))?/(\d+)", re.A)


def _warnings(fields: str) -> Iterator[str]:
    minute, hour, day, _, weekday = texts = fields.split()
    for field, text in zip(_FIELDS, texts, strict=True):
        yield from filter(None, (_step_warning(field, term) for term in text.split(",")))
    if minute == "*" and re.fullmatch(r"[\d,]+", hour):
        yield "* as the minute is every minute of the hour; for once write 0, or another minute."
    if day != "*" and weekday != "*":
        yield _both_days_warning(day.startswith("*") or weekday.startswith("*"))
    if "/" not in day:
        yield from _rare_day_warnings(CronSim(fields, _BASE))


def _step_warning(field: _Field, term: str) -> str | None:
    """Say if steps end early: the next period begins anew."""
    if not (match := _STEP.fullmatch(term)):
        return None
    first, last, step = match.groups()
    span = range(int(first), int(last or field.last) + 1) if first != "*" else _all(field)
    values = span[:: int(step)]
    if len(values) == 1:
        sentence = f"is {values[0]} only: it ends at {span[-1]}."
    elif last is None and field.size % int(step):
        sentence = f"begins anew every {field.period}: after {values[-1]} comes {values[0]}."
    else:
        return None
    if first == "*" and field.seconds:
        unit, seconds = field.name.split()[0], int(step) * field.seconds
        sentence += f" For every {step} {unit}s say everySeconds {seconds}."
    return f"{term} as the {field.name} {sentence}"


def _all(field: _Field) -> range:
    return range(field.first, field.first + field.size)


def _both_days_warning(both_must_fit: bool) -> str:
    if both_must_fit:
        return "Day of the month and day of the week must both fit here, as one begins with *."
    return "Either day of the month or day of the week is enough here, as none begins with *."


def _rare_day_warnings(cron: CronSim) -> Iterator[str]:
    shortest = min(monthrange(2001, month)[1] for month in cron.months)
    for day in sorted(cron.days):
        if day > shortest and day - 1 not in cron.days:
            yield f"It leaves out months without a day {day}; L is the last day of every month."
