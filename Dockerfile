# Two images: `--target shim` builds the server, `--target worker` the worker. docs/deploy-docker.md lists the build
# arguments. tests/infra runs these instructions in empty virtual environments, so everything installs below /opt/hunyuan.

FROM docker.io/library/python:3.12.13-slim-trixie AS wheel

WORKDIR /opt/hunyuan/source
COPY pyproject.toml README.md LICENSE ./
COPY contract ./contract
COPY handler ./handler
COPY hunyuan ./hunyuan
COPY shim ./shim
COPY storage ./storage
RUN pip wheel --no-deps --wheel-dir /opt/hunyuan/dist .


# The dependencies alone, so that no setting of a tool in pyproject.toml makes the large layers new.
FROM docker.io/library/python:3.12.13-slim-trixie AS requirements

WORKDIR /opt/hunyuan/requirements
COPY pyproject.toml ./
RUN python3 -c "import pathlib, tomllib; p = tomllib.loads(pathlib.Path('pyproject.toml').read_text())['project']; \
shim = p['dependencies']; worker = shim + p['optional-dependencies']['worker']; \
pathlib.Path('shim.txt').write_text('\\n'.join(shim)); pathlib.Path('worker.txt').write_text('\\n'.join(worker))"


FROM docker.io/library/python:3.12.13-slim-trixie AS shim

RUN useradd --uid 10001 --create-home hunyuan \
    && install --directory --owner=10001 --group=10001 /var/lib/hunyuan

ENV PATH=/opt/hunyuan/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# This layer installs the dependencies alone, which change rarely.
WORKDIR /opt/hunyuan/source
COPY constraints.txt ./
COPY --from=requirements /opt/hunyuan/requirements/shim.txt ./
RUN python3 -m venv /opt/hunyuan/venv \
    && pip install --constraint constraints.txt --requirement shim.txt

COPY --from=wheel /opt/hunyuan/dist /opt/hunyuan/dist
RUN pip install --no-deps --force-reinstall /opt/hunyuan/dist/*.whl

ENV HUNYUAN_DATA_DIR=/var/lib/hunyuan \
    HUNYUAN_WORKERS=0
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="hunyuan-video-shim" \
      org.opencontainers.image.description="HunyuanVideo-1.5 service: the REST server, without torch" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.12.13-slim-trixie" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

WORKDIR /home/hunyuan
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('HUNYUAN_PORT', '8000') + '/health', timeout=4)"]
CMD ["hunyuan", "serve"]


# PyPI's torch 2.13 is built for CUDA 13.0 and installs cuBLAS and cuDNN as wheels, so the `base` image is enough.
FROM docker.io/nvidia/cuda:13.0.3-base-ubuntu24.04 AS worker

# torch.compile calls a C++ compiler and needs Python's headers when the worker loads the model.
# Ubuntu removes old package versions, so no version is pinned here; the base image's tag pins the release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# RunPod mounts network volumes and its cached models at /runpod-volume. Mount a volume there on other hosts, too.
RUN useradd --uid 10001 --create-home hunyuan \
    && install --directory --owner=10001 --group=10001 /runpod-volume /runpod-volume/huggingface-cache/hub

ENV PATH=/opt/hunyuan/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video

WORKDIR /opt/hunyuan/source
COPY constraints.txt constraints-cuda.txt ./
COPY --from=requirements /opt/hunyuan/requirements/worker.txt ./
ARG PIP_EXTRA_INDEX_URL=""
RUN python3 -m venv /opt/hunyuan/venv \
    && pip install --constraint constraints.txt --constraint constraints-cuda.txt --requirement worker.txt

ARG FLASH_ATTN_WHEEL=""
RUN if [ -n "$FLASH_ATTN_WHEEL" ]; then \
        pip install --constraint constraints.txt --constraint constraints-cuda.txt "$FLASH_ATTN_WHEEL"; \
    fi

COPY --from=wheel /opt/hunyuan/dist /opt/hunyuan/dist
RUN pip install --no-deps --force-reinstall /opt/hunyuan/dist/*.whl

ARG PROFILE=""
ARG ACCEPT_LICENCE=""
# A layer for each checkpoint: registries limit the size of a layer, and hosts pull several layers at once.
RUN if [ -n "$PROFILE" ]; then \
        hunyuan download-weights "$PROFILE" --first 1 --to /opt/hunyuan/models ${ACCEPT_LICENCE:+--accept-licence}; \
    fi
# hadolint ignore=DL3059
RUN if [ -n "$PROFILE" ]; then \
        hunyuan download-weights "$PROFILE" --first 2 --to /opt/hunyuan/models ${ACCEPT_LICENCE:+--accept-licence}; \
    fi
# hadolint ignore=DL3059
RUN if [ -n "$PROFILE" ]; then \
        hunyuan download-weights "$PROFILE" --to /opt/hunyuan/models ${ACCEPT_LICENCE:+--accept-licence}; \
    fi

# An empty HUNYUAN_MODEL_PATH counts as unset: the worker then looks for the checkpoint in HF_HUB_CACHE, RunPod's cache.
ENV HF_HUB_CACHE=/runpod-volume/huggingface-cache/hub \
    HUNYUAN_MODEL_PATH=${PROFILE:+/opt/hunyuan/models}
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="hunyuan-video-worker" \
      org.opencontainers.image.description="HunyuanVideo-1.5 service: the worker, for RunPod and your own machines" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/nvidia/cuda:13.0.3-base-ubuntu24.04" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

WORKDIR /home/hunyuan
USER 10001:10001
STOPSIGNAL SIGTERM
# The worker listens on no port. It reports its state to the server, which counts it in /health.
HEALTHCHECK NONE
# The base image's entry point prints a banner first; clear it.
ENTRYPOINT []
CMD ["python", "-u", "-m", "handler"]
