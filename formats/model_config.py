"""Settings: what the files of a model may ask for, and what of it is computed here.

A file that asks for something else is refused, with its key. Computed without a word, the model
would answer, and be another one: a Gemma has Llama's tensor names, a scaled embedding keeps its
shape. What is not named here is no sum (dropout, dates), or a size that config classes name.

Each table reads {key: values that mean what is computed here}; an absent key, null and [] are among
them. A list is refused for any of its entries.

Reads: files.py.   Read next: template.py.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from runtime import files

Computed = dict[str, tuple[Any, ...]]

# Of a model_type with another name even the defaults of absent keys differ (for a Mistral no
# sliding_window means one of 4096), so none is taken for a Llama, whatever else its file says.
# pretraining_tp is not here: it says in how many parts a sum was written down, not another sum.
LLAMA: Computed = {
    "model_type": ("llama",),
    "quantization_config": (),
    **dict.fromkeys(["hidden_act", "hidden_activation"], ("silu", "swish")),
    **dict.fromkeys(["attention_bias", "mlp_bias", "use_qkv_bias", "use_bias"], (False,)),
    **dict.fromkeys(["qk_norm", "use_qk_norm", "qk_layernorm"], (False,)),
    **dict.fromkeys(["use_parallel_residual", "use_bidirectional_attention"], (False,)),
    **dict.fromkeys(["embedding_multiplier", "residual_multiplier", "logits_scaling"], (1,)),
    **dict.fromkeys(["scale_emb", "logit_scale"], (1,)),
    **dict.fromkeys(["scale_depth", "dim_model_base", "attention_multiplier"], ()),
    **dict.fromkeys(["attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"], ()),
    **dict.fromkeys(["query_pre_attn_scalar", "sliding_window", "no_rope_layer_interval"], ()),
    "layer_types": ("full_attention",),
    "no_rope_layers": (1,),  # 1: a layer that rotates, in the files that have the key
    **dict.fromkeys(["partial_rotary_factor", "rotary_pct"], (1,)),
    "rope_interleaved": (False,),
}
# scale_embedding is not here: transformers reads it and multiplies nothing.
WHISPER: Computed = {
    "model_type": ("whisper",),
    "quantization_config": (),
    "activation_function": ("gelu",),
    "tie_word_embeddings": (True,),
}
LISTENING: Computed = {  # preprocessor_config.json, beside feature_size
    "sampling_rate": (16_000,),
    "hop_length": (160,),
    "n_fft": (400,),
    "dither": (0,),
    "padding_value": (0,),
}
# Tokens are chosen as the caller asks, greedily where none does: so do_sample, temperature and the
# like are free. These would change what the likeliest token is.
CHOOSING: Computed = {
    **dict.fromkeys(["num_beams", "num_beam_groups", "guidance_scale"], (1,)),
    **dict.fromkeys(["repetition_penalty", "encoder_repetition_penalty"], (1,)),
    **dict.fromkeys(["no_repeat_ngram_size", "encoder_no_repeat_ngram_size"], (0,)),
    **dict.fromkeys(["min_length", "min_new_tokens", "penalty_alpha"], (0,)),
    **dict.fromkeys(["bad_words_ids", "force_words_ids", "sequence_bias", "stop_strings"], ()),
    **dict.fromkeys(["forced_bos_token_id", "forced_eos_token_id"], ()),
    "exponential_decay_length_penalty": (),
}
ENGLISH_ONLY = 51_864  # rows of the published token tables that are for English alone
ANSWERING: Computed = CHOOSING | dict.fromkeys(["suppress_tokens", "begin_suppress_tokens"], ())


def refuse(file: Path, values: dict[str, Any], computed: Computed) -> None:
    """Raises ValueError that names file and key if `values` ask for what is not computed here."""
    for key, known in computed.items():
        value = values.get(key)
        if value is None or value == {}:
            continue
        if any(one not in known for one in (value if isinstance(value, list) else [value])):
            expected = " or ".join(repr(one) for one in known) or "none"
            raise ValueError(
                f"{file}: {key} is {value!r}; expected {expected}, all that is computed here. Use "
                "another model: without this setting it would give other numbers, not an error."
            )


def fields_of(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that the config class names. Raises ValueError for one of another type."""
    kept = {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, low = values[field.name], 0 if field.name.endswith("_id") else 1
        kinds = typing.get_args(field.type) or (field.type,)
        right = {  # {type: (is the value one, how that is called)}
            int: (type(value) is int and value >= low, f"a whole number from {low}"),
            float: (type(value) in (int, float) and 0 < value < math.inf, "a number above 0"),
            bool: (type(value) is bool, "true or false"),
            type(None): (value is None, "null"),
            Any: (True, ""),
        }
        if not any(right[kind][0] for kind in kinds):
            expected = " or ".join(right[kind][1] for kind in kinds)
            raise ValueError(f"{field.name} is {value!r}; expected {expected}. Download it again.")
        kept[field.name] = float(value) if float in kinds and value is not None else value
    return kept


def rope(said: Any, theta: float, positions: int) -> dict[str, Any]:
    """rope_type and the numbers that it needs, from rope_scaling (or, in newer files,
    rope_parameters). Raises ValueError, also for one that differs between layers."""
    if not isinstance(said or {}, dict):
        raise ValueError(f"rope_scaling is {said!r}; expected null or a JSON object.")
    found = {"rope_theta": theta, "original_max_position_embeddings": positions} | (said or {})
    kind = found["rope_type"] = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"rope type {kind!r}; expected 'default' or 'llama3'. Other position scalings are not "
            "implemented: use a Llama 3, 3.1 or 3.2."
        )
    scaling = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "factor")
    for key in ("rope_theta", *(scaling if kind == "llama3" else ())):
        if type(found.get(key)) not in (int, float) or not 0 < found[key] < math.inf:
            raise ValueError(
                f"rope_scaling (or rope_parameters) has {key} {found.get(key)!r}; expected a "
                f"number above 0, as {kind!r} needs. Download it again."
            )
    if found.get("partial_rotary_factor") not in (None, 1) or any(
        isinstance(value, dict) for value in found.values()
    ):
        raise ValueError(
            f"rope_parameters is {said!r}; expected one rotation of whole heads for all layers, "
            "all that is computed here. Use another model."
        )
    return found


def rows(folder: Path) -> int:
    """Rows of a model's embedding table, by its config.json. Raises ValueError."""
    file = folder / "config.json"
    found = files.read_json(file).get("vocab_size")
    if type(found) is not int or found < 1:
        raise ValueError(
            f"{file}: vocab_size is {found!r}; expected how many rows the embedding table has. "
            "Download it again."
        )
    return found


def token_ids(file: Path, key: str, value: Any, rows: int | None) -> tuple[int, ...]:
    """One id, or a list of them, or none. Raises ValueError unless the table has each row.

    JAX would read the last row instead of one that is not there. (rows None: ids that the model
    never reads.)
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or (rows is not None and not 0 <= token < rows):
            raise ValueError(
                f"{file}: {key} has the token id {token!r}; expected a whole number"
                + (f" below {rows}, the rows of the model's embedding table" if rows else "")
                + ". Tokenizer, settings and weights are not of one model: download them again "
                "together."
            )
    return tuple(ids)


POSITIONS = {  # {end of a tensor's name: the key that says how many rows it has}
    "encoder.embed_positions.weight": "max_source_positions",
    "decoder.embed_positions.weight": "max_target_positions",
}


def misshaped(file: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """What to say of a tensor that has another shape than config.json implies."""
    key = next((key for end, key in POSITIONS.items() if name.endswith(end)), None)
    if key and found[1:] == expected[1:]:  # cut, or stretched, in config.json alone
        return (
            f"{file.parent / 'config.json'}: {key} is {expected[0]}; expected {found[0]}, the rows "
            f"of {name} in {file.name}. Set it to that: a window is not cut in config.json alone."
        )
    return (
        f"{file}: {name} has shape {found}; expected {expected} from config.json. Check that the "
        "two belong together."
    )


def count(file: Path, key: str, values: dict[str, Any]) -> int | None:
    """A number of tokens, if there is one. Raises ValueError."""
    value = values.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{file}: {key} is {value!r}; expected a whole number from 1.")
    return value


def mapping(file: Path, key: str, value: Any, rows: int) -> dict[str, int]:
    """{name: token id}, or nothing. Raises ValueError."""
    if not isinstance(value or {}, dict):
        raise ValueError(f"{file}: {key} is {value!r}; expected {{name: token id}}.")
    token_ids(file, key, list((value or {}).values()), rows)
    return value or {}


def generation(folder: Path, computed: Computed) -> tuple[Path, dict[str, Any]]:
    """The file that says how the model writes, and what it says: generation_config.json, or, as
    older models have it, config.json. Raises ValueError for what is not computed here."""
    file = folder / "generation_config.json"
    file = file if file.is_file() else folder / "config.json"
    values = files.read_json(file)
    refuse(file, values, computed)
    return file, values


def transcribing(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The same for a Whisper. Without generation_config.json its tokenizer says which tokens name
    languages and tasks, as <|de|> and <|transcribe|> do. Raises ValueError."""
    file, values = generation(folder, CHOOSING)
    if file.name != "config.json" or not (folder / "tokenizer.json").is_file():
        return file, values
    tokens = tokenizer(folder).get_vocab(with_added_tokens=True)
    found = {"no_timestamps_token_id": tokens.get("<|notimestamps|>")}
    # the tokenizers of English-only models name all languages too
    found["is_multilingual"] = values.get("vocab_size") != ENGLISH_ONLY
    if "<|transcribe|>" in tokens:
        names = [name for name in tokens if re.fullmatch(r"<\|[a-z]{2,3}\|>", name)]
        found["lang_to_id"] = {name: tokens[name] for name in names}
        found["task_to_id"] = {"transcribe": tokens["<|transcribe|>"]}
    return file, found | values


def listening(folder: Path, num_mel_bins: int) -> None:
    """Raises ValueError if preprocessor_config.json asks for other frames than log-mel gives."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        refuse(file, files.read_json(file), LISTENING | {"feature_size": (num_mel_bins,)})


def tokenizer(folder: Path) -> Tokenizer:
    """The model's own, which neither pads nor cuts, whatever was left on when it was saved.

    Raises FileNotFoundError or ValueError that names the file.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; expected the fast tokenizer that is published with the model. "
            "Download it into this folder."
        )
    expected = (
        "the fast tokenizer that is published with the model. Download it again, or, if it is "
        "newer than the library that reads it, pip install -U tokenizers"
    )
    found = guarded(file, lambda: Tokenizer.from_file(str(file)), expected)
    found.no_padding()
    found.no_truncation()
    return found


def guarded(file: Path, read: Callable[[], Any], expected: str) -> Any:
    """What `read` makes of `file`. Raises ValueError in one line for any error of what reads it."""
    try:
        return read()
    except Exception as error:  # tokenizers raises nothing narrower, and a template what it likes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{file}: {reason}; expected {expected}.") from error
