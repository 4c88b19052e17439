PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
BINDINGS := 10.16.1.11 11.4.0.106
COMPILERS := g++ cmake

.PHONY: demo test search compilers test-gpu receipt check setup table benchmark clean

demo: $(READY)
	$(BIN)/python -m exporter examples/fashion.pt --onnx --trt fp16 --size 28

# Two processes; threads that spin while they wait would slow each other down.
test: check compilers
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

# The property-based tests on other examples than make test, where they are the same each time; for those who look.
search: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile -m hypothesis --hypothesis-profile=search

# The tests compile the loader in C++.
compilers:
	@for tool in $(COMPILERS); do \
	  command -v $$tool >/dev/null || { apt-get update -q && apt-get install -q -y $(COMPILERS) || exit 1; break; }; \
	done

# For owners of a GPU; nothing here is part of make test.
test-gpu: $(READY)
	$(BIN)/python -m pytest tests/gpu --gpu

# For owners of a GPU: what it writes is to be sent back, above all where something failed.
receipt:
	@PYTHONPATH=. $(PYTHON) examples/receipts/make_receipt.py --check
	$(MAKE) $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e ".[$$($(BIN)/python examples/receipts/make_receipt.py --check)]"
	$(BIN)/python examples/receipts/make_receipt.py --out receipt.json

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# Everything pinned, the project itself editable. torch is pinned to a release whose wheel is small. The bindings of full
# TensorRT have no libraries with them: tests hold every name that the code uses against them.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	for version in $(BINDINGS); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --target $(VENV)/bindings/$$version tensorrt-cu12-bindings==$$version || exit 1; \
	done
	touch $(READY)

# The README's tables of families are made from the tuples that decide what is recognised and what is refused; the one of
# GPUs from the receipts in examples/receipts.
table: $(READY)
	$(BIN)/python -m exporter.lineages.table README.md
	$(BIN)/python -m engines.receipts.verified_on README.md

benchmark: $(READY)
	$(BIN)/python benchmarks/export_time.py

clean:
	rm -rf $(VENV) fashion receipt-exports *.egg-info
