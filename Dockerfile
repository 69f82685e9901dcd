# Image with the pinned versions of requirements.txt. torch brings its own CUDA libraries; the driver is the host's.
#   docker build -t videox .
#   docker run --rm -it --gpus all --shm-size=16g --ulimit memlock=-1 -v "$PWD/models:/videox/models" videox
FROM python:3.11-slim-bookworm

# g++ and ninja compile DeepSpeed's extensions and adamw_bf16_offload at their first use; make runs the targets.
RUN apt-get update \
  && apt-get install --yes --no-install-recommends g++ git make ninja-build \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /videox
# The packages are a layer of their own, which a change of the code does not build again. torch first, as in
# scripts/setup.sh, so that no other package replaces it by another build.
COPY requirements.txt pyproject.toml README.md LICENSE ./
COPY videox/__init__.py videox/__init__.py
RUN python -m venv .venv \
  && .venv/bin/pip install --no-cache-dir "$(head -n 1 requirements.txt)" \
  && .venv/bin/pip install --no-cache-dir -r requirements.txt -e ".[optimizers]"

COPY . .
ENV PATH=/videox/.venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["bash"]
