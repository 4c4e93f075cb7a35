# The kit with its pinned versions, for the table's jobs and for sweep agents on any number of machines.
#   docker build --tag calibrated-distillation .
#   mkdir -p data  # else Docker makes it, as root
#   docker run --gpus all --user "$(id -u):$(id -g)" --volume "$PWD/data:/kit/data" \
#       --volume "$PWD/results:/kit/results" calibrated-distillation python recipes/kd_cutmix.py
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# A compiler for torch.compile, git for the commit in result.json
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ git \
    && rm -rf /var/lib/apt/lists/*
COPY --from=astral/uv:0.13.9 /uv /usr/local/bin/uv
ENV UV_LINK_MODE=copy UV_NO_CACHE=1 UV_PYTHON_INSTALL_DIR=/opt/python PATH=/kit/.venv/bin:$PATH

WORKDIR /kit
# Dependencies first, so that a change to the code does not download them again
COPY pyproject.toml ./
RUN uv sync --python 3.12 --no-dev --extra table --no-install-project
COPY . .
RUN uv sync --python 3.12 --no-dev --extra table

# For a --user that has no name and no home here, as on Kubernetes: torch asks for the one, W&B writes into the other
ENV USER=kit HOME=/tmp

CMD ["python", "recipes/kd_cutmix.py", "--help"]
