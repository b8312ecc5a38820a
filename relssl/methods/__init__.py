"""The methods by name: each is a config, which builds a module whose forward is one training step."""

from collections.abc import Mapping

from relssl.methods import ressl, sacc
from relssl.methods.base import TrainConfig

CONFIGS: dict[str, type[TrainConfig]] = {"ressl": ressl.ReSSLConfig, "sacc": sacc.SACCConfig}
PRESETS: dict[str, Mapping[str, TrainConfig]] = {"ressl": ressl.PRESETS, "sacc": sacc.PRESETS}
