"""Page: an assistant in a browser. Speak, upload or click a clip; see what was heard, the answer,
and on request beside it what a cascade makes of the same clip: Whisper, then the same LLM.

    clip -> DiVA's answer, then the cascade's, each timed from the clip on

Nothing is fetched from elsewhere, and no file of this machine can be read through it but uploads
and the clips that it offers. What goes wrong is said, and takes nothing away that was there.

Reads: evaluation/tasks.py, completions.py.   Read next: demo.py.
"""

import dataclasses
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import jax

from evaluation import tasks
from serving import completions

OFFERED = Path(__file__).parents[1] / "toy/tasks"  # clips for who has no microphone, and prompts
FAULTS = ValueError, OSError, jax.errors.JaxRuntimeError  # a bad clip; no file; no memory
TABS = 64  # of which the conversation is kept
PRIVATE = {"api_visibility": "private"}
NAMES = "DiVA", "Cascade: Whisper, then the same LLM"


@dataclasses.dataclass(frozen=True)
class Side:
    """One system's conversation: what is shown of it, and the turns that it remembers."""

    messages: tuple[dict, ...] = ()
    turns: tuple[Any, ...] = ()
    times: str = ""

    def grown(self, clip: str, reply: Any) -> "Side":
        """With the reply to a clip, as far as it has come."""
        said = {"role": "user", "content": [{"path": clip}, f"(speech) {reply.heard}"]}
        messages = (*self.messages, said, {"role": "assistant", "content": reply.text})
        turns = self.turns if reply.turn is None else (*self.turns, reply.turn)
        return Side(messages, turns, reply.times())


def offers(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The prompts of a folder's tasks by name; and of each accent and each emotion in them the
    first clip, by what it says. Nothing where there is no such folder."""
    found = tasks.read_tasks([folder]) if (folder / "tasks.json").is_file() else {}
    first = {}
    for task in found.values():
        for example in task.examples:
            if kind := example.group or (example.answers[0] if task.labels else ""):
                first.setdefault(kind, (f"{example.text} ({kind})", example.audio))
    prompts = {name: task.ask(task.examples[0]).prompt or "" for name, task in found.items()}
    return prompts, dict(first.values())


@dataclasses.dataclass(frozen=True)
class Page:
    """Who answers, and how; and by a secret of each tab what was said there, since a browser that
    finds its way back to the server loads the page anew."""

    assistant: Any
    sampling: Any
    long: bool
    kept: dict[str, tuple[Side, Side]] = dataclasses.field(default_factory=dict)

    def resume(self, token: str = "") -> tuple:
        """The page of a tab that has been here, or of a new one."""
        if token not in self.kept:
            token = secrets.token_urlsafe()
            self.kept[token] = Side(), Side()
            for old in [*self.kept][:-TABS]:
                del self.kept[old]
        return token, *shown(self.kept[token])

    def respond(
        self, clip: str | None, instruction: str, both: bool, token: str
    ) -> Iterator[tuple]:
        """Both conversations, again and again while the answers to a clip grow; if one cannot be
        given, as they were before it."""
        if clip is None:
            return
        token, *_ = self.resume(token)
        told = instruction.strip() or None
        for at in range(1 + both):
            before = self.kept[token]
            how = {"long": self.long, "live": True, "cascade": at == 1}
            turns = before[at].turns
            try:
                for reply in self.assistant.answer(clip, turns, told, self.sampling, **how):
                    side = before[at].grown(clip, reply)
                    self.kept[token] = (side, before[1]) if at == 0 else (before[0], side)
                    yield token, *shown(self.kept[token])
            except FAULTS as error:
                # the file's place on this machine is nobody's business
                gr.Warning(str(error).replace(clip, Path(clip).name), title="Not answered")
                self.kept[token] = before
                yield token, *shown(before)
                return

    def compare(self, both: bool) -> Iterator[dict]:
        """The cascade's column; its Whisper is read now, so that answers are timed without."""
        yield gr.update(visible=both)
        try:
            if both:
                self.assistant.warm_up(self.sampling, cascade=True)
        except FAULTS as error:
            gr.Warning(str(error), title="No cascade")

    def blocks(self, notice: str) -> gr.Blocks:
        """The conversation, and the cascade's beside it; below, what one can do."""
        prompts, clips = offers(OFFERED)
        with gr.Blocks(title="DiVA", analytics_enabled=False) as page:
            gr.Markdown(f"# DiVA\n{notice}")
            token = gr.Textbox(visible=False)
            with gr.Row():
                columns, chats = zip(*map(conversation, NAMES), strict=True)
            clip, given, offered, again = controls(prompts, clips)
            given = [*given, token]
            outputs = [token, *(part for chat in chats for part in chat), clip]

            def press(event: gr.EventData, *rest):
                yield from self.respond(clips[event.target.value], *rest)

            # one after the other; an error shall not lie over the conversation
            device = {"concurrency_id": "device", "show_progress_on": clip} | PRIVATE
            spoken, pressed = [clip.stop_recording, clip.upload], [one.click for one in offered]
            answering = [
                gr.on(spoken, self.respond, [clip, *given], outputs, **device),
                gr.on(pressed, press, given, outputs, **device),
            ]
            given[1].change(self.compare, given[1], columns[1], **device)
            ends = [again.click, *(chat.clear for chat, _ in chats)]
            for event in (
                gr.on(ends, self.resume, None, outputs, cancels=answering, **PRIVATE),
                page.load(self.resume, token, outputs, js="() => sessionStorage.diva", **PRIVATE),
            ):
                event.then(None, token, js="token => { sessionStorage.diva = token }")
        # one answer at a time on the device; who finds sixteen waiting is told to come back
        return page.queue(max_size=16, default_concurrency_limit=1)


def controls(
    prompts: dict[str, str], clips: dict[str, str]
) -> tuple[gr.Audio, list[Any], list[gr.Button], gr.Button]:
    """A recorder; an instruction and whether to compare; a button for each clip; one to end."""
    clip = gr.Audio(sources=["microphone", "upload"], type="filepath", label="Say something")
    instruction = gr.Textbox(label="Instruction (may stay empty)", max_length=2000)
    names = [("none", ""), *((name.replace("_", " "), prompt) for name, prompt in prompts.items())]
    preset = gr.Radio(names, value="", label="Instructions of the paper", visible=bool(prompts))
    preset.input(None, preset, instruction, js="prompt => prompt")
    both = gr.Checkbox(label="Beside it: what Whisper wrote, and the LLM's answer to that")
    with gr.Accordion("Or click a clip", visible=bool(clips)), gr.Row():
        offered = [gr.Button(label, size="sm", min_width=150) for label in clips]
    return clip, [instruction, both], offered, gr.Button("New conversation")


def conversation(name: str) -> tuple[gr.Column, tuple[gr.Chatbot, gr.Markdown]]:
    """A column, in which a conversation and its last times are shown."""
    with gr.Column(min_width=300, visible=name == NAMES[0]) as column:
        chat = gr.Chatbot(label=name, render_markdown=False, buttons=[], allow_file_downloads=False)
        return column, (chat, gr.Markdown())


def shown(sides: tuple[Side, Side]) -> tuple:
    """What is seen of the page: each conversation and its times, and an empty recorder."""
    return *(part for side in sides for part in ([*side.messages], side.times)), None


# Browsers treat a microphone as a telephone and distort it; a recogniser wants it as it is.
AS_IT_IS = """<script>
const devices = navigator.mediaDevices, ask = devices?.getUserMedia.bind(devices);
if (ask) devices.getUserMedia = ({ audio, ...rest }) => ask({ ...rest, audio: audio && {
  ...audio, echoCancellation: false, noiseSuppression: false, autoGainControl: false } });
</script>"""

# A player takes its own line breaks for its user's, and would share with a page elsewhere; who has
# no mouse must see where they are.
STYLE = """
.waveform-wrapper { white-space: normal }
[role="log"] :has(> [aria-label="Share"]) { display: none }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 1px }
"""


def serve(assistant: Any, sampling: Any, long: bool, notice: str, host: str, port: int) -> None:
    """Open the page, and beside it what OpenAI's clients ask, until Ctrl-C."""
    Page(assistant, sampling, long).blocks(notice).launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=completions.LARGEST,
        allowed_paths=[str(OFFERED.parent / "common_voice")],
        footer_links=[],
        head=AS_IT_IS,
        css=STYLE,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        app_kwargs={"routes": [completions.route(assistant, sampling, long)]},
    )
