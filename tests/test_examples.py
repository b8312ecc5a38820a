"""The examples run; `make demo` runs the longer one, and test_fsdp the one with FSDP."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_loss_of_a_loop_of_ones_own_falls(one_thread, capsys):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLES / "own_loop.py")
    own_loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own_loop)
    losses = own_loop.main()
    assert losses[-1] < losses[0] / 2
    assert len(capsys.readouterr().out.splitlines()) == len(losses)


def environment(first, **variables):
    """Returns this process's environment with another folder before all of PATH."""
    return os.environ | {"PATH": f"{first}{os.pathsep}{os.environ['PATH']}", **variables}


@pytest.mark.slow
@pytest.mark.alone
def test_two_launchers_train_together(tmp_path):
    """Starts one launcher of a process for each of two nodes, which here are the same machine."""
    pytest.importorskip("sklearn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--data", "digits", "--epochs", "1", "--eval-every", "0", "--out", "run"]
    env = environment(Path(sys.executable).parent, PROCESSES="1", OMP_NUM_THREADS="1")
    how = {"cwd": tmp_path, "env": env, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = ["bash", str(EXAMPLES / "two_nodes.sh"), endpoint, *options]
    launchers = [subprocess.Popen(command, **how) for _ in range(2)]
    try:
        outputs = [launcher.communicate(timeout=200) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # It ends its processes.
            launcher.wait(60)
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    (line,) = "".join(stdout for stdout, _ in outputs).splitlines()  # Rank 0's, of either node.
    assert json.loads(line)["trained encoder"]["knn"] > 0.8
    (epoch,) = json.loads((tmp_path / "run/metrics.json").read_text())["epochs"]
    assert epoch["epoch"] == 1 and 0 < epoch["loss"] < 1 and epoch["images_per_second"] > 0


# What the job calls, without a cluster: "$STEP" says how its step ends.
STUBS = {
    "scontrol": """
[[ $1 == show ]] && printf '%s\\n' first second || echo "$@"
""",
    "srun": """
echo "$@"
[[ $STEP == signal ]] || exit "$STEP"
trap 'echo saved; exit 1' USR1
sleep 0.3
kill -USR1 $PPID  # as Slurm would
for _ in {1..500}; do sleep 0.02; done
""",
}


@pytest.mark.parametrize("step, status", [("0", 0), ("1", 1), ("signal", 1)])
def test_a_job_of_slurm_runs_again_only_after_a_signal(tmp_path, step, status):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash{body}")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "1234", "JOB_NODELIST": "a[1-2]", "NNODES": "2", "CPUS_PER_TASK": "8"}
    env = environment(tmp_path, STEP=step, **{f"SLURM_{name}": value for name, value in slurm.items()})
    command = ["bash", str(EXAMPLES / "slurm.sh"), "--out", "a folder"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == status, run.stderr
    launch, *rest = run.stdout.splitlines()
    assert "--nnodes 2 " in launch and " --rdzv-endpoint first:29734 " in launch
    assert launch.endswith("-m relssl train ressl --resume --out a folder")
    assert rest == (["saved", "requeue 1234"] if step == "signal" else [])
