"""`generate` on captured steps: on a CPU a "graph" runs the same forward on the same memory."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import CompileConfig, GenerationConfig

import libortho
from libortho import decoding
from libortho.decoding import accelerate_decoding, restore_decoding
from libortho.errors import ConfigError
from libortho.greedy import GreedyLoop, is_greedy
from libortho.linear import OrthoLinear
from tests.test_fusion import private_of

PROMPT = torch.tensor([[7, 3, 200, 41, 9]])
Model = Any


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replays forwards on a CPU as a graph would: same tensors in, same tensors out, no Python
    arguments of later calls; one element a capture."""
    made: list[int] = []

    def capture(forward: Callable[[], Any], rewind: Callable[[], None]) -> Any:
        made.append(1)
        result = forward()
        rewind()

        def replay() -> None:
            for old, new in zip(
                pytree.tree_leaves(dict(result)), pytree.tree_leaves(dict(forward())), strict=True
            ):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return replay, result

    monkeypatch.setattr(decoding, "capture", capture)
    return made


def generate(model: Model, prompt: torch.Tensor = PROMPT, **options: Any) -> torch.Tensor:
    """`generate` as it is on a card: a static cache, and steps by the compiled call."""
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": everywhere}
    return model.generate(
        prompt,
        **({"max_new_tokens": 12, "do_sample": False, "eos_token_id": None} | static | options),
    )


def plainly(model: Model, prompt: torch.Tensor = PROMPT, **options: Any) -> torch.Tensor:
    return type(model).generate(
        model,
        prompt,
        **({"max_new_tokens": 12, "do_sample": False, "eos_token_id": None} | options),
    )


def loop(model: Model) -> GreedyLoop:
    return GreedyLoop(model.get_compiled_call.__self__)


def test_what_a_graph_reads_lives_as_long_as_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows addresses only: a tensor that nothing else holds would be given away."""
    replayed: list[int] = []
    graph = SimpleNamespace(replay=lambda: replayed.append(1))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda given: nullcontext(),
        "CUDAGraph": lambda: graph,
        "graph": lambda *_, **__: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def captured() -> tuple[Callable[[], None], weakref.ref[torch.Tensor]]:
        read = torch.arange(3)
        replay, result = decoding.capture(lambda: read + 1, lambda: None)
        assert result.tolist() == [1, 2, 3]
        return replay, weakref.ref(read)

    replay, read = captured()
    gc.collect()
    replay()
    assert replayed == [1]
    assert read() is not None
    del replay
    gc.collect()
    assert read() is None


@pytest.mark.parametrize("end", [None, [11, 250]])
def test_the_greedy_loop_decodes_what_transformers_does(
    end: list[int] | None, captures: list[int], tiny_model: Callable[..., Model]
) -> None:
    model = tiny_model()
    prompt = torch.tensor([[0, 0, 5, 6], [9, 8, 7, 6]])
    options: dict[str, Any] = {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
    whole = plainly(model, prompt, **options)
    if end is not None:  # the first sequence ends before the other
        options["eos_token_id"] = [int(whole[0, 7]), int(whole[1, 11])]
    expected = plainly(model, prompt, **options)
    accelerate_decoding(model)
    for _ in range(2):
        made = generate(model, prompt, custom_generate=loop(model), **options)
        assert made.tolist() == expected.tolist()
    assert len(captures) == 2  # the forward, and the choice after it
    assert generate(model, prompt, **options).tolist() == expected.tolist()
    one = generate(model, prompt, custom_generate=loop(model), **(options | {"max_new_tokens": 1}))
    assert one.tolist() == whole[:, :5].tolist()


def test_the_greedy_loop_uses_its_cache_again(
    captures: list[int], tiny_model: Callable[..., Model]
) -> None:
    model = tiny_model()
    accelerate_decoding(model)
    one = loop(model)
    prompts = [PROMPT, PROMPT.flip(1), PROMPT[:, :3], PROMPT.repeat(2, 1)]
    expected = [plainly(model, prompt, max_new_tokens=20 - len(prompt[0])) for prompt in prompts]
    caches = []
    for prompt, tokens in zip(prompts, expected, strict=True):
        new = 20 - len(prompt[0])
        made = generate(model, prompt, max_new_tokens=new, custom_generate=one)
        assert made.tolist() == tokens.tolist()
        caches.append(one._cache)
    assert caches[0] is caches[1] is caches[2]
    assert caches[3] is not caches[0]  # of two sequences


def test_the_greedy_loop_leaves_the_rest_to_transformers(
    captures: list[int], separated_model: Callable[..., Model]
) -> None:
    model = private_of(separated_model())
    options = {"repetition_penalty": 1.7, "max_new_tokens": 9}
    expected = plainly(model, **options)
    accelerate_decoding(model)
    assert generate(model, custom_generate=loop(model), **options).tolist() == expected.tolist()
    assert len(captures) == 1
    for given, greedy in (
        ({}, True),
        ({"do_sample": True}, False),
        ({"num_beams": 2}, False),
        ({"return_dict_in_generate": True}, False),
        ({"streamer": object()}, False),
        ({"generation_config": GenerationConfig(do_sample=True)}, False),
    ):
        assert is_greedy(model, given) is greedy, given


def test_the_greedy_loop_runs_uncaptured_too(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Model]
) -> None:
    def capture(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "capture", capture)
    model = tiny_model()
    expected = plainly(model)
    accelerate_decoding(model)
    assert generate(model, custom_generate=loop(model)).tolist() == expected.tolist()


@pytest.mark.parametrize("separated", [True, False])
def test_captured_steps_decode_what_plain_ones_do(
    separated: bool,
    captures: list[int],
    separated_model: Callable[..., Model],
    tiny_model: Callable[..., Model],
) -> None:
    model = private_of(separated_model()) if separated else tiny_model()
    expected = plainly(model)
    assert accelerate_decoding(model) is model
    for _ in range(2):
        assert generate(model).tolist() == expected.tolist()
    assert len(captures) == 1  # the second call's cache was moved to where the first one's was
    other = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert generate(model, other, max_new_tokens=10).tolist() == (
        plainly(model, other, max_new_tokens=10).tolist()
    )
    assert len(captures) == 1


def test_batches_with_padding_and_sampling(
    captures: list[int], tiny_model: Callable[..., Model]
) -> None:
    model = tiny_model()
    prompt = torch.tensor([[0, 0, 5, 6], [9, 8, 7, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"attention_mask": mask, "do_sample": True, "top_k": 5}
    torch.manual_seed(3)
    expected = plainly(model, prompt, **options)
    accelerate_decoding(model)
    torch.manual_seed(3)
    assert generate(model, prompt, **options).tolist() == expected.tolist()
    assert captures


def test_alpha_changes_the_very_next_token_under_a_captured_step(
    captures: list[int], separated_model: Callable[..., Model]
) -> None:
    model = private_of(separated_model())
    for module in model.modules():
        if isinstance(module, OrthoLinear):
            module.private_values.mul_(3)
    on, off = plainly(model), None
    with libortho.alpha(model, 0.0):
        off = plainly(model)
    assert on[0, 5] != off[0, 5]

    class Switch:
        """Sets alpha to 0 once so many tokens are there."""

        def __init__(self, at: int) -> None:
            self.at = at

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            libortho.set_alpha(model, 0.0 if ids.shape[1] >= self.at else 1.0)
            return scores

    def switched(run: Callable[..., torch.Tensor]) -> list[int]:
        libortho.set_alpha(model, 1.0)
        return run(model, logits_processor=[Switch(9)]).tolist()[0]

    expected = switched(plainly)
    assert expected[:10] == on.tolist()[0][:10]
    assert expected[10] != on.tolist()[0][10]
    accelerate_decoding(model)
    assert switched(generate) == expected
    libortho.set_alpha(model, 1.0)
    assert generate(model).tolist() == on.tolist()
    libortho.set_alpha(model, 0.0)
    assert generate(model).tolist() == off.tolist()
    assert len(captures) == 1


def test_a_replaced_tensor_is_captured_again(
    captures: list[int], separated_model: Callable[..., Model]
) -> None:
    model = accelerate_decoding(private_of(separated_model()))
    generate(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.set_private(layer.private_columns.clone(), layer.private_values * -9)
    assert generate(model).tolist() == plainly(model).tolist()
    assert len(captures) == 2
    with libortho.dense_weights(model, torch.float32):
        assert generate(model).tolist() == plainly(model).tolist()
    assert len(captures) == 3


def test_two_conversations_keep_their_caches(
    captures: list[int], tiny_model: Callable[..., Model]
) -> None:
    model = tiny_model()
    options = {"return_dict_in_generate": True, "output_logits": True}
    prompts = PROMPT, PROMPT + 1
    plain = [plainly(model, p, max_new_tokens=20) for p in prompts]
    accelerate_decoding(model)
    generate(model, max_new_tokens=30)  # the cache's size, from the start
    first = [generate(model, p, max_new_tokens=10, **options) for p in prompts]
    for begun, prompt, expected in zip(first, prompts, plain, strict=True):
        more = generate(
            model,
            begun.sequences,
            max_new_tokens=10,
            cache_implementation=None,
            past_key_values=begun.past_key_values,
        )
        assert more.tolist() == expected.tolist(), prompt
    assert all(torch.isfinite(logits).all() for logits in first[0].logits)


def test_other_caches_run_uncaptured(captures: list[int], tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    expected = plainly(model, num_beams=2)
    accelerate_decoding(model)
    assert model.generate(PROMPT, max_new_tokens=12, num_beams=2, eos_token_id=None).tolist() == (
        expected.tolist()
    )
    assert not captures


def test_a_forward_that_cannot_be_captured_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Model], caplog: Any
) -> None:
    def capture(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "capture", capture)
    model = tiny_model()
    expected = plainly(model)
    accelerate_decoding(model)
    assert generate(model).tolist() == expected.tolist()
    assert "not permitted" in caplog.text


def test_projections_stay_apart_where_that_is_asked_for(
    separated_model: Callable[..., Model],
) -> None:
    for fuse in (False, True):
        model = accelerate_decoding(private_of(separated_model()), fuse=fuse)
        layers = [module for module in model.modules() if isinstance(module, OrthoLinear)]
        assert any(layer.siblings is not None for layer in layers) is fuse


def test_it_can_be_undone_and_copied(captures: list[int], tiny_model: Callable[..., Model]) -> None:
    model = accelerate_decoding(tiny_model())
    generate(model)
    copied = copy.deepcopy(model)
    assert generate(copied).tolist() == generate(model).tolist()
    assert len(captures) == 2
    restore_decoding(model)
    assert "generate" not in vars(model)
    assert model.get_compiled_call.__func__ is type(model).get_compiled_call
    with pytest.raises(ConfigError, match="no `generate`"):
        accelerate_decoding(nn.Linear(2, 2))
