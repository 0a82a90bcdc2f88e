"""formats/model_config.py: what a model's files ask for is honoured or refused.

Each test changes one key of a model that loads. No weights are read here: what a file asks for is
known before.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import universe
from tokenizers import Tokenizer
from tokenizers import models as tokens

import generate
import llama
import weights
import whisper
from formats import model_config

LLAMA31 = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
    "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
    "vocab_size": 128256}"""
SMOLLM2 = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192,
    "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 2, "rms_norm_eps": 1e-05,
    "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
    "tie_word_embeddings": true, "transformers.js_config": {"kv_cache_dtype": {}},
    "vocab_size": 49152}"""
TURBO = """{"activation_dropout": 0.0, "activation_function": "gelu", "apply_spec_augment": false,
    "architectures": ["WhisperForConditionalGeneration"], "begin_suppress_tokens": [220, 50256],
    "bos_token_id": 50257, "d_model": 1280, "decoder_attention_heads": 20, "decoder_ffn_dim": 5120,
    "decoder_layers": 4, "decoder_start_token_id": 50258, "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120, "encoder_layers": 32, "eos_token_id": 50257,
    "is_encoder_decoder": true, "max_source_positions": 1500, "max_target_positions": 448,
    "model_type": "whisper", "num_hidden_layers": 32, "num_mel_bins": 128, "pad_token_id": 50257,
    "scale_embedding": false, "use_weighted_layer_sum": false, "vocab_size": 51866}"""


def change(file: Path, **changes) -> None:
    """Write `changes` into a JSON file; `...` takes a key out."""
    values = json.loads(file.read_text()) if file.is_file() else {}
    values = {key: value for key, value in (values | changes).items() if value is not ...}
    file.write_text(json.dumps(values))


def refused(action, *parts: str) -> None:
    """One line that holds every part, raised as a ValueError."""
    with pytest.raises(ValueError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    for part in (*parts, "expected"):
        assert part in message, f"{part} is not in: {message}"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    universe.build(root)
    return root


@pytest.fixture
def llm(models, tmp_path) -> Path:
    return shutil.copytree(models / "llama", tmp_path / "llama")


@pytest.fixture
def asr(models, tmp_path) -> Path:
    return shutil.copytree(models / "whisper", tmp_path / "whisper")


def read_llama(folder: Path) -> llama.LlamaConfig:
    return weights.read_config(llama.LlamaConfig, folder)


def read_rules(folder: Path, language: str = "en") -> dict:
    config = weights.read_config(whisper.WhisperConfig, folder)
    return generate.decoding_rules(folder, config, language)


# --------------------------------------------------------------------------------- other families


@pytest.mark.parametrize(
    "said",
    [
        *({"model_type": name} for name in ("gemma", "granite", "smollm3", "qwen2", "mistral")),
        *({"hidden_act": name} for name in ("gelu", "relu2")),
        {"hidden_activation": "gelu_pytorch_tanh"},
        *({name: True} for name in ("attention_bias", "mlp_bias", "use_qk_norm", "qk_layernorm")),
        {"sliding_window": 4096},
        {"embedding_multiplier": 12.0},
        {"residual_multiplier": 0.22},
        {"attention_multiplier": 0.015625},
        {"logits_scaling": 8.0},
        {"scale_emb": 12},
        {"scale_depth": 1.4},
        {"dim_model_base": 256},
        {"partial_rotary_factor": 0.5},
        {"no_rope_layers": [1, 1, 1, 0]},
        {"no_rope_layer_interval": 4},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"query_pre_attn_scalar": 256},
        {"clip_qkv": 8.0},
        {"rope_interleaved": True},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
    ids=lambda said: "-".join(f"{key}-{value}" for key, value in said.items()),
)
def test_a_setting_that_is_not_computed_is_refused_with_its_key(llm, said):
    read_llama(llm)
    change(llm / "config.json", **said)
    (key,) = said
    refused(lambda: read_llama(llm), f"{llm / 'config.json'}: {key} is")
    refused(lambda: llama.Llama.load(llm), key)


@pytest.mark.parametrize(
    "said",
    [
        {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        {"pretraining_tp": 2, "attention_dropout": 0.1, "sliding_window": None},
        {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1]},
        {"embedding_multiplier": 1.0, "partial_rotary_factor": 1.0, "quantization_config": None},
    ],
    ids=str,
)
def test_a_setting_that_means_what_is_computed_loads(llm, said):
    before = read_llama(llm)
    change(llm / "config.json", **said)
    assert read_llama(llm) == before


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (llama.LlamaConfig, LLAMA31),
        (llama.LlamaConfig, SMOLLM2),
        (whisper.WhisperConfig, TURBO),
    ],
    ids=["llama-3.1", "smollm2", "whisper-turbo"],
)
def test_published_files_are_understood(tmp_path, cls, text):
    (tmp_path / "config.json").write_text(text)
    config = weights.read_config(cls, tmp_path)
    values = json.loads(text)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(cls)}
    assert {k: v for k, v in fields.items() if k in values} == {
        k: v for k, v in values.items() if k in fields
    }


@pytest.mark.parametrize(
    "said",
    [
        {"model_type": "speech_to_text"},
        {"activation_function": "relu"},
        {"tie_word_embeddings": False},
        {"quantization_config": {"quant_method": "awq"}},
    ],
    ids=str,
)
def test_a_whisper_that_is_another_model_is_refused(asr, said):
    read = lambda: weights.read_config(whisper.WhisperConfig, asr)  # noqa: E731
    before = read()
    change(asr / "config.json", scale_embedding=True)
    assert read() == before, "transformers computes nothing from it"
    change(asr / "config.json", **said)
    refused(read, f"{asr / 'config.json'}: {next(iter(said))} is")


@pytest.mark.parametrize(
    "said",
    [
        {"feature_size": 80},
        {"hop_length": 320},
        {"n_fft": 512},
        {"sampling_rate": 8000},
        {"dither": 1e-5},
        {"padding_value": 1.0},
    ],
    ids=str,
)
def test_frames_that_are_made_in_another_way_are_refused(asr, said):
    file = asr / "preprocessor_config.json"
    change(file, feature_size=8, hop_length=160, n_fft=400, sampling_rate=16000, dither=0.0)
    whisper.Whisper.published(asr)
    change(file, **said)
    refused(lambda: whisper.Whisper.published(asr), f"{file}: {next(iter(said))} is")


# -------------------------------------------------------------------------------------- wrong types


@pytest.mark.parametrize(
    "said",
    [
        {"hidden_size": "24"},
        {"hidden_size": 24.0},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": True},
        {"vocab_size": None},
        {"rms_norm_eps": "1e-5"},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": 0},
        {"tie_word_embeddings": "false"},
        {"head_dim": [8]},
        {"rope_scaling": "llama3"},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        {"rope_parameters": {"rope_theta": "big"}},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"num_attention_heads": 3},
        {"num_attention_heads": 5, "head_dim": 8},
    ],
    ids=str,
)
def test_a_size_that_can_be_none_is_refused(llm, said):
    change(llm / "config.json", **said)
    key = next(iter(said)).replace("rope_scaling", "rope").replace("rope_parameters", "rope")
    refused(lambda: read_llama(llm), f"{llm / 'config.json'}: ", key)


def test_heads_that_do_not_divide_a_whispers_width_are_refused(asr):
    change(asr / "config.json", decoder_attention_heads=3)
    refused(lambda: whisper.Whisper.published(asr), f"{asr / 'config.json'}: d_model is 16")


def test_scaling_has_the_defaults_that_transformers_gives_it(llm):
    """rope_scaling goes before rope_parameters; without the length of the first training it is
    max_position_embeddings; rope_theta stands in it or beside it."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}
    change(llm / "config.json", rope_scaling=scaling, rope_theta=5e5, rope_parameters={"x": 1})
    short = read_llama(llm).frequencies()
    whole = scaling | {"original_max_position_embeddings": 64, "rope_theta": 5e5}
    change(llm / "config.json", rope_scaling=None, rope_theta=1e4, rope_parameters=whole)
    np.testing.assert_array_equal(short, read_llama(llm).frequencies())
    change(llm / "config.json", rope_parameters=whole | {"original_max_position_embeddings": 9})
    assert (short != read_llama(llm).frequencies()).any()


# ---------------------------------------------------------------------------------- the tokenizer


def test_a_tokenizer_that_pads_and_cuts_encodes_as_without(llm):
    """Both are kept in tokenizer.json by whoever trained with them."""
    expected = llama.Chat.load(llm).encode_batch(["one two three four", "sun"])
    tokenizer = Tokenizer.from_file(str(llm / "tokenizer.json"))
    tokenizer.enable_padding(length=6)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(llm / "tokenizer.json"))
    chat = llama.Chat.load(llm)
    assert chat.encode_batch(["one two three four", "sun"]) == expected
    assert [len(row) for row in expected] == [4, 1]
    assert [chat.encode(text) for text in ("one two three four", "sun")] == expected


@pytest.mark.parametrize("text", ["{", "", '{"version": "9.0"}', '{"version":"1.0","model":{}}'])
def test_a_tokenizer_that_cannot_be_read_is_named(llm, asr, text):
    (llm / "tokenizer.json").write_text(text)
    (asr / "tokenizer.json").write_text(text)
    refused(lambda: llama.Chat.load(llm), f"{llm / 'tokenizer.json'}: ", "pip install -U tokeni")
    refused(lambda: generate.Transcriber.load(asr), f"{asr / 'tokenizer.json'}: ")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_file_of_a_chat_is_named(llm, name):
    (llm / name).write_text('{"eos_token_id": 4, ')
    with pytest.raises(ValueError, match=re.escape(f"{llm / name}: not valid JSON")):
        llama.Chat.load(llm)


# ------------------------------------------------------------------------- ids beyond the table


def test_a_token_that_the_table_has_no_row_for_is_refused(llm):
    """Wherever it comes from: the template, a question, a label, a transcript."""
    rows = len(universe.VOCABULARY) - 1  # "good" is the last word
    chat = llama.Chat.load(llm)
    assert chat.encode("good") == [rows]
    change(llm / "config.json", vocab_size=rows)
    chat = llama.Chat.load(llm)
    assert len(chat.encode("say what")) == 2
    for act in (
        lambda: chat.encode("is it good"),
        lambda: chat.encode_batch(["is it", "is it good"]),
        lambda: chat.wrap("good"),
        lambda: chat.around(None, ["good"]),
    ):
        refused(act, f"{llm / 'tokenizer.json'}: token 'good'", f"id {rows};", f"below {rows}, the")
    template = universe.TEMPLATE.replace("<|bos|>{%", "<|bos|>good{%", 1)
    change(llm / "tokenizer_config.json", chat_template=template)
    refused(lambda: llama.Chat.load(llm).wrap(), "token 'good'")


@pytest.mark.parametrize("stop", [400, [2, 400], -1, "4", [[4]], True, 4.0], ids=str)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_stop_token_that_cannot_be_is_refused(llm, name, stop):
    change(llm / name, eos_token_id=stop)
    refused(lambda: llama.Chat.load(llm), f"{llm / name}: eos_token_id has the token id")


def test_a_table_without_a_size_is_refused(llm):
    change(llm / "config.json", vocab_size="28")
    refused(lambda: llama.Chat.load(llm), f"{llm / 'config.json'}: vocab_size is '28'")


RULES = {
    "decoder_start_token_id": 1,
    "eos_token_id": 4,
    "lang_to_id": {"<|en|>": 5, "<|de|>": 6},
    "task_to_id": {"transcribe": 7, "translate": 8},
    "no_timestamps_token_id": 9,
    "suppress_tokens": [10, 11],
    "begin_suppress_tokens": [12, 50256],
    "max_length": 1,
}


@pytest.mark.parametrize(
    "said",
    [
        {"decoder_start_token_id": 100},
        {"lang_to_id": {"<|en|>": 100}},
        {"lang_to_id": ["<|en|>"]},
        {"task_to_id": {"transcribe": 100}},
        {"task_to_id": "transcribe"},
        {"no_timestamps_token_id": 100},
        {"suppress_tokens": ["10"]},
        {"begin_suppress_tokens": 4.5},
        {"eos_token_id": 3},
        {"eos_token_id": 100},
        {"max_length": "20"},
        {"max_new_tokens": -1},
        {"lang_to_id": ..., "forced_decoder_ids": [[1, 100]]},
        {"lang_to_id": ..., "forced_decoder_ids": [[1, 5], [3, 7]]},
        {"lang_to_id": ..., "forced_decoder_ids": [[2, 5]]},
        {"lang_to_id": ..., "forced_decoder_ids": [5, 7]},
        {"lang_to_id": ..., "forced_decoder_ids": {"1": 5}},
    ],
    ids=str,
)
def test_rules_of_a_whisper_that_cannot_be_are_refused(asr, said):
    """An id beyond the table, another type, a gap between forced positions."""
    change(asr / "generation_config.json", **RULES)
    read_rules(asr)
    change(asr / "generation_config.json", **said)
    refused(lambda: read_rules(asr), f"{asr / 'generation_config.json'}: {[*said][-1]} ")


def test_more_forced_tokens_than_positions_are_refused(asr):
    pairs = [[n, 5] for n in range(1, 7)]
    change(asr / "generation_config.json", forced_decoder_ids=pairs)
    refused(lambda: read_rules(asr), f"{asr / 'generation_config.json'}: 7 tokens are forced")


@pytest.mark.parametrize("key", ["decoder_start_token_id", "eos_token_id"])
def test_a_whispers_own_tokens_are_in_its_table(asr, key):
    change(asr / "config.json", **{key: 100})
    refused(lambda: read_rules(asr), f"{asr / 'config.json'}: {key} has the token id 100")


# ------------------------------------------------------------------------------ how a model writes


@pytest.mark.parametrize(
    "said",
    [
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 3},
        {"num_beams": 5},
        {"bad_words_ids": [[3]]},
        {"forced_eos_token_id": 4},
        {"min_new_tokens": 2},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_would_change_the_likeliest_token_is_refused(llm, asr, name, said):
    """In either file; what only says how to draw tokens is the caller's."""
    free = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_beams": 1, "min_length": 0}
    for folder, load in ((llm, llama.Chat.load), (asr, read_rules)):
        change(folder / name, **free)
        load(folder)
        change(folder / name, **said)
        key = next(iter(said))
        refused(lambda load=load, folder=folder: load(folder), f"{folder / name}: {key} is")


def test_an_llm_whose_tokens_are_suppressed_is_refused(llm):
    change(llm / "generation_config.json", suppress_tokens=[])
    llama.Chat.load(llm)
    change(llm / "generation_config.json", suppress_tokens=[9])
    refused(lambda: llama.Chat.load(llm), "suppress_tokens is [9]")


def test_rules_are_read_from_their_older_home(asr):
    """Without generation_config.json, from config.json: the same rules."""
    forced = {"forced_decoder_ids": [[1, 5], [2, 7], [3, 9]]}
    change(asr / "generation_config.json", **RULES | {"lang_to_id": ...} | forced)
    rules = read_rules(asr)
    assert rules == {
        "forced": (1, 5, 7, 9),
        "suppress": (10, 11),
        "begin_suppress": (12, 50256),
        "max_length": 5,  # one beside the forced ones
    }
    (asr / "generation_config.json").unlink()
    change(asr / "config.json", **RULES | {"lang_to_id": ...} | forced)
    assert read_rules(asr) == rules


def test_of_a_generation_config_only_forced_tokens_may_stand_elsewhere(asr):
    """As transformers reads them: the rest of config.json is not asked once there is the file."""
    forced = {"forced_decoder_ids": [[1, None], [2, 7]]}
    change(asr / "config.json", **RULES | {"lang_to_id": ...} | forced)
    change(asr / "generation_config.json", bos_token_id=1)
    expected = {"forced": (1, 7), "suppress": (), "begin_suppress": (), "max_length": 7}
    assert read_rules(asr) == expected


@pytest.mark.parametrize(
    ("absent", "forced"),
    [
        (["task_to_id"], (1, 5, 9)),
        (["no_timestamps_token_id"], (1, 5, 7)),
        (["task_to_id", "no_timestamps_token_id"], (1, 5)),
        (["decoder_start_token_id"], (1, 5, 7, 9)),
        (["lang_to_id"], (1, 9)),
    ],
    ids=str,
)
def test_a_rule_that_is_not_there_forces_nothing(asr, absent, forced):
    change(asr / "generation_config.json", **RULES | dict.fromkeys(absent, ...))
    assert read_rules(asr)["forced"] == forced


@pytest.mark.parametrize(
    ("said", "length"),
    [
        ({"max_length": 2}, 6),
        ({"max_length": 20}, 7),
        ({"max_length": ...}, 7),
        ({"max_length": 3, "max_new_tokens": 1}, 5),
    ],
    ids=str,
)
def test_the_longest_transcript_is_counted_beside_what_is_forced(asr, said, length):
    """As transformers counts it, and never beyond the decoder's positions."""
    change(asr / "generation_config.json", **RULES | said)
    assert read_rules(asr)["max_length"] == length


@pytest.mark.parametrize(
    ("said", "why"),
    [({"lang_to_id": ...}, "no lang_to_id"), ({"is_multilingual": False}, "an English-only model")],
    ids=str,
)
def test_a_language_that_no_rule_can_set_is_refused(asr, said, why, monkeypatch):
    """Before weights are read."""
    monkeypatch.setattr(weights, "load", lambda *_: pytest.fail("weights are read"))
    change(asr / "generation_config.json", **RULES | said)
    assert read_rules(asr, "en")["forced"] == (1, 9)
    message = f"{asr / 'generation_config.json'}: {why}, so language 'de' cannot be set"
    refused(lambda: read_rules(asr, "de"), message)
    refused(lambda: generate.Transcriber.load(asr, "de"), message)


LANGUAGES = {"<|en|>": 5, "<|de|>": 6, "<|haw|>": 7, "<|transcribe|>": 9, "<|notimestamps|>": 11}


@pytest.fixture
def bare(asr) -> Path:
    """A Whisper without generation_config.json whose tokenizer names languages, and more."""
    ids = {"<unk>": 0, "<|startoftranscript|>": 1, "<|0.00|>": 2} | LANGUAGES
    tokenizer = Tokenizer(tokens.WordLevel(ids, "<unk>"))
    tokenizer.add_special_tokens([*LANGUAGES])
    tokenizer.save(str(asr / "tokenizer.json"))
    return asr


@pytest.mark.parametrize(("code", "token"), [("en", 5), ("de", 6), ("haw", 7)])
def test_without_a_generation_config_the_tokens_say_which_languages_there_are(bare, code, token):
    """And what transcribes, and what keeps times away; whatever an older file would force."""
    change(bare / "config.json", forced_decoder_ids=[[1, 5], [2, 9], [3, 11]])
    assert read_rules(bare, code)["forced"] == (1, token, 9, 11)
    refused(
        lambda: read_rules(bare, "fr"), f"{bare / 'config.json'}: no language 'fr'", "de, en, haw"
    )


def test_an_english_only_model_is_known_by_the_rows_of_its_table(bare, monkeypatch):
    """The published ones have 51,864, and a tokenizer that names all languages nevertheless."""
    monkeypatch.setattr(model_config, "ENGLISH_ONLY", universe.WHISPER.vocab_size)
    assert read_rules(bare, "en")["forced"] == (1, 11)
    refused(lambda: read_rules(bare, "de"), f"{bare / 'config.json'}: an English-only model")


def test_a_tokenizer_without_tasks_names_no_languages(asr):
    """<|bos|> and <|end|> are none."""
    assert read_rules(asr, "en")["forced"] == (1,)
    refused(lambda: read_rules(asr, "bos"), "no lang_to_id, so language 'bos'")


# ------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("key", "had"), [("max_source_positions", 25), ("max_target_positions", 7)]
)
@pytest.mark.parametrize("said", [5, 40])
def test_a_window_that_was_cut_in_config_json_alone_is_laid_to_it(asr, key, had, said):
    """Not to the weights; with what they have."""
    change(asr / "config.json", **{key: said})
    message = f"{asr / 'config.json'}: {key} is {said}; expected {had}, the rows of model."
    refused(lambda: whisper.Whisper.load(asr), message, "Set it to that: ")


def test_positions_of_another_width_are_not_those_of_a_window(asr):
    change(asr / "config.json", d_model=8, max_source_positions=5)
    refused(lambda: whisper.Whisper.load(asr), "model.safetensors: model.encoder.", "has shape")
