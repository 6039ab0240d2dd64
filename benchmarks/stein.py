"""How fast is the Stein score, against a naive one, the spectral one, and what the machine allows?

    python -m benchmarks.stein [--output=benchmarks/results/stein.json]

Ours is `marsjax.stein.stein_score`, compiled, over N samples of a Gaussian of width D. Beside it stand

- the same estimator as it is written down: all differences [N, N, D], their sort for the median, a general solve. Where
  these differences take more than `--memory` GiB it is left out, and the row says so;
- SSGE (Shi et al., arXiv 1806.02925), `marsjax.stein.ssge_score`, which needs all eigenvectors; up to `--spectral`
  samples, since these take minutes beyond;
- the floor: 4 N^2 D operations of two products at the rate of a large product (in whole float32), and N^3 / 3 of a
  Cholesky factorisation at the rate of LAPACK's for that N (on a GPU that of its own library), both measured in the
  same run. It holds no median, no exponential and no substitution, which an implementation has to do too;
- the loss and its gradient (Eq. 8: alignment of two modalities and the entropy of both), against two scores;
- what two scores of 512 items are of a step of the alignment stage, in the default configuration.

Asserted beside the time: scores of ours and of the naive form agree. Each row has the error of the estimators, relative
to the true score, which is minus the sample.
"""

from __future__ import annotations

import argparse
import functools
import logging
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks import harness

log = logging.getLogger("stein")

SEED, ETA = 0, 0.1
AGREE = 3e-2  # of the largest score: float32 and another order of sums, through a system of condition 3e3
FLOOR_TARGET, NAIVE_TARGET, SHARE_TARGET = 0.5, 20.0, 0.05
FROM, NAIVE_AT, STEP_AT = 512, 2048, 512  # where the targets are


def samples(count: int, width: int) -> np.ndarray:
    """Of a Gaussian, [N, D] float32."""
    return np.random.default_rng(SEED).normal(size=(count, width)).astype(np.float32)


def naive(x_ND: Any) -> Any:
    """The score as Li and Turner (arXiv 1705.07107) write it down."""
    import jax.numpy as jnp

    difference_NND = x_ND[:, None] - x_ND[None]
    square_NN = jnp.sum(difference_NND**2, axis=-1)
    pairs = jnp.sort(square_NN.ravel())[len(x_ND) :]  # the first are those of the diagonal
    gamma2 = pairs[(len(pairs) - 1) // 2]
    kernel_NN = jnp.exp(-square_NN / (2 * gamma2))
    drift_ND = jnp.einsum("nm,nmd->nd", kernel_NN, difference_NND, precision="highest") / gamma2
    return -jnp.linalg.solve(kernel_NN + ETA * jnp.eye(len(x_ND)), drift_ND)


def error(score_ND: Any, x_ND: np.ndarray) -> float:
    """Of a score, relative to the true one."""
    return float(np.linalg.norm(np.asarray(score_ND) + x_ND) / np.linalg.norm(x_ND))


def cholesky_rate(count: int) -> float:
    """Operations a second of the factorisation of [N, N] float32: LAPACK's, or that of an accelerator."""
    import jax
    import scipy.linalg

    matrix_NN = np.eye(count, dtype=np.float32, order="F") * 2 + np.float32(1 / count)
    if jax.default_backend() != "cpu":
        factor = jax.jit(functools.partial(jax.lax.linalg.cholesky, symmetrize_input=False))
        once = functools.partial(factor, jax.device_put(matrix_NN))
        jax.block_until_ready(once())  # compiled
        return count**3 / 3 / harness.quickest(lambda: jax.block_until_ready(once()), times=3)
    work = functools.partial(scipy.linalg.cholesky, matrix_NN, lower=True, check_finite=False)
    return count**3 / 3 / harness.quickest(work, times=3)


def rows_of(
    count: int, width: int, machine: harness.Machine, arguments: argparse.Namespace
) -> Iterable[dict[str, Any]]:
    """The rows of one number and width of samples."""
    import jax
    import jax.numpy as jnp

    from marsjax import stein

    log.info("%d samples of width %d", count, width)
    case = f"N = {count:,}, D = {width}"
    x_ND, mask_N = jnp.asarray(samples(count, width)), jnp.ones(count, bool)
    score, spectral, plain = jax.jit(stein.stein_score), jax.jit(stein.ssge_score), jax.jit(naive)
    errors = {"ours": error(score(x_ND, mask_N), samples(count, width))}
    sides = {"ours": harness.repeated(lambda: score(x_ND, mask_N))}
    needed = count * count * width * 4 / 2**30
    if needed <= arguments.memory:
        check_equal(score(x_ND, mask_N), plain(x_ND))
        sides["naive"] = harness.repeated(lambda: plain(x_ND))
    if count <= arguments.spectral:
        errors["SSGE"] = error(spectral(x_ND, mask_N), samples(count, width))
        sides["SSGE"] = harness.repeated(lambda: spectral(x_ND, mask_N))

    def surrogate(x_ND: jax.Array, y_ND: jax.Array) -> jax.Array:
        matched, _ = stein.alignment(x_ND, y_ND, mask_N)
        return -matched + 0.003 * sum(stein.entropy_surrogate(value, mask_N) for value in (x_ND, y_ND))

    gradient = jax.jit(jax.value_and_grad(surrogate, argnums=(0, 1)))
    y_ND = jnp.asarray(samples(2 * count, width)[count:])
    sides["loss"] = harness.repeated(lambda: gradient(x_ND, y_ND))
    timed = harness.take_turns(sides, turns=arguments.turns, seconds=arguments.seconds, warm=1)
    told = ", ".join(f"{name} {value:.2f}" for name, value in errors.items())

    question = "milliseconds of the Stein score, against all differences, a sort and a general solve"
    row = harness.compare(
        question, case, timed["ours"], timed.get("naive"), "naive", target=NAIVE_TARGET if count == NAIVE_AT else None
    )
    left_out = "" if "naive" in timed else f"; naive left out, since it takes {needed:.0f} GiB"
    yield row | {"errors": errors, "note": f"error of the score: {told}{left_out}"}
    if "SSGE" in timed:
        row = harness.compare(
            "milliseconds of the Stein score, against SSGE", case, timed["ours"], timed["SSGE"], "SSGE"
        )
        yield row | {"errors": errors, "note": f"error of the score: {told}"}

    rate = cholesky_rate(count)
    floor = 4 * count**2 * width / machine.flops + count**3 / 3 / rate
    reached = floor / timed["ours"].median
    question = "milliseconds of the Stein score, against 4 N^2 D operations of products and a Cholesky factorisation"
    row = harness.compare(question, case, timed["ours"], harness.Timed([floor] * len(timed["ours"].turns), []), "floor")
    target = FLOOR_TARGET if count >= FROM else None
    yield row | {
        "target": target,
        "met": None if target is None else bool(reached >= target),
        "operations": 4 * count**2 * width + count**3 / 3,
        "note": f"{1 / reached:.1f} times the floor; Cholesky at {rate / 1e9:.0f} GFLOP/s",
    }
    two = harness.Timed(*([2 * value for value in part] for part in timed["ours"]))
    row = harness.compare("milliseconds of the loss of Eq. 8 and its gradient, against two scores", case, timed["loss"],
                          two, "two scores")  # fmt: skip
    yield row


def check_equal(found_ND: Any, expected_ND: Any) -> None:
    """Stops where the scores of ours and of the naive form differ."""
    found_ND, expected_ND = np.asarray(found_ND), np.asarray(expected_ND)
    worst = float(np.abs(found_ND - expected_ND).max() / np.abs(expected_ND).max())
    if not worst < AGREE:
        raise SystemExit(f"expected the scores of the naive form within {AGREE}, found a difference of {worst:.3f}")


def all_rows(machine: harness.Machine, arguments: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """The rows of every number and width, and that of the step."""
    for count in arguments.counts:
        for width in arguments.widths:
            yield from rows_of(count, width, machine, arguments)
    yield step_row(arguments)


def step_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two scores of the samples of a step of the alignment stage, beside that step."""
    import jax
    import jax.numpy as jnp

    from marsjax import alignment, stein
    from marsjax.configuration import to_json
    from marsjax.data import batches
    from marsjax.data.splits import make_rows
    from marsjax.data.synthetic import make_synthetic
    from marsjax.defaults import default_config
    from marsjax.training.optimizer import AdamW, adamw
    from marsjax.training.step import init_state, init_variables

    log.info("a step of the alignment stage")
    cfg = default_config().alignment
    dataset = make_synthetic(n_users=arguments.users, n_items=2 * cfg.stein_items, high_events=(60, 120), seed=SEED)
    rows = make_rows(dataset.log, split="leave_one_out")
    source, _ = batches.alignment_source(
        dataset.log, rows, blocks=cfg.blocks, targets=cfg.targets, length=cfg.history, stein_items=cfg.stein_items,
        steps=8, seed=SEED,
    )  # fmt: skip
    tables = alignment.feature_tables(dataset.items, tuple(cfg.modalities))
    encoder = alignment.make_encoder(to_json(cfg), n_items=len(dataset.items.raw_id_N))
    settings = AdamW(cfg.learning_rate, cfg.weight_decay, cfg.clip)
    weights = alignment.AlignmentLoss(cfg.beta, cfg.lambda_, 1.0, cfg.eta, cfg.estimator, cfg.objective)
    lifted = alignment.lifted_step(encoder, weights, settings, "single")
    params = init_variables(encoder, (), jax.random.key(SEED), source[0], tables)["params"]
    state = lifted.replicate(init_state(params, {}, adamw(settings), seed=SEED))
    placed, ready = lifted.replicate(tables), [source[index] for index in range(len(source))]
    at = 0

    def step(times: int) -> None:
        nonlocal state, at
        for _ in range(times):
            at += 1
            state, _ = lifted.step(state, ready[at % len(ready)], placed)
        jax.block_until_ready(state)

    x_ND, mask_N = jnp.asarray(samples(cfg.stein_items, cfg.width)), jnp.ones(cfg.stein_items, bool)
    score = jax.jit(stein.stein_score)
    timed = harness.take_turns(
        {"scores": harness.repeated(lambda: (score(x_ND, mask_N), score(x_ND, mask_N))), "step": step},
        turns=arguments.turns, seconds=arguments.seconds,
    )  # fmt: skip
    share = timed["scores"].median / timed["step"].median
    row = harness.compare(
        "milliseconds of two Stein scores, against the whole step of the alignment they are part of",
        f"N = {cfg.stein_items}, D = {cfg.width}, {cfg.blocks} histories of {cfg.history}, {cfg.targets} targets each",
        timed["scores"], timed["step"], "step",
    )  # fmt: skip
    return row | {
        "target": 1 / SHARE_TARGET,
        "met": bool(share <= SHARE_TARGET),
        "share": share,
        "note": f"{share:.1%} of the step; the target is {SHARE_TARGET:.0%}",
    }


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="128,512,2048,8192", help="samples, N (default: %(default)s)")
    parser.add_argument("--widths", default="64,256", help="their widths, D (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=5.0, help="GiB of differences, at most (default: %(default)s)")
    parser.add_argument("--spectral", type=int, default=2048, help="N of SSGE, at most (default: %(default)s)")
    parser.add_argument("--users", type=int, default=2000, help="of the log of the step (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="repeats of each case, by turns (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a turn takes at least (default: 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes, in less than a minute")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows there as JSON")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.counts, arguments.widths, arguments.users = "128,512", "64", 300
        arguments.turns, arguments.seconds = 3, 0.1
    arguments.counts, arguments.widths = (
        harness.whole_numbers(parser, "--counts and --widths", text, least=2)
        for text in (arguments.counts, arguments.widths)
    )
    return arguments


def main(words: list[str] | None = None) -> None:
    """Measures, prints the tables, and writes the rows."""
    arguments = parse(words)
    harness.log_progress(log.name)
    from marsjax.allocator import keep_freed_memory

    keep_freed_memory()  # as `marsjax` trains
    began = harness.begin()
    machine = harness.measure_device(precision="highest")
    harness.write_results(
        arguments.output, all_rows(machine, arguments), began, program="-m benchmarks.stein", words=words,
        machine=machine.describe(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
