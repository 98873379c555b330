# moe-train on NVIDIA's PyTorch container, which brings torch for CUDA, Transformer Engine, NCCL and cuDNN as NVIDIA built them together.
#   docker build -t moe-train .
# Another release: --build-arg BASE=nvcr.io/nvidia/pytorch:YY.MM-py3 (25.12 is torch 2.10, CUDA 13.1, Python 3.12).
# On a Slurm cluster with pyxis: docs/gpu.md.
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

# What NVIDIA built stays as it is: pip is held to the versions that are there. Everything else may be what we ask for, which the
# container's own list of constraints (PIP_CONSTRAINT) would forbid.
RUN python -m pip list --format freeze \
    | grep -iE '^(torch|torchvision|torchao|triton|pytorch[-_]triton|transformer[-_]engine.*|apex|flash[-_]attn|numpy|cuda.*|nvidia.*)==' \
    > /etc/pip/nvidia.txt \
    && grep -q '^torch==' /etc/pip/nvidia.txt && grep -qi '^transformer[-_]engine' /etc/pip/nvidia.txt
ENV PIP_CONSTRAINT=/etc/pip/nvidia.txt

WORKDIR /opt/moe-train
COPY . .
RUN python -m pip install --no-cache-dir --no-build-isolation -e ".[export,data,s3]" pytest \
    && python -m pip list --format freeze | grep -Fxq "$(grep '^torch==' /etc/pip/nvidia.txt)" \
    && moe-train --help > /dev/null
WORKDIR /workspace
