"""Build relssl: the packages, and the native kernels of csrc/. Everything else is in pyproject.toml.

    RELSSL_CPU=0     leave out the C++ kernels; the backend "chunked" serves instead
    RELSSL_EMULATE=1 also build the code of AVX-512 BF16 for processors without it, for tests
    CXX, CXXFLAGS    the C++17 compiler (default c++, g++ or clang++) and more flags for it
    MAX_JOBS         how many files to compile at a time

torch is not needed to build: the extensions take raw addresses. kernels/ stands at the top level for readers
and is installed as relssl.kernels ("kernels" alone is another project's name).
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = ROOT / "csrc" / "cpu"

# For each instruction set the flags to compile csrc/cpu/kernels.cpp with, best first; chosen at run time.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
BASELINE = {"baseline": ["-DRELSSL_VECTOR_BYTES=16"]}  # SSE2, NEON, or what the compiler takes by itself
X86 = {
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-DRELSSL_VECTOR_BYTES=64"],
    "avx512": [*AVX512, "-DRELSSL_VECTOR_BYTES=64"],
    "avx2": [*AVX2, "-DRELSSL_VECTOR_BYTES=32"],
}
EMULATED = {"emulated": [*AVX2, "-DRELSSL_VECTOR_BYTES=64", "-DRELSSL_EMULATED", "-O2"]}


def compiler() -> list[str]:
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise SystemExit(
        f"relssl: no C++ compiler ({given[0] if given else 'c++, g++ or clang++'}) was found for the CPU"
        " kernels. Install one, name it in CXX, or set RELSSL_CPU=0 to install without them (slower on CPUs)."
    )


def accepts(cxx: list[str], flags: list[str]) -> bool:
    command = [*cxx, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def cpu_extension() -> Extension:
    return Extension("relssl._cpu", [], language="c++", extra_link_args=["-pthread"])


def cpu_objects(cxx: list[str]) -> dict[str, tuple[Path, list[str]]]:
    """Object file -> source and its own flags."""
    sets = dict(BASELINE)
    if platform.machine().lower() in ("x86_64", "amd64"):
        sets = {**X86, **BASELINE, **(EMULATED if os.environ.get("RELSSL_EMULATE") == "1" else {})}
    sets = {name: flags for name, flags in sets.items() if accepts(cxx, flags)}
    listed = ["-DRELSSL_INSTRUCTION_SETS(X)=" + " ".join(f"X({name})" for name in sets)]
    listed += ["-DRELSSL_AVX512_BF16"] if "avx512_bf16" in sets else []
    objects = {
        f"kernels_{name}.o": (CPU / "kernels.cpp", [*flags, f"-DRELSSL_ISA={name}"])
        for name, flags in sets.items()
    }
    objects |= {f"{name}.o": (CPU / f"{name}.cpp", []) for name in ("losses", "threads")}
    return objects | {"binding.o": (CPU / "binding.cpp", listed)}


class NinjaBuildExt(build_ext):
    """Compile with ninja, in parallel and only what changed; link as setuptools does."""

    def run(self) -> None:
        if self.extensions:  # setuptools links with what CXX says, or else with what built Python.
            os.environ["CXX"] = shlex.join(compiler())
        super().run()

    def build_extensions(self) -> None:
        cxx = compiler()
        objects = cpu_objects(cxx)
        folder = Path(self.build_temp).resolve() / "cpu"
        self.compile(cxx, objects, folder)
        for extension in self.extensions:
            extension.extra_objects = [str(folder / name) for name in objects]
            extension.depends = extension.extra_objects  # or what is linked already would stay
        super().build_extensions()

    def compile(self, cxx: list[str], objects: dict[str, tuple[Path, list[str]]], folder: Path) -> None:
        import ninja
        import pybind11

        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-pthread"]
        common += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))

        def escaped(path: Path) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        lines = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {shlex.join(cxx)} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for name, (source, flags) in objects.items():
            every = shlex.join([*common, *includes, *flags, *extra]).replace("$", "$$")
            lines += [f"build {escaped(folder / name)}: cxx {escaped(source)}", f"  flags = {every}"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = shutil.which("ninja") or str(Path(ninja.BIN_DIR) / "ninja")
        if subprocess.run([command, "-C", str(folder), *jobs]).returncode:
            raise SystemExit("relssl: compiling the CPU kernels failed. RELSSL_CPU=0 installs without them.")


setup(
    packages=[*find_packages(include=["relssl", "relssl.*"]), "relssl.kernels"],
    package_dir={"relssl": "relssl", "relssl.kernels": "kernels"},
    package_data={"relssl": ["py.typed"]},
    ext_modules=[] if os.environ.get("RELSSL_CPU") == "0" else [cpu_extension()],
    cmdclass={"build_ext": NinjaBuildExt},
)
