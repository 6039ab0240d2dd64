"""What does it take to embed users?

    python -m benchmarks.encoding [--output=benchmarks/results/encoding.json]

The encoder of the default configuration, with a catalogue and features as MovieLens-1M has them (3,417 items, texts of
384 numbers, images of 1,280), makes item and user vectors of `--batch` histories of each of `--lengths` (Eqs. 3-4,
9-11, 13), by turns

- from the vectors of Eq. 3, which `embeddings.with_vectors` makes once (ours),
- from the features, of which every entry's are gathered and projected,
- as the equations are written: with a key and a value for each entry beside that.

Asserted beside the time: all three give the same user vectors. Some items have no text or no image, some histories are
short, and ids are as far apart as a training makes them, so that each equation counts.

What it takes to make the vectors of Eq. 3 is a row of its own. The floor are the operations of ours, without them, at
the rate of a large float32 product.
"""

from __future__ import annotations

import argparse
import functools
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from marsjax import embeddings
from marsjax.alignment import FeatureTables, make_encoder
from marsjax.configuration import to_json
from marsjax.defaults import default_config
from marsjax.records import AlignmentBatch
from marsjax.training.step import init_variables

log = logging.getLogger("encoding")

ITEMS, WIDTHS, SEED = 3417, {"text": 384, "image": 1280}, 0
APART = 20.0  # times as far apart as ids are drawn
QUESTION = "milliseconds to encode histories"


def as_written(params: Mapping[str, Any], tables: FeatureTables, history_BL: jax.Array) -> jax.Array:
    """User vectors [B, D], each equation by itself."""

    def project(name: str) -> jax.Array:  # Eq. 3
        emb_BLD = tables.feature_NF[name][history_BL] @ params[f"project_{name}"]["kernel"]
        emb_BLD = emb_BLD * jax.lax.rsqrt(jnp.mean(emb_BLD**2, axis=-1, keepdims=True) + 1e-6)
        return emb_BLD * tables.present_N[name][history_BL][..., None]

    def attend(name: str, query_BLD: jax.Array, key_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        of_query, of_key, of_value = (params[name][f"to_{part}"]["kernel"] for part in ("query", "key", "value"))
        logit_BLL = jnp.einsum("btd,bld->btl", query_BLD @ of_query, key_BLD @ of_key) / np.sqrt(of_key.shape[1])
        weight_BLL = jax.nn.softmax(jnp.where(mask_BL[:, None], logit_BLL, -1e30)) * mask_BL[:, None]
        return jnp.einsum("btl,bld->btd", weight_BLL, key_BLD @ of_value)

    def norm(name: str, x_BLD: jax.Array) -> jax.Array:
        centred_BLD = x_BLD - jnp.mean(x_BLD, axis=-1, keepdims=True)
        unit_BLD = centred_BLD * jax.lax.rsqrt(jnp.mean(centred_BLD**2, axis=-1, keepdims=True) + 1e-6)
        return unit_BLD * params[name]["scale"][None, None] + params[name]["bias"][None, None]

    mask_BL = history_BL > 0
    text_BLD, image_BLD = project("text"), project("image")
    has_text_BL = mask_BL & tables.present_N["text"][history_BL]
    fused_BLD = norm("fuse_norm", image_BLD + attend("modal_attention", image_BLD, text_BLD, has_text_BL))  # Eqs. 9-10
    id_BLD = params["item"][history_BL]
    id_BLD = attend("self_attention", id_BLD, id_BLD, mask_BL)  # Eq. 4
    item_BLD = norm("residual_norm", fused_BLD + attend("id_attention", fused_BLD, id_BLD, mask_BL))  # Eq. 11
    return jnp.sum(item_BLD * mask_BL[..., None], axis=1) / jnp.sum(mask_BL, axis=1)[:, None]  # Eq. 13


def flops(batch: int, length: int, *, width: int, id_width: int) -> float:
    """Operations of the products of ours. Each attention compares and averages keys as they come, and makes its queries
    comparable, by the product of two matrices, and its averages values."""

    def attention(query: int, key: int, value: int) -> int:
        return 2 * query * key + 2 * 2 * length * key + 2 * key * value

    each = attention(width, width, width) + attention(id_width, id_width, id_width) + attention(width, id_width, width)
    return float(batch * length * each + 2 * (width**3 + id_width**3 + width**2 * id_width))


def rows_of(machine: harness.Machine, arguments: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """A row for the vectors, and two for each length."""
    rng = np.random.default_rng(SEED)
    cfg = default_config().alignment
    present = {name: (np.arange(arguments.items) > 0) & (rng.random(arguments.items) < 0.95) for name in WIDTHS}
    features = {
        name: (rng.normal(size=(arguments.items, width)) * present[name][:, None]).astype(np.float32)
        for name, width in WIDTHS.items()
    }
    tables = jax.device_put(FeatureTables(features, present))
    encoder = make_encoder(to_json(cfg), n_items=arguments.items)
    one_BL, one_BT = np.ones((1, 1), np.int32), np.ones((1, 1), np.float32)
    batch = AlignmentBatch(one_BL, one_BL, one_BT, one_BT, one_BL[0])
    params = init_variables(encoder, (), jax.random.key(SEED), batch, tables)["params"]
    params = params | {"item": APART * params["item"]}
    with_vectors = embeddings.with_vectors(encoder, params, tables)
    making = harness.repeated(lambda: embeddings.with_vectors(encoder, params, tables))
    timed = harness.take_turns({"ours": making}, turns=arguments.turns, seconds=arguments.seconds, warm=1)
    yield harness.compare(
        f"{QUESTION}: the vectors of Eq. 3, once", f"{arguments.items} items", timed["ours"], None, None
    )
    written = jax.jit(as_written)
    for length in arguments.lengths:
        case = f"{arguments.batch} histories of {length}"
        log.info("%s", case)
        real_BL = np.arange(length) < rng.integers((length + 1) // 2, length + 1, arguments.batch)[:, None]
        history_BL = jnp.asarray((rng.integers(1, arguments.items, real_BL.shape) * real_BL).astype(np.int32))
        made: dict[str, Callable[[jax.Array], jax.Array]] = {
            "ours": lambda history_BL: embeddings.encode(encoder, params, with_vectors, history_BL)[1],
            "features projected for each entry": lambda history_BL: embeddings.encode(
                encoder, params, tables, history_BL
            )[1],
            "the equations as written": lambda history_BL: written(params, tables, history_BL),
        }
        vectors = {name: np.asarray(make(history_BL)) for name, make in made.items()}
        for name, found_BD in vectors.items():
            if not np.allclose(found_BD, vectors["ours"], atol=1e-4):
                worst = np.abs(found_BD - vectors["ours"]).max()
                raise SystemExit(f"{case}, {name}: expected the same user vectors, found a difference of {worst}")

        sides = {name: harness.repeated(functools.partial(make, history_BL)) for name, make in made.items()}
        timed = harness.take_turns(sides, turns=arguments.turns, seconds=arguments.seconds, warm=1)
        work = flops(arguments.batch, length, width=cfg.width, id_width=cfg.id_width)
        reached = harness.bound(machine, work, 0.0) / timed["ours"].median
        for name in list(made)[1:]:
            row = harness.compare(QUESTION, case, timed["ours"], timed[name], name)
            yield row | {"reached": reached, "note": f"{work / 1e9:.3g} GFLOP, {reached:.0%} of what they allow"}


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="16,64,200", help="of histories (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="histories at a time (default: 128)")
    parser.add_argument("--items", type=int, default=ITEMS, help="of the catalogue (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="repeats of each case, by turns (default: 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a turn takes at least (default: 1)")
    parser.add_argument("--quick", action="store_true", help="few turns, in less than a minute")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows there as JSON")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.lengths, arguments.turns, arguments.seconds = "16,64", 3, 0.1
    arguments.lengths = harness.whole_numbers(parser, "--lengths", arguments.lengths)
    if min(arguments.batch, arguments.turns) < 1 or arguments.items < 2:
        parser.error("--batch and --turns: expected 1 or more, --items: 2 or more")
    return arguments


def main(words: list[str] | None = None) -> None:
    """Measures, prints the table, and writes the rows."""
    arguments = parse(words)
    harness.log_progress(log.name)
    from marsjax.allocator import keep_freed_memory

    keep_freed_memory()  # as `marsjax` runs
    began = harness.begin()
    machine = harness.measure_machine()
    rows = rows_of(machine, arguments)
    harness.write_results(
        arguments.output, rows, began, program="-m benchmarks.encoding", words=words, machine=machine.describe()
    )


if __name__ == "__main__":
    main()
