# One project, two images; the README's section "Docker" says how they are used.
#
#   export   makes the files and checks them: torch for the CPU, ONNX Runtime, TensorRT for RTX (which compiles with no GPU)
#   serve    runs them on a card: ONNX Runtime and TensorRT for RTX, neither torch nor onnx
#
# Every RUN line is a command of the README. tests/test_dockerfile.py holds that, and runs them.

FROM python:3.11-slim-bookworm AS source
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY engines engines
COPY exporter exporter

FROM source AS export
# torch from PyPI brings CUDA with it, several gigabytes; +cpu is on this index alone.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN pip install -c constraints.txt torch==2.13.0+cpu '.[export,ort,rtx]'
# The mounted directory is data: no Python file in it is ever imported. Any user id may run this, so HOME is for all.
ENV PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["python", "-m", "exporter"]
CMD ["--help"]

FROM source AS serve
RUN pip install -c constraints.txt '.[images,ort,rtx]'
ENV PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /model
USER 10001:10001
# Exit code 1 where a file is not the one that was exported or computes something else, 4 where an engine cannot be run:
# no GPU answers. A server that needs its GPU is then unhealthy; for the files alone, give --static.
HEALTHCHECK --interval=10m --timeout=5m --start-period=5m CMD python -m engines verify /model || exit 1
ENTRYPOINT ["python", "-m", "engines"]
CMD ["verify", "/model"]
