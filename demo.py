"""Demo: talk to a DiVA, in the terminal or on a page with a microphone.

    python demo.py clip.mp3                          the answer, as it is generated
    python demo.py clip.mp3 "Answer in German."      under an instruction, also as --instruction
    python demo.py first.wav second.wav              two turns of one conversation
    python demo.py --serve                           a page at http://127.0.0.1:7860

    audio -> virtual tokens -> [template; virtual tokens; template] -> prefill -> token after token

Nothing is transcribed on the way: the first token of the answer comes after one pass of each part.
Prompts are padded to a power of two, so that few lengths are ever compiled, and what was compiled
is kept on disk for the next start.

Axes: S audio samples, Q virtual tokens, N tokens of text, E the LLM's width, L positions of the
prompt.
Reads: weights.py, llama.py, generate.py, connector.py.   The last chapter.
"""

import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import soundfile
import tyro
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

import connector
import generate
import llama
import weights
from formats import audio_files
from formats.audio_files import SAMPLE_RATE
from runtime import cli, files, sharding

TOY = Path(__file__).parent / "toy"
PIECES = 10  # a long recording may be so many windows
SHOWN = 24  # virtual tokens that are shown as words
ENDINGS = set(".wav .mp3 .flac .ogg .oga .opus .m4a .mp4 .aac .aif .aiff .au .webm".split())


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest, or drawn."""

    temperature: float = 0.0  # 0: the likeliest
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256


class Turn(NamedTuple):
    """What was said and answered: virtual tokens [Q, E] or ids of text [N], and the answer."""

    said: np.ndarray
    answer: str


@dataclasses.dataclass
class Reply:
    """An answer so far."""

    heard: str  # the text tokens nearest to the virtual tokens, or what Whisper wrote
    text: str = ""
    tokens: int = 0
    first: float = 0.0  # seconds from the recording to the first token
    rate: float = 0.0  # tokens a second after it
    turn: Turn | None = None  # when the answer is whole

    def times(self) -> str:
        after = f", then {self.rate:.0f} tokens/s" if self.rate else ""
        return f"first token after {self.first:.2f} s{after}"


# ---------------------------------------------------------------------------------------------
# The assistant


@sharding.use_model_mesh
@eqx.filter_jit
def _embed(llm: llama.Llama, ids: Int[Array, "1 L"]) -> Float[Array, "1 L E"]:
    return llm.embed(ids)


_put = jax.jit(generate.insert_virtual_tokens, donate_argnames="embeds")


@dataclasses.dataclass(frozen=True)
class Assistant:
    """A DiVA and its LLM's chat."""

    diva: connector.DiVA
    chat: llama.Chat
    toy: bool  # does it know no more than the toy universe?
    asr: Callable[[], generate.Transcriber]  # its Whisper whole, read when it is first to write

    @staticmethod
    def load(model: str | Path) -> "Assistant":
        """float32 on a CPU, bfloat16 elsewhere. Raises ValueError or FileNotFoundError."""
        dtype = sharding.compute_dtype(jax.default_backend())
        asr_path, llm_path = connector.references(model)
        toy = weights.resolve(llm_path).resolve() == (TOY / "llama").resolve()
        mesh = sharding.local_mesh(connector.templates(model, dtype))
        place = functools.partial(sharding.shard_params, mesh=mesh)
        diva = connector.load(model, dtype, place)
        read = generate.Transcriber.load
        asr = functools.partial(read, asr_path, dtype=dtype, place=place, encoder=diva.encoder)
        return Assistant(diva, llama.Chat.load(llm_path), toy, functools.cache(asr))

    @property
    def window(self) -> float:
        """Seconds that are heard at once."""
        return self.diva.window_samples / SAMPLE_RATE

    def parts(
        self, clip: str | Path, long: bool = False, live: bool = False
    ) -> list[Float[Array, "1 S"]]:
        """A recording as windows; `long` and `live` as in audio_files.windows. Raises ValueError or
        FileNotFoundError that names the file."""
        rows = audio_files.windows(clip, self.diva.window_samples, long, live, PIECES)
        return [jnp.asarray(row)[None] for row in rows]

    def listen(
        self, clip: str | Path, long: bool = False, live: bool = False
    ) -> Float[np.ndarray, "Q E"]:
        """Virtual tokens of a recording, those of its parts one behind the other. Raises as
        `parts`."""
        rows = self.parts(clip, long, live)
        return np.concatenate(
            [np.asarray(connector.virtual_tokens_jit(self.diva, row)[0]) for row in rows]
        )

    def write(
        self, clip: str | Path, long: bool = False, live: bool = False
    ) -> Int[np.ndarray, "N"]:
        """The tokens of what Whisper writes: a cascade reads them, where DiVA listens. Raises as
        `parts`."""
        text = " ".join(self.asr()(row)[0] for row in self.parts(clip, long, live))
        return np.asarray(self.chat.encode(text), np.int32)

    def heard(self, said: Float[np.ndarray, "Q E"] | Int[np.ndarray, "N"]) -> str:
        """What was written; or the text tokens nearest to the last virtual tokens: those stand for
        the words."""
        if said.ndim == 1:
            return self.chat.decode(said)
        ids = np.asarray(connector.nearest_token_ids(self.diva.llm, jnp.asarray(said)[None]))[
            0, -SHOWN:
        ]
        return " ".join(self.chat.decode(ids).split())

    def prompt(
        self,
        turns: Sequence[Turn],
        said: Float[np.ndarray, "Q E"] | Int[np.ndarray, "N"],
        instruction: str | None,
        room: int = 0,
    ) -> tuple[Float[Array, "1 L E"], int]:
        """Embeddings of the conversation up to the assistant's next word, and how many they are.

        Raises ValueError if the LLM has no positions for them and `room` tokens more.
        """
        around = self.chat.around(instruction, [answer for _, answer in turns])
        ids, virtual = [*around[0]], {}
        for tokens, after in zip([*(before for before, _ in turns), said], around[1:], strict=True):
            if tokens.ndim == 2:  # a hole, into which they are put
                virtual[len(ids)] = tokens
            ids += ([0] * len(tokens) if tokens.ndim == 2 else tokens.tolist()) + after
        most = self.diva.llm.config.max_position_embeddings
        if len(ids) + room > most:
            raise ValueError(
                f"the conversation has {len(ids)} positions; expected at most {most - room} "
                f"({most} less {room} for the answer). Start a new one."
            )
        embeds = _embed(self.diva.llm, jnp.asarray(generate.padded_row(ids)))
        for start, tokens in virtual.items():
            embeds = _put(embeds, jnp.asarray(tokens)[None], jnp.asarray([start]))
        return embeds, len(ids)

    def answer(
        self,
        clip: str | Path,
        turns: Sequence[Turn] = (),
        instruction: str | None = None,
        sampling: Sampling = Sampling(),
        long: bool = False,
        live: bool = False,
        cascade: bool = False,
    ) -> Iterator[Reply]:
        """The reply to a recording, again and again while it grows; the last one has its turn.

        `turns` are those of the conversation before it. A `cascade` reads what Whisper writes.
        Raises ValueError or FileNotFoundError.
        """
        began = time.perf_counter()
        said = (self.write if cascade else self.listen)(clip, long, live)
        yield from self.reply(said, turns, instruction, sampling, began)

    def reply(
        self,
        said: Float[np.ndarray, "Q E"] | Int[np.ndarray, "N"],
        turns: Sequence[Turn],
        instruction: str | None,
        sampling: Sampling,
        began: float,
    ) -> Iterator[Reply]:
        """As `answer`, to what was listened to, or is text; times are counted from `began`."""
        turns = () if self.toy else turns  # its LLM has never seen a second turn
        embeds, length = self.prompt(turns, said, instruction, sampling.max_new_tokens)
        tokens = generate.stream(
            self.diva.llm,
            embeds,
            jnp.asarray([length]),
            max_new_tokens=sampling.max_new_tokens,
            stop_ids=self.chat.stop_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            key=jax.random.fold_in(jax.random.key(sampling.seed), len(turns)),
        )
        reply = Reply("")

        def counted() -> Iterator[int]:
            for token in tokens:
                reply.tokens += 1
                yield token

        for piece in generate.text_pieces(self.chat, counted()):
            now = time.perf_counter()
            if not reply.first:
                reply.first = now - began
                reply.heard = self.heard(said)  # while the device is at the next token
            elif reply.tokens > 1:
                reply.rate = (reply.tokens - 1) / (now - began - reply.first)
            reply.text += piece
            yield reply
        reply.turn = Turn(said, reply.text.strip())
        yield reply

    def warm_up(self, sampling: Sampling, cascade: bool = False) -> None:
        """Read and compile what the first answer needs."""
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            soundfile.write(
                file.name, np.ones(audio_files.FRAME), SAMPLE_RATE
            )  # silence is not answered
            next(self.answer(file.name, sampling=sampling, cascade=cascade))


# ---------------------------------------------------------------------------------------------
# The command

TOY_SAYS = (
    "**This is the toy model**: it knows some 200 words, says nothing sensible about anything "
    "else, and takes each sentence for itself."
)


def clips_and_instruction(
    words: Sequence[str], told: str | None, one: bool = False
) -> tuple[list[str], str | None]:
    """Without an instruction `told`, the last word is one, if it has a blank, is no file, and does
    not end as recordings do. Raises FileNotFoundError for a clip that is missing, ValueError for
    several where `one` is expected."""
    clips, last = list(words), words[-1] if len(words) > 1 else ""
    is_clip = os.path.exists(last) or Path(last).suffix.lower() in ENDINGS
    if told is None and " " in last and not is_clip:
        told = clips.pop()
    if missing := [clip for clip in clips if not os.path.isfile(clip)]:
        raise FileNotFoundError(
            f"{missing[0]} is missing; expected an audio file. Check the path; what is meant as an "
            "instruction can be given as --instruction TEXT."
        )
    if one and len(clips) > 1:
        raise ValueError(f"{len(clips)} recordings; expected one, whose prompt can be written.")
    return clips, told


def drawing(temperature: float, top_p: float) -> tuple[float, float]:
    """Both, if tokens can be drawn so. Raises ValueError."""
    if not (temperature > 0 and 0 < top_p <= 1):
        raise ValueError(
            f"temperature {temperature}, top-p {top_p}; expected a temperature above 0 and a top-p "
            "above 0, at most 1."
        )
    return temperature, top_p


def main(
    words: Annotated[tuple[str, ...], tyro.conf.Positional] = (str(cli.EXAMPLE),),
    instruction: str | None = None,
    model: str = "toy/diva",
    sample: bool = False,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    max_new_tokens: int = 256,
    long: bool = False,
    serve_page: Annotated[bool, tyro.conf.arg(name="serve")] = False,
    host: str = "127.0.0.1",
    port: int = 7860,
    embeddings: Path | None = None,
) -> None:
    """Talk to a DiVA.

    Args:
        words: recordings, each a turn of one conversation; behind them perhaps an instruction.
        instruction: what to do with what is said; needed so if it is one word.
        model: folder or repo id of a trained DiVA, ours or a published one.
        sample: draw tokens instead of taking the likeliest.
        temperature: of drawing; lower is closer to the likeliest.
        top_p: draw from the likeliest tokens that have this probability together.
        seed: of drawing.
        max_new_tokens: an answer stops here at the latest.
        long: split recordings that are longer than the window, at their quietest moments.
        serve_page: open a page with a microphone instead.
        host: where the page is to be seen; 0.0.0.0 for all who can reach this machine.
        port: its port.
        embeddings: write the prompt of one recording here, for another program to answer.
    """
    heat, share = drawing(temperature, top_p) if sample else (0.0, 1.0)
    sampling = Sampling(heat, share, seed, max_new_tokens)
    if serve_page:
        return open_page(model, sampling, long, host, port)
    clips, instruction = clips_and_instruction(words, instruction, one=bool(embeddings))
    for clip in clips:  # what cannot be heard is refused before weights are read
        audio_files.windows(clip, connector.encoder_config(model).window_samples, long, most=PIECES)
    assistant = Assistant.load(model)
    if embeddings:
        return write_prompt(embeddings, assistant, clips[0], instruction, long)
    talk(assistant, clips, instruction, sampling, long)


def open_page(model: str, sampling: Sampling, long: bool, host: str, port: int) -> None:
    """Until Ctrl-C. Raises ValueError without the extra `demo`."""
    try:
        from serving import page
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the page needs {error.name}, which is not installed. Run pip install '.[demo]'"
        ) from error
    assistant = Assistant.load(model)
    assistant.warm_up(sampling)
    page.serve(assistant, sampling, long, notice(assistant, long), host, port)


def notice(assistant: Assistant, long: bool) -> str:
    """What one must know before one speaks."""
    note = f"Speak for at most {assistant.window:g} s"
    note += f" (longer recordings are split, up to {PIECES} times that)." if long else "."
    return f"{TOY_SAYS} {note}" if assistant.toy else note


def write_prompt(
    file: Path, assistant: Assistant, clip: str, instruction: str | None, long: bool
) -> None:
    """What any program that has the LLM needs to answer a recording, in float32: prompt_embeds
    [L, E], the whole prompt; and of it virtual_tokens [Q, E], which begin at row `start` (said in
    the file's metadata)."""
    virtual = assistant.listen(clip, long)
    embeds, length = assistant.prompt((), virtual, instruction)
    prompt = np.asarray(embeds[0, :length], np.float32)
    start = len(assistant.chat.around(instruction, [])[0])
    arrays = {"prompt_embeds": prompt, "virtual_tokens": prompt[start : start + len(virtual)]}
    with files.atomic_write(file) as partial:
        save_file(arrays, partial, {"start": str(start)})
    print(f"{file}: {length} positions, of which {len(virtual)} are speech, from {start} on")


def talk(
    assistant: Assistant,
    clips: Sequence[str],
    instruction: str | None,
    sampling: Sampling,
    long: bool,
) -> None:
    """Answer clip after clip in the terminal: what was heard, and the answer as it is generated."""
    if assistant.toy:
        print(TOY_SAYS.replace("*", ""), file=sys.stderr)
    turns = []
    for clip in clips:
        shown = ""
        for reply in assistant.answer(clip, turns, instruction, sampling, long):
            if not shown:
                print(f"heard:  {reply.heard}\nanswer: ", end="")
            print(reply.text[len(shown) :], end="", flush=True)
            shown = reply.text
        print(f"\n({reply.times()})")
        turns.append(reply.turn)


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
