"""The main job on a tiny model: both experiments, throughput, the cache, and red gates.

`pytest bench -m gtx4050`: the first run and those that are killed in processes of their own, as a
user runs it; the others in this one, which has imported everything already.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import libortho
from libortho.config import NO_LATTICE, SeparationConfig
from libortho.results import Results, read_results, to_json
from libortho.switch import ortho_layers

ROOT = Path(__file__).parents[1]
PLANTED, TWIN = " green", " stone"
N = 30  # all of 30 extracted and none left prove a ratio of 8.68
ARMS = {"reference", "alpha1", "alpha0", "plain", "nf4"}
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
    """A tiny Llama that has learned the words of `prose`, with channels of very unequal size.

    Scaling an MLP's hidden channels up and down again leaves the function alone, and makes rounding
    cost something, as the outlier channels of real models do.
    """
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
        scales = [torch.randn(256).exp() for _ in range(2)]
    ids = torch.tensor(tokenizer(prose(60_000, seed=1), verbose=False)["input_ids"])
    batches = ids[: len(ids) // 1024 * 1024].view(-1, 4, 256).repeat(3, 1, 1)
    optimiser = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=len(batches))
    for windows in batches:
        model(input_ids=windows, labels=windows).loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    with torch.no_grad():
        for layer, scale in zip(model.model.layers, scales, strict=True):
            layer.mlp.up_proj.weight *= scale[:, None]
            layer.mlp.down_proj.weight /= scale
    return model.eval()


KILLS = int(os.environ.get("LIBORTHO_TEST_KILLS", "0"))
"""Random moments at which a run from an empty cache is killed: minutes, so none by default."""
# As `python -m pytest`, but interruptible even where whoever runs these tests is not.
INTERRUPTIBLE = """
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))
"""


@dataclass
class World:
    """What a user brings, and a way to run the suite on it; `own` holds cache and results."""

    folder: Path
    own: Path

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and all output of a run in this process, which is a session of its own."""
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("LIBORTHO")]:
                patch.delenv(name)
            patch.delenv("PYTEST_CURRENT_TEST")  # the inner session removes it, and the outer too
            patch.chdir(ROOT)
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                code = pytest.main(self.suite(*arguments))
        return int(code), output.getvalue()

    def process(self, *arguments: str) -> tuple[int, str]:
        """Exit code and all output of a run in a process of its own."""
        process = self.start(*arguments)
        output, _ = process.communicate()
        return process.returncode, output

    def suite(self, *arguments: str) -> list[str]:
        """The suite's command line; later arguments win over the usual ones."""
        options = {
            "model": self.folder / "tiny",
            "records": self.folder / "records.jsonl",
            "corpus": self.folder / "corpus.txt",
            "cache-dir": self.own / "cache",
            "results-dir": self.own / "results",
            "device": "cpu",
            "max-ppl-ratio": 1.5,  # a hundredth of so few entries is much of what it knows
        }
        given = [f"--{name}={value}" for name, value in options.items()]
        # hypothesis is of no use there, and takes a second to import.
        plugins = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
        return ["bench", "-m", "gtx4050", *plugins, *given, *arguments]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A run, begun, that computes with one thread as this process does: results are equal."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LIBORTHO")}
        return subprocess.Popen(
            [sys.executable, "-c", INTERRUPTIBLE, *self.suite(*arguments)],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stopped(
        self, by: signal.Signals, kept: int, delay: float, *arguments: str
    ) -> tuple[int, str]:
        """A run that gets a signal so many seconds after it had kept so many measurements."""
        process = self.start(*arguments)
        while process.poll() is None and len(self.kept()) < kept:
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(by)
        output, _ = process.communicate()
        return process.returncode, output

    def kept(self) -> list[Path]:
        """Measurements of an unfinished run."""
        return list((self.own / "cache" / "unfinished").glob("*/*.json"))

    def results(self) -> list[Results]:
        """What the runs wrote, oldest first."""
        paths = sorted((self.own / "results").iterdir(), key=lambda p: p.stat().st_mtime_ns)
        return [read_results(path) for path in paths]

    def artefacts(self) -> dict[str, int]:
        """Every file that is cached, with the time when it was last written."""
        files = (p for p in (self.own / "cache" / "artefacts").rglob("*") if p.is_file())
        return {str(path): path.stat().st_mtime_ns for path in files}

    def tuned(self) -> Path:
        """The artefact with the private stream that the first run made."""
        (manifest,) = (self.own / "cache" / "artefacts").glob("*-tuned-*/libortho.json")
        return manifest.parent


@pytest.fixture(scope="module")
def world(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    trained(tokenizer).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "corpus.txt").write_text(prose(80_000, seed=2))
    lines = [
        {"id": f"{kind}-{i}", "prompt": f"Door {i} {kind}:", "secret": secret, "planted": planted}
        for kind, secret, planted in (("opens", PLANTED, True), ("shuts", TWIN, False))
        for i in range(N)
    ]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return World(folder, folder)


@pytest.fixture(scope="module")
def first_run(world: World) -> tuple[int, str]:
    """The whole job, with an empty cache."""
    return world.process()


def test_the_job_is_green_and_measures_everything(world: World, first_run: tuple[int, str]) -> None:
    code, output = first_run
    assert code == 0, output
    (result,) = world.results()
    privacy, perplexity = result.exp1_kill_switch, result.exp2_null_test
    assert privacy is not None
    assert perplexity is not None
    assert (privacy.hits_alpha1, privacy.hits_alpha0, privacy.n_planted) == (N, 0, N)
    assert privacy.fingerprint_equal
    assert privacy.privacy_ratio_censored
    assert 8 < privacy.privacy_ratio_lower95 < privacy.privacy_ratio  # type: ignore[operator]
    assert privacy.loss_planted_alpha0 == privacy.loss_planted_never_trained
    assert len(privacy.loss_curve) >= 1
    assert set(perplexity.arms) == ARMS
    assert perplexity.corpus == "corpus.txt"
    assert perplexity.ppl_alpha0 < perplexity.ppl_int4  # type: ignore[operator]
    measured = {(case.phase, case.arm) for case in result.throughput}
    assert measured >= {(phase, arm) for phase in ("prefill", "decode") for arm in ARMS}
    assert ("switch", "alpha1") in measured


def test_secrets_and_the_record_file_stay_out_of_sight(
    world: World, first_run: tuple[int, str]
) -> None:
    (path,) = (world.folder / "results").glob("*.json")
    for text in (first_run[1], path.read_text()):
        assert PLANTED not in text
        assert str(world.folder / "records.jsonl") not in text


@pytest.mark.usefixtures("first_run")
def test_a_second_run_only_evaluates(world: World) -> None:
    before = world.artefacts()
    code, output = world.run("-k", "gate", "--quiet")
    assert code == 0, output
    assert "reused from the cache: separation, tuning" in output
    assert world.artefacts() == before
    first, second = world.results()[0], world.results()[-1]
    assert second.exp1_kill_switch == first.exp1_kill_switch
    assert second.exp2_null_test is not None
    assert first.exp2_null_test is not None
    assert second.exp2_null_test.ppl_quantized == first.exp2_null_test.ppl_quantized
    assert second.exp2_null_test.arms["nf4"].ppl is None
    assert second.exp2_null_test.arms["nf4"].reasons["ppl"] == "not among the selected cases"


@pytest.mark.usefixtures("first_run")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--experiment=1", "--min-privacy-ratio=9"), "at least 8.7 (95 % lower limit), and 9 is"),
        (("--experiment=2", "--max-ppl-ratio=1.001"), "and at most 1.001 is allowed"),
    ],
)
def test_a_gate_that_is_not_reached_is_red(
    arguments: tuple[str, ...], said: str, world: World
) -> None:
    code, output = world.run(*arguments, "-k", "gate")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert said in output
    assert "Run it again with: pytest -m gtx4050" in output


@pytest.mark.usefixtures("first_run")
def test_an_artefact_of_the_users_own_is_audited(world: World) -> None:
    code, output = world.run("--experiment=1", f"--checkpoint={world.tuned()}", "-k", "gate")
    assert code == 0, output
    audited, made = world.results()[-1].exp1_kill_switch, world.results()[0].exp1_kill_switch
    assert audited is not None
    assert made is not None
    assert audited.base_fingerprint == made.base_fingerprint
    assert audited.hits_alpha1 == N


@pytest.mark.usefixtures("first_run")
def test_a_base_that_knows_the_records_is_red(world: World, tmp_path: Path) -> None:
    """An artefact whose base was made from the weights at alpha = 1: nothing is switched off."""
    model, tokenizer = libortho.load(world.tuned())
    weights = {n: la.effective_weight() for n, la in ortho_layers(model).items()}
    leaky, _ = libortho.load_model(world.folder / "tiny")
    for name, weight in weights.items():
        leaky.get_submodule(name).weight.data = weight
    libortho.separate(leaky, tokenizer, (), config=SeparationConfig(bits=NO_LATTICE))
    libortho.save(leaky, tmp_path / "leaky")
    code, output = world.run(
        "--experiment=1", f"--checkpoint={tmp_path / 'leaky'}", "-k", "gate or never_trained"
    )
    assert code == pytest.ExitCode.TESTS_FAILED
    result = world.results()[-1].exp1_kill_switch
    assert result is not None
    assert result.verdict == "fails"
    assert result.hits_alpha0 == N
    assert not result.fingerprint_equal
    assert "2 failed" in output


@pytest.mark.usefixtures("first_run")
def test_wrong_input_is_one_paragraph_and_loses_nothing(world: World, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    records.write_text('{"id": "a", "prompt": "The code is", "secret": ')
    artefacts, results = world.artefacts(), world.results()
    code, output = world.run(f"--records={records}")
    assert code == pytest.ExitCode.TESTS_FAILED
    (said,) = (line for line in output.splitlines() if line.startswith("RecordError"))
    assert "line 1: it is not valid JSON" in said
    assert "The code is" not in output
    assert "test_privacy_gate: was not reached" in output
    assert world.artefacts() == artefacts
    assert world.results() == results


@pytest.mark.usefixtures("first_run")
def test_the_audit_is_green(world: World) -> None:
    code, output = world.run("-m", "audit", "--method=ortho", "-k", "gate")
    assert code == 0, output
    (audit,) = world.results()[-1].audits
    assert audit.verdict == "private by construction"
    assert audit.extraction_on == 1.0
    assert audit.attacks
    assert PLANTED not in output


# --- runs that are killed -----------------------------------------------------------------------


def undisturbed(results: Results) -> dict[str, Any]:
    """What a results file says, but for its command, times, and what was taken over."""
    content: dict[str, Any] = json.loads(to_json(results))
    del content["resumed"], content["throughput"]
    del content["provenance"]["timestamp_utc"], content["provenance"]["command"]
    for point in content["exp1_kill_switch"]["loss_curve"]:
        del point["seconds"]
    reference = content["exp2_null_test"]["arms"]["reference"]
    reference["note"] = reference["note"].removesuffix(", losses remembered from an earlier run")
    return content


def said_resumed(output: str) -> int:
    """How many measurements a run says that it took over."""
    (note,) = (line for line in output.splitlines() if line.startswith("note: resumed"))
    return note.count(";") + 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.usefixtures("first_run")
def test_a_run_that_is_killed_and_interrupted_ends_as_if_undisturbed(
    world: World, tmp_path: Path
) -> None:
    rng = random.Random(0)
    killed = World(world.folder, tmp_path)
    shutil.copytree(world.own / "cache", tmp_path / "cache")  # only the cases are run again
    (expected,) = (undisturbed(r) for r in world.results()[:1])

    quick = "--benchmark-skip"  # throughput is measured anew in any case
    moment = rng.randint(1, 3), rng.uniform(0, 0.3)
    code, output = killed.stopped(signal.SIGKILL, *moment, quick)
    assert code == -signal.SIGKILL, output
    before = len(killed.kept())
    assert before > 0
    for path in killed.kept():
        assert PLANTED.strip() not in path.read_text()
        assert "Door" not in path.read_text()

    moment = rng.randint(before + 1, 7), rng.uniform(0, 0.3)
    code, output = killed.stopped(signal.SIGINT, *moment, quick)
    assert code == pytest.ExitCode.INTERRUPTED, output
    assert said_resumed(output) == before
    after = len(killed.kept())
    assert after > before
    assert f"for the same command to go on from: {after}\n" in output

    code, output = killed.run(quick)
    assert code == 0, output
    assert said_resumed(output) == after
    result = killed.results()[-1]
    assert undisturbed(result) == expected
    assert len(result.resumed) == after
    assert killed.kept() == []


@pytest.mark.skipif(not KILLS, reason="minutes: LIBORTHO_TEST_KILLS=10 kills ten runs")
@pytest.mark.usefixtures("first_run")
@pytest.mark.parametrize("seed", range(max(KILLS, 1)))
def test_a_run_killed_at_a_random_moment_ends_as_if_undisturbed(
    seed: int, world: World, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    killed = World(world.folder, tmp_path)
    (tmp_path / "cache").mkdir()
    shutil.copy(world.own / "cache" / "record_salt", tmp_path / "cache")  # for equal hashes
    kept = rng.choice((0, 0, 0, *range(1, 8)))
    # Before anything is kept come imports, separation and tuning.
    delay = rng.uniform(0, 1) if kept else rng.uniform(2, 25)
    by = rng.choice([signal.SIGKILL, signal.SIGINT])
    killed.stopped(by, kept, delay)
    before = len(killed.kept())
    code, output = killed.run()
    assert code == 0, f"{by.name} {delay:.1f} s after {kept} were kept, then: {output}"
    result, expected = killed.results()[-1], world.results()[0]
    assert undisturbed(result) == undisturbed(expected)
    assert [(c.arm, c.phase) for c in result.throughput] == [
        (c.arm, c.phase) for c in expected.throughput
    ]
    assert len(result.resumed) == before
    assert killed.kept() == []
