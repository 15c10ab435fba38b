# syntax=docker/dockerfile:1
#
# CPU   docker build -t loramux --build-arg DEVICE=cpu --build-arg TORCH_INDEX_URL=<PyTorch's CPU wheel index> .
# CUDA  docker build -t loramux --build-arg DEVICE=cuda .
#
# PyTorch's default wheel for Linux is the CUDA build and brings the CUDA libraries along, so both images start from the
# same small one; the host needs only the driver and its container toolkit. Without TORCH_INDEX_URL the CPU image holds that
# larger build and works all the same.
#
# The CUDA image has a C compiler with its headers: Triton, which comes with that build of PyTorch, compiles the kernels on
# the card they run on when they are first started, and a small module in C that starts them. It keeps both below
# /var/lib/loramux/cache/triton: with the volume, a second container starts without compiling.
#
# run   docker run -p 8000:8000 -e LORAMUX_API_KEY -v loramux:/var/lib/loramux loramux        (CUDA: add --gpus all)

ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_INDEX_URL=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/loramux
ENV PATH=/opt/loramux/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY server server
COPY adapters adapters
RUN pip install -c constraints.txt .

FROM python:${PYTHON_VERSION}-slim
ARG DEVICE=cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 $(if [ "$DEVICE" = cuda ]; then echo gcc libc6-dev; fi) \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/loramux --create-home loramux
COPY --from=build /opt/loramux /opt/loramux
COPY --chown=loramux adapters/examples /opt/loramux/examples
ENV PATH=/opt/loramux/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LORAMUX_HOST=0.0.0.0 \
    LORAMUX_PORT=8000 \
    LORAMUX_DEVICE=${DEVICE} \
    LORAMUX_ADAPTER_DIR=/var/lib/loramux/adapters \
    LORAMUX_CACHE_DIR=/var/lib/loramux/cache \
    TRITON_CACHE_DIR=/var/lib/loramux/cache/triton \
    HF_HOME=/var/lib/loramux/hub
USER loramux
WORKDIR /var/lib/loramux
VOLUME /var/lib/loramux
EXPOSE 8000
# /health answers from the first second, also while the base is still loading. The port of a container is set with
# LORAMUX_PORT alone: it beats a config file, and a flag would hide it from this check.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['LORAMUX_PORT'] + '/health', timeout=4)"]
# SIGTERM drains: give `docker stop -t` more than LORAMUX_SHUTDOWN_TIMEOUT (30 s).
STOPSIGNAL SIGTERM
ENTRYPOINT ["loramux"]
CMD ["serve"]
