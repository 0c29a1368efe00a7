# Every verb is complete on a machine with Python 3.11 or later, make and a package registry.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.edgecloud-installed
TREE := build/tree
# Subcommands and tests start `edgecloud` by name.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types proto bench dist tree

help: ## list the verbs
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

install: $(STAMP) ## create the virtual environment and install the project, editable, with everything

# Done again only when the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is Python " + sys.version.split()[0] + "; edgecloud needs 3.11 or later: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot create a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## fetch, partition, serve and generate on this machine, with a table at the end
	$(BIN)/edgecloud demo $(ARGS)

# The console script, not `python -m pytest`: that puts the root on sys.path, where kernels/ would shadow other packages.
test: $(STAMP) ## run the tests: make test ARGS="-k choice"
	$(BIN)/pytest $(ARGS)

lint: $(STAMP) tree ## ruff, formatting, and which layer imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# its cache remembers where an import led before a module was added
	PYTHONPATH=$(TREE) $(BIN)/lint-imports --no-cache

types: $(STAMP) tree ## mypy, strict
	MYPYPATH=$(TREE) $(BIN)/mypy -p edgecloud

# mypy and import-linter do not follow an editable install, so they get the package as links.
tree:
	@mkdir -p $(TREE)/edgecloud
	@ln -sfn $(addprefix $(CURDIR)/,$(filter-out sdk/__pycache__,$(wildcard sdk/*)) edge cloud partitioner kernels) $(TREE)/edgecloud/
	@find $(TREE)/edgecloud -xtype l -delete

proto: $(STAMP) ## generate the stubs of sdk/rpc/edgecloud.proto
	@mkdir -p build/proto
	$(BIN)/python -m grpc_tools.protoc -I edgecloud/rpc=sdk/rpc \
		--python_out=build/proto --pyi_out=build/proto --grpc_python_out=build/proto edgecloud/rpc/edgecloud.proto
	cp build/proto/edgecloud/rpc/edgecloud_pb2* sdk/rpc/

bench: $(STAMP) ## measure, and write benchmarks/results
	$(BIN)/python benchmarks/run_all.py $(ARGS)

dist: $(STAMP) ## build wheel and sdist into dist/
	$(BIN)/python -m build --no-isolation
