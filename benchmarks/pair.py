"""What a pair of published models has learnt: `python -m benchmarks.pair` RUN --clips TEST.jsonl.

Of clips that were not trained on, before training and after: both losses, KL(teacher || student) at
the answer's first token, and the word error of the text tokens nearest to the aligned virtual
tokens; and what is answered to five of them, beside the cascade and the LLM on the transcript.
"""

import json
from pathlib import Path
from typing import Annotated

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import connector
import data
import distill_loss
from benchmarks import side_by_side
from evaluation import metrics, suites, systems

FILE = Path(__file__).with_suffix(".json")
AT_ONCE = 20
SAMPLES = 5
ROWS = {  # name: digits
    "alignment": 2,
    "response": 1,
    "KL of the first token, nats": 3,
    "word error of the nearest tokens, %": 1,
}


@eqx.filter_jit
def look(diva: connector.DiVA, batch: data.Batch, prefix, suffix) -> dict[str, jax.Array]:
    """Of each clip: distance of its aligned tokens (a sum), of its states, KL, nearest tokens."""
    out = diva(
        transcript=batch.transcript,
        lengths=batch.lengths,
        prefix=prefix,
        suffix=suffix,
        response=batch.fed_response,
        audio=batch.audio,
    )
    aligned, real = distill_loss.last_tokens(
        out.virtual_tokens, batch.lengths, batch.transcript.shape[1]
    )
    student, teacher = out.student_states[:, 0], out.teacher_states[:, 0]
    return {
        "alignment": (distill_loss.l2_norm(aligned - out.transcript_embeds) * real).sum(1),
        "response": distill_loss.l2_norm(student - teacher),
        "KL of the first token, nats": distill_loss.kl_divergence(
            student, teacher, diva.llm.output_matrix
        ),
        "heard": connector.nearest_token_ids(diva.llm, aligned),
    }


def score(diva: connector.DiVA, models: systems.Models, corpus: data.Corpus) -> dict[str, float]:
    """The rows of the table for one connector; the first clips' words as they are heard."""
    load, clips = data.samples(corpus), len(corpus.ids)
    turn = [jnp.asarray(side, jnp.int32) for side in models.chat.wrap()]
    parts = []
    for first in range(0, clips, AT_ONCE):
        rows = [load(min(i, clips - 1)) for i in range(first, first + AT_ONCE)]
        batch = data.Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
        parts.append(jax.device_get(look(diva, batch, *turn)))
    found = {name: np.concatenate([part[name] for part in parts])[:clips] for name in parts[0]}
    heard = [
        models.chat.decode(row[: len(ids)]).strip()
        for row, ids in zip(found.pop("heard"), corpus.ids, strict=True)
    ]
    means = {name: float(values.mean()) for name, values in found.items()}
    means["alignment"] = float(found["alignment"].sum() / sum(map(len, corpus.ids)))
    wer = metrics.METRICS["wer"]
    examples = [suites.Example("", c.audio, c.text, (c.text,)) for c in corpus.clips]
    errors = [wer.measure(text, e, ()) for text, e in zip(heard, examples, strict=True)]
    means["word error of the nearest tokens, %"] = float(wer.combine(np.sum(errors, 0)))
    return means | {"heard": heard[:SAMPLES]}


def answers(models: systems.Models, corpus: data.Corpus) -> list[dict[str, str]]:
    """What DiVA, the cascade and the LLM on the transcript say to the first clips."""
    told = [{"said": clip.text} for clip in corpus.clips[:SAMPLES]]
    ask = systems.Ask(None, (), "first_token", 24)
    questions = [systems.Question(ask, c.audio, c.text) for c in corpus.clips[:SAMPLES]]
    who = {"diva", "cascade", "text"}
    systems.answer(
        *(models, questions, [who] * SAMPLES, {}, SAMPLES),
        lambda i, system, answer, note: told[i].update({system: answer or ""}),
    )
    return told


def table(measured: dict) -> str:
    """The scores (README's table), and sample answers."""
    if not measured:
        return ""
    lines = [f"| | {' | '.join(ROWS)} |", f"|---|{'--:|' * len(ROWS)}"]
    for when in ("before", "after"):
        cells = (f"{measured[when][name]:.{digits}f}" for name, digits in ROWS.items())
        lines.append(f"| {when} training | {' | '.join(cells)} |")
    lines += ["", "| said | heard | DiVA | cascade | text |", "|---|---|---|---|---|"]
    for row, heard in zip(measured["answers"], measured["after"]["heard"], strict=True):
        cells = (row["said"], heard, row["diva"], row["cascade"], row["text"])
        lines.append(f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |")
    return "\n".join(lines)


def main(run: Annotated[Path, tyro.conf.Positional], clips: Path) -> None:
    """Measure a finished run of train.py on clips that it was not trained on.

    Args:
        run: the run's folder.
        clips: JSON lines with audio and text.
    """
    models = systems.Models.load(run)
    queries = len(models.diva.connector.query_tokens)
    held_out = data.read_clips(str(clips), "test", None)
    corpus = data.prepare(held_out, models.chat.encode_batch, models.diva.window_samples, queries)
    untrained = eqx.tree_at(lambda d: d.connector, models.diva, models.connectors["untrained"])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {
        "machine": side_by_side.machine("jax"),
        "clips": len(corpus.ids),
        "steps": len(steps),
        "seconds": round(sum(step["seconds"] for step in steps)),
        "validation": [
            {name: step[name] for name in ("step", "kl", "nearest_token_accuracy")}
            for step in steps
            if "kl" in step
        ],
        "before": score(untrained, models, corpus),
        "after": score(models.diva, models, corpus),
        "answers": answers(models, corpus),
    }
    side_by_side.keep(FILE, found, table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
