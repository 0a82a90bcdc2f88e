"""Llama: parity with transformers through fixtures, generation, and the chat template."""

import dataclasses
import json
import shutil
from pathlib import Path

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import universe
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import generate
import llama
from runtime import attention

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("llama-tied-scaled", "llama-untied-head-dim")
SPECIALS = {
    "<|begin_of_text|>": 128000,
    "<|eot_id|>": 128009,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
}
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (  # always a system turn, with today's date
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: "
    "{{ strftime_now('%d %b %Y') }}\n\n"
    "{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}"
    "{%- set messages = messages[1:] %}{%- endif %}<|eot_id|>"
    "{%- for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.mark.parametrize("name", NAMES)
def test_states_logits_rope_and_greedy_tokens_are_those_of_transformers(name):
    checks.check_llama(FIXTURES / name)


@pytest.fixture(scope="module")
def model():
    return llama.Llama.load(FIXTURES / NAMES[0])


@pytest.fixture(scope="module")
def prompts(model):
    """Three prompts of 9, 4 and 6 tokens, right-padded with garbage."""
    ids = jax.random.randint(jax.random.key(1), (3, 9), 4, model.config.vocab_size)
    return ids, jnp.asarray([9, 4, 6])


@universe.compiled_fast()
def test_a_batch_of_different_lengths_answers_as_each_row_alone(model, prompts):
    ids, lengths = prompts
    limits = dict(max_new_tokens=8, stop_ids=(3,))
    together = generate.generate(model, model.embed(ids), lengths, **limits)
    for row, length in enumerate(lengths):
        alone = model.embed(ids[row : row + 1, :length])
        np.testing.assert_array_equal(
            together[row], generate.generate(model, alone, length[None], **limits)[0]
        )


@universe.compiled_fast()
def test_generation_with_the_cache_equals_the_whole_pass_at_every_step(model, prompts):
    ids, lengths = prompts
    sequence = ids[:1]
    tokens = generate.generate(
        model, model.embed(sequence), lengths[:1], max_new_tokens=6, stop_ids=(70,)
    )
    for token in tokens[0]:
        logits = model.logits(model(model.embed(sequence)))[0, -1]
        assert int(logits.argmax()) == int(token)
        sequence = jnp.append(sequence, token[None, None], axis=1)


@universe.compiled_fast()
def test_any_of_several_stop_tokens_ends_a_row_and_fills_it(model, prompts):
    ids, lengths = prompts
    never = (0, 1)  # tokens that are not generated here
    free = generate.generate(model, model.embed(ids), lengths, max_new_tokens=8, stop_ids=never)
    assert not np.isin(free, never).any()
    stop = int(free[0, 3])
    assert stop not in free[0, :3]
    stop_ids = (0, stop, 1)
    stopped = generate.generate(
        model, model.embed(ids), lengths, max_new_tokens=8, stop_ids=stop_ids
    )
    np.testing.assert_array_equal(stopped[0, :3], free[0, :3])
    assert (stopped[0, 3:] == 0).all()
    streamed = generate.stream(
        model, model.embed(ids[:1]), lengths[:1], max_new_tokens=8, stop_ids=stop_ids
    )
    assert list(streamed) == free[0, :3].tolist()


def test_streaming_gives_the_tokens_of_generate(model, prompts):
    ids, lengths = prompts
    embeds = model.embed(ids[:1])
    whole = generate.generate(model, embeds, lengths[:1], max_new_tokens=6, stop_ids=(70,))[0]
    pieces = list(generate.stream(model, embeds, lengths[:1], max_new_tokens=6, stop_ids=(70,)))
    assert pieces == whole.tolist()[: len(pieces)] and len(pieces) >= 1


@universe.compiled_fast()
def test_streaming_samples_as_generate_does(model, prompts):
    """The same key gives the same tokens, whichever way they are made."""
    ids, lengths = prompts
    sampling = {"temperature": 1.0, "top_p": 0.9, "key": jax.random.key(3)}
    options = {"max_new_tokens": 6, "stop_ids": (70,)} | sampling
    whole = generate.generate(model, model.embed(ids[:1]), lengths[:1], **options)[0]
    pieces = list(generate.stream(model, model.embed(ids[:1]), lengths[:1], **options))
    assert pieces == whole.tolist()[: len(pieces)] and len(pieces) >= 3


def test_prompts_of_many_lengths_are_compiled_for_few(model):
    assert [generate.pad_to_bucket(n) for n in (1, 64, 65, 128, 129, 448, 513)] == [
        *(64, 64, 128, 128, 256, 512, 1024)
    ]
    before = (
        generate._prefill.__wrapped__._cache_size(),
        generate.decode_one_token.__wrapped__._cache_size(),
    )
    for length in (1, 9, 30):
        embeds = model.embed(jnp.ones((1, generate.pad_to_bucket(length)), int))
        lengths = jnp.asarray([length])
        list(generate.stream(model, embeds, lengths, max_new_tokens=3, stop_ids=(70,)))
    after = (
        generate._prefill.__wrapped__._cache_size(),
        generate.decode_one_token.__wrapped__._cache_size(),
    )
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


def test_sampling_follows_the_softmax_and_the_nucleus():
    """20,000 draws: frequencies within 5 standard deviations; nothing outside the nucleus."""
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    draws = jnp.tile(logits, (20_000, 1))
    for top_p, expected in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0, 0])):
        chosen = generate.sample(draws, 1.0, top_p, jax.random.key(0))
        found = np.bincount(chosen, minlength=4) / 20_000
        np.testing.assert_allclose(found, expected, atol=5 * 0.5 / 20_000**0.5)
        assert (found[np.array(expected) == 0] == 0).all()
    cold = generate.sample(draws[:100], 0.05, 1.0, jax.random.key(0))
    assert (cold == 0).mean() > 0.99


@universe.compiled_fast()
def test_gradient_reaches_the_embeddings_and_obeys_causality(model, prompts):
    embeds = model.embed(prompts[0][:1])
    reached = jax.grad(lambda x: jnp.square(model(x)[0, 5]).sum())(embeds)[0]
    assert list(np.abs(reached).sum(-1) > 0) == [True] * 6 + [False] * 3


@pytest.mark.parametrize("cached", [attention.MAX_CPU_SCORES, 0])
@pytest.mark.parametrize("past", [0, 1, 4])
@universe.compiled_fast()
def test_what_stands_before_all_rows_is_read_once_for_them(
    model, prompts, past, cached, monkeypatch
):
    """Nothing, a token or a few: states and gradients of two sequences are those of whole rows."""
    monkeypatch.setattr(attention, "MAX_CPU_SCORES", cached)  # all heads at once, or head by head
    before = model.embed(jnp.arange(5, 5 + past)[None])
    both = model.embed(prompts[0]), model.embed(prompts[0][:, :6])

    def whole(xs):
        rows = jnp.broadcast_to(before, (3, *before.shape[1:]))
        rows = jax.tree.map(lambda x: jnp.concatenate([rows, x], axis=1), xs)
        return jax.tree.map(lambda x: x[:, past:], model(rows))

    def once(xs):
        return model(xs, before=before)

    for found, expected in zip(once(both), whole(both), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    found, expected = (
        jax.grad(lambda xs, f=f: sum(jnp.sin(x).sum() for x in f(xs)))(both) for f in (once, whole)
    )
    for a, b in zip(found, expected, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_older_and_newer_config_files_give_the_same_frequencies():
    new = LLAMAS_CONFIG
    rope = dict(new.rope_parameters)
    old = dataclasses.replace(
        new, rope_parameters=None, rope_theta=rope.pop("rope_theta"), rope_scaling=rope
    )
    np.testing.assert_array_equal(new.frequencies(), old.frequencies())


LLAMAS_CONFIG = llama.weights.read_config(llama.LlamaConfig, FIXTURES / NAMES[0])


def test_an_unknown_rope_type_is_refused():
    with pytest.raises(ValueError, match="rope type 'yarn'; expected 'default' or 'llama3'"):
        dataclasses.replace(LLAMAS_CONFIG, rope_parameters={"rope_type": "yarn"})


# ---------------------------------------------------------------------------------------------
# Chat template


def write_chat(folder, template, **settings):
    """A byte-level tokenizer with Llama 3's special ids, and a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    merges = []
    for word, number in (("user", 882), ("assistant", 78191), ("system", 9125), ("ĊĊ", 271)):
        for end in range(2, len(word) + 1):  # merge letter by letter
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.setdefault(word[:end], 1000 + len(vocabulary))
        vocabulary[word] = number
    # In the real file their numbers follow the vocabulary; here they have to stand in it.
    tokenizer = Tokenizer(models.BPE(vocabulary | SPECIALS, merges, ignore_merges=True))
    tokenizer.add_special_tokens(list(SPECIALS))
    # as Llama 3's own rule has it: "\n\n" is one token also before a letter
    line_ends = pre_tokenizers.Split(Regex(r"\s*[\r\n]+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([line_ends, letters])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin_of_text|>", "chat_template": template} | settings
    settings = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"eos_token_id": [128001, 128009], "vocab_size": 128256}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_llama_3_wraps_the_user_in_the_published_ids(tmp_path):
    chat = llama.Chat.load(write_chat(tmp_path, LLAMA3))
    prefix, suffix = chat.wrap()
    assert prefix == [128000, 128006, 882, 128007, 271]
    assert suffix == [128009, 128006, 78191, 128007, 271]
    assert chat.stop_ids == (128001, 128009)


def test_an_instruction_stands_in_the_system_turn_before_the_user(tmp_path):
    chat = llama.Chat.load(write_chat(tmp_path, LLAMA3))
    prefix, suffix = chat.wrap("Be brief.")
    assert prefix[:5] == [128000, 128006, 9125, 128007, 271]
    assert chat.decode(prefix[5:]).startswith("Be brief.")
    assert prefix[-5:] == [128009, 128006, 882, 128007, 271]
    assert suffix == chat.wrap()[1] and prefix.count(128000) == 1


def test_a_conversation_keeps_what_was_said_between_the_users_turns(tmp_path):
    """BOS once, each header once a turn; one part more than there are users' turns."""
    chat = llama.Chat.load(write_chat(tmp_path, LLAMA3))
    parts = chat.around("Be brief.", ["yes", "no"])
    assert len(parts) == 4
    assert (parts[0], parts[-1]) == chat.wrap("Be brief.")
    header = [128009, 128006, 882, 128007, 271]
    for part, answer in zip(parts[1:3], ("yes", "no"), strict=True):
        assert part[:5] == chat.wrap()[1] and part[-5:] == header
        assert chat.decode(part[5:-5]) == answer
    assert sum(part.count(128000) for part in parts) == 1
    with pytest.raises(ValueError, match="does not keep"):
        chat.around(None, [llama.PLACEHOLDER])


def test_a_template_with_a_date_and_a_default_system_turn_works(tmp_path):
    chat = llama.Chat.load(write_chat(tmp_path, LLAMA31))
    text = chat.decode(chat.wrap("Be brief.")[0])
    assert "Today Date: " in text and "Be brief." in text
    assert chat.wrap()[0][-4:] == [128006, 882, 128007, 271]


def test_the_template_may_stand_in_a_file_of_its_own_or_be_one_of_several(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAMA3}]
    expected = llama.Chat.load(write_chat(tmp_path, LLAMA3)).wrap()
    assert llama.Chat.load(write_chat(tmp_path, named)).wrap() == expected
    folder = write_chat(tmp_path, None)
    (folder / "chat_template.jinja").write_text(LLAMA3)
    assert llama.Chat.load(folder).wrap() == expected


def test_a_model_without_a_template_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no chat_template; expected that of an instruct model"):
        llama.Chat.load(write_chat(tmp_path, None))


def test_a_template_without_a_system_turn_refuses_an_instruction(tmp_path):
    only_user = "{{ bos_token }}{{ messages[-1]['content'] }}<|eot_id|>"
    chat = llama.Chat.load(write_chat(tmp_path, only_user))
    assert chat.wrap() == ([128000], [128009])
    with pytest.raises(ValueError, match=r"does not keep the system and user turns as given"):
        chat.wrap("Be brief.")


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing; expected"):
        llama.Chat.load(shutil.copytree(FIXTURES / NAMES[0], tmp_path / "model"))


def test_a_stream_of_bytes_never_shows_half_a_character(tmp_path):
    chat = llama.Chat.load(write_chat(tmp_path, LLAMA3))
    text = "größe 你好 🙂"
    pieces = list(generate.text_pieces(chat, iter(chat.encode(text))))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces) and len(pieces) > 5


def test_a_question_longer_than_the_context_is_refused(tmp_path, model):
    chat = llama.Chat.load(write_chat(tmp_path, LLAMA3))
    short = dataclasses.replace(model.config, max_position_embeddings=40)
    small = llama.Llama(model.model, model.lm_head, short)
    with pytest.raises(ValueError, match=r"tokens with its template; expected at most 24"):
        next(generate.answer(small, chat, "why " * 20, max_new_tokens=16))
