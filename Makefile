# Targets for a fresh clone: `make reproduce` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && exit; done; echo python3)
ARGS ?=
bin = .venv/bin
quiet = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 MPLBACKEND=agg TOKENIZERS_PARALLELISM=false
extras = dev,site,video,data,encoders,bench
# PyTorch's own index has wheels without CUDA. It is taken where there is no GPU and it answers.
cpu_index = https://download.pytorch.org/whl/cpu
has_gpu = [ -e /dev/nvidia0 ] || [ "$$(uname)" != Linux ]
answers = $(PYTHON) -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=3)' $(cpu_index)/torch/

.PHONY: help reproduce test lint format lab export readme site clean distclean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

reproduce: .venv/installed ## the main tables, on data that the library makes itself; ARGS=all for every one, ARGS="m5 --seeds 3" to choose
	@$(bin)/vlkd reproduce $(ARGS)

test: .venv/installed ## pytest, then every notebook
	@$(quiet) $(bin)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder && $(quiet) $(bin)/nbdev-test --n-workers 2

lint: .venv/installed ## is everything formatted, and is the linter content?
	@$(bin)/ruff format --check . && $(bin)/ruff check .

format: .venv/installed ## format notebooks, tests and scripts, and mend what the linter can mend
	@$(bin)/ruff format . && $(bin)/ruff check --fix . ; $(bin)/nbdev-export && $(bin)/nbdev-clean

lab: .venv/installed ## JupyterLab at the notebooks
	@$(bin)/jupyter-lab nbs $$([ "$$(id -u)" -ne 0 ] || echo --allow-root)

export: .venv/installed ## notebooks to library, then clean notebooks
	@$(bin)/nbdev-export && $(bin)/nbdev-clean

readme: .venv/installed ## run nbs/index.ipynb and write README.md from it
	@$(quiet) $(bin)/nbdev-test nbs/index.ipynb --save --n-workers 1 && $(bin)/nbdev-clean --fname nbs/index.ipynb && $(bin)/python site/readme.py

site: .venv/installed ## reports, notebooks and the API as a web site in build/site
	@$(quiet) $(bin)/python site/build.py

clean: ## remove caches and build outputs; runs and results stay
	@rm -rf build dist .pytest_cache .hypothesis && find nbs vlkd tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean ## remove the environment, all runs and your own reports as well
	@rm -rf .venv runs reports/latest vlkd.egg-info

# The stamp is written last, so that an installation which was interrupted is done again, and a second call does nothing.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vlkd needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv
	@if $(has_gpu) || ! $(answers) 2>/dev/null; then \
	    echo "Installing into .venv (once, some minutes; up to 6 GB where pip takes the CUDA wheels of PyTorch) ..."; \
	else \
	    echo "Installing into .venv (once, some minutes; about 2 GB, with PyTorch for CPUs) ..."; \
	    export PIP_EXTRA_INDEX_URL="$$PIP_EXTRA_INDEX_URL $(cpu_index)"; \
	fi; \
	$(bin)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$(extras)]"
	@touch $@
