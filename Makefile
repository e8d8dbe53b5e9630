# make demo   fine-tune the embedded model on a real reward, from nothing (about 5 minutes on 2 cores)
# make demo-words   the same for a model that writes words, on a recogniser of text (about 8 minutes)
# make test   run the test suite from nothing (a quarter of an hour on 2 cores)
# make test-device   the same on a simulated accelerator, CUDA's discipline without a GPU
# make verify every theorem, and every mistake that its check must reject (a minute and a half)
# make faults   kill, damage, fill, interrupt: does a run keep its promises? (a quarter of an hour)
# make docs   the documentation as a site: site/index.html, to open without a network (under 1 minute)
# make package   both wheels, installed into an empty environment and used there (under 3 minutes)
# make lowest   part of the tests with the lowest versions that are declared (docs/releasing.md)
# make portability   the tests that round, under every kernel that this machine can run (15 minutes)

PYTHON ?= python3
VENV   ?= .venv
REWARD ?= prompt-alignment
OUTPUT ?= runs/$@
BIN    := $(VENV)/bin

# Settings that were measured to show a clear gain within the time (docs/tiny.md).
DEMO := --model tiny --steps 10 --guidance 1 --guidance-knots 4 --kl-weight 0.1 --samples 40 --minibatches 4 --average 0.7 --updates 12 --evaluation-samples 100 --frontier-samples 600
# Measured too, in docs/words.md; words of evaluation are never trained on.
PROMPTS := diffusion_envs/words/prompts
WORDS := --model words --guidance 1 --guidance-knots 4 --lora-rank 0 --steps 10 --learning-rate 6e-3 --kl-weight 0.004 --samples 64 --minibatches 4 --average 0.8 --updates 24 --evaluation-samples 260 --reward text-in-picture --judges readable=readable-text --prompts $(PROMPTS)/training.txt --evaluation-prompts $(PROMPTS)/held_out.txt

# A run that was stopped goes on; one that is finished is moved aside.
define finetune
@if [ -f $(OUTPUT)/report.html ]; then mv $(OUTPUT) $(OUTPUT)-$$(date +%Y%m%d-%H%M%S); fi
@if [ -f $(OUTPUT)/config.json ]; then \
	$(BIN)/python -m diffusion_envs.sd15 --resume $(OUTPUT); \
else \
	$(BIN)/python -m diffusion_envs.sd15 $(1) --output $(OUTPUT); \
fi
endef

# Threads that wait must not burn the core that another program needs.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo demo-words test test-device verify docs package lowest faults portability lint bench mutants clean
.DELETE_ON_ERROR:

# torch first and pinned: it decides what everything else may bring.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[diffusion]"
	touch $@

$(VENV)/.installed-ocr: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[diffusion,ocr]"
	touch $@

# The site is made from the text of the sources: neither torch nor the package itself is needed.
DOCS := import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))
$(VENV)/.installed-docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c '$(DOCS)' > $(VENV)/docs.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement $(VENV)/docs.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(call finetune,$(DEMO) --reward $(REWARD))

demo-words: $(VENV)/.installed-ocr
	$(call finetune,$(WORDS))

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# A process of its own: the simulated accelerator replaces parts of torch.
test-device: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.device.plugin tests/device --numprocesses 2

verify: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m verification

# A broken link, an unknown claim, a formula that cannot be typeset: any warning fails it (not with
# --quiet, which counts no warnings).
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo site/index.html

package: $(VENV)/.installed-dev
	PYTHON=$(BIN)/python bash .ci/package

lowest:
	bash benchmarks/lowest_versions.sh runs/lowest

# SAMPLE=--sample: few faults of each kind.
faults: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults $(SAMPLE)

# SAMPLE=--sample: two kernels and the fewest tests.
portability: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.portability $(SAMPLE)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pyright --pythonpath $(BIN)/python --project pyright-strict.json

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.simulate
	$(BIN)/python -m benchmarks.update

# Goes on where it was stopped; MODULE=ctrl.girsanov for one alone.
mutants: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutants $(MODULE)

clean:
	rm -rf $(VENV) runs
