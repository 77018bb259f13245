"""One typed, validated configuration. Every section is frozen and forbids unknown keys."""

from fastrepa.config.ingredients import (
    AlignmentConfig,
    CodecConfig,
    DataConfig,
    EncoderConfig,
    ModelConfig,
    ObjectiveConfig,
    VisionConfig,
)
from fastrepa.config.loading import (
    PATCHES,
    SIT_MODELS,
    config_from_dict,
    load_config,
    load_run_config,
    overridden,
    own_files,
    run_folder,
    save_config,
    told_of_folder,
)
from fastrepa.config.sections import (
    MAX_EMAS,
    AttentionConfig,
    Config,
    EmaConfig,
    EvaluationConfig,
    KeepBestConfig,
    OptimizerConfig,
    SampleConfig,
    ScheduleConfig,
    SurvivalConfig,
    TrainingConfig,
    ZeroConfig,
)

__all__ = [
    "MAX_EMAS", "PATCHES", "SIT_MODELS", "AlignmentConfig", "AttentionConfig", "CodecConfig",
    "Config", "DataConfig", "EmaConfig", "EncoderConfig", "EvaluationConfig", "KeepBestConfig",
    "ModelConfig", "ObjectiveConfig", "OptimizerConfig", "SampleConfig", "ScheduleConfig",
    "SurvivalConfig", "TrainingConfig", "VisionConfig", "ZeroConfig", "config_from_dict",
    "load_config", "load_run_config", "overridden", "own_files", "run_folder", "save_config",
    "told_of_folder",
]  # fmt: skip
