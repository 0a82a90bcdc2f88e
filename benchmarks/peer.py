"""The peer: DiVA and its training step in PyTorch, made of transformers' Whisper and Llama.

As one would write it there: scaled_dot_product_attention, no gradient for the encoder and the
teacher, fused AdamW. It reads the same folders as ours and takes the same batches.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

import connector
from training import recipe


class DiVA(torch.nn.Module):
    """Encoder, connector (decoder and projection) and LLM of a DiVA folder, in float32."""

    def __init__(self, folder: Path):
        super().__init__()
        asr_path, llm_path = connector.references(folder)
        asr = transformers.WhisperModel.from_pretrained(asr_path, dtype=torch.float32)
        tensors = {n: x.float() for n, x in load_file(folder / "model.safetensors").items()}
        start = "connector."
        own = {name[len(start) :]: x for name, x in tensors.items() if name.startswith(start)}
        asr.decoder.load_state_dict(own, strict=True)
        self.encoder, self.decoder = asr.encoder, asr.decoder
        self.llm = transformers.LlamaModel.from_pretrained(llm_path, dtype=torch.float32)
        self.query_tokens = torch.nn.Parameter(tensors["query_tokens"])
        self.projection = torch.nn.Linear(*tensors["projection.weight"].shape)
        self.projection.weight.data = tensors["projection.weight"].T.contiguous()
        self.projection.bias.data = tensors["projection.bias"]
        for frozen in (self.encoder, self.decoder.embed_tokens, self.llm):
            frozen.requires_grad_(False)
        self.eval()  # no dropout

    def virtual_tokens(self, mel: torch.Tensor) -> torch.Tensor:
        """mel [B, M, F] -> [B, Q, E]"""
        with torch.no_grad():
            states = self.encoder(mel).last_hidden_state
        queries = self.query_tokens.expand(len(mel), -1, -1)
        heard = self.decoder(
            inputs_embeds=queries, encoder_hidden_states=states, use_cache=False
        ).last_hidden_state
        return self.projection(heard)

    def states(self, embeds: torch.Tensor) -> torch.Tensor:
        return self.llm(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def loss(
        self,
        mel: torch.Tensor,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        text: torch.Tensor,
        last: torch.Tensor,
        prefix: torch.Tensor,
        suffix: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token alignment and response distillation (l2) of a batch: two scalars."""
        virtual, rows = self.virtual_tokens(mel), torch.arange(len(ids))
        table = self.llm.embed_tokens
        at = torch.arange(ids.shape[1])
        query = (virtual.shape[1] - lengths[:, None] + at).clamp(0, virtual.shape[1] - 1)
        distance = (virtual[rows[:, None], query] - table(ids)).norm(dim=-1)
        real = at < lengths[:, None]
        alignment = (distance * real).sum() / real.sum()

        before, after = (table(x).expand(len(ids), -1, -1) for x in (prefix, suffix))
        student = self.states(torch.cat([before, virtual, after], dim=1))[:, -1]
        with torch.no_grad():
            teacher = self.states(table(text))[rows, last]
        return alignment, (student - teacher).norm(dim=-1).mean()


def log_mel(
    audio: np.ndarray, with_torch: bool, num_mel_bins: int = 80
) -> Callable[[], np.ndarray]:
    """transformers' log-mel of audio [B, S]: [B, F, M]. It is in NumPy where torch is absent."""
    module = transformers.models.whisper.feature_extraction_whisper
    module.is_torch_available = lambda: with_torch
    seconds = audio.shape[1] / 16_000
    extractor = transformers.WhisperFeatureExtractor(num_mel_bins, chunk_length=seconds)

    def work():
        found = extractor(list(audio), sampling_rate=16_000, return_tensors="np")
        return found.input_features.swapaxes(1, 2)

    return work


def encoder(folder: Path, mel: np.ndarray) -> Callable[[], np.ndarray]:
    """Whisper's encoder states of mel [B, F, M]."""
    model = transformers.WhisperModel.from_pretrained(folder / "whisper", dtype=torch.float32)
    model, mel = model.encoder.eval(), torch.tensor(mel.swapaxes(1, 2).copy())

    def work():
        with torch.inference_mode():
            return model(mel).last_hidden_state.numpy()

    return work


def prefill(folder: Path, embeds: np.ndarray) -> Callable[[], np.ndarray]:
    """The last hidden state of prompts [B, L, E], and (not returned) the cache."""
    model = transformers.LlamaModel.from_pretrained(folder / "llama", dtype=torch.float32)
    model, embeds = model.eval(), torch.tensor(embeds)

    def work():
        with torch.inference_mode():
            return model(inputs_embeds=embeds, use_cache=True).last_hidden_state[:, -1].numpy()

    return work


def answers(path: Path, ids: np.ndarray, new: int) -> Callable[[], np.ndarray]:
    """The `new` greedy tokens that follow each of the prompts `ids` [B, L], with a cache."""
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig()  # no token ends an answer
    prompts = torch.tensor(ids)
    rules = {"max_new_tokens": new, "do_sample": False, "use_cache": True}
    rules |= {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0}

    def work():
        with torch.inference_mode():
            return model.generate(prompts, **rules)[:, ids.shape[1] :].numpy()

    return work


def losses_of(folder: Path, batch: dict[str, np.ndarray], compiled: bool = False):
    """A DiVA, its trained parameters by published name, and the losses of it on `batch`."""
    diva = DiVA(folder)
    mel = log_mel(batch["audio"], True, diva.encoder.config.num_mel_bins)
    names = ("ids", "lengths", "text", "last", "prefix", "suffix")
    rest = [torch.tensor(batch[name], dtype=torch.long) for name in names]
    loss = torch.compile(diva.loss) if compiled else diva.loss
    trained = {
        name.replace("decoder.", "connector.", 1): parameter
        for name, parameter in diva.named_parameters()
        if parameter.requires_grad
    }
    return trained, lambda: loss(torch.tensor(mel()).mT, *rest)


def gradient(
    folder: Path, batch: dict[str, np.ndarray], config: recipe.Config
) -> Callable[[], tuple[list[float], dict[str, np.ndarray]]]:
    """The two losses, and their weighted sum's gradient by the tensors' published names."""
    trained, losses = losses_of(folder, batch)

    def work():
        alignment, response = losses()
        (config.align_weight * alignment + config.response_weight * response).backward()
        grads = {name: parameter.grad.numpy() for name, parameter in trained.items()}
        grads["projection.weight"] = grads["projection.weight"].T
        return [alignment.item(), response.item()], grads

    return work


def training(
    folder: Path, batch: dict[str, np.ndarray], config: recipe.Config, compiled: bool
) -> Callable[[], list[float]]:
    """A step of training, always on `batch`; it returns the two losses."""
    trained, losses = losses_of(folder, batch, compiled)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=1.0, weight_decay=config.weight_decay, fused=True
    )
    rise = max(1, round(config.warmup * config.steps))

    def rate(step: int) -> float:
        share = (step - rise) / max(1, config.steps - rise)
        cosine = 0.5 * (1 + math.cos(math.pi * min(max(share, 0), 1)))
        return config.learning_rate * ((step + 1) / rise if step < rise else cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def step():
        alignment, response = losses()
        optimizer.zero_grad()
        (config.align_weight * alignment + config.response_weight * response).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.clip)
        optimizer.step()
        schedule.step()
        return [alignment.item(), response.item()]

    return step
