"""The methods by name: each is a config, which builds a module whose forward is one training step."""

from collections.abc import Mapping

from relssl.methods import cc, distill, moco, ressl, sacc, simclr
from relssl.methods.base import TrainConfig

CONFIGS: dict[str, type[TrainConfig]] = {
    "ressl": ressl.ReSSLConfig,
    "sacc": sacc.SACCConfig,
    "distill": distill.DistillConfig,
    "moco": moco.MoCoConfig,
    "simclr": simclr.SimCLRConfig,
    "cc": cc.CCConfig,
}
PRESETS: dict[str, Mapping[str, TrainConfig]] = {
    "ressl": ressl.PRESETS,
    "sacc": sacc.PRESETS,
    "distill": distill.PRESETS,
    "moco": moco.PRESETS,
    "simclr": simclr.PRESETS,
    "cc": cc.PRESETS,
}
