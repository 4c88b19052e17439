PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: demo test check setup benchmark clean

demo: $(READY)
	$(BIN)/python -m exporter examples/fashion.pt --onnx --trt fp16 --size 28

test: check
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# Everything pinned, the project itself editable. torch is pinned to a release whose wheel is small.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

benchmark: $(READY)
	$(BIN)/python benchmarks/export_time.py

clean:
	rm -rf $(VENV) fashion *.egg-info
