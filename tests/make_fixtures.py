"""Tiny random models in the published layouts, and what transformers computes with them.

    python tests/make_fixtures.py [FOLDER]      needs the `parity` extra; default tests/fixtures

Each folder holds config.json, model.safetensors (fp16), for Whisper generation_config.json, and
expected.safetensors with inputs and outputs in f32; versions.json says what made them. The tests
read the committed folder; the parity checks make them anew and read those.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

WHISPERS = {  # odd shapes on purpose: other depths, odd widths, windows of 1 and 0.6 s
    "whisper-multilingual": dict(
        d_model=24, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=40,
        decoder_layers=3, decoder_attention_heads=3, decoder_ffn_dim=28, num_mel_bins=80,
        max_source_positions=50, max_target_positions=20, vocab_size=61,
    ),
    "whisper-turbo": dict(
        d_model=20, encoder_layers=3, encoder_attention_heads=5, encoder_ffn_dim=36,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24, num_mel_bins=128,
        max_source_positions=30, max_target_positions=17, vocab_size=53,
    ),
}  # fmt: skip
START, LANGUAGES, TASKS, NO_TIMESTAMPS, END = 40, {"<|en|>": 41, "<|de|>": 42}, 43, 45, 39

LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=256,
)  # fmt: skip
LLAMAS = {
    "llama-tied-scaled": dict(
        hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=71, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=16384, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE,
    ),
    "llama-untied-head-dim": dict(
        hidden_size=30, intermediate_size=36, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, head_dim=12, vocab_size=67, rms_norm_eps=1e-3,
        tie_word_embeddings=False, max_position_embeddings=512, rope_theta=10000.0,
    ),
}  # fmt: skip


def randomise(model: torch.nn.Module, scale: float = 0.3) -> None:
    """Weights large enough that the outputs differ from token to token, rounded to fp16."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" in name and "encoder" in name:
                continue  # sinusoids
            noise = torch.randn(parameter.shape, generator=generator) * scale
            is_norm_weight = "norm" in name and name.endswith("weight")
            parameter.copy_((noise + 1 if is_norm_weight else noise).half().float())


def write(folder: Path, model: torch.nn.Module, expected: dict[str, np.ndarray]) -> None:
    model.half().save_pretrained(folder)
    arrays = {k: np.ascontiguousarray(v) for k, v in expected.items()}
    save_file(arrays, folder / "expected.safetensors")


def make_whisper(folder: Path, sizes: dict) -> None:
    config = transformers.WhisperConfig(
        **sizes, bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=START,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    randomise(model)
    window = config.max_source_positions * 320
    rng = np.random.default_rng(0)
    audio = rng.normal(size=(2, window)) * np.array([[1e-3], [1.0]])
    audio[0, window // 2 :] = 0
    audio[1, : window // 4] = 0  # far more than 8 decades below the rest: the floor is tested
    audio[1, window // 4 :] += 0.1 * np.sin(np.arange(window // 4, window) * 0.3)
    audio = audio.astype(np.float32)
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=config.num_mel_bins, chunk_length=window / 16000
    )
    extractor.n_samples, extractor.nb_max_frames = window, window // 160
    mel = extractor(list(audio), sampling_rate=16000, return_tensors="pt").input_features
    ids = torch.tensor(rng.integers(0, config.vocab_size, size=(2, 7)))
    rules = transformers.GenerationConfig(
        decoder_start_token_id=START, eos_token_id=END, pad_token_id=END, bos_token_id=END,
        is_multilingual=True, lang_to_id=LANGUAGES,
        task_to_id={"transcribe": TASKS, "translate": 44},
        no_timestamps_token_id=NO_TIMESTAMPS, suppress_tokens=[1, 5, 44],
        begin_suppress_tokens=[END, 7],
        max_length=config.max_target_positions, return_timestamps=False,
    )  # fmt: skip
    model.generation_config = rules
    with torch.no_grad():
        states = model.model.encoder(mel).last_hidden_state
        hidden = model.model.decoder(input_ids=ids, encoder_hidden_states=states).last_hidden_state
        logits = model.proj_out(hidden)
        tokens = model.generate(mel, language="en", task="transcribe", num_beams=1, do_sample=False)
    free = [
        [t for t in row if t not in (START, 41, TASKS, NO_TIMESTAMPS)] for row in tokens.tolist()
    ]
    padded = np.full((len(free), config.max_target_positions), END)
    for i, row in enumerate(free):
        padded[i, : len(row)] = row
    arrays = dict(mel=mel, states=states, ids=ids, hidden=hidden, logits=logits)
    arrays = {name: x.numpy() for name, x in arrays.items()}
    write(folder, model, arrays | {"audio": audio, "tokens": padded})


def make_llama(folder: Path, sizes: dict) -> None:
    config = transformers.LlamaConfig(**sizes, bos_token_id=0, eos_token_id=3, pad_token_id=3)
    model = transformers.LlamaForCausalLM(config).eval()
    randomise(model)
    rng = np.random.default_rng(0)
    ids = torch.tensor(rng.integers(4, config.vocab_size, size=(2, 500)))
    far = torch.tensor([[0, 1, 255, 256, 4096, 8191, 9000]])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        generated = model.generate(
            ids[:1, :9], attention_mask=torch.ones(1, 9, dtype=torch.int64), max_new_tokens=20,
            do_sample=False,
        )  # fmt: skip
        far_cos, far_sin = model.model.rotary_emb(torch.zeros(1, 7, 1), far)
    at = torch.tensor([0, 1, 7, 100, 255, 256, 300, 499])
    arrays = dict(
        ids=ids, at=at, hidden=out.hidden_states[-1][:, at], logits=out.logits[:, at],
        generated=generated[:, 9:], far=far, far_cos=far_cos, far_sin=far_sin,
    )  # fmt: skip
    write(folder, model, {name: x.numpy() for name, x in arrays.items()})


def make_all(folder: Path) -> None:
    for name, sizes in WHISPERS.items():
        make_whisper(folder / name, sizes)
    for name, sizes in LLAMAS.items():
        make_llama(folder / name, sizes)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (folder / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    make_all(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "fixtures")
