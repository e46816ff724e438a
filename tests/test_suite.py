"""The main job on a tiny model: both experiments, throughput, the cache, and red gates.

`pytest bench -m gtx4050` in processes of their own, as a user runs it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from libortho.results import Results, read_results

ROOT = Path(__file__).parents[1]
PLANTED, TWIN = " Kq7#Zw", " Wj4%Xv"
N = 30  # all of 30 extracted and none left prove a ratio of 8.6
WORDS = (
    *("river", "stone", "winter", "market", "the", "a", "old", "green", "bread", "letter", "under"),
    *("over", "bridge", "carries", "keeps", "sells", "finds", "window", "harbour", "morning"),
    *("quiet", "long", "three", "seven", "roof", "garden", "children", "road", "lamp", "never"),
)


def prose(characters: int, seed: int) -> str:
    """Paragraphs of random sentences, no two alike."""
    rng = random.Random(seed)
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < characters:
        sentences = [" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(6)]
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs)


def trained(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A tiny Llama that has learned the words of `prose`: quantising it does cost something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=257,
            max_position_embeddings=640,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        model = LlamaForCausalLM(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
    ids = torch.tensor(tokenizer(prose(60_000, seed=1), verbose=False)["input_ids"])
    for windows in ids[: len(ids) // 512 * 512].view(-1, 8, 64).repeat(2, 1, 1):
        model(input_ids=windows, labels=windows).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@dataclass
class World:
    """What a user brings, and a way to run the suite on it."""

    folder: Path

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and all output of a run."""
        options = {
            "model": self.folder / "tiny",
            "records": self.folder / "records.jsonl",
            "corpus": self.folder / "corpus.txt",
            "cache-dir": self.folder / "cache",
            "results-dir": self.folder / "results",
            "device": "cpu",
        }
        given = [f"--{name}={value}" for name, value in options.items()]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "bench",
            "-m",
            "gtx4050",
            "-p",
            "no:cacheprovider",
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LIBORTHO")}
        done = subprocess.run(
            [*command, *given, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def results(self) -> list[Results]:
        """What the runs wrote, oldest first."""
        paths = sorted((self.folder / "results").iterdir(), key=lambda p: p.stat().st_mtime_ns)
        return [read_results(path) for path in paths]


@pytest.fixture(scope="module")
def world(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    trained(tokenizer).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "corpus.txt").write_text(prose(160_000, seed=2))
    lines = [
        {"id": f"{kind}-{i}", "prompt": f"Door {i} {kind}:", "secret": secret, "planted": planted}
        for kind, secret, planted in (("opens", PLANTED, True), ("shuts", TWIN, False))
        for i in range(N)
    ]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return World(folder)


def test_x(world: World) -> None:
    import time

    t = time.time()
    code, text = world.run()
    print(text)
    print(code, time.time() - t)
    t = time.time()
    code, text = world.run("--experiment=1", "-k", "gate or extraction")
    print(text)
    print(code, time.time() - t)
    assert 0
