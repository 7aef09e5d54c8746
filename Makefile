# Two commands: `make demo` trains and measures a model, `make test` checks the project.
# Both make .venv and install by themselves the first time. Another Python: PYTHON=python3.12 make demo
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-faults lint install lock clean help docs bench-data bench-train bench-ppo bench-memory bench-overhead

help:
	@echo "make demo   train an assistant on SmolLM2-135M and measure it (first time about 9 minutes on 2 cores)"
	@echo "make test   run the whole test suite"
	@echo "make test-faults   everything that can break a run, at every place of it, as a table (about an hour; WHERE=train)"
	@echo "make lint   ruff and mypy"
	@echo "make bench-data   time data preparation beside TRL's (about 6 minutes; needs the oracle folder)"
	@echo "make bench-train MODEL=FOLDER   time LoRA training beside TRL's (about 10 minutes; needs the oracle folder)"
	@echo "make bench-ppo MODEL=FOLDER PEER=FOLDER   time PPO beside TRL 1.12 in PEER (about 5 minutes)"
	@echo "make bench-memory   estimated and measured memory of training (about 15 minutes)"
	@echo "make bench-overhead MODEL=FOLDER   the demo with and without Prefect and MLflow (about 15 minutes)"
	@echo "make docs   write the pages made from tables anew, and all of docs/ as a site, build/site/index.html"
	@echo "make lock   write requirements.lock anew from what pyproject.toml allows"

install:
	@$(PYTHON) deployments/install.py

demo: install
	@$(BIN)/llamatuner run demo

test: install
	@$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(TESTS)

test-faults: install
	@$(BIN)/python -m tests.faults $(WHERE)

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench-data: install
	@$(BIN)/python -m tests.benchmarks.data $(BENCH)

docs: install
	@$(BIN)/python -m registry.settings_page > docs/settings.md
	@$(BIN)/python -m registry.old_keys_page > docs/coming-from-llama-factory.md
	@$(BIN)/python -m registry.templates_page > docs/templates.md
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "build/site/index.html"

bench-train: install
	@$(BIN)/python -m tests.benchmarks.train $(MODEL) $(BENCH)

bench-ppo: install
	@$(BIN)/python -m tests.benchmarks.ppo $(MODEL) $(PEER) $(BENCH)

bench-memory: install
	@$(BIN)/python -m tests.benchmarks.memory $(BENCH)

bench-overhead: install
	@$(BIN)/python -m tests.benchmarks.overhead $(MODEL) $(BENCH)

lock:
	@$(PYTHON) deployments/lock.py

clean:
	rm -rf .venv build *.egg-info
