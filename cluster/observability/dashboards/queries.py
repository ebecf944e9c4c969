"""PromQL that panels are written with."""

from __future__ import annotations

from cluster.observability.dashboards.model import Query

RATE = "[$__rate_interval]"
_HERE = 'namespace=~"$namespace"'  # a label on Kubernetes alone; elsewhere "all of them" matches its absence
OURS = f'{{{_HERE}, application=~"$application"}}'
ROUTERS = f'{{{_HERE}, application=~"$application", replica=~"$router"}}'
SHARDS = f'{{{_HERE}, application=~"$application", rank=~"$rank"}}'
VLLM = f'{{{_HERE}, ReplicaId=~"$router"}}'  # vLLM's label for what Serve calls replica
SERVE = OURS


def selected(more: str, select: str) -> str:
    """`select` with one more condition."""
    return f"{select[:-1]}, {more}}}"


def rate_by(labels: str, name: str, select: str) -> str:
    """Growth a second of a counter, added up by labels."""
    return f"sum by ({labels}) (rate({name}{select}{RATE}))"


def max_by(labels: str, name: str, select: str) -> str:
    """A gauge of which a process that has just gone may have told another value."""
    return f"max by ({labels}) ({name}{select})"


def quantiles(histogram: str, select: str, by: str = "", *shares: float) -> tuple[Query, ...]:
    """Quantiles of a histogram of all routers, by a label if one is named. `histogram`: the name of its buckets."""
    labels, legend = (f"{by}, le", f"{{{{{by}}}}} ") if by else ("le", "")
    return tuple(
        Query(
            f"histogram_quantile({share}, sum by ({labels}) (rate({histogram}{select}{RATE})))",
            f"{legend}p{share * 100:g}",
        )
        for share in shares or (0.5, 0.95, 0.99)
    )
