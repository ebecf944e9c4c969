"""What users notice: latency, tokens, queue, KV cache, errors, keys, versions."""

from __future__ import annotations

from cluster.observability.dashboards.model import APPLICATION, NAMESPACE, ROUTER, Dashboard, Panel, Query, Row
from cluster.observability.dashboards.queries import OURS, ROUTERS, SERVE, VLLM, max_by, quantiles, rate_by, selected
from cluster.observability.dashboards.versions import VERSIONS

IDLE = "vLLM sets its gauges in steps alone"
NO_KEYS = "keys have no names, or none was used"
NO_REQUEST = "no request ended in the last minutes"

_TTFT = "ray_vllm_time_to_first_token_seconds_bucket"
_BETWEEN = "ray_vllm_inter_token_latency_seconds_bucket"
_WHOLE = "ray_vllm_e2e_request_latency_seconds_bucket"
_HTTP, _HTTP_ERRORS = "ray_serve_num_http_requests_total", "ray_serve_num_http_error_requests_total"
_5XX = selected('status_code=~"5.."', SERVE)

GLANCE = Row(
    "At a glance",
    (
        Panel(
            "Generated tokens/s",
            "Tokens that all routers generate in a second.",
            "short",
            (Query(f"sum(rate(ray_vllm_generation_tokens_total{VLLM}[$__rate_interval]))", "tokens/s"),),
            "stat",
        ),
        Panel(
            "First token, p95",
            "19 of 20 requests have their first token within this time.",
            "s",
            quantiles(_TTFT, VLLM, "", 0.95),
            "stat",
            warn=2,
            bad=10,
        ),
        Panel(
            "Whole request, p95",
            "19 of 20 requests end within this time; the alert SlowRequests fires from 30 s on.",
            "s",
            quantiles(_WHOLE, VLLM, "", 0.95),
            "stat",
            warn=15,
            bad=30,
        ),
        Panel(
            "Requests waiting",
            "Requests in vLLM's queues; the alert ManyRequestsWaiting fires from 100 on.",
            "short",
            (Query(f"sum(ray_vllm_num_requests_waiting{VLLM})", "waiting"),),
            "stat",
            warn=50,
            bad=100,
            may_be_empty=IDLE,
        ),
        Panel(
            "KV cache",
            "In use at the fullest router. Over 90 % requests begin to wait, over 95 % vLLM preempts.",
            "percentunit",
            (Query(f"max(ray_vllm_kv_cache_usage_perc{VLLM})", "in use"),),
            "stat",
            warn=0.9,
            bad=0.95,
            most=1,
            may_be_empty=IDLE,
        ),
        Panel(
            "Server errors",
            "Share of HTTP answers with a status from 500 on.",
            "percentunit",
            (
                Query(
                    f"(sum(rate({_HTTP}{_5XX}[$__rate_interval])) or vector(0)) / "
                    f"sum(rate({_HTTP}{SERVE}[$__rate_interval]))",
                    "5xx",
                ),
            ),
            "stat",
            warn=0.001,
            bad=0.01,
        ),
    ),
)

LATENCY = Row(
    "Latency",
    (
        Panel(
            "Time to first token",
            "From the arrival of a request at vLLM to its first token: queue and prefill.",
            "s",
            quantiles(_TTFT, VLLM),
        ),
        Panel(
            "Time between tokens",
            "Gaps in a stream: one step of the engine and what holds it up. The mesh's dashboard has its parts.",
            "s",
            quantiles(_BETWEEN, VLLM),
        ),
        Panel("Whole requests", "From arrival to last token; long answers take long.", "s", quantiles(_WHOLE, VLLM)),
        Panel(
            "Time in the queue",
            "Before a request is first scheduled.",
            "s",
            quantiles("ray_vllm_request_queue_time_seconds_bucket", VLLM),
        ),
        Panel(
            "Prefill and decode, p95",
            "The two parts of a request after the queue.",
            "s",
            (
                Query(quantiles("ray_vllm_request_prefill_time_seconds_bucket", VLLM, "", 0.95)[0].expr, "prefill"),
                Query(quantiles("ray_vllm_request_decode_time_seconds_bucket", VLLM, "", 0.95)[0].expr, "decode"),
            ),
        ),
        Panel(
            "HTTP, p95 by application",
            "As the proxy measures whole answers, streams to their end. Milliseconds, in Serve's buckets.",
            "ms",
            quantiles("ray_serve_http_request_latency_ms_bucket", SERVE, "application", 0.95),
        ),
    ),
)

THROUGHPUT = Row(
    "Throughput",
    (
        Panel(
            "Generated tokens/s by router",
            "Uneven routers: look at long prompts and at the proxy.",
            "short",
            (Query(rate_by("ReplicaId", "ray_vllm_generation_tokens_total", VLLM), "{{ReplicaId}}"),),
            stacked=True,
        ),
        Panel(
            "Prompt tokens/s by router",
            "Computed and cached ones.",
            "short",
            (Query(rate_by("ReplicaId", "ray_vllm_prompt_tokens_total", VLLM), "{{ReplicaId}}"),),
            stacked=True,
        ),
        Panel(
            "Requests that end, by reason",
            "stop and length are as they should be; abort is a client that hung up.",
            "reqps",
            (Query(rate_by("finished_reason", "ray_vllm_request_success_total", VLLM), "{{finished_reason}}"),),
            stacked=True,
        ),
        Panel(
            "HTTP answers by status",
            "Of all applications of Serve that are chosen above. 499: the client hung up.",
            "reqps",
            (Query(rate_by("status_code", _HTTP, SERVE), "{{status_code}}"),),
            stacked=True,
        ),
        Panel(
            "Prompt length",
            "Tokens of a prompt.",
            "short",
            quantiles("ray_vllm_request_prompt_tokens_bucket", VLLM, "", 0.5, 0.95),
        ),
        Panel(
            "Answer length",
            "Tokens of an answer.",
            "short",
            quantiles("ray_vllm_request_generation_tokens_bucket", VLLM, "", 0.5, 0.95),
        ),
    ),
)

QUEUE = Row(
    "Queue and KV cache",
    (
        Panel(
            "Requests running and waiting",
            "In vLLM, by router. Many that wait beside idle routers: the KV cache is the limit.",
            "short",
            (
                Query(max_by("ReplicaId", "ray_vllm_num_requests_running", VLLM), "{{ReplicaId}} running"),
                Query(max_by("ReplicaId", "ray_vllm_num_requests_waiting", VLLM), "{{ReplicaId}} waiting"),
            ),
            may_be_empty=IDLE,
        ),
        Panel(
            "Requests in the engine",
            "Running or waiting, as the router counts them; also known while no step runs.",
            "short",
            (Query(max_by("replica", "ray_expertmesh_requests_unfinished", ROUTERS), "{{replica}}"),),
        ),
        Panel(
            "KV cache in use",
            "By router. Over 90 % for five minutes is a warning, over 95 % critical.",
            "percentunit",
            (Query(max_by("ReplicaId", "ray_vllm_kv_cache_usage_perc", VLLM), "{{ReplicaId}}"),),
            warn=0.9,
            bad=0.95,
            most=1,
            may_be_empty=IDLE,
        ),
        Panel(
            "Preemptions/s",
            "Requests that vLLM put aside for want of KV cache, and computes again.",
            "ops",
            (Query(rate_by("ReplicaId", "ray_vllm_num_preemptions_total", VLLM), "{{ReplicaId}}"),),
            warn=0.1,
            may_be_empty="no request was ever preempted",
        ),
        Panel(
            "Prefix cache hits",
            "Share of prompt tokens that the prefix cache had.",
            "percentunit",
            (
                Query(
                    f"sum(rate(ray_vllm_prefix_cache_hits_total{VLLM}[$__rate_interval])) / "
                    f"sum(rate(ray_vllm_prefix_cache_queries_total{VLLM}[$__rate_interval]))",
                    "hits",
                ),
            ),
            most=1,
            may_be_empty="no prompt had a prefix in the cache",
        ),
        Panel(
            "Memory of routers",
            "Anonymous memory of each engine's worker; weights on a GPU are not in it.",
            "bytes",
            (Query(max_by("replica", "ray_expertmesh_router_resident_bytes", ROUTERS), "{{replica}}"),),
        ),
    ),
)

ERRORS = Row(
    "Errors",
    (
        Panel(
            "HTTP errors by status",
            "401 no key, 429 over a limit of the key, 503 queue full or no router. README.md lists all codes.",
            "reqps",
            (Query(rate_by("error_code", _HTTP_ERRORS, SERVE), "{{error_code}}"),),
            stacked=True,
        ),
        Panel(
            "Requests refused for want of experts",
            "Ended, since no shard has an expert that they need and the fallback may not take longer.",
            "reqps",
            (Query(rate_by("replica", "ray_expertmesh_refused_requests_total", ROUTERS), "{{replica}}"),),
            warn=0.001,
            bad=0.1,
        ),
        Panel(
            "Replicas that started",
            "In ten minutes, by deployment. More than you deployed: something ends and is started again.",
            "short",
            (
                Query(
                    "sum by (application, deployment) "
                    f"(increase(ray_serve_deployment_replica_starts_total{SERVE}[10m]))",
                    "{{application}} {{deployment}}",
                ),
            ),
        ),
    ),
)

KEYS = Row(
    "Keys",
    (
        Panel(
            "Requests by key",
            "Let in.",
            "reqps",
            (Query(rate_by("key", "ray_expertmesh_key_requests_total", ROUTERS), "{{key}}"),),
            stacked=True,
            may_be_empty=NO_KEYS,
        ),
        Panel(
            "Refused by key",
            "Over a limit of the key, or for a model that it may not use.",
            "reqps",
            (Query(rate_by("key", "ray_expertmesh_key_refused_total", ROUTERS), "{{key}}"),),
            may_be_empty=NO_KEYS,
        ),
        Panel(
            "Tokens a minute by key",
            "Prompts and completions, which is what `tokens_per_minute` limits.",
            "short",
            (
                Query(
                    f"60 * ({rate_by('key', 'ray_expertmesh_key_prompt_tokens_total', ROUTERS)} + "
                    f"{rate_by('key', 'ray_expertmesh_key_completion_tokens_total', ROUTERS)})",
                    "{{key}}",
                ),
            ),
            stacked=True,
            may_be_empty=NO_KEYS,
        ),
        Panel(
            "Keys as in the file",
            "0: the file cannot be read, so an older list is in use.",
            "short",
            (Query(f"min(ray_expertmesh_keys_current{OURS})", "current"),),
            "stat",
            warn=1,
            bad=0.5,
            falling=True,
            may_be_empty=NO_KEYS,
        ),
    ),
)

SERVICE = Dashboard(
    "service",
    "expertmesh: service",
    "What users notice: latency, tokens, queue, KV cache, errors, keys, versions.",
    (NAMESPACE, APPLICATION, ROUTER),
    (GLANCE, LATENCY, THROUGHPUT, QUEUE, ERRORS, KEYS, VERSIONS),
)
