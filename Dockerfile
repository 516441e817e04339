# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
#
# avdet2 with all that it needs, on CPUs, or on GPUs with a CUDA image as base:
#
#   docker build -t avdet2 .
#   docker build -t avdet2 --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
#
#   docker run --rm -v "$PWD:/data" --shm-size 8g [--gpus all] avdet2 pipeline \
#     --config-file quick_schedules/own_videos_pipeline.yaml DATASETS.VIDEOS my_videos OUTPUT_DIR run
#
# Any base with apt and Python 3.10 to 3.12 will do.
ARG BASE=ubuntu:24.04
FROM ${BASE}

RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      gcc git libc6-dev python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/*

WORKDIR /avdet2
COPY . .
RUN bash -euo pipefail -c "source tools/setup_env.sh" && rm -rf /root/.cache
ENV PATH=/avdet2/.venv/bin:$PATH

# What the user mounts; paths in commands are relative to it.
WORKDIR /data
ENTRYPOINT ["avdet2"]
