"""What people choose: pydantic models, unknown keys forbidden, limits derived once.

One `Config` describes the whole recipe; each command reads its sections. Units are
in the names: `*_tokens`, `*_s` (seconds), `*_gib`, `prompts_per_step`,
`samples_per_prompt`. What follows from the choices is a property, and what cannot
work fails here, before any actor starts, with the fix in the message.
"""

from distrl.config.base import ConfigError, Section
from distrl.config.functions import blamed, resolve, told
from distrl.config.learn import (
    AdvantageConfig,
    KLConfig,
    LearnConfig,
    LoRAConfig,
    ObjectiveConfig,
    OffPolicyConfig,
    PretrainConfig,
    ValueConfig,
)
from distrl.config.ring import (
    OWN,
    GenerateConfig,
    OverlongConfig,
    RewardPart,
    ScoreConfig,
    SyncConfig,
)
from distrl.config.run import ClusterConfig, DriverConfig, MetricsConfig, SimulateConfig
from distrl.config.stages import (
    HEAD_SIZES,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)
from distrl.config.whole import PRESETS, Config, dump_yaml, preset_path, read_yaml

__all__ = [
    "HEAD_SIZES",
    "OWN",
    "PRESETS",
    "AdvantageConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DriverConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "KLConfig",
    "LearnConfig",
    "LoRAConfig",
    "MetricsConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OffPolicyConfig",
    "OverlongConfig",
    "PretrainConfig",
    "RewardModelConfig",
    "RewardPart",
    "RunConfig",
    "SFTConfig",
    "ScoreConfig",
    "Section",
    "SimulateConfig",
    "SyncConfig",
    "ValueConfig",
    "blamed",
    "dump_yaml",
    "preset_path",
    "read_yaml",
    "resolve",
    "told",
]
