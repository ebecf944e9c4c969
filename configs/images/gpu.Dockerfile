# The image for NVIDIA GPUs: `docker build -f configs/images/gpu.Dockerfile -t expertmesh:gpu .` in the repository root.
# The packages are those of requirements/gpu.lock; torch and vLLM bring CUDA along, so the host needs the driver only.
FROM python:3.11.14-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir uv==0.13.9
WORKDIR /opt/expertmesh
COPY requirements/gpu.lock requirements/
RUN /opt/venv/bin/uv pip install --no-cache --python /opt/venv/bin/python --no-deps --compile-bytecode \
      -r requirements/gpu.lock
COPY pyproject.toml README.md LICENSE serve_app.py ./
COPY cluster cluster
COPY experts experts
COPY placement placement
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11.14-slim-bookworm
# wget: KubeRay's own probes call it. procps: drain.sh looks for replicas. g++: Triton, vLLM and the C++ data plane
# compile for the machine they run on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ procps tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ray \
    && echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/expertmesh.sh
COPY --from=build /opt/venv /opt/venv
COPY configs/images/drain.sh /usr/local/bin/expertmesh-drain
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=3600 \
    RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=5 \
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 \
    RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY=1 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=cluster.http.waking:middlewares
WORKDIR /home/ray
USER 1000:1000
# The API; Ray's dashboard; Ray's metrics.
EXPOSE 8000 8265 8080
# A container that stands alone. Kubernetes ignores it and has probes of its own.
HEALTHCHECK --interval=10s --timeout=15s --start-period=60m --retries=6 \
    CMD ["wget", "-q", "-T", "10", "-O", "/dev/null", "http://127.0.0.1:8000/live"]
ENTRYPOINT ["tini", "--"]
# A config is mounted, with its checkpoint: docker run --gpus all --shm-size 8g -v FOLDER:/config ...
CMD ["expertmesh", "serve", "/config/serve.yaml"]
