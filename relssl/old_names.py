"""What checkpoints of earlier versions of relssl call by another name, and the settings that they lack."""

from collections.abc import Mapping
from typing import Any

# Keys of the checkpoint.
KEYS = {"steps": "steps_per_epoch", "unjudged": "evaluation_due", "randomness": "rng_states"}
# Settings in its config.
SETTINGS = {
    "judge_every": "eval_every",
    "standardise": "normalize",
    "weak_jitter": "jitter",
    "weak_blur": "blur",
}
# Settings that its config may lack, with the values that change nothing.
ADDED = {"exclude_own": False, "accumulate": 1, "compile": "no", "patch_size": None, "clip_grad": 0.0}
# Submodules in its names of parameters and buffers.
MODULES = {"standardise": "normalize"}


def replace_old_names(contents: dict[str, Any]) -> None:
    """Renames what has an old name in the contents of a checkpoint, and adds the settings that it lacks."""
    _rename(contents, KEYS)
    _rename(contents["config"], SETTINGS)
    contents["config"] = ADDED | contents["config"]
    model = contents.get("model", {})  # A folder, which earlier versions did not write, has it apart.
    _rename(model, {name: ".".join(MODULES.get(part, part) for part in name.split(".")) for name in model})


def _rename(values: dict[str, Any], names: Mapping[str, str]) -> None:
    """Renames keys in place, in their order: a state_dict has attributes that a copy would lack."""
    for name in list(values):
        values[names.get(name, name)] = values.pop(name)
