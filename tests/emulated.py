"""Runs the CUDA kernels on a CPU: g++ compiles csrc/cuda with tests/emulation/ to replace relssl._cuda."""

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from relssl.kernels.heuristics import Chip

from relssl import backends

ROOT = Path(__file__).resolve().parents[1]
CUDA, EMULATION = ROOT / "csrc/cuda", ROOT / "tests/emulation"
WIDTHS = (64, 128, 256, 512)
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", f"-I{CUDA}", f"-I{EMULATION / 'toolkit'}"]
FLAGS += ["-include", EMULATION / "cuda.h"]
# Each module needs a machine of its own, and threads switch stacks by longjmp.
FLAGS += ["-fno-gnu-unique", "-U_FORTIFY_SOURCE"]


def compile_to(target, source, *flags):
    command = ["g++", *FLAGS, *flags, "-x", "c++", "-c", source, "-o", target]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def objects(folder):
    """Returns the object files of the module, with the arguments of compile_to for each."""
    import pybind11

    python = f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"
    named = "-DRELSSL_MODULE=_emulated", '-DRELSSL_ARCHITECTURES="sm_80, sm_90a"', "-DRELSSL_SM90A"
    found = {"binding": (CUDA / "binding.cpp", *python, *named), "control": (EMULATION / "control.cpp",)}
    for name in ("forward_sm90", "forward_sm80"):
        found |= {f"{name}_{width}": (CUDA / f"{name}.cu", f"-DRELSSL_DIM={width}") for width in WIDTHS}
    found["combine"] = (CUDA / "combine.cu",)
    return {folder / f"{name}.o": arguments for name, arguments in found.items()}


def link(target, files):
    subprocess.run(["g++", "-shared", *map(str, files), "-o", str(target)], check=True)


def build():
    """Returns the module's file, which is compiled once for each state of the sources."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    sources = [
        *sorted(CUDA.glob("*.*")),
        *sorted(EMULATION.rglob("*.*")),
        CUDA.parent / "addresses.h",
        Path(__file__),
    ]
    state = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = ROOT / "build/emulated" / state
    module = folder / "_emulated.so"
    folder.parent.parent.mkdir(exist_ok=True)
    with FileLock(folder.parent.with_suffix(".lock")):  # One process compiles, and the others wait.
        if not module.exists():
            shutil.rmtree(folder.parent, ignore_errors=True)
            folder.mkdir(parents=True)
            files = objects(folder)
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda item: compile_to(item[0], *item[1]), files.items()))
            link(folder / "linked", files)
            (folder / "linked").rename(module)  # The file appears only when it is complete.
    return module


def load(file):
    spec = importlib.util.spec_from_file_location("_emulated", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = ctypes.CDLL(str(file))
    module.seed = library.emulation_seed
    module.seed.argtypes = [ctypes.c_uint64]
    module.device, module.launched_on = library.emulation_device, library.emulation_launched_on
    return module


def install(module, patch, path, processors=3):
    """Makes the backend "cuda" run a module's kernels for one capability, 80 or 90, on CPU tensors."""
    patch(backends.BACKENDS["cuda"], "supports", lambda device, dtype, dim: None)
    patch(backends.cuda, "_cuda", module)
    patch(backends.cuda, "_chip", lambda index: Chip(path, processors))
    patch(backends.cuda, "_place", lambda x: (0, 0))
    patch(backends.cuda, "_runnable", lambda wanted, queue: path)
    return backends.BACKENDS["cuda"]
