# Every target first makes .venv when it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
unexport PYTHONDONTWRITEBYTECODE  # set-up compiles nothing: what is imported first is kept for the next process

.PHONY: setup try app demo shapes fewstep bits evaluate compare compare-quick test docs lint format benchmark

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

try: $(READY)  ## draw from a caption with the model in assets/shapes/model
	$(BIN)/python sample.py --model assets/shapes/model --num-images 8 \
		--prompt "two small red circles above a large blue square"

app: $(READY)  ## the page to try models: http://127.0.0.1:7860
	$(BIN)/python app.py

demo: $(READY)  ## train on digits, then draw every digit from a caption
	$(BIN)/python train.py fit --config configs/digits.yaml
	$(BIN)/python sample.py --model runs/digits --prompts configs/digits-prompts.txt --num-images 8 --out runs/digits/demo

evaluate: $(READY)  ## the demo's numbers
	$(BIN)/python evaluate.py --model runs/digits --out runs/digits/evaluation

compare: $(READY)  ## every process and baseline on the digits: hours; writes docs/compare.md
	$(BIN)/python compare.py configs/studies/digits.yaml

compare-quick: $(READY)  ## ten minutes that show the way, not the result: runs/studies/digits-quick/compare.md
	$(BIN)/python compare.py configs/studies/digits.yaml --quick

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

docs: $(READY)  ## the site of the documentation: build/site/index.html; a broken link or reference fails
	test -x $(BIN)/mkdocs || $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(READY)
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/picture.py

shapes: $(READY)  ## the proving ground: scenes into a store, a model from it, judged by category
	$(BIN)/python encode.py --config configs/shapes.yaml
	$(BIN)/python train.py fit --config configs/shapes.yaml
	$(BIN)/python evaluate.py --data shapes --by category --model runs/shapes --out runs/shapes/judged

bits: $(READY)  ## bits per dimension of held-out digits by every principle: hours; writes docs/likelihood.md
	$(BIN)/python compare.py configs/studies/likelihood.yaml

fewstep: $(READY)  ## teachers and their one-step students, measured: hours; writes docs/fewstep.md
	$(BIN)/python compare.py configs/studies/fewstep.yaml
