# make demo    set up, then generate data, train, evaluate, export and separate (at most 12 minutes on two cores)
# make demo-speaker  set up, then train speaker models, align them and compare (under 10 minutes on two cores)
# make test    set up, then run the tests
# make web     set up, then start a page on this machine to try a model on (MODEL=folder PORT=7860)
# make test-web  set up, then run that page's tests, in a headless Chromium where there is one
# make lint    set up, then look at format, style and spelling
# make clean   remove what demo and tests made (the virtual environment and the data stay)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RECIPE := recipes/LibriMix/separation
SPEAKER_RECIPE := recipes/VoxCeleb/SpeakerAlignment
DEMO_FOLDER ?= results/demo
SPEAKER_DEMO_FOLDER ?= results/demo

# The whole difference between the demo and the full-size recipe.
DEMO_OVERRIDES := \
	--output_folder $(DEMO_FOLDER) \
	--synthetic_sizes [1200,40,100] --probe_size 32 \
	--number_of_epochs 7 --batch_size 1 --segment_seconds 2 \
	--lr 0.0012 --lr_schedule linear --lr_warmup 0.05 \
	--num_filters 64 --kernel_size 32 --chunk_size 50 --num_blocks 2 \
	--num_intra_layers 1 --num_inter_layers 1 --num_heads 2 --d_ffn 128 \
	--num_workers 0

.PHONY: setup demo demo-speaker test web test-web lint clean
.DELETE_ON_ERROR:

setup: .venv/ready

# The stamp is written last: an interrupted or outdated installation is made anew.
.venv/ready: requirements.txt requirements-dev.txt requirements-export.txt requirements-peers.txt requirements-compiled.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or later is needed, but $(PYTHON) is older; give one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps -r requirements-peers.txt
	@$(BIN)/pip install --disable-pip-version-check -r requirements-compiled.txt \
		|| echo "note: pesq could not be installed (it needs a C compiler): the tests of it will be skipped"
	$(BIN)/pip install --disable-pip-version-check --no-deps -e .
	@touch $@

demo: setup
	cd $(RECIPE) && $(CURDIR)/$(BIN)/python train.py hparams/sepformer_dsd.yaml $(DEMO_OVERRIDES)

demo-speaker: setup
	cd $(SPEAKER_RECIPE) && $(CURDIR)/$(BIN)/python experiment.py $(SPEAKER_DEMO_FOLDER)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

web: .venv/web
	$(BIN)/python -m dsd_modules.web $(if $(MODEL),--model $(MODEL)) $(if $(PORT),--port $(PORT))

test-web: .venv/web-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_web.py

.venv/web: .venv/ready requirements-web.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-web.txt
	@touch $@

.venv/web-test: .venv/web requirements-web-test.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-web-test.txt
	@touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell

clean:
	rm -rf $(RECIPE)/results $(SPEAKER_RECIPE)/results .pytest_cache .ruff_cache
