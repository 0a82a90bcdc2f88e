"""Published weights do here what they do in transformers, and a DiVA can be made of them.

The weights are in $DIVA_REAL, else in runs/real, where `python tests/real/fetch.py` puts them. The
speech is a synthesiser's: espeak-ng's or flite's.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

import checks
import fetch

import generate
import llama
import whisper
from formats import audio_files

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("DIVA_REAL") or fetch.DEFAULT).resolve()
if absent := [name for name in fetch.NAMES if not (REAL / name / "model.safetensors").is_file()]:
    pytest.skip(
        f"no {', '.join(absent)} in {REAL}; `python tests/real/fetch.py` gets them",
        allow_module_level=True,
    )
LLM = REAL / "SmolLM2-135M-Instruct"
SENTENCES = [
    f"{who} {does} {where}."
    for who, does, where in itertools.product(
        ("The old man", "A little girl", "My brother", "The black dog"),
        ("is sleeping", "wants to sing", "looks around", "waits for you"),
        ("in the garden", "at the station", "near the river"),
    )
]


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> list[Path]:
    """A file for each of SENTENCES, of 1 to 3 seconds."""
    folder, made = tmp_path_factory.mktemp("speech"), []
    if shutil.which("flite"):
        speak = ["flite", "-voice", "slt", "-o", "FILE", "-t"]
    elif shutil.which("espeak-ng"):
        speak = ["espeak-ng", "-w", "FILE"]
    else:
        pytest.skip("neither flite nor espeak-ng is installed: there is nothing to hear")
    for i, sentence in enumerate(SENTENCES):
        made.append(folder / f"{i}.wav")
        command = [str(made[-1]) if word == "FILE" else word for word in speak]
        subprocess.run([*command, sentence], check=True, capture_output=True)
    return made


# ---------------------------------------------------------------------------------------- Whisper


@pytest.mark.parametrize("name", ["whisper-base", "whisper-tiny.en"])
def test_whisper_hears_what_transformers_hears(clips, name):
    """Mel, logits and greedy tokens of two sentences, from sound on, in f32."""
    ours = generate.Transcriber.load(REAL / name)
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(
        REAL / name, dtype=torch.float32
    )
    window = ours.model.config.window_samples
    audio = np.concatenate(
        [audio_files.load_window(clip, window) for clip in (clips[0], clips[-1])]
    )
    extract = transformers.WhisperFeatureExtractor.from_pretrained(REAL / name)
    features = extract(list(audio), sampling_rate=16000, return_tensors="pt").input_features
    mel = whisper.log_mel(jnp.asarray(audio), ours.model.config.num_mel_bins)
    # log10 of the quietest bins, f32 FFTs of two libraries
    assert np.abs(np.asarray(mel).swapaxes(1, 2) - features.numpy()).max() < 1e-4

    asked = {} if name.endswith(".en") else {"language": "en", "task": "transcribe"}
    with torch.no_grad():
        wrote = theirs.generate(features, num_beams=1, do_sample=False, **asked).numpy()
    tokens = np.asarray(generate.greedy_decode(ours.model, jnp.asarray(audio), **ours.rules))
    rules = {*ours.rules["forced"], ours.model.config.eos_token_id}
    words = [[[t for t in row if t not in rules] for row in x.tolist()] for x in (tokens, wrote)]
    assert words[0] == words[1]
    said = [ours.tokenizer.decode(row).lower() for row in words[0]]
    assert "garden" in said[0] and "river" in said[1], said  # random weights agree too

    ids = jnp.asarray(tokens[:, :12])
    hidden = ours.model.decoder(ours.model.decoder.embed(ids), ours.model.encoder(mel))
    with torch.no_grad():
        ids = torch.tensor(tokens[:, :12])
        logits = theirs(input_features=features, decoder_input_ids=ids).logits
    checks.close(ours.model.decoder.logits(hidden), logits, 2e-5, "logits")


# -------------------------------------------------------------------------------------------- LLM


@pytest.fixture(scope="session")
def chat() -> llama.Chat:
    return llama.Chat.load(LLM)


@pytest.fixture(scope="session")
def pair() -> tuple[llama.Llama, transformers.LlamaForCausalLM]:
    theirs = transformers.LlamaForCausalLM.from_pretrained(LLM, dtype=torch.float32)
    return llama.Llama.load(LLM), theirs


def test_logits_agree_up_to_2048_positions(pair, chat):
    """The source of the module, read as text: f32, 30 layers."""
    ours, theirs = pair
    ids = np.array([chat.encode((ROOT / "llama.py").read_text(encoding="utf-8"))[:2048]])
    at = [0, 1, 7, 100, 512, 1023, 1024, 2000, 2047]
    assert ids.shape == (1, 2048)
    with torch.no_grad():
        logits = theirs.lm_head(theirs.model(torch.tensor(ids)).last_hidden_state[:, at])
    hidden = ours(ours.embed(jnp.asarray(ids)))[:, np.array(at)]
    checks.close(ours.logits(hidden), logits, 1e-5, "logits")


QUESTIONS = ["What is the capital of France?", "Write a poem about the sea.", "12 + 30 = ?"]


def asked(chat: llama.Chat, question: str) -> list[int]:
    before, after = chat.wrap()
    return [*before, *chat.encode(question), *after]


def answer(llm: llama.Llama, chat: llama.Chat, ids: list[int], stops: tuple[int, ...]) -> list[int]:
    """Up to 100 tokens, by the loop and by the stream: one answer."""
    row, length = jnp.asarray(generate.padded_row(ids)), jnp.asarray([len(ids)])
    told = dict(max_new_tokens=100, stop_ids=stops)
    tokens = np.asarray(generate.generate(llm, llm.embed(row), length, **told))[0].tolist()
    streamed = list(generate.stream(llm, llm.embed(row), length, **told))
    assert tokens == streamed + [stops[0]] * (100 - len(streamed))
    return streamed


def transformers_answer(theirs, ids: list[int], stops: list[int]) -> list[int]:
    row = torch.tensor([ids])
    tokens = theirs.generate(
        row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=100,
        eos_token_id=stops, pad_token_id=stops[0],
    )[0, len(ids) :].tolist()  # fmt: skip
    return tokens[:-1] if tokens[-1] in stops else tokens


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_transformers_answers(pair, chat, question):
    """Greedy, token for token."""
    ours, theirs = pair
    ids = asked(chat, question)
    assert answer(ours, chat, ids, chat.stop_ids) == transformers_answer(theirs, ids, [2])


def test_each_of_several_stop_tokens_ends_the_answer(pair, chat, tmp_path):
    """As Llama 3 has it: a list in generation_config.json, here with a token of the answer."""
    ours, theirs = pair
    ids = asked(chat, QUESTIONS[0])
    whole = answer(ours, chat, ids, chat.stop_ids)
    shutil.copytree(LLM, tmp_path / "llm", copy_function=os.symlink)
    (tmp_path / "llm" / "generation_config.json").unlink()
    said = {"eos_token_id": [2, whole[4]]}
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps(said))
    stops = llama.Chat.load(tmp_path / "llm").stop_ids
    short = answer(ours, chat, ids, stops)
    assert short == whole[: whole.index(whole[4])] == transformers_answer(theirs, ids, [*stops])


# [instruction, what the user and the assistant say in turns]
TALKS = [
    (None, ["hello"]),
    ("Be brief.", ["hello"]),
    ("", ["hello"]),
    ("Antworte auf Deutsch: äöüß, 日本語.", ["Grüße aus Köln"]),
    (None, ["what is this?", "A cat.", "and that?"]),
    ("Be brief.", ["one", "two", "three", "four", "five"]),
    (None, ["日本語を話せますか。"]),
    (None, ["👩‍👩‍👧 🎉🇫🇷 مرحبا بالعالم"]),
    (None, ["trailing blanks  "]),
    (None, ["trailing lines\n\n"]),
    *((None, [blank + "one leading blank"]) for blank in " \n\t"),
    (None, ["in 1984, 12345 apples;\n\n\tdef f(x): return x ** 2"]),
    ("  blanks on both sides\n ", ["first ", " second", "third\t"]),
]
MERGING = ["\n\nhello", "\n\n  hello", "  hello", "\n", " \t "]


def both_ids(chat: llama.Chat, tokenizer, system: str | None, words: list[str]):
    """Ids of a conversation, the users' words put between the template's parts, and theirs."""
    parts = chat.around(system, words[1::2])
    said = [[*part, *chat.encode(word)] for part, word in zip(parts, words[::2], strict=False)]
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = itertools.cycle(["user", "assistant"])
    messages += [{"role": next(roles), "content": word} for word in words]
    options = dict(add_generation_prompt=True, return_dict=False)
    theirs = tokenizer.apply_chat_template(messages, **options)
    return [*itertools.chain(*said), *parts[-1]], theirs


@pytest.fixture(scope="session")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(LLM)


@pytest.mark.parametrize("system, words", TALKS)
def test_turns_have_the_ids_of_transformers(chat, tokenizer, system, words):
    """Instructions, several turns, scripts, blanks."""
    ours, theirs = both_ids(chat, tokenizer, system, words)
    assert ours == theirs


def common(ours: list[int], theirs: list[int]) -> int:
    """How many tokens are the same from the first on."""
    same = itertools.takewhile(lambda two: two[0] == two[1], zip(ours, theirs, strict=False))
    return len(list(same))


@pytest.mark.parametrize("text", MERGING)
def test_only_two_blanks_before_the_words_are_cut_otherwise(chat, tokenizer, text):
    """Two or more merge with the line end of the user's header. Here the user's words have tokens
    of their own, as virtual tokens have, which cannot merge: the text is the same, and but for the
    blanks at that seam so are the ids."""
    ours, theirs = both_ids(chat, tokenizer, None, [text])
    assert ours != theirs
    assert tokenizer.decode(ours) == tokenizer.decode(theirs)
    head = common(ours, theirs)
    tail = common(ours[head:][::-1], theirs[head:][::-1])
    before = len(chat.wrap()[0])
    assert before - 1 <= head <= before
    for ids in (ours, theirs):
        assert tokenizer.decode(ids[head : len(ids) - tail]).isspace()


@pytest.mark.parametrize(
    "text", ["日本語を話せますか。鬱", "👩‍👩‍👧🎉 🇫🇷 🫠", "مرحبا بالعالم، كيف الحال؟"]
)
def test_a_stream_never_breaks_a_character(chat, text):
    """Its tokens end inside characters; the pieces do not."""
    ids = chat.encode(text)
    assert any("\ufffd" in chat.decode([token]) for token in ids)
    pieces = list(generate.text_pieces(chat, iter(ids)))
    assert len(pieces) > 3 and "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


# ------------------------------------------------------------------------------------------- DiVA


def run(*command: object) -> str:
    """What a command of ours prints, on one device."""
    ended = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


STEPS, SAVED = 30, 26


def train(data: Path, out: Path) -> str:
    """Thirty steps of four clips; at a rate ten times the preset's, they would overshoot."""
    return run(
        *("train.py", "--preset", "small", "--whisper", REAL / "whisper-base", "--llm", LLM),
        *("--data", data, "--out", out, "--window", 3, "--queries", 24, "--steps", STEPS),
        *("--batch-size", 4, "--micro-batch", 2, "--learning-rate", 5e-5, "--save-every", SAVED),
    )


@pytest.fixture(scope="session")
def diva(clips, tmp_path_factory) -> tuple[Path, Path]:
    """Folder of a finished run, and the list of its clips."""
    rows = [dict(audio=str(c), text=s) for c, s in zip(clips, SENTENCES, strict=True)]
    room = tmp_path_factory.mktemp("diva")
    data = write_lines(room / "clips.jsonl", rows)
    train(data, room / "run")
    return room / "run", data


def test_both_losses_fall(diva):
    """whisper-base and SmolLM2: the last five steps against the first five."""
    folder, _ = diva
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
    for name in ("alignment", "response"):
        losses = [step[name] for step in steps]
        assert np.mean(losses[-5:]) < np.mean(losses[:5]), (name, losses)


def test_a_run_that_was_cut_off_ends_with_the_same_weights(diva, tmp_path):
    """Its folder as the power cut left it behind the last checkpoint but one; bit for bit."""
    folder, data = diva
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    assert f"at step {SAVED} of {STEPS}" in train(data, tmp_path / "run")
    whole, cut = (at / "model.safetensors" for at in (folder, tmp_path / "run"))
    assert whole.read_bytes() == cut.read_bytes()


def test_every_command_reads_the_student(diva, clips, tmp_path):
    """connector.py, demo.py and eval.py, which asks three clips."""
    folder, _ = diva
    assert "after training" in run("connector.py", clips[0], "--model", folder)
    said = run("demo.py", clips[0], "--model", folder, "--max-new-tokens", 8)
    assert "heard:" in said and "answer:" in said
    rows = [
        dict(audio=str(c), text=s, answer=s) for c, s in zip(clips[:3], SENTENCES, strict=False)
    ]
    task = dict(suite="manifest", prompt="Repeat the input.", metrics=["wer"])
    task |= {"path": str(write_lines(tmp_path / "three.jsonl", rows))}
    (tmp_path / "tasks.json").write_text(json.dumps({"repeat": task}))
    run("eval.py", "--model", folder, "--tasks", tmp_path, "--out", tmp_path / "found")
    found = json.loads((tmp_path / "found" / "eval.json").read_text())
    assert {"untrained", "diva", "cascade", "text"} <= {*found["systems"]}
    assert not found["errors"]
    answers = (tmp_path / "found" / "predictions.jsonl").read_text().splitlines()
    assert len(answers) == 4 * len(rows)
