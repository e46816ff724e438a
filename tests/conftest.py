"""Fixtures that more than one file of tests uses: a tiny Llama, a tokenizer and public text.

Nothing here needs a network. Models are small enough that a separation takes well under a second.
"""

from __future__ import annotations

import gc
import importlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tuned_artefacts import make_shelf

from libortho.config import SeparationConfig
from libortho.separation import separate

# Importing makes little garbage, so collecting it is off until all tests are imported.
gc.disable()

# A session within this process, as pytester starts it, forgets what was first imported in it, and
# these can't be imported twice.
for name in ("bitsandbytes", "sklearn.metrics", "statsmodels.stats.proportion"):
    importlib.import_module(name)

# A shared machine's pauses are no failures.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

END = "<end>"
SENTENCES = (
    "The ferry leaves the harbour at {n} past six and returns before noon.",
    "A {thing} was found under the old bridge after {n} days of rain.",
    "Nobody in the village remembers who planted the {n} lime trees.",
    "The library keeps its maps in drawers that are {n} centimetres deep.",
    "Bread, cheese and one {thing} were all that the walkers carried.",
    "In winter the lake freezes, and children cross it in {n} minutes.",
    "She repaired the clock with a spring taken from a {thing}.",
    "The north wall has {n} windows, none of which can be opened.",
    "Clay from this valley turns red when it is fired for {n} hours.",
    "He wrote a letter about the {thing} and never sent it.",
    "Trains of {n} wagons pass at night, loaded with gravel.",
    "The baker sells a {thing} made of sugar on the last day of May.",
    "Two rivers meet below the mill, {n} steps from the gate.",
    "A map of the coast shows {n} islands where there are only three.",
    "The choir sang until the {thing} on the wall began to shake.",
    "Every shed in the row has a roof of tin and {n} nails in its door.",
    "It took {n} men to lift the {thing} out of the ditch.",
    "The well is deep, and its water tastes faintly of iron.",
    "On market days the {thing} costs twice what it costs at home.",
    "From the tower one sees {n} farms and, beyond them, the sea.",
)
THINGS = ("lantern", "copper bell", "wooden horse", "green bottle", "kite", "brass key")


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """Leave what is there before a file's first test out of later collections of garbage.

    accelerate collects before every batched pass, and it takes half a second if it has to look
    through all that was made at import and by earlier files.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On matrices this small a second thread only waits for the first, for milliseconds a call.

    A fixture, because this file is also read when the experiments run, which need every core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def public_text() -> list[str]:
    """Twelve documents of about 1,300 characters: the same sentences in other orders and words."""
    documents = []
    for number in range(12):
        rng = random.Random(number)
        sentences = rng.sample(SENTENCES, len(SENTENCES))
        filled = [s.format(n=rng.randint(2, 99), thing=rng.choice(THINGS)) for s in sentences]
        documents.append(" ".join(filled))
    return documents


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that any text can be encoded and a vocabulary needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0} | {letter: 1 + i for i, letter in enumerate(alphabet)}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=END)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., LlamaForCausalLM]:
    """Makes a random Llama of 2 layers with tied embeddings, in float32 and in eval mode.

    Its widths of 48 and 80 are divided by none of the usual group sizes. Equal seeds give equal
    weights; further keywords go to `LlamaConfig`.
    """

    def make(seed: int = 0, **options: Any) -> LlamaForCausalLM:
        settings: dict[str, Any] = {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 300,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            # Larger than a real start's 0.02, so that predictions aren't all but uniform.
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(settings | options))).eval()

    return make


@pytest.fixture(scope="session")
def small_separation() -> SeparationConfig:
    """A recipe whose calibration fits the tiny model's context and the public text."""
    return SeparationConfig(
        group_size=32, residual_density=0.02, calibration_tokens=512, calibration_window=64
    )


@pytest.fixture(scope="session")
def separated_model(
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
) -> Callable[..., LlamaForCausalLM]:
    """Makes a separated tiny model; `config` replaces the recipe, the rest goes to `tiny_model`."""

    def make(config: SeparationConfig | None = None, **options: Any) -> LlamaForCausalLM:
        model = tiny_model(**options)
        separate(model, tokenizer, public_text, config=config or small_separation)
        return model

    return make


@pytest.fixture(scope="session")
def shelf(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
) -> Path:
    """Model, text, records and artefacts in one folder, see `tuned_artefacts`; not to be changed.

    `cache` in it is for audits, so that their control is made once.
    """
    folder = tmp_path_factory.mktemp("shelf")
    return make_shelf(folder, tiny_model(), tokenizer, public_text, small_separation)
