"""Llama: text to text. Llama 3, 3.1 and 3.2, and the chat template of their turns.

    ids [B, L] -> embed [B, L, E] -> layers -> norm: hidden [B, L, E] -> logits [B, L, V]

Axes: B batch, L positions, E width (hidden_size), H query heads, G key/value heads, K head width,
V vocabulary, N layers, C positions that the cache has room for.

DiVA keeps all of it frozen. The forward pass starts from embeddings, not from tokens, because the
virtual tokens that stand for speech have no number. Attribute names are the published tensor names.

Annex: `attention.attend` is softmax attention, `sharding.run_layers` scans over the stack and
brings each layer to the device that runs it, `sharding.lookup` reads rows of a split table;
`settings` refuses what a model's files ask for and nothing here computes, `template` runs the chat
template.

Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models".
Reads: weights.py.   Read next: generate.py.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from tokenizers import Tokenizer

import weights
from formats import chat_template, model_config
from runtime import attention, cli, files, sharding
from weights import Embedding, Linear

SOME = 4096  # rows of the LLM's table that are looked at together


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama, under the names of the published config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: Any = None  # {"rope_type": "llama3", "factor": ...}
    rope_parameters: Any = None  # newer files: theta and scaling in one place
    tie_word_embeddings: bool = False
    eos_token_id: Any = None  # a number or a list of them
    computed: ClassVar = model_config.LLAMA

    def __post_init__(self):
        heads, groups = self.num_attention_heads, self.key_value_heads
        if heads % groups or (not self.head_dim and self.hidden_size % heads):
            raise ValueError(
                f"num_attention_heads is {heads}; expected a multiple of num_key_value_heads "
                f"{groups} and, without head_dim, a divisor of hidden_size {self.hidden_size}."
            )
        self.frequencies()  # an unknown rope type is refused before anything is read

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    def frequencies(self) -> np.ndarray:
        """Rotation in radians per position of each of the K/2 pairs, with llama3 scaling.

        The scaling slows down the pairs whose wavelength is long beside the length that the model
        was first trained on, keeps the fast ones, and blends between the two.
        """
        said = self.rope_scaling or self.rope_parameters
        rope = model_config.rope(said, self.rope_theta, self.max_position_embeddings)
        plain = rope["rope_theta"] ** -(np.arange(0, self.head_width, 2) / self.head_width)
        if rope["rope_type"] == "default":
            return plain
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return keep * plain + (1 - keep) * plain / rope["factor"]


# ---------------------------------------------------------------------------------------------
# Modules


class RMSNorm(eqx.Module):
    """Divide by the root mean square over the last axis, in f32, then scale."""

    weight: Float[Array, "*N E"]
    eps: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (normal * self.weight).astype(x.dtype)


def rotate(
    x: Float[Array, "B L heads K"], angles: Float[Array, "#B L half"]
) -> Float[Array, "B L heads K"]:
    """RoPE: turn the pair (x_i, x_{i + K/2}) by its angle (the published files' pairing)."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Attention(eqx.Module):
    """Grouped-query attention: H query heads share G key/value heads."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    head_width: int = eqx.field(static=True)

    def __call__(self, x, angles, cache=None, seen=None, before=None):
        """x [B, L, E]. Causal over x, and what stands `before` it; or over what is `seen` of layer
        n's part of a cache, which is (n, positions of x, keys and values of all layers)."""
        queries, keys, values = (
            proj(x).reshape(*x.shape[:2], -1, self.head_width)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = rotate(queries, angles), rotate(keys, angles)
        if cache is None:
            heard = attention.attend(queries, keys, values, causal=True, prefix_kv=before)
            return self.o_proj(heard.reshape(*x.shape[:2], -1)), (keys, values)
        n, positions, cached = cache
        queries, *new = sharding.gather_to_batch((queries, keys, values))

        def write(all_layers, one, at):  # in place, at each row's own position
            return all_layers.at[jnp.arange(len(one)), n, :, at].set(one[:, 0])

        pairs = zip(cached, new, strict=True)
        cached = tuple(sharding.shard_map_batch(write, *pair, positions) for pair in pairs)
        heard = attention.attend_one(queries[:, 0], *(x[:, n] for x in cached), seen)
        return self.o_proj(
            sharding.broadcast_to_param_shards(heard.reshape(*x.shape[:2], -1))
        ), cached


class MLP(eqx.Module):
    """SwiGLU."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(eqx.Module):
    """Attention, then SwiGLU; each behind an RMSNorm, each added back."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: MLP

    def __call__(self, x, angles, cache=None, seen=None, before=None):
        given = angles, cache, seen, before
        heard, keys_values = self.self_attn(self.input_layernorm(x), *given)
        x = x + heard
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values


Cache = tuple[Float[Array, "B N G C K"], Float[Array, "B N G C K"]]  # keys (rotated), values


class LlamaModel(eqx.Module):
    """All that stands under `model.` in a published file."""

    embed_tokens: Embedding
    layers: Layer  # arrays stacked on a leading axis [N, ...]
    norm: RMSNorm


class Llama(eqx.Module):
    """A Llama that starts from embeddings and ends in hidden states."""

    model: LlamaModel
    lm_head: Linear | None  # None: tied to embed_tokens
    config: LlamaConfig = eqx.field(static=True)

    @property
    def output_matrix(self) -> Float[Array, "V E"]:
        return (self.lm_head or self.model.embed_tokens).weight

    def embed(self, ids: Int[Array, "B L"]) -> Float[Array, "B L E"]:
        return sharding.lookup(self.model.embed_tokens.weight, ids)

    def angles(self, positions: Int[Array, "B L"]) -> Float[Array, "B L half"]:
        return positions[..., None] * jnp.asarray(self.config.frequencies(), jnp.float32)

    def __call__(
        self,
        embeds: PyTree[Float[Array, "B ?L E"], "T"],
        remat: sharding.Remat = "layers",
        before: Float[Array, "1 P E"] | None = None,
    ) -> PyTree[Float[Array, "B ?L E"], "T"]:
        """Hidden states after the last norm. Right-padded: what stands after a row's own length
        changes nothing before it, since attention is causal. So what stands `before` all rows
        alike, as a chat template's head does, is read once for all of them.

        Several sequences (of a student and a teacher) go through each layer side by side."""
        past = 0 if before is None else before.shape[1]

        def layer(module, x, start=0, known=None):
            angles = self.angles(start + jnp.arange(x.shape[1])[None])
            return module(x, angles, before=known)

        def layer_for_all(module, states):
            before, xs = states
            before, known = layer(module, before) if past else (before, None)
            return before, jax.tree.map(lambda x: layer(module, x, past, known)[0], xs)

        given = self.model.layers, (before, embeds), layer_for_all, remat
        return jax.tree.map(self.model.norm, sharding.run_layers(*given)[1])

    def prefill(
        self, embeds: Float[Array, "B L E"], lengths: Int[Array, "B"], room: int
    ) -> tuple[Float[Array, "B E"], Cache]:
        """The hidden state at each row's last position, and a cache with `room` positions more."""
        angles = self.angles(jnp.arange(embeds.shape[1])[None])

        def layer(x, module):
            return sharding.shard_batch(sharding.all_gather_params(module, x.dtype)(x, angles))

        x, cache = jax.lax.scan(layer, sharding.shard_batch(embeds), self.model.layers)
        cache = jax.tree.map(
            lambda kv: jnp.pad(kv.transpose(1, 0, 3, 2, 4), [(0, 0)] * 3 + [(0, room), (0, 0)]),
            cache,
        )
        last = sharding.shard_map_batch(lambda x, n: x[jnp.arange(len(x)), n - 1], x, lengths)
        return self.model.norm(last), cache

    def step(
        self, ids: Int[Array, "B"], positions: Int[Array, "B"], cache: Cache
    ) -> tuple[Float[Array, "B E"], Cache]:
        """One token more, at each row's own position; it overwrites the padding there."""
        angles = self.angles(positions[:, None])
        seen = jnp.arange(cache[0].shape[3]) <= positions[:, None]

        def layer(state, numbered):
            (x, cache), (n, module) = state, numbered
            x, cache = module(x, angles, (n, positions, cache), seen)
            return (sharding.broadcast_to_param_shards(x), cache), None

        start = sharding.broadcast_to_param_shards(self.embed(ids[:, None])), cache
        numbered = jnp.arange(self.config.num_hidden_layers), self.model.layers
        x, cache = jax.lax.scan(layer, start, numbered)[0]
        return self.model.norm(x[:, 0]), cache

    def logits(self, hidden: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
        """Next-token logits, in f32."""
        return weights.logits(hidden, self.output_matrix)

    @staticmethod
    def init(config: LlamaConfig, key: PRNGKeyArray) -> "Llama":
        """Random weights (normal, 0.02)."""
        c, n, width = config, config.num_hidden_layers, config.hidden_size
        keys = iter(jax.random.split(key, 16))

        def linear(n_out, n_in, lead=(n,)):
            return Linear(0.02 * jax.random.normal(next(keys), (*lead, n_out, n_in)))

        def norm(*lead):
            return RMSNorm(jnp.ones((*lead, width)), c.rms_norm_eps)

        wide, narrow = (h * c.head_width for h in (c.num_attention_heads, c.key_value_heads))
        layers = Layer(
            input_layernorm=norm(n),
            self_attn=Attention(
                q_proj=linear(wide, width),
                k_proj=linear(narrow, width),
                v_proj=linear(narrow, width),
                o_proj=linear(width, wide),
                head_width=c.head_width,
            ),
            post_attention_layernorm=norm(n),
            mlp=MLP(
                gate_proj=linear(c.intermediate_size, width),
                up_proj=linear(c.intermediate_size, width),
                down_proj=linear(width, c.intermediate_size),
            ),
        )
        embed = Embedding(linear(c.vocab_size, width, lead=()).weight)
        head = None if c.tie_word_embeddings else linear(c.vocab_size, width, lead=())
        return Llama(LlamaModel(embed, layers, norm()), head, config)

    @staticmethod
    def published(folder: Path, dtype=None) -> weights.Published:
        """What a published folder holds; floats in `dtype`."""
        config = weights.read_config(LlamaConfig, folder)
        template = weights.abstract(Llama.init, config, jax.random.key(0), dtype=dtype)
        tied = {"lm_head.weight": "tied to model.embed_tokens"}
        return weights.Published(template, unused=tied if config.tie_word_embeddings else {})

    @staticmethod
    def load(
        path: str | Path, dtype=jnp.float32, place: Callable = lambda template: template
    ) -> "Llama":
        """Load a published checkpoint; `place` gives the template's arrays their shardings."""
        folder = weights.resolve(path)
        template, prefix, unused = Llama.published(folder, dtype)
        if template.lm_head is None:
            weights.check_tied(folder, "lm_head.weight", "model.embed_tokens.weight")
        return weights.load(place(template), folder, prefix, unused)


def nearest_tokens(virtual: Float[Array, "B Q E"], table: Float[Array, "V E"]) -> Int[Array, "B Q"]:
    """The token whose embedding is nearest to each virtual token, by L2 distance."""
    rows, most = table.shape[0], min(SOME, table.shape[0])

    def look(best, start):
        """Further rows of the table: the distances to all at once could be tens of GB."""
        some = jax.lax.dynamic_slice_in_dim(table, start, most)
        some = sharding.all_gather_rows(some).astype(jnp.float32)
        # |v - e|^2 = |v|^2 - 2 v.e + |e|^2, and |v|^2 is the same for every token
        far = jnp.square(some).sum(-1) - 2 * virtual.astype(jnp.float32) @ some.T
        found = far.min(-1), start + far.argmin(-1)
        return jax.tree.map(lambda a, b: jnp.where(found[0] < best[0], a, b), found, best), None

    # the last rows are looked at with some that were seen before: those cannot win again
    starts = jnp.minimum(jnp.arange(0, rows, most), rows - most)
    none = jnp.full(virtual.shape[:2], jnp.inf), jnp.zeros(virtual.shape[:2], starts.dtype)
    return jax.lax.scan(look, none, starts)[0][1]


# ---------------------------------------------------------------------------------------------
# Chat template


@dataclasses.dataclass(frozen=True)
class Chat:
    """The model's own tokenizer and chat template.

    DiVA needs the user's turn with a hole in it: `wrap` renders the template around a placeholder
    and splits there. The two sides are tokenised without added specials, because the template
    writes its own: a second BOS would be one that the LLM never saw in training.
    """

    tokenizer: Tokenizer
    render: Callable[[list[dict[str, str]]], str]
    stop_ids: tuple[int, ...]
    rows: int  # of the LLM's embedding table
    folder: Path

    @staticmethod
    def load(path: str | Path) -> "Chat":
        """Raises FileNotFoundError without tokenizer.json, ValueError without a chat template."""
        folder = weights.resolve(path)
        tokenizer, rows = model_config.tokenizer(folder), model_config.rows(folder)
        file, said = model_config.generation(folder, model_config.ANSWERING)
        stops = said.get("eos_token_id")
        if stops is None:
            stops = files.read_json(folder / "config.json").get("eos_token_id")
        if not (stops := model_config.token_ids(file, "eos_token_id", stops, rows)):
            raise ValueError(
                f"{folder / 'config.json'}: no eos_token_id; expected the token (or list of them) "
                "that ends an answer. Add it to generation_config.json."
            )
        return Chat(tokenizer, chat_template.load(folder), stops, rows, folder)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for a token that the embedding table has no row for."""
        return self._checked(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """On all cores."""
        found = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [self._checked(row.ids) for row in found]

    def _checked(self, ids: list[int]) -> list[int]:
        if max(ids, default=0) >= self.rows:
            name = f"token {self.tokenizer.id_to_token(max(ids))!r}"
            model_config.token_ids(self.folder / "tokenizer.json", name, max(ids), self.rows)
        return ids

    def decode(self, ids: Any) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def wrap(self, system: str | None = None) -> tuple[list[int], list[int]]:
        """Token ids before and after the user's words, with BOS once and the assistant's header."""
        before, after = self.around(system)
        return before, after

    def around(self, system: str | None = None, answers: Sequence[str] = ()) -> list[list[int]]:
        """Token ids around the user's words in a conversation: before the first, between each two,
        after the last. `answers` are what the assistant said to all but the last."""
        turns = [{"role": "system", "content": system}] if system is not None else []
        user = {"role": "user", "content": PLACEHOLDER}
        for answer in answers:
            turns += [user, {"role": "assistant", "content": answer}]
        text = self.render([*turns, user])
        parts = text.split(PLACEHOLDER)
        if len(parts) != len(answers) + 2 or (system is not None and system.strip() not in text):
            kept = "system and user turns" if turns else "user turn"
            raise ValueError(
                f"{self.folder}: the chat template does not keep the {kept} as given; expected a "
                "template that writes each once. Use an instruct model with such turns, or no "
                "instruction."
            )
        return [self.encode(part) for part in parts]


PLACEHOLDER = "<<<speech>>>"


def main(
    question: Annotated[str, tyro.conf.Positional] = "what is the capital of france",
    model: str = "toy/llama",
    system: str | None = None,
    max_new_tokens: int = 256,
) -> None:
    """Ask a Llama a question.

    Args:
        question: what the user says.
        model: folder or Hugging Face repo id.
        system: instruction in the system turn.
        max_new_tokens: the answer stops here at the latest.
    """
    import generate  # what writes word after word is the next chapter

    chat, dtype = Chat.load(model), sharding.compute_dtype(jax.default_backend())
    llm = Llama.load(model, dtype, sharding.shard_params_locally)
    for piece in generate.answer(llm, chat, question, system, max_new_tokens):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
