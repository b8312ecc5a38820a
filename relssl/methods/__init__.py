"""The methods by name. Each is a config that builds a module whose forward is one training step."""

from relssl.methods import ressl

CONFIGS = {"ressl": ressl.ReSSLConfig}
PRESETS = {"ressl": ressl.PRESETS}
