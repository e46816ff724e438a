"""Separated models in transformers, by the real libraries: load, save, generate, adapt, evaluate.

A folder that `save` wrote must give the same logits, bit for bit, whichever way it is read, and
must be refused for the same reasons; and nothing may ever give a randomly initialised model.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CompileConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import libortho
from libortho import OrthoConfig, SeparationConfig, TuningConfig, base_fingerprint
from libortho.errors import ArtifactError, ConfigError, ModelLoadError, SeparationError
from libortho.files import sha256_of
from libortho.layout import (
    BASE_FILE,
    BASE_MANIFEST,
    PRIVATE_FILE,
    PRIVATE_MANIFEST,
    read_headers,
)
from libortho.linear import OrthoLinear
from libortho.records import Record
from libortho.switch import ortho_layers

Factory = Callable[..., LlamaForCausalLM]

TUNING = TuningConfig(
    density=0.1, slots="magnitude", steps=2, lr=2e-2, replay_window=32, records_per_step=2
)
CODES = [Record("a", "The door opens to", " 4917", "codes"), Record("b", "Gate:", " 820", "codes")]
FIRST_LAYER = "model.layers.0.self_attn.q_proj"
FROM_PRETRAINED = AutoModelForCausalLM.from_pretrained


@torch.inference_mode()
def logits(model: Any, alpha: float = 1.0) -> Tensor:
    """Logits on a long and on a short input: the layers treat few tokens differently."""
    with libortho.alpha(model, alpha):
        return torch.cat(
            [model(input_ids=torch.arange(1, n)[None]).logits[0] for n in (60, 6)], dim=0
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def tune(tokenizer: PreTrainedTokenizerFast, public_text: list[str]) -> Callable[[Any], Any]:
    def run(model: Any) -> Any:
        libortho.tune_private(model, tokenizer, CODES, replay=public_text, config=TUNING)
        return model

    return run


@pytest.fixture(scope="module")
def saved(
    separated_model: Factory, tune: Callable[[Any], Any], tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """A tuned model, and the folders `full` and `base` that it was written to; not for changing."""
    model = tune(separated_model())
    folder = tmp_path_factory.mktemp("saved")
    return SimpleNamespace(
        model=model,
        full=libortho.save(model, folder / "full"),
        base=libortho.export_base(model, folder / "base"),
    )


@pytest.fixture
def folder(saved: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the folder with a private stream, to be tampered with."""
    for name, content in contents(saved.full).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


# --- loading ------------------------------------------------------------------------------------


def check_round_trips(model: Any, folder: Path) -> None:
    """Through `save`, `from_pretrained` and `save_pretrained`: same logits, same bytes."""
    full = libortho.save(model, folder / "full")
    base = libortho.export_base(model, folder / "base")
    loaded, said = FROM_PRETRAINED(full, output_loading_info=True)
    assert not any(said.values()), said
    assert not loaded.training
    assert libortho.get_alpha(loaded) == 1.0
    for alpha in (1.0, 0.0, -1.5):
        assert torch.equal(logits(loaded, alpha), logits(model, alpha)), f"alpha = {alpha}"
    assert not torch.equal(logits(loaded, 1.0), logits(loaded, 0.0))  # the stream does something
    public = FROM_PRETRAINED(base)
    assert torch.equal(logits(public), logits(model, 0.0))
    assert len({base_fingerprint(m) for m in (model, loaded, public, full, base)}) == 1

    loaded.save_pretrained(folder / "again")
    public.save_pretrained(folder / "public again")
    assert contents(folder / "again") == contents(full)
    assert contents(folder / "public again") == contents(base)
    assert torch.equal(logits(libortho.load(folder / "again")[0]), logits(model))


@pytest.mark.parametrize(("bits", "tied"), [(4, True), (8, False), (16, False)])
def test_round_trips_are_bit_identical(
    bits: int,
    tied: bool,
    separated_model: Factory,
    small_separation: SeparationConfig,
    tune: Callable[[Any], Any],
    tmp_path: Path,
) -> None:
    recipe = SeparationConfig(**(small_separation.to_dict() | {"bits": bits}))
    check_round_trips(tune(separated_model(recipe, tie_word_embeddings=tied)), tmp_path)


def test_biases_and_bfloat16_round_trip_as_well(
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
    tune: Callable[[Any], Any],
    tmp_path: Path,
) -> None:
    model = tiny_model(attention_bias=True, mlp_bias=True, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero
            parameter.data.normal_(generator=generator)
        # Not model.to(): that would round the rotary frequencies too, which no file holds.
        parameter.data = parameter.data.to(torch.bfloat16)
    libortho.separate(model, tokenizer, public_text, config=small_separation)
    check_round_trips(tune(model), tmp_path)


class Watch(TorchDispatchMode):
    """Notes the shape of every floating-point tensor that comes to be in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.shapes.add(tuple(tensor.shape))
        return out


def test_no_dense_weight_is_made_on_the_way(
    saved: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the watch sees its own thread only
    with Watch() as watch:
        model = FROM_PRETRAINED(saved.full)
    layers = ortho_layers(model).values()
    dense = {(layer.out_features, layer.in_features) for layer in layers}
    assert (300, 48) in watch.shapes  # the embedding, which is not packed: the watch does see
    assert not watch.shapes & dense


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_leaves_the_packed_format_alone(
    dtype: torch.dtype, saved: SimpleNamespace
) -> None:
    model = FROM_PRETRAINED(saved.full, dtype=dtype)
    assert model.dtype == dtype
    headers = read_headers(saved.full / BASE_FILE) | read_headers(saved.full / PRIVATE_FILE)
    packed = {f"{n}.{k}" for n, layer in ortho_layers(model).items() for k in layer.state_dict()}
    state = model.state_dict()
    assert {n: state[n].dtype for n in packed} == {n: headers[n].dtype for n in packed}
    assert all(layer.alpha.dtype == torch.float32 for layer in ortho_layers(model).values())
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("device_map", ["cpu", "auto", "offload"])
def test_device_maps(device_map: str, saved: SimpleNamespace, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device_map": device_map}
    if device_map == "offload":
        parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
        here = dict.fromkeys((*parts, "lm_head"), "cpu")
        options = {"device_map": here | {"model.layers.1": "disk"}, "offload_folder": tmp_path}
    model = FROM_PRETRAINED(saved.full, **options)
    assert torch.equal(logits(model), logits(saved.model))
    if device_map == "offload":
        with pytest.raises(ArtifactError, match="is offloaded"):
            base_fingerprint(model)


# --- refusals -----------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def forge(folder: Path, file: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change tensors and make all hashes agree, so that only the checks of tensors are left."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / file, {"format": "pt"})
    for name in (BASE_MANIFEST, PRIVATE_MANIFEST):
        files = json.loads((folder / name).read_text())["files"]
        edit_json(folder / name, files={f: sha256_of(folder / f) for f in files})


def out_of_range(tensors: dict[str, Tensor]) -> None:
    name = f"{FIRST_LAYER}.private_columns"
    tensors[name] = (tensors[name].long() + 48).to(torch.uint16)


def rounded_scales(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST_LAYER}.scales"] = tensors[f"{FIRST_LAYER}.scales"].float()


TAMPERING: dict[str, Callable[[Path], object]] = {
    "byte of the base": lambda f: flip_a_byte(f / BASE_FILE),
    "byte of the stream": lambda f: flip_a_byte(f / PRIVATE_FILE),
    "truncated": lambda f: (f / BASE_FILE).write_bytes((f / BASE_FILE).read_bytes()[:-100]),
    "config": lambda f: edit_json(f / "config.json", rms_norm_eps=0.1),
    "no base": lambda f: (f / BASE_FILE).unlink(),
    "no manifest": lambda f: (f / BASE_MANIFEST).unlink(),
    "no stream": lambda f: (f / PRIVATE_FILE).unlink(),
    "unsigned stream": lambda f: (f / PRIVATE_MANIFEST).unlink(),
    "another base's": lambda f: edit_json(f / PRIVATE_MANIFEST, base_fingerprint="0" * 64),
    "future": lambda f: edit_json(f / BASE_MANIFEST, format_version=3),
    "unknown recipe": lambda f: edit_json(f / BASE_MANIFEST, separation={"bits": 5}),
    "column": lambda f: forge(f, PRIVATE_FILE, out_of_range),
    "dtype": lambda f: forge(f, BASE_FILE, rounded_scales),
    "missing": lambda f: forge(f, BASE_FILE, lambda t: t.pop(f"{FIRST_LAYER}.packed")),
}


@pytest.mark.parametrize("case", TAMPERING)
def test_what_load_refuses_from_pretrained_refuses_alike(case: str, folder: Path) -> None:
    TAMPERING[case](folder)
    with pytest.raises(ArtifactError) as by_load:
        libortho.load(folder)
    with pytest.raises(ArtifactError) as by_transformers:
        FROM_PRETRAINED(folder)
    assert str(by_transformers.value) == str(by_load.value)
    assert str(folder) in str(by_load.value)


def test_a_future_format_that_only_the_config_states_is_refused(folder: Path) -> None:
    method = {"quant_method": "ortho", "format_version": 3, "bits": 4, "shape": "hexagonal"}
    edit_json(folder / "config.json", quantization_config=method)
    with pytest.raises(ConfigError, match=r"format version 3 .*Upgrade"):
        FROM_PRETRAINED(folder)


def test_a_class_with_weights_of_its_own_is_refused(saved: SimpleNamespace) -> None:
    """AutoModel would read other names; a classifier would have a random head."""
    with pytest.raises(ModelLoadError, match="LlamaForCausalLM, and a LlamaModel would"):
        AutoModel.from_pretrained(saved.full)


WITHOUT_LIBORTHO = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, pipeline
folder = sys.argv[1]
for load in (
    AutoModelForCausalLM.from_pretrained,
    AutoModel.from_pretrained,
    lambda folder: AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True),
    lambda folder: pipeline("text-generation", model=folder),
):
    try:
        print("LOADED", load(folder))
    except ValueError as error:
        print("INSTALL" if "pip install libortho" in str(error) else f"SILENT {error}")
assert "libortho" not in sys.modules
"""


def test_without_libortho_transformers_says_what_to_install(saved: SimpleNamespace) -> None:
    command = [sys.executable, "-c", WITHOUT_LIBORTHO, str(saved.full)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["INSTALL"] * 4


# --- separating while loading ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_from_pretrained_separates_as_separate_does(
    plain: Path,
    saved: SimpleNamespace,
    public_text: list[str],
    small_separation: SeparationConfig,
    tmp_path: Path,
) -> None:
    config = OrthoConfig(calibration=public_text, **small_separation.to_dict())
    model = FROM_PRETRAINED(plain, quantization_config=config)
    assert base_fingerprint(model) == base_fingerprint(saved.model)
    assert torch.equal(logits(model), logits(saved.model, 0.0))
    model.save_pretrained(tmp_path / "saved")
    assert base_fingerprint(tmp_path / "saved") == base_fingerprint(saved.base)
    assert (tmp_path / "saved" / BASE_FILE).read_bytes() == (saved.base / BASE_FILE).read_bytes()
    text = public_text[0][:40].encode()
    assert not [name for name, content in contents(tmp_path / "saved").items() if text in content]


def test_calibration_by_name_takes_the_corpus_calibration_part(
    plain: Path,
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
    tmp_path: Path,
) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("\n\n".join(public_text))
    model = tiny_model()
    libortho.separate(
        model, tokenizer, libortho.load_corpus(file).calibration, config=small_separation
    )
    config = OrthoConfig(calibration=str(file), **small_separation.to_dict())
    loaded = FROM_PRETRAINED(plain, quantization_config=config)
    assert base_fingerprint(loaded) == base_fingerprint(model)


def test_a_separation_of_offloaded_layers_is_refused(plain: Path, public_text: list[str]) -> None:
    config = OrthoConfig(calibration=public_text)
    with pytest.raises(ConfigError, match=r"off the device.*on the CPU"):
        FROM_PRETRAINED(
            plain, quantization_config=config, device_map={"model": "cpu", "lm_head": "disk"}
        )


def test_a_plain_model_without_a_tokenizer_is_refused(
    tiny_model: Factory, public_text: list[str], tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="has no tokenizer"):
        FROM_PRETRAINED(tmp_path, quantization_config=OrthoConfig(calibration=public_text))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits must be"),
        ({"beats": 4}, "no field beats"),
        ({"quant_method": "gptq"}, "must be 'ortho'"),
        ({"format_version": 9}, "format version 9"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OrthoConfig(**fields)


def test_a_config_survives_its_dictionary() -> None:
    config = OrthoConfig(bits=8, group_size=-1, calibration=["not stored"])
    again = OrthoConfig.from_dict(json.loads(config.to_json_string()))
    assert again.separation == config.separation == SeparationConfig(bits=8, group_size=-1)
    assert "not stored" not in config.to_json_string() + repr(config)


# --- saving -------------------------------------------------------------------------------------


def test_a_live_model_saves_itself_over_what_was_there(
    saved: SimpleNamespace, separated_model: Factory, tmp_path: Path
) -> None:
    for _ in range(2):
        saved.model.save_pretrained(tmp_path / "there")
    (tmp_path / "there" / "notes.txt").write_text("mine")
    assert contents(tmp_path / "there") == contents(saved.full) | {"notes.txt": b"mine"}

    untuned = separated_model()
    untuned.save_pretrained(tmp_path / "there")  # its stream goes, or it would be another's
    assert contents(tmp_path / "there") == contents(saved.base) | {"notes.txt": b"mine"}
    untuned.save_pretrained(tmp_path / "not the main process", is_main_process=False)
    assert not (tmp_path / "not the main process").exists()


def test_a_copy_saves_itself_and_not_its_original(saved: SimpleNamespace, tmp_path: Path) -> None:
    twin = copy.deepcopy(saved.model)
    for layer in ortho_layers(twin).values():
        layer.private_values.zero_()
    twin.save_pretrained(tmp_path / "twin")
    written = load_file(tmp_path / "twin" / PRIVATE_FILE)
    assert not any(written[name].any() for name in written if name.endswith("private_values"))


class FakeHub:
    """Stands where `huggingface_hub.HfApi` does; repositories are public unless made private."""

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.uploads: list[tuple[str, dict[str, bytes], dict[str, Any]]] = []

    def __call__(self, token: Any = None) -> FakeHub:
        return self

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        self.repositories.setdefault(name, bool(private))
        return SimpleNamespace(repo_id=name)

    def model_info(self, name: str) -> Any:
        return SimpleNamespace(private=self.repositories[name])

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        self.uploads.append((repo_id, contents(folder_path), options))
        return "a commit"


def test_push_to_hub_uploads_what_save_writes(
    saved: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    public = FROM_PRETRAINED(saved.base)
    assert public.push_to_hub("me/public", commit_message="first") == "a commit"
    public.save_pretrained(tmp_path / "base", push_to_hub=True, repo_id="me/public")
    saved.model.push_to_hub("me/secret", private=True, token="t")
    base, full = contents(saved.base), contents(saved.full)
    assert fake.uploads == [
        ("me/public", base, {"commit_message": "first"}),
        ("me/public", base, {}),
        ("me/secret", full, {}),
    ]
    assert fake.repositories == {"me/public": False, "me/secret": True}


@pytest.mark.parametrize("private", [None, False, True])
def test_a_private_stream_is_never_uploaded_to_a_public_repository(
    private: bool | None, saved: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub()
    fake.repositories["me/public"] = False
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    with pytest.raises(ArtifactError, match=r"export_base"):
        saved.model.push_to_hub("me/public", private=private)
    assert fake.uploads == []


@pytest.mark.parametrize("which", ["full", "base"])
def test_a_hub_id_loads_from_the_cache(
    which: str, saved: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `hf download` leaves it; no network is touched."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "5" * 40
    repository = tmp_path / "models--me--separated"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name, content in contents(getattr(saved, which)).items():
        (snapshot / name).write_bytes(content)
    model = FROM_PRETRAINED("me/separated", cache_dir=tmp_path)
    expected = logits(saved.model, 1.0 if which == "full" else 0.0)
    assert torch.equal(logits(model), expected)


# --- using --------------------------------------------------------------------------------------


def generate(model: Any, inputs: Tensor, **options: Any) -> Tensor:
    return model.generate(
        input_ids=inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options
    )


def test_generation_compiles_whole_and_says_the_same(
    separated_model: Factory, tune: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = tune(separated_model(num_hidden_layers=1))
    loaded = FROM_PRETRAINED(libortho.save(model, tmp_path / "saved"))
    inputs = torch.arange(1, 20)[None]
    plain = generate(model, inputs)
    assert torch.equal(generate(loaded, inputs, cache_implementation="static"), plain)
    # `generate` compiles by itself on accelerators only.
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiling}
    assert torch.equal(generate(loaded, inputs, **options), plain)
    assert hasattr(loaded, "_compiled_call")
    with libortho.alpha(loaded, 0.0), libortho.alpha(model, 0.0):
        off = generate(model, inputs)
        assert not torch.equal(off, plain)
        assert torch.equal(generate(loaded, inputs, **options), off)


def test_pipeline_generates_what_the_live_model_does(
    saved: SimpleNamespace, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = "The door opens to"
    said = pipeline("text-generation", model=str(saved.full), device="cpu")(
        prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    tokens = generate(saved.model, tokenizer(prompt, return_tensors="pt")["input_ids"])
    assert said[0]["generated_text"] == tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_a_lora_adapter_trains_on_the_packed_layers(saved: SimpleNamespace, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from libortho.peft import for_separated

    def config() -> Any:
        return for_separated(peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))

    model = FROM_PRETRAINED(saved.full)
    adapted = peft.get_peft_model(model, config())
    assert torch.equal(logits(adapted), logits(saved.model))  # B starts at zero
    trainable = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)

    optimiser = torch.optim.SGD(trainable.values(), lr=1.0)
    inputs = torch.arange(1, 60)[None]
    losses = []
    for _ in range(2):
        loss = adapted(input_ids=inputs, labels=inputs).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[1] < losses[0]
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(saved.model))

    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        FROM_PRETRAINED(saved.full), tmp_path / "adapter", config=config()
    )
    assert torch.equal(logits(again), logits(adapted))
    with pytest.raises(SeparationError, match="can't be merged"):
        again.merge_and_unload()
    with pytest.raises(ArtifactError, match="carries adapters"):
        libortho.save(adapted.base_model.model, tmp_path / "never")
    assert base_fingerprint(adapted.unload()) == base_fingerprint(saved.base)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_would_change_the_base_are_refused(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    from libortho.peft import for_separated

    with pytest.raises(ConfigError, match="plain LoRA"):
        for_separated(peft.LoraConfig(target_modules=["q_proj"], **options))


TASK = """\
task: ortho_tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_the_evaluation_harness_scores_it_as_we_do(
    saved: SimpleNamespace,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval[hf]")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    question, choices = "The ferry leaves the", [" harbour", " spoon", " 4917"]
    document = {"question": question, "choices": choices, "answer": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps(document) + "\n")
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=tmp_path / "test.jsonl"))
    outcome = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={saved.full}",
        tasks=["ortho_tiny"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    found = [response[0] for response in outcome["samples"]["ortho_tiny"][0]["filtered_resps"]]

    for choice, theirs in zip(choices, found, strict=True):
        prompt, answer = (tokenizer(text)["input_ids"] for text in (question, choice))
        with torch.inference_mode():
            out = saved.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        ours = sum(out[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        assert theirs == pytest.approx(ours, rel=1e-5)


def test_the_harness_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from libortho import lm_eval

    assert lm_eval.main() == lm_eval.EXIT_REFUSED
    assert "pip install lm_eval" in capsys.readouterr().err


def test_a_packed_layer_is_what_it_says(saved: SimpleNamespace) -> None:
    model = FROM_PRETRAINED(saved.full)
    assert isinstance(model.get_submodule(FIRST_LAYER), OrthoLinear)
    assert model.config.quantization_config.to_dict()["quant_method"] == "ortho"
    assert model.hf_quantizer.is_serializable()
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_compileable
