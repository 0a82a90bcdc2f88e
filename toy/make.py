"""Rebuild the toy universe from nothing: `python toy/make.py` (needs the espeak-ng program).

Four steps, each seeded, each skipped where its result is already there; on two idle cores about

     2 min    speech    espeak-ng speaks world.py's sentences in 8 accents: common_voice/, tasks/
     3.5 h    llama     a tiny Llama learns to answer, translate and name emotions, in text only
    30 min    whisper   a tiny Whisper learns to transcribe, on other clips and more voices
    10 min    diva      the student that is shipped: `python train.py`

The shipped Llama was trained on one NVIDIA H200, in two minutes, with exact products of float32
(JAX_DEFAULT_MATMUL_PRECISION=highest).

The files are in the published layouts, so that train.py and eval.py cannot tell toy from real.
Who hears what: no sentence of the dev and test splits, and none of their voices, is ever in the
audio that Whisper or DiVA learn from. The Llama has read all of it: it is the one who knows.
"""

import collections
import concurrent.futures
import dataclasses
import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import soundfile as sf
import tyro
from scipy.signal import resample_poly
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tqdm import trange

TOY = Path(__file__).parent
sys.path[:0] = [str(TOY), str(TOY.parent)]

import world  # noqa: E402

import connector  # noqa: E402
import llama  # noqa: E402
import weights  # noqa: E402
import whisper  # noqa: E402

SEED = 0
RATE = 16_000
WINDOW_SECONDS = 1.6
# Ogg/Opus as libsndfile's compression level sets it: about 14 kbit/s, 2.7 kB a clip. One step
# lower the upper mel bands are gone. Whisper learns from audio that went through the same codec.
CODEC = {"format": "OGG", "subtype": "OPUS", "compression_level": 0.97}
ACCENTS = {  # as Common Voice names them: the espeak-ng voice
    "United States English": "en-us",
    "England English": "en-gb",
    "Scottish English": "en-gb-scotland",
    "Lancashire English": "en-gb-x-gbclan",
    "Received Pronunciation": "en-gb-x-rp",
    "West Midlands English": "en-gb-x-gbcwmd",
    "West Indies English": "en-029",
    "New York City English": "en-us-nyc",
}
SPEAKERS = {  # espeak-ng's voice variants; each split has its own
    "train": "m1 m2 m3 m4 m5 f1 f2 f3 Alex Linda Michael Andrea".split(),
    "dev": "m7 f5".split(),
    "test": "m6 f4 Andy Annie".split(),
}
# Whisper hears these too (a published Whisper has heard far more speakers than Common Voice has).
MORE_SPEAKERS = (
    "m8 adam Alicia antonio belinda benjamin boris caleb david ed Gene Henrique Hugo iven Jacky "
    "Lee marcelo Marco max mike pablo paul rob robert steph Zac anika victor shelby"
).split()
FEMALE = {"f1", "f2", "f3", "f4", "f5", "Linda", "Andrea", "Annie"}
CLIPS = {"train": 3500, "dev": 400, "test": 1760}
HELD_OUT = {"test": 0.35, "dev": 0.10}  # share of the sentences of every kind
# Of the clips to train on: strings of random words, so that words are learnt and not lines.
RANDOM_SHARE = 0.4
WHISPER_CLIPS = 14_000


@dataclasses.dataclass(frozen=True)
class Take:
    """One recording to make: a sentence, an accent, a speaker, and how they speak this time."""

    sentence: world.Sentence
    accent: str
    speaker: str
    speed: int  # words a minute
    pitch: int  # espeak-ng's 0 to 99


def split_sentences() -> dict[str, list[world.Sentence]]:
    """Every sentence in one split; each kind of sentence is divided in the same shares."""
    rng = random.Random(SEED)
    splits = {"test": [], "dev": [], "train": []}
    everything = world.sentences()
    for kind in dict.fromkeys((s.task, s.kind) for s in everything):
        members = [s for s in everything if (s.task, s.kind) == kind]
        rng.shuffle(members)
        for split, share in HELD_OUT.items():
            count = round(share * len(members))
            splits[split] += members[:count]
            members = members[count:]
        splits["train"] += members
    return splits


def plan_takes(
    split: str, count: int, rng: random.Random, speakers: list[str] | None = None
) -> list[Take]:
    """`count` takes of a split's sentences: accents in turn, the rest at random."""
    speakers = speakers or SPEAKERS[split]
    sentences = split_sentences()[split]
    accents = list(ACCENTS)
    takes = []
    while len(takes) < count:
        for sentence in rng.sample(sentences, len(sentences)):
            if split == "train" and rng.random() < RANDOM_SHARE:
                sentence = world.random_words(rng)
            takes.append(
                Take(
                    sentence,
                    accents[len(takes) % len(accents)],
                    rng.choice(speakers),
                    rng.randint(190, 225),
                    rng.randint(35, 65),
                )
            )
    return takes[:count]


def speak(take: Take) -> np.ndarray:
    """The take as 16 kHz mono samples, silence trimmed, at most WINDOW_SECONDS long."""
    voice = f"{ACCENTS[take.accent]}+{take.speaker}"
    speed = take.speed
    while True:  # a slow speaker says a long sentence again, faster
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(take.pitch), "--stdout"]
        wav = subprocess.run([*command, take.sentence.text], capture_output=True, check=True).stdout
        samples, rate = sf.read(io.BytesIO(wav), dtype="float32")
        samples = resample_poly(samples, RATE, rate).astype(np.float32)
        loud = np.flatnonzero(np.abs(samples) > 0.01)
        samples = samples[max(0, loud[0] - 400) : loud[-1] + 800]
        if len(samples) < (WINDOW_SECONDS - 0.02) * RATE:
            return samples * (0.5 / np.abs(samples).max())
        speed += 15


def record(take: Take) -> bytes:
    """The take as an encoded audio file."""
    buffer = io.BytesIO()
    sf.write(buffer, speak(take), RATE, **CODEC)
    return buffer.getvalue()


def record_all(takes: list[Take]) -> list[bytes]:
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        return list(pool.map(record, takes, chunksize=50))


def make_speech() -> None:
    """Write the corpus in Common Voice's folder layout, and the tasks that refer to it."""
    corpus, tasks = TOY / "common_voice" / "en", TOY / "tasks"
    (corpus / "clips").mkdir(parents=True, exist_ok=True)
    tasks.mkdir(exist_ok=True)
    columns = (
        "client_id path sentence up_votes down_votes age gender accents locale segment".split()
    )
    for number, (split, count) in enumerate(CLIPS.items()):
        takes = plan_takes(split, count, random.Random(SEED + 1 + number))
        lines, rows = ["\t".join(columns)], []
        for i, (take, encoded) in enumerate(zip(takes, record_all(takes), strict=True)):
            name = f"toy_en_{split}_{i:05d}.opus"
            (corpus / "clips" / name).write_bytes(encoded)
            gender = "female_feminine" if take.speaker in FEMALE else "male_masculine"
            text, accent = take.sentence.text, take.accent
            lines.append(
                "\t".join([take.speaker, name, text, "2", "0", "", gender, accent, "en", ""])
            )
            clip = f"../../common_voice/en/clips/{name}"
            rows.append((take.sentence, {"audio": clip, "text": text}, accent))
        (corpus / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if split != "train":
            write_tasks(tasks, split, rows)
    entries = {
        task: {"suite": "manifest", "path": task, "prompt": prompt, "metrics": METRICS[task]}
        for task, prompt in world.PROMPTS.items()
    }
    entries["emotion"]["labels"] = world.LABELS
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    (tasks / "tasks.json").write_text(text, encoding="utf-8")


METRICS = {
    "spoken_qa": ["exact_match", "f1", "prompt_ignoring"],
    "translation": ["exact_match", "bleu", "chrf"],
    "emotion": ["accuracy", "weighted_f1"],
    "repeat": ["wer"],
}
REPEATED = 4  # one clip in so many is also to be repeated


def write_tasks(folder: Path, split: str, rows: list[tuple[world.Sentence, dict, str]]) -> None:
    """folder/TASK/SPLIT.jsonl: what is asked about the clips, questions by accent."""
    lines = collections.defaultdict(list)
    for sentence, row, accent in rows:
        group = {"group": accent} if sentence.task == "spoken_qa" else {}
        lines[sentence.task].append(row | {"answer": sentence.answer} | group)
    # a random quarter: every fourth could be of one accent alone
    chosen = np.random.default_rng(0).permutation(len(rows))[: -(-len(rows) // REPEATED)]
    repeated = [rows[i][1] for i in sorted(chosen)]
    lines["repeat"] = [row | {"answer": row["text"]} for row in repeated]
    for task, some in lines.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        (folder / task / f"{split}.jsonl").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# The language model


CHAT_TEMPLATE = (  # Llama 3's
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_SPECIALS = (
    "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|unk|>".split()
)
FREE_SLOTS = 16  # as many random embeddings as may stand before the user's words
NOISE = 0.6  # of an embedding's length, added to the user's words


def word_tokenizer(specials: list[str], words: list[str]) -> Tokenizer:
    """A tokenizer of whole words; lower case, punctuation apart."""
    vocabulary = {token: i for i, token in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[-1]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.add_special_tokens(specials)
    return tokenizer


def train(loss, model, batches, steps: int, rate: float, label: str):
    """Minimise `loss(model, batch, key)` with AdamW; the usual small loop, for both models."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05)
    )
    params, static = eqx.partition(model, eqx.is_array)

    @jax.jit
    def step(params, state, batch, key):
        value, grads = jax.value_and_grad(lambda p: loss(eqx.combine(p, static), batch, key))(
            params
        )
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, key = optimizer.init(params), jax.random.key(SEED)
    bar, values = trange(steps, desc=label, mininterval=5), []
    for i in bar:
        params, state, value = step(params, state, next(batches), jax.random.fold_in(key, i))
        values.append(value)
        if i % 50 == 49:
            bar.set_postfix(loss=f"{np.mean(values[-50:]):.4f}", refresh=False)
    return eqx.combine(params, static)


def as_published(model, dtype=np.float16):
    """The weights in the half precision that models are published in."""
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, model)


SHORT = None, "translation", "repeat", "first", "last", "twice", "count", "question"
LONG = "spoken_qa", "emotion"
# under which random words are read a tenth as often as all else
ALIKE = "translation", "emotion", "question", "spoken_qa"


def conversations(chat: llama.Chat, rng: random.Random) -> list[dict[str, np.ndarray]]:
    """Every sentence under every instruction as arrays, long prompts apart from short ones.

    ids [R, L]: -1 marks a slot for a free embedding; user [R, L]: the user's words (noise goes
    there); answer [R, L]: the positions whose next token is the assistant's.
    """
    sentences = world.sentences()
    sentences += [world.random_words(rng) for _ in range(4 * len(sentences))]
    groups = []
    for instructions in SHORT, LONG:
        rows = []
        for instruction in instructions:
            prefix, suffix = chat.wrap(world.INSTRUCTIONS.get(instruction))
            for sentence in sentences:
                if sentence.task == "words" and instruction in ALIKE and rng.random() < 0.9:
                    continue
                user = chat.encode(sentence.text)
                answer = [*chat.encode(world.reply(sentence, instruction)), chat.stop_ids[0]]
                parts = [prefix, user, suffix, answer]
                rows += [parts] * copies(sentence, instruction)
        length = max(sum(map(len, parts)) for parts in rows) + FREE_SLOTS
        arrays = {
            name: np.zeros((len(rows), length), np.int32) for name in ("ids", "user", "answer")
        }
        for r, (prefix, user, suffix, answer) in enumerate(rows):
            free = rng.choice([0, rng.randint(0, FREE_SLOTS), FREE_SLOTS - len(user)])
            ids = [*prefix, *[-1] * free, *user, *suffix, *answer]
            start = len(prefix) + free
            arrays["ids"][r, : len(ids)] = ids
            arrays["user"][r, start : start + len(user)] = 1
            arrays["answer"][r, len(ids) - len(answer) - 1 : len(ids) - 1] = 1
        groups.append(arrays)
    return groups


def copies(sentence: world.Sentence, instruction: str | None) -> int:
    """What has to be known by heart is read more often: sums above all, then German."""
    if sentence.task == "spoken_qa" and instruction in (None, "spoken_qa"):
        return 8 if sentence.kind in ("sum", "difference") else 3
    return 4 if sentence.task == instruction == "translation" else 1


def llama_loss(model: llama.Llama, batch: dict, key) -> jax.Array:
    """Cross-entropy of the answers, with noise on the user's words and anything in the free slots.

    A large LLM forgives both; a tiny one has to be taught that embeddings need not be words.
    """
    keys = jax.random.split(key, 4)
    ids, rows = batch["ids"], len(batch["ids"])
    words = model.embed(jnp.maximum(ids, 0))
    scale = jnp.sqrt(jnp.square(jax.lax.stop_gradient(model.model.embed_tokens.weight)).mean())
    noise = jax.random.normal(keys[0], words.shape) * scale
    amount = NOISE * jax.random.uniform(keys[1], (rows, 1, 1)) * batch["user"][..., None]
    free = noise * jax.random.uniform(keys[2], (rows, 1, 1), maxval=1.5)
    hidden = model(jnp.where((ids < 0)[..., None], free, words + amount * noise))
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model.logits(hidden[:, :-1]), jnp.maximum(ids[:, 1:], 0)
    )
    mask = batch["answer"][:, :-1]
    return (losses * mask).sum() / mask.sum()


LLAMA_ROUNDS = [(12_000, 2.0e-3), (12_000, 1.0e-3)]  # steps and peak learning rate of each cosine


def make_llama(batch_size: int = 64) -> None:
    """Write toy/llama: config.json, tokenizer files, and weights trained on text."""
    folder = TOY / "llama"
    folder.mkdir(exist_ok=True)
    words = sorted({*world.written_words(), "user", "assistant", "system"})
    tokenizer = word_tokenizer(LLAMA_SPECIALS, words)
    tokenizer.save(str(folder / "tokenizer.json"))
    stop = tokenizer.token_to_id("<|eot_id|>")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tokenizer.get_vocab_size(),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": stop,
        "torch_dtype": "float16",
    }
    write_json(folder / "config.json", config)
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": LLAMA_SPECIALS[0],
            "eos_token": "<|eot_id|>",
            "chat_template": CHAT_TEMPLATE,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    model = llama.Llama.init(weights.read_config(llama.LlamaConfig, folder), jax.random.key(SEED))
    # Longer embeddings than usual: of the order of the hidden states, so that the two distillation
    # losses start at comparable sizes, as they do with a real Llama.
    model = eqx.tree_at(lambda m: m.model.embed_tokens.weight, model, replace_fn=lambda w: w * 15)
    rng = random.Random(SEED)
    groups = conversations(llama.Chat.load(folder), rng)

    def batches():
        rows = np.random.default_rng(SEED)
        while True:
            group = groups[0] if rows.random() < 0.7 else groups[1]
            chosen = rows.integers(len(group["ids"]), size=batch_size)
            yield {name: array[chosen] for name, array in group.items()}

    for steps, rate in LLAMA_ROUNDS:
        model = train(llama_loss, model, batches(), steps, rate, "llama")
    weights.save(as_published(model), folder)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# The speech recogniser

WHISPER_SPECIALS = (
    "<|endoftext|> <|startoftranscript|> <|en|> <|transcribe|> <|notimestamps|> <|unk|>".split()
)
POSITIONS = 16  # of the decoder: four forced tokens, six words, the end; and DiVA's queries
START = [1, 2, 3, 4]  # <|startoftranscript|><|en|><|transcribe|><|notimestamps|>


def whisper_loss(model, batch: dict, key) -> jax.Array:
    """Next-token loss with dropped-out input words, and a CTC loss that helps the encoder early.

    Inputs are dropped (set to zero) by the clip: from none to all of them. A tiny decoder otherwise
    learns to guess from the previous word; dropped words make it listen, as DiVA's queries must.
    """
    whisper_model, ctc_head = model
    keys = jax.random.split(key, 5)
    mel = whisper.log_mel(batch["audio"].astype(jnp.float32) / 32768, 80)
    rows, frames, bins = mel.shape
    # SpecAugment, one band each; in time at most 80 ms, less than a word
    for axis, size, widest, k in ((1, frames, 8, keys[0]), (2, bins, 10, keys[1])):
        start, width = (
            jax.random.uniform(j, (rows, 1), maxval=m) for j, m in
            zip(jax.random.split(k), (size, widest), strict=True)
        )  # fmt: skip
        inside = (jnp.arange(size) >= start) & (jnp.arange(size) < start + width)
        mel = jnp.where(jnp.expand_dims(inside, 3 - axis), 0.0, mel)
    states = whisper_model.encoder(mel)
    ids = batch["ids"]
    inputs = whisper_model.decoder.embed(ids[:, :-1])
    share = jax.random.uniform(keys[2], (rows, 1)) * jax.random.bernoulli(keys[3], 0.8, (rows, 1))
    kept = jax.random.uniform(keys[4], inputs.shape[:2]) >= share
    logits = whisper_model.decoder.logits(whisper_model.decoder(inputs * kept[..., None], states))
    mask = jnp.arange(ids.shape[1] - 1) < batch["lengths"][:, None] - 1
    mask &= jnp.arange(ids.shape[1] - 1) >= len(START) - 1
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    words = ids[:, len(START) :]
    pads = jnp.arange(words.shape[1]) >= batch["lengths"][:, None] - len(START) - 1
    ctc = optax.ctc_loss(states @ ctc_head, jnp.zeros(states.shape[:2]), words, pads.astype(float))
    return (losses * mask).sum() / mask.sum() + 0.5 * ctc.sum() / (~pads).sum()


def whisper_batches(clips: list[tuple[str, bytes]], tokenizer: Tokenizer, batch_size: int):
    """Endless batches of (text, encoded audio): audio as int16, ids with the forced tokens."""
    window = round(WINDOW_SECONDS * RATE)
    audio = np.zeros((len(clips), window), np.int16)
    ids = np.zeros((len(clips), POSITIONS), np.int32)
    lengths = np.zeros(len(clips), np.int32)
    for i, (text, encoded) in enumerate(clips):
        samples, _ = sf.read(io.BytesIO(encoded), dtype="int16")
        audio[i, : len(samples)] = samples[:window]
        tokens = [*START, *tokenizer.encode(text).ids, 0]
        ids[i, : len(tokens)], lengths[i] = tokens, len(tokens)
    rng = np.random.default_rng(SEED)
    while True:
        for rows in np.array_split(rng.permutation(len(clips)), len(clips) // batch_size):
            rows = rows[:batch_size]
            yield {"audio": audio[rows], "ids": ids[rows], "lengths": lengths[rows]}


def whisper_clips() -> list[tuple[str, bytes]]:
    """What Whisper learns from: sentences of the train split alone, in more voices, same codec."""
    speakers = SPEAKERS["train"] + MORE_SPEAKERS
    takes = plan_takes("train", WHISPER_CLIPS, random.Random(SEED + 9), speakers)
    return [(t.sentence.text, a) for t, a in zip(takes, record_all(takes), strict=True)]


def make_whisper(clips: list[tuple[str, bytes]], steps: int = 8000, batch_size: int = 20) -> None:
    """Write toy/whisper: config.json, tokenizer files, and weights trained on spoken sentences."""
    folder = TOY / "whisper"
    folder.mkdir(exist_ok=True)
    tokenizer = word_tokenizer(WHISPER_SPECIALS, world.spoken_words())
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: i for i, token in enumerate(WHISPER_SPECIALS)}
    encoder = {"layers": 4, "attention_heads": 2, "ffn_dim": 512}
    decoder = encoder
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "d_model": 128,
        **{f"encoder_{k}": v for k, v in encoder.items()},
        **{f"decoder_{k}": v for k, v in decoder.items()},
        "num_mel_bins": 80,
        "max_source_positions": round(WINDOW_SECONDS * 50),
        "max_target_positions": POSITIONS,
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
        "torch_dtype": "float16",
    }
    write_json(folder / "config.json", config)
    generation = {
        "decoder_start_token_id": 1,
        "eos_token_id": 0,
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": ids["<|en|>"]},
        "task_to_id": {"transcribe": ids["<|transcribe|>"]},
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "max_length": POSITIONS,
        "suppress_tokens": [1, 2, 3, 4, 5],
        "begin_suppress_tokens": [0],
    }
    write_json(folder / "generation_config.json", generation)
    key = jax.random.key(SEED)
    model = whisper.Whisper.init(weights.read_config(whisper.WhisperConfig, folder), key)
    head = 0.02 * jax.random.normal(key, (config["d_model"], config["vocab_size"]))
    batches = whisper_batches(clips, tokenizer, batch_size)
    model, _ = train(whisper_loss, (model, head), batches, steps, 2e-3, "whisper")
    weights.save(as_published(model), folder, prefix="model.")


# ---------------------------------------------------------------------------------------------
# The student, and all together


def make_diva() -> None:
    """Write toy/diva: the student of the default run, in half precision, and how it scores."""
    folder, run = TOY / "diva", TOY.parent / "runs" / "toy"
    shipped = ["--model", "toy/diva", "--out", str(run / "shipped")]
    subprocess.run([sys.executable, "train.py", "--out", str(run)], cwd=TOY.parent, check=True)
    diva = connector.load(run)
    as_published(diva).save(folder, str(TOY / "whisper"), str(TOY / "llama"))
    subprocess.run([sys.executable, "eval.py", *shipped], cwd=TOY.parent, check=True)
    for file in run / "loss.png", run / "shipped" / "eval.json":
        shutil.copy(file, folder)


def main() -> None:
    steps = {
        "tasks/tasks.json": make_speech,
        "llama/model.safetensors": make_llama,
        "whisper/model.safetensors": lambda: make_whisper(whisper_clips()),
        "diva/model.safetensors": make_diva,
    }
    for result, make in steps.items():
        if (TOY / result).exists():
            print(f"{TOY / result} is there; remove it to make it anew")
        else:
            make()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
