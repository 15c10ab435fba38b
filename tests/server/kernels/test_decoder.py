"""The compiled step: every family has the bits of its modules, on every instruction set, alone or in company."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import load_base_model
from loramux_server.kernels.compiled.library import Compiled, NativeLibrary, native_library
from loramux_server.kernels.decoder.decoder import Decoder, compare, decoder_for
from loramux_server.kernels.decoder.description import NotOfThisShape, describe
from loramux_server.kernels.decoder.exact_model import KINDS
from loramux_server.kernels.decoder.trial import Trial
from support.adapter_files import write_adapter
from support.decoders import FAMILIES, Served, changed, random_model, slow_twin
from support.stepping import CPU, Stepper, relative_difference
from support.tiny_models import ARCHITECTURES, save_tiny_model

LIBRARY = native_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there are no compiled kernels")

LENGTHS = (37, 5, 16, 23, 1)
ADAPTERS = [
    (),
    (ScaledSlot(Slot(0, 8)),),
    (ScaledSlot(Slot(16, 16), 0.5),),
    (ScaledSlot(Slot(0, 8)), ScaledSlot(Slot(32, 32), -0.7)),
    (ScaledSlot(Slot(32, 32)),),
]
WHOLE_MIXTURES = ("qwen3_moe", "mixtral", "olmoe", "flex_olmo", "gpt_oss")
CAPPED = {"Gemma 2", "long heads"}  # PyTorch's own tanh is the last thing that their modules do


def sequences(vocabulary: int = 333) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Served]:
    return request.param, Served(random_model(request.param))


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def step_of(served: Served) -> Decoder:
    assert served.decoder is not None
    return served.decoder


def library() -> NativeLibrary:
    assert LIBRARY is not None
    return LIBRARY


def test_it_is_near_transformers_own_code_in_fp32(family: tuple[str, Served]) -> None:
    _, served = family
    with torch.no_grad():
        twin = slow_twin(served.model)
        expected = [twin(input_ids=torch.tensor([tokens]), use_cache=False).logits[0] for tokens in sequences()]
    got = served.feed(step_of(served).forward, sequences(), chunk=7)
    assert relative_difference(torch.cat(got), torch.cat(expected)) < 0.004


def test_it_has_the_bits_of_the_modules_adapters_and_company_included(family: tuple[str, Served]) -> None:
    name, served = family
    compiled = served.feed(step_of(served).forward, sequences(), ADAPTERS, chunk=7)
    modules = served.feed(served.by_modules, sequences(), ADAPTERS, chunk=5)
    for ours, theirs in zip(compiled, modules, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6) if name in CAPPED else torch.equal(ours, theirs)
    assert not torch.equal(compiled[1], served.feed(step_of(served).forward, sequences())[1])  # adapters change it


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3"])
def test_embedding_and_head_of_one_weight_are_one_in_memory(name: str, tied: bool) -> None:
    served = Served(random_model(name, tie_word_embeddings=tied))
    head, embedding = served.model.get_output_embeddings(), served.model.get_input_embeddings()
    assert (step_of(served).description.embedding is None) == tied
    assert (embedding.weight is head.weight) == tied
    modules = served.feed(served.by_modules, sequences(), ADAPTERS)
    for isa in library().isas:
        decoder = Decoder(Compiled(library(), isa), step_of(served).description)
        assert equal(served.feed(decoder.forward, sequences(), ADAPTERS, chunk=7), modules), isa.label


def test_it_has_the_same_bits_on_every_instruction_set_and_with_any_threads(family: tuple[str, Served]) -> None:
    _, served = family
    expected = served.feed(step_of(served).forward, sequences(), ADAPTERS, chunk=7)
    threads = torch.get_num_threads()
    for isa in library().isas:
        decoder = Decoder(Compiled(library(), isa), step_of(served).description)
        torch.set_num_threads(1 + isa % 2)
        try:
            assert equal(served.feed(decoder.forward, sequences(), ADAPTERS, chunk=7), expected), isa.label
        finally:
            torch.set_num_threads(threads)


def test_a_row_has_the_same_bits_alone_and_in_company_whatever_the_chunks(family: tuple[str, Served]) -> None:
    _, served = family
    forward = step_of(served).forward
    whole = served.feed(forward, sequences(), ADAPTERS)
    for chunk in (1, 7, 16):
        assert equal(served.feed(forward, sequences(), ADAPTERS, chunk), whole)
    for index, tokens in enumerate(sequences()):
        assert equal(served.feed(forward, [tokens], [ADAPTERS[index]], 9), [whole[index]])


def test_only_sampled_rows_have_logits_and_a_chunk_without_any_fills_the_cache(family: tuple[str, Served]) -> None:
    _, served = family
    forward = step_of(served).forward
    some: list[torch.Tensor] = []

    def last_only(tokens: list[int], heads: list[int], step: Any, lora: Any, head: Any) -> torch.Tensor:
        wanted = heads[-1:] if step.runs[0][3] else []
        logits = forward(tokens, wanted, step, None, None)
        some.append(logits)
        return torch.zeros(len(heads), 333)

    tokens = sequences()[:1]
    served.feed(last_only, tokens, chunk=20)
    assert some[0].shape[0] == 0
    assert torch.equal(some[1], served.feed(forward, tokens)[0][-1:])


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Phi-3", "OLMo 2"])
def test_a_row_that_is_no_number_harms_no_other(name: str) -> None:
    served = Served(random_model(name, tie_word_embeddings=False))
    forward = step_of(served).forward
    whole = served.feed(forward, sequences(332), ADAPTERS, chunk=7)
    sick = sequences(332)
    sick[2][3] = 332
    served.model.get_input_embeddings().weight.data[332] = torch.nan
    got = served.feed(forward, sick, ADAPTERS, chunk=7)
    assert equal(got[:2] + got[3:], whole[:2] + whole[3:])
    assert equal([got[2][:3]], [whole[2][:3]])
    assert not got[2][3:].isfinite().any()


def mutations(decoder: Decoder) -> Iterator[tuple[str, Any, str, Any]]:
    """(what, structure, its field, another value) of everything in a description that can be wrong."""
    model, layers = decoder.exact.model, decoder.exact.layers
    for name in ("embedding_factor", "residual_factor", "logit_divisor"):
        yield name, model, name, getattr(model, name) * 1.0001
    yield (
        "no cap of logits" if model.logit_softcap else "a cap",
        model,
        "logit_softcap",
        0 if model.logit_softcap else 9,
    )
    if model.logit_softcap:
        yield "another cap", model, "logit_softcap", model.logit_softcap * 1.0001
    yield "eps of the last norm", model.norm, "eps", model.norm.eps * 10
    yield "fewer pairs", model, "rotary_pairs", model.rotary_pairs // 2
    for index in (0, len(layers) - 1):
        layer = layers[index]
        yield f"scaling {index}", layer, "scaling", layer.scaling * 1.0001
        yield f"softcap {index}", layer, "softcap", 0 if layer.softcap else 50
        yield f"window {index}", layer, "window", layer.window + 1 if layer.window else 15
        if layer.experts.layers:
            yield from mutations_of_mixture(index, layer)
        else:
            yield f"gelu {index}", layer, "gelu", 1 - layer.gelu
        if layer.sinks:
            yield f"no sinks {index}", layer, "sinks", None
        if layer.clip:
            yield f"clip {index}", layer, "clip", layer.clip * 0.9
        yield f"rotary {index}", layer, "rotary", 0 if layer.rotary < 0 else -1
        for name in ("before_attention", "q_norm", "k_norm", "after_attention", "before_mlp", "after_mlp"):
            norm = getattr(layer, name)
            if norm.weight:
                yield f"eps of {name} {index}", norm, "eps", norm.eps * 10
                yield f"no {name} {index}", norm, "weight", None
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            if getattr(layer, name).bias:
                yield f"no bias of {name} {index}", getattr(layer, name), "bias", None
    if len(decoder.description.angles) > 1:
        yield "the other table", layers[0], "rotary", 1 - layers[0].rotary


def mutations_of_mixture(index: int, layer: Any) -> Iterator[tuple[str, Any, str, Any]]:
    """Of all but the limit, which random numbers do not reach."""
    experts, router = layer.experts, layer.router
    yield f"gelu of experts {index}", experts, "gelu", 1 - experts.gelu
    yield f"alpha {index}", experts, "alpha", experts.alpha * 1.01
    yield f"above {index}", experts, "above", experts.above + 0.01
    yield f"chosen {index}", experts, "chosen", experts.chosen - 1
    yield f"fewer experts {index}", experts, "count", experts.count - 1
    yield f"normalized {index}", router, "normalized", 1 - router.normalized
    if router.bias:
        yield f"no bias of the router {index}", router, "bias", None


def test_every_mistake_in_a_description_is_seen_at_the_start(family: tuple[str, Served]) -> None:
    _, served = family
    with torch.inference_mode():
        trial = Trial(served.kernels.attend, served.model, served.cache(8))
        decoder = step_of(served)
        compare(trial, decoder)
        seen = 0
        for what, structure, name, value in mutations(decoder):
            with changed(structure, name, value), pytest.raises(NotOfThisShape, match="compute something else"):
                compare(trial, decoder)
                pytest.fail(what)
            seen += 1
        assert seen > 20
        compare(trial, decoder)


def with_scale(model: Any) -> None:
    model.model.layers[1].register_parameter("scale", nn.Parameter(torch.ones(1)))


def with_sinks(model: Any) -> None:
    model.model.layers[1].self_attn.register_parameter("sinks", nn.Parameter(torch.ones(4)))


def with_another_norm(model: Any) -> None:
    model.model.norm = nn.LayerNorm(128)


def with_a_dense_layer(model: Any) -> None:
    model.model.layers[2].mlp.down_proj = nn.Linear(192, 128, bias=False)


def with_another_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()


def with_a_bias_of_the_head(model: Any) -> None:
    model.lm_head = nn.Linear(128, 333, dtype=torch.bfloat16)


def with_more_after_the_body(model: Any) -> None:
    model.second_head = nn.Linear(128, 4)


def with_another_kind_of_rotation(model: Any) -> None:
    model.model.rotary_emb.rope_type = ["default"]


def with_a_clip_in_its_config(model: Any) -> None:
    model.config.clip_qkv = 100.0  # more than the trial's random tokens reach


REFUSED: list[tuple[Callable[[Any], None], str]] = [
    (with_scale, "layer 1 is made of .*scale"),
    (with_sinks, "the attention of layer 1 is made of .*sinks"),
    (with_another_norm, r"the last norm \(LayerNorm\) has no compiled forward"),
    (with_a_dense_layer, r"down_proj of layer 2 \(Linear\) has no compiled kernel"),
    (with_another_activation, r"the MLP of layer 0 \(LlamaMLP\) has no compiled forward"),
    (with_a_bias_of_the_head, r"its head \(Linear\) has no compiled kernel"),
    (with_more_after_the_body, "it is not made of a body and an output head"),
    (with_a_clip_in_its_config, "its queries, keys and values may be cut off"),
    (with_another_kind_of_rotation, r"the rotation of its positions is another one \(LlamaRotaryEmbedding\)"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[change.__name__ for change, _ in REFUSED])
def test_what_has_no_place_in_the_description_is_named_and_runs_module_by_module(
    change: Callable[[Any], None], reason: str
) -> None:
    model = random_model("Llama")
    change(model)
    served = Served(model)
    assert served.decoder is None
    assert re.search(reason, served.why_by_modules), served.why_by_modules


@pytest.mark.parametrize("architecture", ["starcoder2", "gpt_neox"])
def test_other_architectures_run_module_by_module(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "other", (architecture, {}))
    assert Served(random_model("other")).decoder is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"intermediate_size": 176},
            r"gate_proj of layer 0 \(Linear4bit\) has no compiled kernel: it takes 128 numbers to 176, and they take a "
            "multiple of 64 to a multiple of 32",
        ),
        ({"head_dim": 24}, "its heads have 24 numbers, and the cache of whole numbers takes multiples of 16 up to 512"),
    ],
)
def test_sizes_that_the_kernels_cannot_take_are_told(changes: dict[str, Any], reason: str) -> None:
    served = Served(random_model("Llama", **changes))
    assert served.decoder is None
    assert re.fullmatch(reason, served.why_by_modules), served.why_by_modules


def test_the_set_modules_computes_the_same_bits_without_a_whole_step() -> None:
    by_modules, whole = Served(random_model("Qwen3"), "modules"), Served(random_model("Qwen3"))
    assert by_modules.decoder is None and by_modules.why_by_modules == "the kernels 'modules' have no whole step"
    assert equal(by_modules.feed(by_modules.by_modules, sequences()), whole.feed(step_of(whole).forward, sequences()))


def test_sizes_that_do_not_fit_one_another_are_refused() -> None:
    served = Served(random_model("Qwen3"))
    with torch.inference_mode():
        asked = Trial(served.kernels.attend, served.model, served.cache(8)).asked
    layer = served.model.model.layers[1]
    for owner, name, other, reason in (
        (layer.self_attn, "v_proj", layer.self_attn.q_proj, "v of layer 1 takes 128 numbers to 128, and not 128 to 64"),
        (
            layer.mlp,
            "down_proj",
            layer.self_attn.k_proj,
            "gate of layer 1 takes 128 numbers to 192, and not 128 to 128",
        ),
        (layer, "input_layernorm", layer.self_attn.q_norm, "input_layernorm of layer 1 is of 32 numbers"),
        (layer.self_attn, "k_norm", layer.input_layernorm, "k_norm of layer 1 is of 128 numbers, and not of 32"),
    ):
        with changed(owner, name, other), pytest.raises(NotOfThisShape, match=reason):
            describe(served.model, served.shape, asked, KINDS)
    chunks = [asked[0], replace(asked[1], chunk=20), asked[2]]
    with pytest.raises(NotOfThisShape, match="layer 1 sees chunks of a text"):
        describe(served.model, served.shape, chunks, KINDS)
    with pytest.raises(NotOfThisShape, match="it has 3 layers and 2 attentions"):
        describe(served.model, served.shape, asked[:2], KINDS)


def test_a_layer_that_does_more_than_its_parts_say_is_found_out() -> None:
    served = Served(random_model("Llama"))
    layer = served.model.model.layers[1].post_attention_layernorm
    own = layer.forward
    layer.forward = lambda x: own(x) * 1.0001
    compiled = Compiled(library(), library().isas[-1])
    with pytest.raises(NotOfThisShape, match="a logit differs by"):
        decoder_for(compiled, served.kernels.attend, served.model, served.cache(8))


def test_what_a_model_does_far_out_only_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ministral 3 makes its queries larger beyond the length that it was first trained on."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
    for length, reason in ((512, None), (128, "queries or keys of layer 0 do more than turn with their position")):
        more = {"rope_parameters": rope | {"original_max_position_embeddings": length}, "sliding_window": None}
        monkeypatch.setitem(FAMILIES, "Ministral 3", ("ministral3", more))
        served = Served(random_model("Ministral 3"))
        assert (served.decoder is None) == (reason is not None)
        assert served.why_by_modules == (reason or "")


def test_logits_are_the_callers_to_keep() -> None:
    served = Served(random_model("Llama"))
    first = served.feed(step_of(served).forward, sequences())
    kept = [logits.clone() for logits in first]
    served.feed(step_of(served).forward, [[5] * 40])
    assert equal(first, kept)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *WHOLE_MIXTURES])
def test_a_base_from_the_loader_runs_in_one_call_where_it_can(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    base = load_base_model(str(directory), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None)
    stepper = Stepper(base.model)
    assert (stepper.runner.decoder is None) == (architecture in {"starcoder2", "gpt_neox"})
    kinds: list[dict[str, Any]] = [{"rank": 5}, {"rank": 16, "targets": ["o_proj", "down_proj"]}]
    slots = [Slot(0, 8), Slot(16, 16)]
    for index, (slot, kind) in enumerate(zip(slots, kinds, strict=True)):
        directory = write_adapter(tmp_path / str(index), dict(base.linears), seed=index, std_b=0.2, **kind)
        stepper.load(slot, load_host_adapter(directory))

    def replies() -> list[torch.Tensor]:
        prompts = [list(range(3, 43)), [7] * 12, [300]]
        uses = zip(prompts, [None, *slots], strict=True)
        found = [stepper.sequence(str(index), *prompt_and_slot) for index, prompt_and_slot in enumerate(uses)]
        return [logits for one in found for logits in stepper.greedy(one, 4, chunk=9)]

    compiled, stepper.runner.decoder = replies(), None
    for ours, theirs in zip(compiled, replies(), strict=True):
        assert (
            torch.allclose(ours, theirs, rtol=0, atol=1e-6) if architecture == "gemma2" else torch.equal(ours, theirs)
        )
