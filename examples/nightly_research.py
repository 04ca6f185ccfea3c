"""Agents that study the readings of weather stations, and join what they found.

A station of which too little is left once its faulty readings are dropped fails for good. The
workflow that puts them together is `nightly_research.yaml`.
"""

import random
import statistics
from typing import Any

from opscore import Context, GiveUp, agent

READINGS = 24
"""Of a station in a night."""
FEWEST_READINGS = 12
"""A trend from fewer says nothing."""
NAMED = 3
"""Stations that the digest names at either end."""

Json = dict[str, Any]


def sample(stations: int = 200, broken: int = 15) -> list[Json]:
    """Make stations to try it with, always the same; the `broken` ones are spread among them."""
    chance = random.Random(7)
    faulty = {n * stations // broken for n in range(broken)}
    return [_station(n, chance, n in faulty) for n in range(stations)]


def _station(number: int, chance: random.Random, is_broken: bool) -> Json:
    start, slope = chance.uniform(-5, 15), chance.uniform(-0.4, 0.4)
    readings: list[Any] = [
        round(start + slope * hour + chance.gauss(0, 0.3), 2) for hour in range(READINGS)
    ]
    if is_broken:
        readings[3:] = ["n/a"] * (READINGS - 3)
    return {"id": f"station-{number:03}", "readings": readings}


@agent("study-station", capabilities=["study"])
def study_station(parameters: Json, context: Context) -> Json:
    """Answer `{id, readings, median, trend}` of the `station`: how many, and degrees an hour."""
    station = parameters["station"]
    good = [
        (hour, reading)
        for hour, reading in enumerate(station["readings"])
        if isinstance(reading, int | float)
    ]
    if len(good) < FEWEST_READINGS:
        all_of_them = len(station["readings"])
        raise GiveUp(f"{station['id']}: only {len(good)} of {all_of_them} readings are numbers.")
    hours, readings = zip(*good, strict=True)
    return {
        "id": station["id"],
        "readings": len(good),
        "median": round(statistics.median(readings), 2),
        "trend": round(statistics.linear_regression(hours, readings).slope, 3),
    }


@agent("write-digest", capabilities=["digest"])
def write_digest(parameters: Json, context: Context) -> Json:
    """Join `studies`, of which some are null, of `stations`, their ids in the same order.

    Answers `{studied, leftOut: [id], median, warming: [study], cooling: [study], text}`.
    """
    pairs = list(zip(parameters["stations"], parameters["studies"], strict=True))
    studies = [study for _, study in pairs if study is not None]
    left_out = [station for station, study in pairs if study is None]
    if not studies:
        raise GiveUp("There is no station to write of.")
    by_trend = sorted(studies, key=lambda study: (study["trend"], study["id"]))
    text = f"{len(studies)} of {len(pairs)} stations were studied"
    text += f"; {len(left_out)} left out: {', '.join(left_out)}." if left_out else "."
    return {
        "studied": len(studies),
        "leftOut": left_out,
        "median": round(statistics.median(study["median"] for study in studies), 2),
        "warming": by_trend[: -NAMED - 1 : -1],
        "cooling": by_trend[:NAMED],
        "text": text,
    }
