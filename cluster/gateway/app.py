"""The gateway's app: keys, one error format, and the door behind them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount

from cluster.config.gateway.sections import GatewayHttpSection
from cluster.gateway.door import Door
from cluster.gateway.forward import Forwarder
from cluster.gateway.models import Models
from cluster.http.connections import close_where_haproxy_is, open_to_origins
from cluster.http.errors import ErrorsStayInside
from cluster.http.gate import Gate
from cluster.http.health import HEALTH_PATHS
from cluster.keys.sources import source_of


def gateway_app(models: Models, http: GatewayHttpSection, forwarder: Forwarder) -> Starlette:
    """The ASGI app of one replica; whoever made `forwarder` closes it.

    Raises ValueError if http names a file or a variable that holds no key.
    """
    keys = source_of(http).ring
    door = Door(models, http, forwarder)
    return Starlette(
        routes=[Mount("/", app=door)],
        middleware=[
            *close_where_haproxy_is(),
            Middleware(ErrorsStayInside, retry_after_s=http.retry_after_s),
            *open_to_origins(http.cors_origins),
            Middleware(
                Gate, keys=keys, max_pending=0, retry_after_s=http.retry_after_s, open_paths=frozenset(HEALTH_PATHS)
            ),
        ],
    )
