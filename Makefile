# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint types unit zoo clean

demo: $(READY)
	$(BIN)/aim-surgery demo

test: lint types unit

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/basedpyright --level error

unit: $(READY)
	$(BIN)/python -m pytest --doctest-modules aim_surgery
	$(BIN)/python -m pytest

# Every model of torchvision, timm and transformers: hours. What has a row of this source is kept.
zoo: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[benchmarks]'
	$(BIN)/python -m benchmarks.zoo --library torchvision --resume
	$(BIN)/python -m benchmarks.zoo --library transformers --resume
	$(BIN)/python -m benchmarks.zoo --library timm --resume

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv demo
