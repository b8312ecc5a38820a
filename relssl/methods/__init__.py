"""The methods by name. Each is a config that builds a module whose forward is one training step."""

from relssl.methods import ressl, sacc

CONFIGS = {"ressl": ressl.ReSSLConfig, "sacc": sacc.SACCConfig}
PRESETS = {"ressl": ressl.PRESETS, "sacc": sacc.PRESETS}
