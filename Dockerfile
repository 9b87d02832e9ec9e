# syntax=docker/dockerfile:1
# Two images from one build:
#   docker build --target cuda -t loraplex:cuda .
#   docker build --target cpu  -t loraplex:cpu --build-arg PIP_EXTRA_INDEX_URL=<index of torch CPU wheels> .
# Without that index the CPU image works too, but carries the CUDA libraries that the default torch
# wheel brings along. The base is named by its tag, because its digest could not be looked up where this was
# written. For a reproducible image pin it, and say what was built:
#   --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:<digest> --build-arg REVISION=$(git rev-parse HEAD)
# The server listens on its own loopback until it is told otherwise. Without principals and TLS publish it on
# the host's loopback only, or behind something that authenticates (docs/deployment.md#docker):
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
COPY requirements.lock requirements.hashes requirements.torch.hashes ./
# Every file is compared with its hash. Torch from another index, which has files of its own, is taken in the locked
# version without one: choose an index that you trust.
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "${PIP_EXTRA_INDEX_URL:-}" ]; then \
        pip install --no-deps --constraint requirements.lock torch; \
    else \
        pip install --require-hashes --no-deps --requirement requirements.torch.hashes; \
    fi \
    && env --unset=PIP_EXTRA_INDEX_URL pip install --require-hashes --no-deps --requirement requirements.hashes

COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY gateway gateway
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

# --- runtime: no C++ compiler, no pip cache, no root ---------------------------------------------
FROM ${PYTHON_IMAGE} AS runtime
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
EXPOSE 50051 8000 9464
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["loraplex", "health"]
# Exec form: SIGTERM reaches the server itself, which drains and exits 0. It also waits for its own child
# processes, so the image needs no init program.
STOPSIGNAL SIGTERM
ENTRYPOINT ["loraplex-server"]
CMD ["serve"]
# Last, because a new revision should not build the layers before it again.
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Loraplex" \
      org.opencontainers.image.description="One NF4 base model, many LoRA adapters, one batch" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

FROM runtime AS cpu
COPY --from=build /opt/loraplex /opt/loraplex
ENV LORAPLEX_DEVICE=cpu

FROM runtime AS cuda
# Triton builds the code that launches its kernels with a C compiler, at the first start with a GPU.
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build /opt/loraplex /opt/loraplex
# Refuses a torch without CUDA at build time, and a machine without a GPU at start.
RUN ["python", "-c", "import sys, torch; sys.exit(None if torch.version.cuda else 'this torch has no CUDA')"]
ENV LORAPLEX_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
