"""Everything Prometheus is told, in its words: the text format 0.0.4.

prometheus-client would write it as well, but takes five times as long, and that was most of a
scrape.
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate

from flask import Response

from opscore.metrics import Scrape
from opscore.tally import Counted
from web.current import parts
from web.openapi import Answers, Blueprint

blueprint = Blueprint("metrics", __name__, description="What Prometheus reads.")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EXAMPLE = """\
# HELP opscore_queue_ready Messages of a queue that no worker has taken.
# TYPE opscore_queue_ready gauge
opscore_queue_ready{queue="opscore.agents"} 12.0
"""
_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})

Labels = tuple[str, ...]


def render(scrape: Scrape) -> str:
    """Return a scrape as Prometheus reads it."""
    return "\n".join(_lines(scrape)) + "\n"


def _lines(scrape: Scrape) -> Iterator[str]:
    for gauge, values in scrape.gauges.items():
        yield from _head(gauge.name, gauge.about, "gauge")
        for labels, value in values.items():
            yield f"{gauge.name}{_braced(_pairs(gauge.labels, labels))} {float(value)}"
    for what, counts in scrape.counts.items():
        if what.bounds:
            yield from _histogram(what, counts)
        else:
            name = f"{what.name}_total"
            yield from _head(name, what.about, "counter")
            for labels, (value, _) in counts.items():
                yield f"{name}{_braced(_pairs(what.labels, labels))} {value}"


def _histogram(what: Counted, counts: Mapping[Labels, tuple[float, list[int]]]) -> Iterator[str]:
    yield from _head(what.name, what.about, "histogram")
    ends = [*map(str, what.bounds), "+Inf"]
    for labels, (seconds, buckets) in counts.items():
        pairs = _pairs(what.labels, labels)
        before = f"{pairs}," if pairs else ""
        number = 0
        for end, number in zip(ends, accumulate(buckets), strict=True):
            yield f'{what.name}_bucket{{{before}le="{end}"}} {number}'
        yield f"{what.name}_sum{_braced(pairs)} {seconds}"
        yield f"{what.name}_count{_braced(pairs)} {number}"


def _head(name: str, about: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {about}", f"# TYPE {name} {kind}"


def _pairs(names: Labels, values: Labels) -> str:
    pairs = zip(names, values, strict=True)
    return ",".join(f'{name}="{value.translate(_ESCAPED)}"' for name, value in pairs)


def _braced(pairs: str) -> str:
    return f"{{{pairs}}}" if pairs else ""


@blueprint.operation("GET", "/metrics", Answers(schema=None, text_example=EXAMPLE))
def get_metrics() -> Response:
    """Get how everything is and what happened since ever, for Prometheus.

    Takes the key, or the server's OPSCORE_METRICS_TOKEN. Any web process tells of the whole
    installation. If Redis is away what lies there is missing, and `opscore_redis_up` is 0.
    """
    return Response(render(parts().scrapes.read()), content_type=CONTENT_TYPE)
