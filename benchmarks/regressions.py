"""Has something become slow?

    python -m benchmarks.regressions [--write]

Each of a few hot paths is measured by turns with a reference in the same process: the same work in a plain form, which
nobody tunes and which no change of this project touches. Their ratio depends little on the machine. It is held against
the least one in benchmarks/results/regressions.json, and a fall of more than a third fails, loudly. A slow neighbour
can spoil a turn: the best of three tries counts. `--write` makes the present ratios the ones to be held.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import din_step, harness
from marsjax import files, stein
from marsjax.allocator import keep_freed_memory
from marsjax.augmentation import posterior
from marsjax.data.splits import make_rows
from marsjax.data.synthetic import make_synthetic

HELD = pathlib.Path(__file__).parent / "results" / "regressions.json"
FALL, TRIES = 1 / 3, 3

Sides = tuple[Callable[[int], Any], Callable[[int], Any]]  # ours and the reference, as `harness.take_turns` calls them


class Case(NamedTuple):
    """A hot path and its reference."""

    name: str
    reference: str
    make: Callable[[], Sides]


def din_sides() -> Sides:
    """A training step at batch 512 and history 50, and one that builds [t, h, t - h, t * h] for each entry."""
    size = din_step.Size(512, 50, "prelu")
    of_items_NG, drawn = din_step.draw(size)
    category_NG = jnp.asarray(of_items_NG)
    depth, optimizer = 2 * din_step.EMBEDDING, optax.chain(optax.clip_by_global_norm(10.0), optax.adam(1e-3))
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return rng.normal(scale=shape[0] ** -0.5, size=shape).astype(np.float32)

    widths = (4 * depth, *size.attention, 1), (2 * depth + din_step.EMBEDDING, *size.tower, 1)
    params = {
        "user": matrix(size.users + 1, din_step.EMBEDDING), "item": matrix(size.items + 1, din_step.EMBEDDING),
        "category": matrix(size.categories + 1, din_step.EMBEDDING),
        **{f"{part}{i}": matrix(*pair) for part, of in zip("at", widths, strict=True)
           for i, pair in enumerate(zip(of, of[1:], strict=False))},
    }  # fmt: skip

    def layers(params: Mapping[str, Any], part: str, x: Any, count: int) -> Any:
        for i in range(count):
            x = x @ params[f"{part}{i}"]
            x = jnp.where(x >= 0, x, 0.25 * x) if i + 1 < count else x
        return x[..., 0]

    def loss(params: Mapping[str, Any], rows: din_step.Rows) -> Any:
        def embed(item: Any) -> Any:
            of_categories = params["category"][category_NG[item]].mean(axis=-2)
            return jnp.concatenate([params["item"][item], of_categories], axis=-1)

        target_BD, history_BLD = embed(rows.target_B), embed(rows.history_BL)
        target_BLD = jnp.broadcast_to(target_BD[:, None], history_BLD.shape)
        parts = target_BLD, history_BLD, target_BLD - history_BLD, target_BLD * history_BLD
        weight_BL = jax.nn.softmax(layers(params, "a", jnp.concatenate(parts, axis=-1), len(size.attention) + 1))
        interest_BD = jnp.einsum("bl,bld->bd", weight_BL, history_BLD)
        features_BF = jnp.concatenate([target_BD, interest_BD, params["user"][rows.user_B]], axis=-1)
        logit_B = layers(params, "t", features_BF, len(size.tower) + 1)
        return optax.sigmoid_binary_cross_entropy(logit_B, rows.label_B).mean()

    @jax.jit
    def step(params: Any, state: Any, rows: din_step.Rows) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, rows)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    held = [params, jax.jit(optimizer.init)(params)]

    def reference(steps: int) -> float:
        for number in range(steps):
            *held[:], value = step(*held, drawn[number % len(drawn)])
            found = float(value)
        return found

    return din_step.our_side(size).run, reference


def stein_sides() -> Sides:
    """The score of 512 samples of width 64, and of the same with all differences [N, N, D] and a general solve."""
    x_ND = jnp.asarray(np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32))
    mask_N = jnp.ones(len(x_ND), bool)
    ours = jax.jit(stein.stein_score)

    @jax.jit
    def plain(x_ND: jax.Array) -> jax.Array:
        difference_NND = x_ND[:, None] - x_ND[None]
        square_NN = jnp.sum(difference_NND**2, axis=-1)
        pairs = jnp.sort(square_NN.ravel())[len(x_ND) :]  # the first are those of the diagonal
        gamma2 = pairs[(len(pairs) - 1) // 2]
        kernel_NN = jnp.exp(-square_NN / (2 * gamma2))
        drift_ND = jnp.einsum("nm,nmd->nd", kernel_NN, difference_NND) / gamma2
        return -jnp.linalg.solve(kernel_NN + 0.1 * jnp.eye(len(x_ND)), drift_ND)

    np.testing.assert_allclose(ours(x_ND, mask_N), plain(x_ND), rtol=0, atol=2e-2)
    return harness.repeated(lambda: ours(x_ND, mask_N)), harness.repeated(lambda: plain(x_ND))


def expectation_sides() -> Sides:
    """What is expected of 8,192 rows, and the same row by row in NumPy."""
    dataset = make_synthetic(n_users=400, seed=0)
    log, rows = dataset.log, make_rows(dataset.log, split="leave_one_out")
    settings, user_P = posterior.Settings(), np.flatnonzero(rows.group_U == rows.group_U.max())
    opinions = posterior.learn_opinions(log, rows, user_P, None, n_items=len(dataset.items.raw_id_N), settings=settings)
    row_R = np.resize(np.arange(len(log.item_E)), 4 * posterior.CHUNK)
    histories, folds = rows.histories, settings.folds

    def ours() -> np.ndarray:
        return posterior.expect(log, rows, opinions, row_R, settings=settings)

    def plain() -> np.ndarray:
        out_R = np.empty(len(row_R), np.float32)
        for i, row in enumerate(row_R):
            fold = rows.user_E[row] % folds
            usual_N, loading_NK = opinions.usual_FN[fold], opinions.loading_FNK[fold]
            seen = slice(max(histories.start_E[row], histories.end_E[row] - settings.cap), histories.end_E[row])
            item_L = histories.item_H[seen]
            noise_L = usual_N[item_L] * (1 - usual_N[item_L]) - np.sum(loading_NK[item_L] ** 2, axis=1)
            weight_L = np.maximum(noise_L, posterior.LEAST_NOISE) ** -0.5
            x_LK = loading_NK[item_L] * weight_L[:, None]
            y_L = weight_L * (histories.label_H[seen] - usual_N[item_L])
            taste_K = np.linalg.solve(x_LK.T @ x_LK + np.eye(x_LK.shape[1]), x_LK.T @ y_L)
            out_R[i] = 4 * loading_NK[log.item_E[row]] @ taste_K
        return out_R

    np.testing.assert_allclose(ours()[:, 0], plain(), rtol=0, atol=1e-3)
    return harness.repeated(ours), harness.repeated(plain)


CASES = (
    Case("training step of a DIN, batch 512, history 50", "plain JAX", din_sides),
    Case("Stein score, 512 samples of width 64", "all differences, a sort and a general solve", stein_sides),
    Case("expected opinions of 8,192 rows", "row by row in NumPy", expectation_sides),
)


def measure(case: Case, held: float | None, *, turns: int, seconds: float) -> dict[str, Any]:
    """The best of some tries, no more than it takes to be fast enough."""
    ours, reference = case.make()
    best: dict[str, Any] = {}
    for _ in range(TRIES):
        timed = harness.take_turns({"ours": ours, "reference": reference}, turns=turns, seconds=seconds)
        row = harness.compare("has it become slow? (milliseconds)", case.name, timed["ours"], timed["reference"],
                              case.reference, target=None if held is None else held * (1 - FALL))  # fmt: skip
        best = max((best, row), key=lambda found: found.get("ratio", 0.0))
        if best["met"] is not False:
            break
    return best


def main(words: list[str] | None = None) -> int:
    """1 where something fell by more than a third."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="hold the present ratios from now on")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="that a turn takes at least (default: 0.5)")
    arguments = parser.parse_args(words)
    keep_freed_memory()
    began = harness.begin()
    # The least ratio of the turns: on a busy machine all of them are nearer to it than to the median.
    held = {} if arguments.write else {row["case"]: row["ratio_least"] for row in files.read_json(HELD)["rows"]}
    rows = harness.write_results(
        HELD if arguments.write else None,
        (measure(case, held.get(case.name), turns=arguments.turns, seconds=arguments.seconds) for case in CASES),
        began,
        program="-m benchmarks.regressions",
        words=words,
    )
    slow = [row for row in rows if row["met"] is False]
    for row in slow:
        sys.stdout.write(
            f"SLOW: {row['case']}: expected at least {row['target']:.2f} times the speed of {row['other_name']}, found "
            f"{row['ratio']:.2f}; if that is meant, say why in the commit, and hold it by --write\n"
        )
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
