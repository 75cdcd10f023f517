# make demo   sets up .venv and runs everything once: collect, train, decode
# make test   sets up .venv and passes the tests; PYTEST="tests/decode -k doctor" chooses some
# Written for GNU make 3.81 and the shell of macOS; needs no root and no GPU.

VENV := .venv
STAMP := $(VENV)/.installed
TWO_AT_A_TIME := -n 2 --dist loadfile
INPUTS := setup.sh pyproject.toml CMakeLists.txt $(wildcard kernels/cpu/native/*)

.PHONY: help setup demo test test-fast lint clean

help:
	@echo 'make demo    set up, collect from the embedded teacher, train a draft, decode with it (minutes)'
	@echo 'make test    set up and run the tests; make test-fast leaves out the slow ones'
	@echo 'make setup   only set up: a Python environment in $(VENV)'
	@echo 'make lint    ruff and mypy'
	@echo 'make clean   remove $(VENV) and runs/demo'
	@echo
	@echo 'PYTHON=/path/to/python make setup   chooses the Python (3.11 or newer)'

setup: $(STAMP)

$(STAMP): $(INPUTS)
	@sh setup.sh $(VENV)
	@touch $@

demo: $(STAMP)
	@$(VENV)/bin/python demo.py

test: $(STAMP)
	@$(VENV)/bin/python -m pytest $(TWO_AT_A_TIME) $(PYTEST)

test-fast: $(STAMP)
	@$(VENV)/bin/python -m pytest $(TWO_AT_A_TIME) -m 'not slow' $(PYTEST)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) runs/demo
