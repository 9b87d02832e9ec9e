# syntax=docker/dockerfile:1
# Two images from one build:
#   docker build --target cuda -t loraplex:cuda .
#   docker build --target cpu  -t loraplex:cpu --build-arg PIP_EXTRA_INDEX_URL=<index of torch CPU wheels> .
# Without that index the CPU image works too, but carries the CUDA libraries that the default torch
# wheel brings along. For a reproducible image pin the base by digest:
#   --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:<digest>
# Nothing in this release checks who calls, so the server listens on its own loopback until it is told
# otherwise. Publish it on the host's loopback only, or behind something that authenticates:
#   docker run --read-only --tmpfs /tmp -p 127.0.0.1:50051:50051 -v store:/var/lib/loraplex/store \
#     -v /path/to/model:/models/base:ro -e LORAPLEX_MODEL=/models/base \
#     -e LORAPLEX_HOST=0.0.0.0 -e LORAPLEX_INSECURE=true loraplex:cpu

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# --- build: a compiler, the virtual environment, the kernels -----------------------------------
FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# pip reads these from the environment; both may stay unset.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/loraplex
ENV PATH=/opt/loraplex/bin:$PATH
WORKDIR /src

# The dependencies change seldom, so they have a layer of their own.
COPY pyproject.toml requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["server"], sep="\n")' > server.txt \
    && pip install --constraint requirements.lock --requirement server.txt

COPY README.md LICENSE ./
COPY client client
COPY model model
COPY adapters adapters
COPY training training
COPY server server
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps .

# Every instruction set, since the image may run on another CPU than the one that builds it.
RUN python -m loraplex_model.ops.build --all --into /opt/loraplex/kernels

# WITH_DEFAULT_MODEL=1 adds the default model's weights (93 MB), to try the image without a model of one's own.
ARG WITH_DEFAULT_MODEL=0
RUN if [ "$WITH_DEFAULT_MODEL" = 1 ]; then \
        python -c 'from pathlib import Path; from loraplex_model.checkpoints.default_model import ensure_default_model; ensure_default_model(Path("/opt/loraplex/models"))'; \
    fi

# --- runtime: no compiler, no pip cache, no root ------------------------------------------------
FROM ${PYTHON_IMAGE} AS runtime
LABEL org.opencontainers.image.title="Loraplex" \
      org.opencontainers.image.description="One NF4 base model, many LoRA adapters, one batch" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 loraplex \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/loraplex --shell /usr/sbin/nologin loraplex \
    && install --directory --mode=0700 --owner=10001 --group=10001 /var/lib/loraplex /var/lib/loraplex/store /var/lib/loraplex/cache /var/lib/loraplex/training \
    && install --directory /adapters
ENV PATH=/opt/loraplex/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    LORAPLEX_KERNELS_DIR=/opt/loraplex/kernels \
    LORAPLEX_STORE=/var/lib/loraplex/store \
    LORAPLEX_CACHE=/var/lib/loraplex/cache \
    LORAPLEX_IMPORT_ROOT=/adapters \
    LORAPLEX_TRAINING_JOBS_DIR=/var/lib/loraplex/training \
    XDG_CACHE_HOME=/var/lib/loraplex/cache \
    HF_HOME=/var/lib/loraplex/cache/huggingface
WORKDIR /var/lib/loraplex
# The store (adapters) must outlive the container, and so must training jobs where LORAPLEX_TRAINING is set;
# the cache (the quantised base) makes a restart quick.
VOLUME ["/var/lib/loraplex/store", "/var/lib/loraplex/cache", "/var/lib/loraplex/training"]
EXPOSE 50051 9464
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["loraplex", "health"]
# Exec form: SIGTERM reaches the server itself, which drains and exits 0.
STOPSIGNAL SIGTERM
ENTRYPOINT ["loraplex-server"]
CMD ["serve"]

FROM runtime AS cpu
COPY --from=build /opt/loraplex /opt/loraplex
ENV LORAPLEX_DEVICE=cpu

FROM runtime AS cuda
COPY --from=build /opt/loraplex /opt/loraplex
# Refuses a torch without CUDA at build time, and a machine without a GPU at start.
RUN ["python", "-c", "import sys, torch; sys.exit(None if torch.version.cuda else 'this torch has no CUDA')"]
ENV LORAPLEX_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
