"""Time and memory of the response losses: `python -m benchmarks.loss` (three minutes, 10 GB).

The three values of --response-loss (distill_loss.py) at the sizes of Llama-3-8B (V = 128,256,
E = 4,096), for a batch of 64 states in float32. For comparison the plain KL: two log-softmaxes
over all logits. Memory is what the compiled program allocates in addition to its arguments.
Prints the table of README; writes runs/benchmarks/loss.json.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import distill_loss
from benchmarks import side_by_side

FILE = Path(__file__).with_suffix(".json")
RUNS = 9
ROWS = 128_256
WIDTH = 4096
BATCH = 64
COSTS = {"l2": WIDTH, "gram": WIDTH**2, "kl": 2 * ROWS * WIDTH, "plain KL": 2 * ROWS * WIDTH}
TOLERANCE = 1e-4  # relative, between the two KLs and between their gradients


def plain_kl(student, teacher, output_matrix, weights):
    """KL(softmax(O h_t) || softmax(O h_s)) from two log-softmaxes over all logits."""
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) @ output_matrix.T)
    log_q = jax.nn.log_softmax(student @ output_matrix.T)
    return distill_loss.weighted_mean((jnp.exp(log_p) * (log_p - log_q)).sum(-1), weights)


def program(name: str, with_gradient: bool) -> tuple[Any, tuple]:
    """Compile the loss, with or without its gradient for the student; also return its arguments."""
    keys = jax.random.split(jax.random.key(0), 3)
    student, teacher = (jax.random.normal(key, (BATCH, WIDTH)) for key in keys[:2])
    student = teacher + 0.1 * student
    shared: tuple = ()
    if name != "l2":  # standard deviation 0.02: logits of about 1.3
        shared = (0.02 * jax.random.normal(keys[2], (ROWS, WIDTH)),)
    if name == "gram":
        shared = (jax.jit(distill_loss.gram_matrix)(*shared),)
    functions = {
        "l2": distill_loss.response_l2,
        "gram": distill_loss.response_gram,
        "kl": distill_loss.response_kl,
        "plain KL": plain_kl,
    }
    loss = functions[name]
    loss = jax.jit(jax.value_and_grad(loss) if with_gradient else loss)
    arguments = (student, teacher, *shared, jnp.ones(BATCH))
    return loss.lower(*arguments).compile(), arguments


def work(name: str, with_gradient: bool) -> Callable[[], Any]:
    """Return a function that computes the loss, or (loss, gradient)."""
    compiled, arguments = program(name, with_gradient)
    return lambda: jax.tree.map(np.asarray, compiled(*arguments))


def scratch(name: str, with_gradient: bool) -> int:
    """Bytes that the compiled program allocates in addition to its arguments."""
    memory = program(name, with_gradient)[0].memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def agreement(made: dict[str, side_by_side.Side]) -> float:
    """Largest relative difference between the two KLs or their gradients.

    Raises AssertionError above TOLERANCE.
    """
    kl, gradient = made["kl"].run()
    plain, plain_gradient = made["plain KL"].run()
    difference = max(
        float(abs(kl - plain) / plain),
        float(np.linalg.norm(gradient - plain_gradient) / np.linalg.norm(plain_gradient)),
    )
    assert difference <= TOLERANCE, difference
    return difference


def table(measured: dict[str, Any]) -> str:
    """The table of README."""
    lines = [
        "| loss | multiply-adds a state | forward, ms | with gradient, ms "
        "| memory, forward, MB | memory, with gradient, MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in measured["rows"].items():
        cells = [f"{name} | {COSTS[name]:,}"]
        cells += [f"{1e3 * row[part]['seconds']:.2f}" for part in ("forward", "both")]
        cells += [f"{row[part]['bytes'] / 1e6:.1f}" for part in ("forward", "both")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all losses in turns, without and with gradient, and print the table."""
    rows: dict[str, Any] = {name: {} for name in COSTS}
    measured = {"machine": side_by_side.machine("jax"), "rows": rows}

    for part, with_gradient in (("forward", False), ("both", True)):
        with side_by_side.sides({name: (work, name, with_gradient) for name in COSTS}) as made:
            seconds = side_by_side.take_turns(made, RUNS)
            if with_gradient:
                measured["agreement"] = agreement(made)
            for name, side in made.items():
                size = side.do(scratch, name, with_gradient)
                rows[name][part] = {"seconds": median(seconds[name]), "bytes": size}
    side_by_side.keep(FILE, measured, table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
