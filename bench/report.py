"""The figures of all rounds as tables: minimum, median and maximum, and beside bare Celery."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from rich.console import Console
from rich.table import Table

Figures = Mapping[str, Sequence[float]]
"""A figure's name -> one value a round."""
Results = Mapping[str, Mapping[str, Figures]]
"""Workload -> contender -> its figures."""

BASE = "celery"
LABELS = {
    "tasks_per_s": "tasks/s",
    "submitted_per_s": "submitted runs/s",
    "completed_s": "all completed after, s",
    "makespan_over_ideal": "makespan / ideal",
    "freed_to_next_p95_ms": "slot freed to next start, p95 ms",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "p99_ms": "p99 ms",
    "post_p50_ms": "POST p50 ms",
    "post_p95_ms": "POST p95 ms",
    "post_p99_ms": "POST p99 ms",
    "cpu_s_per_1000": "CPU s/1,000 tasks",
    "cpu_worker_s_per_1000": "- worker",
    "cpu_web_s_per_1000": "- web",
    "cpu_redis_s_per_1000": "- redis",
    "cpu_pg_s_per_1000": "- pg",
    "cpu_client_s_per_1000": "- client",
    "redis_commands_per_task": "Redis commands/task",
    "pg_commits_per_task": "PG commits/task",
    "pg_write_txns_per_task": "PG write txns/task",
    "wal_bytes_per_task": "WAL bytes/task",
    "worker_rss_mib": "worker peak RSS MiB",
    "worker_pss_mib": "worker PSS MiB",
    "other_load_cores": "other load, cores",
}
NO_RATIO = {"other_load_cores"}


def show(results: Results, abouts: Mapping[str, str], *, markdown: bool = False) -> None:
    """Print a table for each workload."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    for workload, contenders in results.items():
        title = f"{workload}: {abouts[workload]}"
        heads, rows = _heads(contenders), list(_rows(contenders))
        if markdown:
            _print_markdown(title, heads, rows)
        else:
            console.print(f"\n[bold]{title}")
            console.print(_table(heads, rows))


def _table(heads: list[str], rows: list[list[str]]) -> Table:
    table = Table()
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _print_markdown(title: str, heads: list[str], rows: list[list[str]]) -> None:
    print(f"\n### {title}\n")
    for row in (heads, ["---"] + ["---:"] * (len(heads) - 1), *rows):
        print(f"| {' | '.join(row)} |")


def _names(contenders: Mapping[str, Figures]) -> list[str]:
    return sorted(contenders, key=lambda name: (name != BASE, name))


def _heads(contenders: Mapping[str, Figures]) -> list[str]:
    heads = ["min / median / max"]
    for name in _names(contenders):
        heads.append(name)
        if name != BASE and BASE in contenders:
            heads.append("x celery")
    return heads


def _rows(contenders: Mapping[str, Figures]) -> Iterator[list[str]]:
    for figure, label in LABELS.items():
        if any(figure in figures for figures in contenders.values()):
            yield [label, *_cells(figure, contenders)]


def _cells(figure: str, contenders: Mapping[str, Figures]) -> Iterator[str]:
    base = contenders.get(BASE)
    for name in _names(contenders):
        values = contenders[name].get(figure, ())
        yield _spread(values)
        if name != BASE and base is not None:
            yield "" if figure in NO_RATIO else _spread(_ratios(values, base.get(figure, ())))


def _ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Divide round by round; nothing if something has no such figure."""
    return [a / b for a, b in zip(values, base, strict=False) if b]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return " / ".join(map(_short, (min(values), median(values), max(values))))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
