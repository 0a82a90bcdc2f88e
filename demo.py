"""Demo: talk to a DiVA, in the terminal or on a page with a microphone.

    python demo.py clip.mp3                          the answer, as it is generated
    python demo.py clip.mp3 "Answer in German."      under an instruction, also as --instruction
    python demo.py first.wav second.wav              two turns of one conversation
    python demo.py --serve                           a page at http://127.0.0.1:7860

    audio -> virtual tokens -> [template; virtual tokens; template] -> prefill -> token after token

Nothing is transcribed on the way: the first token of the answer comes after one pass of each part.
Prompts are padded to a power of two, so that few lengths are ever compiled, and what was compiled
is kept on disk for the next start.

Axes: S audio samples, Q virtual tokens, E the LLM's width, L positions of the prompt.
Reads: weights.py, llama.py, generate.py, connector.py.   The last chapter.
"""

import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

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
from runtime import command, files, recording, sharding
from runtime.recording import SAMPLE_RATE

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


@dataclasses.dataclass(frozen=True)
class Turn:
    """What was said and answered: the virtual tokens [Q, E] of a recording, and the answer."""

    virtual: np.ndarray
    answer: str


@dataclasses.dataclass
class Reply:
    """An answer so far."""

    heard: str  # the text tokens nearest to the virtual tokens
    text: str = ""
    first: float = 0.0  # seconds from the recording to the first token
    rate: float = 0.0  # tokens a second after it
    turn: Turn | None = None  # when the answer is whole

    def times(self) -> str:
        after = f", then {self.rate:.0f} tokens/s" if self.rate else ""
        return f"first token after {self.first:.2f} s{after}"


# ---------------------------------------------------------------------------------------------
# The assistant


@sharding.on_mesh
@eqx.filter_jit
def _embed(llm: llama.Llama, ids: Int[Array, "1 L"]) -> Float[Array, "1 L E"]:
    return llm.embed(ids)


_put = jax.jit(generate.put, donate_argnames="embeds")


@dataclasses.dataclass(frozen=True)
class Assistant:
    """A DiVA and its LLM's chat."""

    diva: connector.DiVA
    chat: llama.Chat
    toy: bool  # does it know no more than the toy universe?

    @staticmethod
    def load(model: str | Path) -> "Assistant":
        """float32 on a CPU, bfloat16 elsewhere. Raises ValueError or FileNotFoundError."""
        dtype = sharding.compute_dtype(jax.default_backend())
        _, llm_path = connector.references(model)
        toy = weights.resolve(llm_path).resolve() == (TOY / "llama").resolve()
        mesh = sharding.local_mesh(connector.templates(model, dtype))
        diva = connector.DiVA.load(model, dtype, functools.partial(sharding.place, mesh=mesh))
        return Assistant(diva, llama.Chat.load(llm_path), toy)

    @property
    def window(self) -> float:
        """Seconds that are heard at once."""
        return self.diva.window_samples / SAMPLE_RATE

    def listen(
        self, clip: str | Path, long: bool = False, live: bool = False
    ) -> Float[np.ndarray, "Q E"]:
        """Virtual tokens of a recording, those of its parts one behind the other; `long` and `live`
        as in recording.windows. Raises ValueError or FileNotFoundError that names the file."""
        parts = recording.windows(clip, self.diva.window_samples, long, live, PIECES)
        rows = [jnp.asarray(part)[None] for part in parts]
        return np.concatenate([np.asarray(connector.listen(self.diva, row)[0]) for row in rows])

    def heard(self, virtual: Float[np.ndarray, "Q E"]) -> str:
        """The text tokens nearest to the last virtual tokens: those stand for the words."""
        ids = np.asarray(connector.heard(self.diva.llm, jnp.asarray(virtual)[None]))[0, -SHOWN:]
        return " ".join(self.chat.decode(ids).split())

    def prompt(
        self,
        turns: Sequence[Turn],
        virtual: Float[np.ndarray, "Q E"],
        instruction: str | None,
        room: int = 0,
    ) -> tuple[Float[Array, "1 L E"], int]:
        """Embeddings of the conversation up to the assistant's next word, and how many they are.

        Raises ValueError if the LLM has no positions for them and `room` tokens more.
        """
        around = self.chat.around(instruction, [turn.answer for turn in turns])
        ids, starts, said = [*around[0]], [], [*(turn.virtual for turn in turns), virtual]
        for tokens, after in zip(said, around[1:], strict=True):
            starts.append(len(ids))
            ids += [0] * len(tokens) + after
        most = self.diva.llm.config.max_position_embeddings
        if len(ids) + room > most:
            raise ValueError(
                f"the conversation has {len(ids)} positions; expected at most {most - room} "
                f"({most} less {room} for the answer). Start a new one."
            )
        embeds = _embed(self.diva.llm, jnp.asarray(generate.padded_row(ids)))
        for tokens, start in zip(said, starts, strict=True):
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
    ) -> Iterator[Reply]:
        """The reply to a recording, again and again while it grows; the last one has its turn.

        `turns` are those of the conversation before it. Raises ValueError or FileNotFoundError.
        """
        began = time.perf_counter()
        turns = () if self.toy else turns  # its LLM has never seen a second turn
        virtual = self.listen(clip, long, live)
        embeds, length = self.prompt(turns, virtual, instruction, sampling.max_new_tokens)
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
        reply, count = Reply(""), 0

        def counted() -> Iterator[int]:
            nonlocal count
            for token in tokens:
                count += 1
                yield token

        for piece in generate.text_pieces(self.chat, counted()):
            now = time.perf_counter()
            if not reply.first:
                reply.first = now - began
                reply.heard = self.heard(virtual)  # while the device is at the next token
            elif count > 1:
                reply.rate = (count - 1) / (now - began - reply.first)
            reply.text += piece
            yield reply
        reply.turn = Turn(virtual, reply.text.strip())
        yield reply

    def warm_up(self, sampling: Sampling) -> None:
        """Compile what the first answer needs."""
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            soundfile.write(
                file.name, np.ones(recording.FRAME), SAMPLE_RATE
            )  # silence is not answered
            next(self.answer(file.name, sampling=sampling))


# ---------------------------------------------------------------------------------------------
# The page

SENTENCES = (
    "what is the opposite of hot",
    "what is two plus five",
    "what is the capital of france",
    "yuck what a phone",
)


TOY_SAYS = (
    "**This is the toy model**: it knows some 200 words, says nothing sensible about anything "
    "else, and takes each sentence for itself."
)


def notice(assistant: Assistant, long: bool) -> str:
    """What one must know before one speaks."""
    note = f"Speak for at most {assistant.window:g} s"
    note += f" (longer recordings are split, up to {PIECES} times that)." if long else "."
    if not assistant.toy:
        return note
    return f"{TOY_SAYS} {note} Try: " + "; ".join(f"*{text}*" for text in SENTENCES)


def page(assistant: Assistant, sampling: Sampling, long: bool) -> Any:
    """A Gradio page: a recording, perhaps an instruction, and the conversation. Needs the extra
    `demo`; nothing is fetched from elsewhere."""
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise ValueError(
            "the page needs gradio, which is not installed. Run pip install '.[demo]'"
        ) from error

    def respond(clip, instruction, messages, turns):
        """The page's new state, again and again while the answer grows."""
        if clip is None:
            return
        messages = [*messages, {"role": "user", "content": "..."}]
        messages.append({"role": "assistant", "content": ""})
        try:
            instruction = instruction.strip() or None
            for reply in assistant.answer(clip, turns, instruction, sampling, long, live=True):
                messages[-2] = {"role": "user", "content": f"(speech) {reply.heard}"}
                messages[-1] = {"role": "assistant", "content": reply.text}
                yield messages, turns, reply.times(), None
        except (ValueError, OSError) as error:
            # the file's place on this machine is nobody's business
            raise gr.Error(str(error).replace(str(clip), Path(clip).name)) from None
        yield messages, [*turns, reply.turn], reply.times(), None

    with gr.Blocks(title="DiVA", analytics_enabled=False) as blocks:
        gr.Markdown(f"# DiVA\n{notice(assistant, long)}")
        turns = gr.State([], time_to_live=3600)
        conversation = gr.Chatbot(label="Conversation", render_markdown=False, buttons=[])
        times = gr.Markdown()
        clip = gr.Audio(sources=["microphone", "upload"], type="filepath", label="Say something")
        instruction = gr.Textbox(label="Instruction (may stay empty)", max_length=2000)
        again = gr.Button("New conversation")
        gr.on(
            [clip.stop_recording, clip.upload],
            respond,
            [clip, instruction, conversation, turns],
            [conversation, turns, times, clip],
            api_visibility="private",
        )
        conversation.clear(list, None, turns, api_visibility="private")
        again.click(
            lambda: ([], [], "", None), None, [conversation, turns, times, clip],
            api_visibility="private",
        )  # fmt: skip
    # one answer at a time on the device; who finds sixteen waiting is told to come back
    return blocks.queue(max_size=16, default_concurrency_limit=1)


# Browsers treat a microphone as a telephone and distort it; a recogniser wants it as it is.
AS_IT_IS = """<script>
const devices = navigator.mediaDevices, ask = devices?.getUserMedia.bind(devices);
if (ask) devices.getUserMedia = ({ audio, ...rest }) => ask({ ...rest, audio: audio && {
  ...audio, echoCancellation: false, noiseSuppression: false, autoGainControl: false } });
</script>"""


def serve(blocks: Any, host: str, port: int, wait: bool = True) -> str:
    """Open the page; returns its address. Uploads are limited in size, and no file of this machine
    can be read through it but those that were uploaded."""
    import gradio as gr

    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size="20mb",
        allowed_paths=[],
        footer_links=[],
        head=AS_IT_IS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        prevent_thread_lock=not wait,
        quiet=not wait,
    )
    return address


# ---------------------------------------------------------------------------------------------
# The command


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
    words: Annotated[tuple[str, ...], tyro.conf.Positional] = (str(command.EXAMPLE),),
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
        assistant = Assistant.load(model)
        blocks = page(assistant, sampling, long)
        assistant.warm_up(sampling)
        serve(blocks, host, port)
        return
    clips, instruction = clips_and_instruction(words, instruction, one=bool(embeddings))
    for clip in clips:  # what cannot be heard is refused before weights are read
        recording.windows(clip, connector.heard_by(model).window_samples, long, most=PIECES)
    assistant = Assistant.load(model)
    if embeddings:
        return write_prompt(embeddings, assistant, clips[0], instruction, long)
    talk(assistant, clips, instruction, sampling, long)


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
    with files.whole(file) as partial:
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
    command.run(lambda: tyro.cli(main))
