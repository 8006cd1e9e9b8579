"""What both frameworks share: configuration, model, text, data, training, decoding, conversions, checkpoint comparison.

Nothing here imports jax or torch. The public names below are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from minillm_core.version import __version__

if TYPE_CHECKING:
    from minillm_core.config import (
        DataConfig,
        ModelConfig,
        OptimConfig,
        RopeScaling,
        RunConfig,
        TrainConfig,
        load_config,
    )
    from minillm_core.data.batches import Batch
    from minillm_core.data.prepared import PreparedData
    from minillm_core.data.run_data import prepare_data
    from minillm_core.decoding.conversation import Conversation
    from minillm_core.decoding.generation import Completion
    from minillm_core.decoding.sampling import SamplingConfig
    from minillm_core.doctor.compare import compare
    from minillm_core.doctor.examine import Report
    from minillm_core.doctor.report import text_report
    from minillm_core.doctor.subjects import Engine
    from minillm_core.errors import InputError, Interrupted
    from minillm_core.interop.conversion import Conversion, convert
    from minillm_core.interop.publish import Publication, publish
    from minillm_core.model.stages import Trace
    from minillm_core.text.chat_template import ChatTemplate
    from minillm_core.text.tokenizer import Tokenizer
    from minillm_core.text.tokenizer_json import load_tokenizer
    from minillm_core.training.backend import Backend, load_backend
    from minillm_core.training.checkpoints import find_checkpoint
    from minillm_core.training.metrics import read_metrics
    from minillm_core.training.train import train

__all__ = [
    "Backend",
    "Batch",
    "ChatTemplate",
    "Completion",
    "Conversation",
    "Conversion",
    "DataConfig",
    "Engine",
    "InputError",
    "Interrupted",
    "ModelConfig",
    "OptimConfig",
    "PreparedData",
    "Publication",
    "Report",
    "RopeScaling",
    "RunConfig",
    "SamplingConfig",
    "Tokenizer",
    "Trace",
    "TrainConfig",
    "__version__",
    "compare",
    "convert",
    "find_checkpoint",
    "load_backend",
    "load_config",
    "load_tokenizer",
    "prepare_data",
    "publish",
    "read_metrics",
    "text_report",
    "train",
]

_MODULES = {
    "Backend": "training.backend",
    "Batch": "data.batches",
    "ChatTemplate": "text.chat_template",
    "Completion": "decoding.generation",
    "Conversation": "decoding.conversation",
    "Conversion": "interop.conversion",
    "DataConfig": "config",
    "Engine": "doctor.subjects",
    "InputError": "errors",
    "Interrupted": "errors",
    "ModelConfig": "config",
    "OptimConfig": "config",
    "PreparedData": "data.prepared",
    "Publication": "interop.publish",
    "Report": "doctor.examine",
    "RopeScaling": "config",
    "RunConfig": "config",
    "SamplingConfig": "decoding.sampling",
    "Tokenizer": "text.tokenizer",
    "Trace": "model.stages",
    "TrainConfig": "config",
    "compare": "doctor.compare",
    "convert": "interop.conversion",
    "find_checkpoint": "training.checkpoints",
    "load_backend": "training.backend",
    "load_config": "config",
    "load_tokenizer": "text.tokenizer_json",
    "prepare_data": "data.run_data",
    "publish": "interop.publish",
    "read_metrics": "training.metrics",
    "text_report": "doctor.report",
    "train": "training.train",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
