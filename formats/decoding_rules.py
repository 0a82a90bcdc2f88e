"""Decoding rules: which tokens Whisper's published files force or suppress in a transcript.

    generation_config.json (or config.json) -> forced, suppress, begin_suppress, max_length

Reads: model_config.py, files.py.   Read next: chat_template.py.
"""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from formats import model_config
from runtime import files


@runtime_checkable
class DecoderConfig(Protocol):
    """The fields of a Whisper's config that the rules depend on."""

    vocab_size: int
    max_target_positions: int
    decoder_start_token_id: int
    eos_token_id: int


def decoding_rules(folder: Path, config: DecoderConfig, language: str) -> dict[str, Any]:
    """Read the arguments of `greedy_decode` for transcripts without timestamps.

    Multilingual files list a token for each language and task. Older and English-only files have
    forced_decoder_ids instead, in generation_config.json or in config.json.

    Raises:
        ValueError: the model does not support the language, the files contradict each other, or
            they ask for something that is not implemented here.
    """
    file, rules = model_config.transcribing(folder)

    def tokens(key: str, rows: int | None = config.vocab_size) -> tuple[int, ...]:
        return model_config.token_ids(file, key, rules.get(key), rows)

    _check_config_ids(folder, file, rules, config)
    forced = [*(tokens("decoder_start_token_id") or (config.decoder_start_token_id,))]
    forced += _language_and_task(folder, file, rules, config, language=language)

    no_timestamps = tokens("no_timestamps_token_id")
    if no_timestamps != tuple(forced[-1:]):
        forced += no_timestamps

    return {
        "forced": tuple(forced),
        "suppress": tokens("suppress_tokens", rows=None),
        "begin_suppress": tokens("begin_suppress_tokens", rows=None),
        "max_length": _max_length(
            file, rules, num_forced=len(forced), positions=config.max_target_positions
        ),
    }


def _check_config_ids(
    folder: Path, file: Path, rules: dict[str, Any], config: DecoderConfig
) -> None:
    """Raises ValueError unless the ids of config.json are in the vocabulary, and eos_token_id is
    the same in both files."""
    eos = model_config.token_ids(file, "eos_token_id", rules.get("eos_token_id"), config.vocab_size)
    if eos not in ((), (config.eos_token_id,)):
        raise ValueError(
            f"{file}: eos_token_id is {rules['eos_token_id']!r}; expected {config.eos_token_id}, "
            "as in config.json. Download both again."
        )
    for key in ("eos_token_id", "decoder_start_token_id"):
        model_config.token_ids(folder / "config.json", key, getattr(config, key), config.vocab_size)


def _language_and_task(
    folder: Path, file: Path, rules: dict[str, Any], config: DecoderConfig, *, language: str
) -> list[int]:
    """Token ids for the language and for transcription, which follow the start token."""

    def token_table(key: str) -> dict[str, int]:
        return model_config.mapping(file, key, rules.get(key), config.vocab_size)

    is_multilingual = rules.get("is_multilingual", True)
    languages = token_table("lang_to_id") if is_multilingual else {}
    if languages:
        if f"<|{language}|>" not in languages:
            supported = ", ".join(sorted(name.strip("<|>") for name in languages))
            raise ValueError(f"{file}: no language {language!r}; expected one of {supported}.")
        tasks = token_table("task_to_id")
        transcribe = [id for task, id in tasks.items() if task == "transcribe"]
        return [languages[f"<|{language}|>"], *transcribe]

    if language != "en":
        reason = "no lang_to_id" if is_multilingual else "an English-only model"
        raise ValueError(
            f"{file}: {reason}, so language {language!r} cannot be set; expected 'en'. Leave the "
            "language out, or use a multilingual model, such as openai/whisper-base."
        )
    return _forced_decoder_ids(folder, file, rules, config)


def _forced_decoder_ids(
    folder: Path, file: Path, rules: dict[str, Any], config: DecoderConfig
) -> list[int]:
    """The token ids of forced_decoder_ids, [[1, id], [2, id], ...], without null ids.

    If generation_config.json does not have the key, config.json is read.
    """
    pairs = rules.get("forced_decoder_ids")
    if not pairs and file.name != "config.json":
        file = folder / "config.json"
        pairs = files.read_json(file).get("forced_decoder_ids")
    pairs = pairs or []

    is_list_of_pairs = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    )
    if not is_list_of_pairs or [position for position, _ in pairs] != [*range(1, len(pairs) + 1)]:
        raise ValueError(
            f"{file}: forced_decoder_ids is {pairs!r}; expected [[1, id], [2, id], ...]. Download "
            "it again."
        )

    ids = [token for _, token in pairs if token is not None]
    return [*model_config.token_ids(file, "forced_decoder_ids", ids, config.vocab_size)]


def _max_length(file: Path, rules: dict[str, Any], *, num_forced: int, positions: int) -> int:
    """Length of the longest transcript in tokens, including the forced ones."""
    # As in transformers, both keys count the tokens after the forced ones.
    max_new_tokens = model_config.count(file, "max_new_tokens", rules)
    max_length = model_config.count(file, "max_length", rules)
    length = min(num_forced + (max_new_tokens or max_length or positions), positions)
    if length <= num_forced:
        raise ValueError(
            f"{file}: {num_forced} tokens are forced; expected fewer than the model's {positions} "
            "positions."
        )
    return length
