# `siglip-serve bulk` with Ray, without Triton: the image of deployments/kubernetes/bulk. Build from the root of the
# checkout: docker build -f docker/bulk.Dockerfile -t siglip-serve-bulk .
FROM python:3.12-slim

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The GPU's kernels are compiled at the start, for which a C compiler is needed. KubeRay's probes call wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 siglip \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/siglip --shell /usr/sbin/nologin siglip \
    && install --directory --owner=10001 --group=10001 /cache /cache/huggingface

# All nodes of a cluster need the same one. `default` brings the dashboard, through which KubeRay submits jobs.
ARG RAY_VERSION=2.60.0
WORKDIR /opt/siglip-serve
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY clients clients
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --quiet ".[bulk,lance]" "ray[default]==${RAY_VERSION}"

ENV PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/huggingface

USER 10001:10001
CMD ["siglip-serve", "bulk", "--help"]
