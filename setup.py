"""Builds relssl: the packages, and the native kernels of csrc/. Everything else is in pyproject.toml.

    RELSSL_CPU=0       leaves out the C++ kernels; "chunked" replaces them
    RELSSL_CUDA        auto (default) builds the CUDA kernels if nvcc is found and works; 1 fails if they
                       cannot be built; 0 leaves them out
    RELSSL_CUDA_ARCHS  the architectures to compile for, default "80;90a;90+PTX"; CUDA_HOME is nvcc's folder
    RELSSL_EMULATE=1   also builds the AVX-512 BF16 code for processors without it, for tests
    CXX, CXXFLAGS      the C++17 compiler (default c++, g++ or clang++) and additional flags
    MAX_JOBS           the number of files to compile at a time

The build does not need torch, because the extensions take raw addresses. kernels/ is at the top level, where
it is easy to find, and is installed as relssl.kernels (another project has the name "kernels").
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CPU = ROOT / "csrc" / "cpu"
CUDA = ROOT / "csrc" / "cuda"
MODE = os.environ.get("RELSSL_CUDA") or "auto"
ARCHS = os.environ.get("RELSSL_CUDA_ARCHS", "80;90a;90+PTX").replace(",", ";").split(";")
WIDTHS = (64, 128, 256, 512)

# The flags of csrc/cpu/kernels.cpp for each instruction set, the best first. The choice is made at run time.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
BASELINE = {"baseline": ["-DRELSSL_VECTOR_BYTES=16"]}  # SSE2, NEON, or the compiler's default
X86 = {
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-DRELSSL_VECTOR_BYTES=64"],
    "avx512": [*AVX512, "-DRELSSL_VECTOR_BYTES=64"],
    "avx2": [*AVX2, "-DRELSSL_VECTOR_BYTES=32"],
}
EMULATED = {"emulated": [*AVX2, "-DRELSSL_VECTOR_BYTES=64", "-DRELSSL_EMULATED", "-O2"]}


def compiler(needed: bool = True) -> list[str]:
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    if not needed:
        return []
    raise SystemExit(
        f"relssl: no C++ compiler ({given[0] if given else 'c++, g++ or clang++'}) was found for the native"
        " kernels. Install one, name it in CXX, or set RELSSL_CPU=0 to install without them (slower on CPUs)."
    )


def accepts(cxx: list[str], flags: list[str]) -> bool:
    command = [*cxx, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


class Object(NamedTuple):
    """The rule, the source and the flags of an object file."""

    rule: str
    source: Path
    flags: list[str]


def cpu_objects(cxx: list[str]) -> dict[str, Object]:
    sets = dict(BASELINE)
    if platform.machine().lower() in ("x86_64", "amd64"):
        sets = {**X86, **BASELINE, **(EMULATED if os.environ.get("RELSSL_EMULATE") == "1" else {})}
    sets = {name: flags for name, flags in sets.items() if accepts(cxx, flags)}
    listed = ["-DRELSSL_INSTRUCTION_SETS(X)=" + " ".join(f"X({name})" for name in sets)]
    listed += ["-DRELSSL_AVX512_BF16"] if "avx512_bf16" in sets else []
    objects = {
        f"kernels_{name}.o": Object("cxx", CPU / "kernels.cpp", [*flags, f"-DRELSSL_ISA={name}"])
        for name, flags in sets.items()
    }
    objects |= {
        f"{name}.o": Object("cxx", CPU / f"{name}.cpp", [])
        for name in ("clusters", "enqueue", "losses", "threads")
    }
    return objects | {"binding.o": Object("cxx", CPU / "binding.cpp", [*python_headers(), *listed])}


class Toolkit(NamedTuple):
    nvcc: str
    include: Path
    library: Path  # the folder of libcudart_static.a, with which the extension needs no CUDA library


def toolkit() -> Toolkit | None:
    """Returns nvcc with its toolkit, whose folder nvcc reports: the nvcc on PATH may be only a script."""
    if MODE not in ("auto", "0", "1"):
        raise SystemExit(f"relssl: RELSSL_CUDA must be auto, 0 or 1; got {MODE!r}")
    if MODE == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [f"{home}/bin/nvcc" for home in homes] or [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in found:
        if not nvcc or not Path(nvcc).exists():
            continue
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        output = subprocess.run(command, capture_output=True, text=True).stderr
        match = re.search(r"^#\$ TOP=(.+?)\s*$", output, re.M)
        top = Path(match[1]).resolve() if match else Path()
        for library in (top / "lib64", *top.glob("targets/*/lib"), top / "lib"):
            if (library / "libcudart_static.a").exists() and (top / "include/cuda_runtime_api.h").exists():
                return Toolkit(nvcc, top / "include", library)
    if MODE == "1":
        raise SystemExit(
            f"relssl: RELSSL_CUDA=1, but no working nvcc with libcudart_static.a was found"
            f" (looked for {', '.join(str(f or 'nvcc on PATH') for f in found)}). Install the CUDA toolkit,"
            " name its folder in CUDA_HOME, or leave RELSSL_CUDA=auto to install without the CUDA kernels."
        )
    return None


def architectures() -> list[str]:
    """Returns the compiler's names: sm_80 is machine code, compute_90 is PTX for later GPUs."""
    names = []
    for arch in ARCHS:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            raise SystemExit(f'relssl: RELSSL_CUDA_ARCHS must look like "80;90a;90+PTX"; got {arch!r} in it')
        number = arch.removesuffix("+PTX")
        names.append(f"compute_{number}" if arch != number else f"sm_{number}")
    return names


def cuda_objects(cuda: Toolkit) -> dict[str, Object]:
    names = architectures()

    def code(*names: str) -> list[str]:
        return [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in names]

    hopper = "sm_90a" in names
    defined = [f'-DRELSSL_ARCHITECTURES="{", ".join(names)}"', *(["-DRELSSL_SM90A"] if hopper else [])]
    kernels = {"forward_sm80": code(*names)} | ({"forward_sm90": code("sm_90a")} if hopper else {})
    objects = {
        f"{name}_{width}.o": Object("nvcc", CUDA / f"{name}.cu", [*flags, f"-DRELSSL_DIM={width}"])
        for width in reversed(WIDTHS)  # the slowest file first
        for name, flags in kernels.items()
    }
    objects["combine.o"] = Object("nvcc", CUDA / "combine.cu", code(*names))
    binding = [*python_headers(), f"-I{cuda.include}", *defined]
    return objects | {"binding.o": Object("cxx", CUDA / "binding.cpp", binding)}


def python_headers() -> list[str]:
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def compiled(objects: dict[str, Object], rules: dict[str, list[str]], folder: Path) -> bool:
    """Compiles changed files with ninja, in parallel. `rules` has the command of each rule."""
    import ninja

    def escaped(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.5"]
    for name, command in rules.items():
        lines += [
            f"rule {name}",
            f"  command = {shlex.join(command)} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    for name, (rule, source, flags) in objects.items():
        lines += [f"build {escaped(folder / name)}: {rule} {escaped(source)}"]
        lines += ["  flags = " + shlex.join(flags).replace("$", "$$")]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = shutil.which("ninja") or str(Path(ninja.BIN_DIR) / "ninja")
    return subprocess.run([command, "-C", str(folder), *jobs]).returncode == 0


class CleanBuild(build):
    """Removes what earlier builds left, which setuptools would install beside today's files."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "relssl", ignore_errors=True)
        super().run()


class NinjaBuildExt(build_ext):
    """Compiles with ninja, links with setuptools. CUDA kernels that fail do not stop the others."""

    def run(self) -> None:
        if self.extensions:  # setuptools links with CXX, or else with the compiler of Python.
            os.environ["CXX"] = shlex.join(compiler())
        super().run()

    def build_extensions(self) -> None:
        cxx = compiler()
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-pthread"]
        common += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]
        rules = {"cxx": [*cxx, *common, *shlex.split(os.environ.get("CXXFLAGS", ""))]}
        kept, note = [], "RELSSL_CUDA=0" if MODE == "0" else "no nvcc was found"
        for extension in self.extensions:
            folder = Path(self.build_temp).resolve() / extension.name.removeprefix("relssl._")
            if extension.name == "relssl._cpu":
                objects = cpu_objects(cxx)
                if not compiled(objects, rules, folder):
                    raise SystemExit(
                        "relssl: compiling the CPU kernels failed. RELSSL_CPU=0 leaves them out."
                    )
            else:
                assert TOOLKIT
                objects = cuda_objects(TOOLKIT)
                host = "-Xcompiler=-fPIC,-fvisibility=hidden"
                nvcc = {"nvcc": [TOOLKIT.nvcc, "-std=c++17", "-O3", host]}
                if compiled(objects, rules | nvcc, folder):
                    note = "for " + ", ".join(architectures())
                elif MODE == "1":
                    raise SystemExit(
                        "relssl: compiling the CUDA kernels failed. RELSSL_CUDA=0 leaves them out."
                    )
                else:
                    note = "nvcc failed; installing with RELSSL_CUDA=1 shows how"
                    print(f"relssl: left out the CUDA kernels: {note}", file=sys.stderr)
                    continue
            extension.extra_objects = [str(folder / name) for name in objects]
            extension.depends = extension.extra_objects  # or an existing library would not be linked again
            kept.append(extension)
        self.extensions = kept
        super().build_extensions()
        root = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        record = root / "relssl" / "_build_info.py"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f'"""The state of the build."""\n\nCUDA = {note!r}\n')


def extensions() -> list[Extension]:
    found = []
    cpu = os.environ.get("RELSSL_CPU") != "0"
    if cpu:
        found.append(Extension("relssl._cpu", [], language="c++", extra_link_args=["-pthread"]))
    if TOOLKIT and compiler(needed=cpu or MODE == "1"):  # nvcc needs a compiler, too.
        libraries = [f"-L{TOOLKIT.library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        link = [*libraries, "-Wl,--exclude-libs,ALL"]
        found.append(Extension("relssl._cuda", [], language="c++", extra_link_args=link))
    return found


def require_build_tools() -> None:
    """Names the missing packages, which pip installs unless it runs with --no-build-isolation."""

    def absent(name: str) -> bool:
        return importlib.util.find_spec(name) is None

    wheel = {"dist_info", "editable_wheel", "bdist_wheel"} & set(sys.argv)
    needed = ["ninja", "pybind11"] if EXTENSIONS else []
    needed += ["wheel"] if wheel and absent("setuptools.command.bdist_wheel") else []
    missing = [name for name in needed if absent(name)]
    missing += ["setuptools>=64"] if absent("setuptools.command.editable_wheel") else []
    if missing:
        raise SystemExit(
            f"relssl: building needs {', '.join(missing)}, which {sys.executable} does not have."
            f" Run pip install {' '.join(map(repr, missing))}, or leave out --no-build-isolation."
        )


TOOLKIT = toolkit()
EXTENSIONS = extensions()
require_build_tools()
setup(
    # A package index shows README.md alone: without its picture, and without links to other files.
    long_description=re.sub(r"!\[.*?\]\(.*?\)\n\n|\[(.*?)\]\((?!https?:).*?\)", r"\1", README),
    long_description_content_type="text/markdown",
    license="MIT",  # No form of it in pyproject.toml works with both setuptools 76 and 77.
    packages=[*find_packages(include=["relssl", "relssl.*"]), "relssl.kernels"],
    package_dir={"relssl": "relssl", "relssl.kernels": "kernels"},
    package_data={"relssl": ["py.typed"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build": CleanBuild, "build_ext": NinjaBuildExt},
)
