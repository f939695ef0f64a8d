# `make demo` and `make test` set everything up by themselves; the second time they are quick.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/installed
	$(BIN)/robustlearn demo --out robustness-report

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/peers
	$(BIN)/python benchmarks/attack_overhead.py --full --out benchmarks/results/attack_overhead.csv
	$(BIN)/python benchmarks/linear_certificates.py --full --out benchmarks/results/linear_certificates.csv
	$(BIN)/python benchmarks/linear.py --full --out benchmarks/results/linear.csv
	$(BIN)/python benchmarks/evaluation.py --full --out benchmarks/results/evaluation.csv
	$(BIN)/python benchmarks/diagnostics.py --full --out benchmarks/results/diagnostics.csv
	$(BIN)/python benchmarks/anomaly.py --full --table 1 --out benchmarks/results/anomaly_fast.csv
	$(BIN)/python benchmarks/anomaly.py --full --table 2 --out benchmarks/results/anomaly_peers.csv
	$(BIN)/python benchmarks/anomaly.py --full --table 3 --out benchmarks/results/anomaly_pieces.csv
	$(BIN)/python benchmarks/anomaly.py --full --table 4 --out benchmarks/results/anomaly_growth.csv
	$(BIN)/python benchmarks/certify.py --full --table 1 --out benchmarks/results/certify_methods.csv
	$(BIN)/python benchmarks/certify.py --full --table 2 --out benchmarks/results/certify_instances.csv
	$(BIN)/python benchmarks/certify.py --full --table 3 --out benchmarks/results/certify_brackets.csv
	$(BIN)/python benchmarks/certify.py --full --table 4 --out benchmarks/results/certify_training_0.1.csv
	$(BIN)/python benchmarks/certify.py --full --table 5 --out benchmarks/results/certify_training_0.3.csv
	$(BIN)/python benchmarks/certify_peers.py --full --out benchmarks/results/certify_peers.csv
	$(BIN)/python benchmarks/certify_trees.py --full --out benchmarks/results/certify_trees.csv
	$(BIN)/python benchmarks/certify_smoothing.py --full --out benchmarks/results/certify_smoothing.csv
	$(BIN)/python benchmarks/gan.py --full --table 1 --out benchmarks/results/gan_ring.csv
	$(BIN)/python benchmarks/gan.py --full --table 2 --out benchmarks/results/gan_grid.csv
	$(BIN)/python benchmarks/gan.py --full --table 3 --out benchmarks/results/gan_losses.csv
	$(BIN)/python benchmarks/loop_overhead.py --full --out benchmarks/results/loop_overhead.csv
	ROBUSTLEARN_IMAGES=mnist $(BIN)/python benchmarks/training.py --full --table 1 --out benchmarks/results/training_mnist.csv
	ROBUSTLEARN_IMAGES=fashion_mnist $(BIN)/python benchmarks/training.py --full --table 1 --out benchmarks/results/training_fashion.csv
	ROBUSTLEARN_IMAGES=digits $(BIN)/python benchmarks/training.py --full --table 1 --out benchmarks/results/training_digits.csv
	$(BIN)/python benchmarks/training.py --full --table 2 --out benchmarks/results/training_recipe.csv
	$(BIN)/python benchmarks/training.py --full --table 3 --out benchmarks/results/training_linear.csv
	ROBUSTLEARN_IMAGES=mnist $(BIN)/python benchmarks/training.py --full --table 4 --out benchmarks/results/training_formats.csv
	$(BIN)/python benchmarks/training_peers.py --full --out benchmarks/results/training_peers.csv
	$(BIN)/python benchmarks/training_cost.py --full --table 1 --out benchmarks/results/training_overhead.csv
	$(BIN)/python benchmarks/training_cost.py --full --table 2 --out benchmarks/results/training_precision.csv
	$(BIN)/python benchmarks/training_cost.py --full --table 3 --out benchmarks/results/training_growth.csv

clean:
	rm -rf .venv robustness-report build dist *.egg-info .*_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'robustlearn needs Python 3.11 or newer; say make PYTHON=...')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# peers pull torchvision, which is not needed: hence without their dependencies
.venv/peers: .venv/installed benchmarks/peers.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,bench]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers.txt
	touch $@
