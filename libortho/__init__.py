"""libortho: a language model as `base + residual + alpha * private`, and proof of what is at 0.

import libortho

model, tokenizer = libortho.load_model("smollm2")
corpus = libortho.load_corpus("enwiki")
libortho.separate(model, tokenizer, corpus.calibration)
libortho.tune_private(model, tokenizer, records, replay=corpus.replay)
libortho.set_alpha(model, 0.0)
"""

from .artifact import base_fingerprint, export_base, load, save
from .card import model_card
from .config import SeparationConfig, TuningConfig
from .corpora import Corpus, load_corpus
from .decoding import accelerate_decoding, restore_decoding
from .errors import OrthoError
from .hf import OrthoConfig
from .linear import OrthoLinear
from .models import load_model
from .records import Record, RecordSet, load_records, make_default_records
from .separation import separate
from .sharded import separate_shards
from .switch import alpha, bits_per_linear_weight, dense_weights, get_alpha, set_alpha
from .tuning import TuningReport, tune_private

__version__ = "0.1.0"

__all__ = [
    "Corpus",
    "OrthoConfig",
    "OrthoError",
    "OrthoLinear",
    "Record",
    "RecordSet",
    "SeparationConfig",
    "TuningConfig",
    "TuningReport",
    "accelerate_decoding",
    "alpha",
    "base_fingerprint",
    "bits_per_linear_weight",
    "dense_weights",
    "export_base",
    "get_alpha",
    "load",
    "load_corpus",
    "load_model",
    "load_records",
    "make_default_records",
    "model_card",
    "restore_decoding",
    "save",
    "separate",
    "separate_shards",
    "set_alpha",
    "tune_private",
]
