# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint types unit zoo evidence clean

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
	$(BIN)/python -m pytest -n auto --dist worksteal

# Every model of torchvision, timm, transformers, and some of other libraries: hours. What has a row
# of this source is kept.
zoo: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[benchmarks]'
	$(BIN)/python -m benchmarks.zoo --library torchvision --resume
	$(BIN)/python -m benchmarks.zoo --library transformers --resume
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/others -r benchmarks/zoo/others.txt
	PYTHONPATH=.venv/others $(BIN)/python -m benchmarks.zoo --library others --resume
	$(BIN)/python -m benchmarks.zoo --library timm --resume

# Does memory help? All studies that need no GPU: hours. Runs that have a row are kept.
evidence: $(READY)
	for study in low-data adapting ablations confirmation full-data step-time; do \
		$(BIN)/python -m benchmarks.evidence --study $$study --jobs 2 --resume || exit 1; \
	done

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv demo
