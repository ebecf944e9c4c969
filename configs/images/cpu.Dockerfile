# The image for processors: `docker build -f configs/images/cpu.Dockerfile -t expertmesh:cpu .` in the repository root.
# The packages are those of requirements/cpu.lock, installed as `make` does it. By itself it serves the tiny model;
# in a cluster `ray start` is the command.
FROM python:3.11.14-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir uv==0.13.9
WORKDIR /opt/expertmesh
COPY requirements/cpu.lock requirements/
# torch first: its CPU build is on an index of its own. The lock is complete, so nothing is resolved here.
RUN /opt/venv/bin/uv pip install --no-cache --python /opt/venv/bin/python --no-deps --torch-backend cpu \
      "$(sed -n 's/^\(torch==[^+]*\).*/\1/p' requirements/cpu.lock)" \
    && grep -v '^torch==' requirements/cpu.lock > /tmp/lock.txt \
    && /opt/venv/bin/uv pip install --no-cache --python /opt/venv/bin/python --no-deps --compile-bytecode -r /tmp/lock.txt
COPY pyproject.toml README.md LICENSE serve_app.py ./
COPY cluster cluster
COPY experts experts
COPY placement placement
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11.14-slim-bookworm
# wget: KubeRay's own probes call it. procps: drain.sh looks for replicas. g++: the C++ data plane is compiled for the
# processor it runs on, and vLLM compiles for it, too.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ procps tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ray \
    && echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/expertmesh.sh
COPY --from=build /opt/venv /opt/venv
COPY configs/images/drain.sh /usr/local/bin/expertmesh-drain
COPY --chown=1000:1000 configs/tiny-cpu.yaml /srv/expertmesh/configs/tiny-cpu.yaml
COPY --chown=1000:1000 examples/tiny-moe /srv/expertmesh/examples/tiny-moe
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=3600 \
    RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=5 \
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 \
    RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY=1 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=cluster.http.waking:middlewares
WORKDIR /srv/expertmesh
USER 1000:1000
# The API; Ray's dashboard; Ray's metrics.
EXPOSE 8000 8265 8080
# A container that stands alone. Kubernetes ignores it and has probes of its own.
HEALTHCHECK --interval=10s --timeout=15s --start-period=15m --retries=6 \
    CMD ["wget", "-q", "-T", "10", "-O", "/dev/null", "http://127.0.0.1:8000/live"]
ENTRYPOINT ["tini", "--"]
CMD ["expertmesh", "serve", "configs/tiny-cpu.yaml"]
