"""How fast is the search for a donor at equal recall, and how much do filtering and concatenating add?

    pip install faiss-cpu hnswlib
    python -m benchmarks.retrieval [--counts=10000,100000,1000000] [--output=benchmarks/results/retrieval.json]

Neither is a dependency of this project: `--alone` measures without them.

The vectors are as wide as the aligned space. They are planted: users of a few types, in a space of few dimensions that
is mapped to the wide one, with noise in both; queries are other users of the same types. White noise alone would say
nothing, since there the nearest neighbour is hardly nearer than any other user.

Ours is `retrieval.build_index` and `retrieval.search` in the default precision, f16, with all that these do beside
USearch: vectors that are checked and brought to unit length, exact similarities, ties, padding; f32 and i8 stand beside
it. The others get unit vectors and answer with slots. All graphs have 16 links and are built with 128 candidates, on
`--build-threads` threads (1: ours is built on one, so that equal data give an equal graph); searches are on all cores,
`--donors` neighbours each.

Recall@1 is the share of queries whose nearest user is found, against exact search over the same sample. For every
index the least number of candidates (ef) with which recall@1 is 0.99 is looked for among steps of an eighth, the same
for all, and the times are compared there; the recall of both stands in the row. An index that does not come to 0.99
with the most candidates stops the run, unless it is not the default one of this project: that one's best is reported.

Bytes are what is resident after building, less what was before: of ours with the vectors for exact similarities.

The whole augmentation is what the pipeline does for each user: search with the defaults, Eqs. 16-17 over the nearest
donor's history, and Eq. 18, the borrowed items before the own ones in a batch. It is held against the search alone.
What is borrowed is asserted to be what a plain loop over a few users finds.

The floor of a search of exactly `ef` candidates would be the vectors of the users that are visited, each once, at the
rate of a copy; what is visited only USearch counts, and the row has it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness

log = logging.getLogger("retrieval")

COUNTS, WIDTH, LATENT, SAMPLE = (10_000, 100_000), 256, 48, 1000
OURS = "f16"  # the default of the product
SEED, LINKS, CANDIDATES, RECALL = 0, 16, 128, 0.99
SPEED, WHOLE = 0.9, 0.7  # targets: of faiss, of the bare search
LADDER = tuple(sorted({round(8 * 1.125**step) for step in range(40)}))  # 8 to some 790
ITEMS, OWN, THETA = 4000, 10, 0.5


class Planted(NamedTuple):
    """Users to be found, and users who ask."""

    base_PD: np.ndarray
    user_P: np.ndarray
    query_QD: np.ndarray


class Engine(NamedTuple):
    """An index that is ready to be asked."""

    name: str
    ask: Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]  # queries, k, ef -> slots, similarities
    seconds: float  # of building
    resident: int  # bytes
    index: Any


class Tuned(NamedTuple):
    """The least candidates that reach the recall, or the most that were tried."""

    ef: int
    at_1: float
    at_k: float


def plant(count: int, *, queries: int, width: int = WIDTH, seed: int = SEED) -> Planted:
    """Vectors of users of planted types, a type for each 100 users, in a space of fewer dimensions than the vectors."""
    rng = np.random.default_rng(seed)
    latent, types = min(LATENT, width), max(4, count // 100)
    type_TC = rng.standard_normal((types, latent), np.float32)
    map_CD = rng.standard_normal((latent, width), np.float32) / np.float32(np.sqrt(latent))

    def draw(n: int) -> np.ndarray:
        out_BD = np.empty((n, width), np.float32)
        for begin in range(0, n, 65_536):  # what is between is as large as the vectors
            here = min(65_536, n - begin)
            point_BC = type_TC[rng.integers(types, size=here)] + 0.7 * rng.standard_normal((here, latent), np.float32)
            out_BD[begin : begin + here] = point_BC @ map_CD + 0.1 * rng.standard_normal((here, width), np.float32)
        return out_BD

    # Numbers of users are not slots: every third user is one who may lend.
    return Planted(draw(count), np.arange(count, dtype=np.int64) * 3, draw(queries))


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    # What was freed before and is kept would be used again, and counted for nobody.
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def engine(name: str, build: Callable[[], Any], ask: Callable[[Any], Any]) -> Engine:
    """Builds an index with the clock running."""
    log.info("building %s", name)
    before, began = resident(), time.perf_counter()
    index = build()
    seconds = time.perf_counter() - began
    return Engine(name, ask(index), seconds, resident() - before, index)


def ours(planted: Planted, dtype: str) -> Engine:
    """USearch as the product uses it."""
    from marsjax import retrieval

    def asker(index: retrieval.UserIndex) -> Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]:
        def ask(query_BD: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
            found = retrieval.search(index, query_BD, k=k, expansion_search=ef)
            return found.user_BK // 3, found.similarity_BK

        return ask

    def build() -> retrieval.UserIndex:
        return retrieval.build_index(
            planted.base_PD, planted.user_P, connectivity=LINKS, expansion_add=CANDIDATES, dtype=dtype
        )

    return engine(f"USearch {dtype}", build, asker)


def need(name: str) -> Any:
    """An optional library. Stops with one line where it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(
            f"{name} cannot be imported ({error}): pip install faiss-cpu hnswlib, or measure --alone"
        ) from None


def by_faiss(unit_PD: np.ndarray, threads: int) -> Engine:
    """HNSW of faiss."""
    faiss = need("faiss")
    cores = len(os.sched_getaffinity(0))

    def build() -> Any:
        faiss.omp_set_num_threads(threads)
        index = faiss.IndexHNSWFlat(unit_PD.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = CANDIDATES
        index.add(unit_PD)
        faiss.omp_set_num_threads(cores)
        return index

    def asker(index: Any) -> Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]:
        def ask(query_BD: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
            index.hnsw.efSearch = ef
            similarity_BK, slot_BK = index.search(query_BD, k)
            return slot_BK, similarity_BK

        return ask

    return engine(f"faiss {faiss.__version__} HNSW", build, asker)


def by_hnswlib(unit_PD: np.ndarray, threads: int) -> Engine:
    """hnswlib."""
    hnswlib = need("hnswlib")
    cores = len(os.sched_getaffinity(0))

    def build() -> Any:
        index = hnswlib.Index(space="ip", dim=unit_PD.shape[1])
        index.init_index(len(unit_PD), M=LINKS, ef_construction=CANDIDATES, random_seed=SEED)
        index.add_items(unit_PD, num_threads=threads)
        return index

    def asker(index: Any) -> Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]:
        def ask(query_BD: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
            index.set_ef(max(ef, k))
            slot_BK, distance_BK = index.knn_query(query_BD, k, num_threads=cores)
            return slot_BK.astype(np.int64), 1.0 - distance_BK

        return ask

    return engine("hnswlib", build, asker)


def recalls(slot_BK: np.ndarray, unit_PD: np.ndarray, unit_BD: np.ndarray, exact_BK: np.ndarray) -> tuple[float, float]:
    """Recall@1 and recall@k by exact similarities: a neighbour as similar as the exact one counts as found."""
    found_BK = (unit_PD[np.maximum(slot_BK, 0)] * unit_BD[:, None, :]).sum(axis=2)
    found_BK = -np.sort(-np.where(slot_BK >= 0, found_BK, -np.inf), axis=1)
    return float((found_BK[:, 0] >= exact_BK[:, 0] - 1e-5).mean()), float((found_BK >= exact_BK[:, -1:] - 1e-5).mean())


def tune(made: Engine, unit_PD: np.ndarray, unit_BD: np.ndarray, exact_BK: np.ndarray, *, must: bool = True) -> Tuned:
    """The least `ef` of the ladder whose recall@1 is high enough, by bisection: recall grows with it but for chance."""
    k, low, high, known = exact_BK.shape[1], 0, len(LADDER) - 1, {}

    def at(step: int) -> Tuned:
        if step not in known:
            slot_BK, _ = made.ask(unit_BD, k, LADDER[step])
            known[step] = Tuned(LADDER[step], *recalls(slot_BK, unit_PD, unit_BD, exact_BK))
        return known[step]

    if at(high).at_1 < RECALL:
        if must:
            raise SystemExit(
                f"{made.name}: expected recall@1 of {RECALL}, found {at(high).at_1:.4f} with {LADDER[-1]} candidates"
            )
        return at(high)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle).at_1 >= RECALL else (middle + 1, high)
    return at(high)


def visited(index: Any, unit_BD: np.ndarray, k: int, ef: int) -> float:
    """Distances that USearch computes for a query, on average."""
    index.graph.expansion_search = ef
    return float(index.graph.search(unit_BD, k, threads=0).computed_distances) / len(unit_BD)


def search_rows(count: int, machine: harness.Machine, arguments: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Searches at equal recall, building and memory, and the whole augmentation, for so many users."""
    from marsjax import retrieval

    planted = plant(count, queries=arguments.queries, width=arguments.width)
    k, sample = arguments.donors, min(SAMPLE, arguments.queries)
    began = time.perf_counter()
    exact = retrieval.exact_search(planted.query_QD[:sample], planted.base_PD, planted.user_P, k=k)
    first_exact = (time.perf_counter() - began) / sample
    engines = {dtype: ours(planted, dtype) for dtype in (OURS, "f32", "i8")}
    unit_PD = engines[OURS].index.unit_PD
    for dtype in ("f32", "i8"):  # one copy of the vectors is enough, now that memory is measured
        engines[dtype] = ours_with(engines[dtype], unit_PD)
    unit_QD = planted.query_QD / np.linalg.norm(planted.query_QD, axis=1, keepdims=True)
    if not arguments.alone:
        for make in (by_faiss, by_hnswlib):
            made = make(unit_PD, arguments.build_threads)
            engines[made.name.split()[0]] = made
    tuned = {
        name: tune(made, unit_PD, unit_QD[:sample], exact.similarity_BK, must=name not in ("f32", "i8"))
        for name, made in engines.items()
    }
    for name, found in tuned.items():
        log.info("%d users, %s: ef %d, recall@1 %.4f", count, engines[name].name, found.ef, found.at_1)

    def runs(name: str) -> Callable[[int], None]:
        def run(times: int) -> None:
            for _ in range(times):
                engines[name].ask(unit_QD, k, tuned[name].ef)

        return run

    timed = harness.take_turns(
        {name: runs(name) for name in engines}, turns=arguments.turns, seconds=arguments.seconds, warm=1
    )
    timed = {
        name: harness.Timed(
            [turn / len(unit_QD) for turn in side.turns], [turn / len(unit_QD) for turn in side.processor]
        )
        for name, side in timed.items()
    }
    question = "microseconds of a search, recall@1 0.99 or more on either side"
    others = [name for name in engines if name != OURS]
    for name in others:
        case = f"{count} users, {arguments.width} numbers, {k} neighbours"
        other = None if name == OURS else timed[name]
        row = harness.compare(
            question, case, timed[OURS], other, None if other is None else engines[name].name, scale=1e6,
            target=SPEED if name == "faiss" else None,
        )  # fmt: skip
        seen = visited(engines[OURS].index, unit_QD[:sample], k, tuned[OURS].ef)
        least = harness.bound(machine, 0.0, seen * arguments.width * 2)  # of half precision
        notes = [f"ours: ef {tuned[OURS].ef}, recall@1 {tuned[OURS].at_1:.4f}"]
        if other is not None:
            notes.append(f"other: ef {tuned[name].ef}, recall@1 {tuned[name].at_1:.4f}")
        notes.append(f"{least / timed[OURS].median:.0%} of what bytes allow, {seen:.0f} vectors read")
        row |= {
            "ours_ef": tuned[OURS].ef, "ours_recall_1": tuned[OURS].at_1, "ours_recall_k": tuned[OURS].at_k,
            "other_ef": tuned[name].ef, "other_recall_1": tuned[name].at_1, "other_recall_k": tuned[name].at_k,
            "vectors_read": seen, "ours_reached": least / timed[OURS].median,
        }  # fmt: skip
        yield row | {"note": "; ".join(notes)}
    yield default_row(count, engines[OURS], planted, exact, first_exact, arguments)
    yield building_row(count, planted, exact, arguments)
    for quantity, question, scale in (
        ("seconds", "seconds of building", 1.0),
        ("resident", "megabytes resident, with the vectors", 1e-6),
    ):
        for name in others:
            mine, theirs = getattr(engines[OURS], quantity) * scale, getattr(engines[name], quantity) * scale
            alone = name == OURS
            yield {
                "question": question, "case": f"{count} users, {arguments.width} numbers", "ours": mine,
                "other": None if alone else theirs, "other_name": None if alone else engines[name].name,
                "ratio": None if alone or not mine else theirs / mine, "target": None, "met": None,
                "note": f"{arguments.build_threads} thread(s); the vectors are {count * arguments.width * 4e-6:.0f} MB",
            }  # fmt: skip
    yield whole_row(count, engines[OURS].index, planted, machine, arguments)


def building_row(count: int, planted: Planted, exact: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Building on all cores against building on one, which the pipeline does, by turns, with the recall of both."""
    from marsjax import retrieval

    built: dict[str, Any] = {}

    def builds(name: str, threads: int) -> Callable[[int], None]:
        def run(times: int) -> None:
            for _ in range(times):
                built[name] = retrieval.build_index(planted.base_PD, planted.user_P, threads=threads)

        return run

    turns = 3 if count <= 100_000 else 1  # minutes each
    sides = {"all": builds("all", 0), "one": builds("one", 1)}
    timed = harness.take_turns(sides, turns=turns, seconds=0.0, warm=0)
    sample_QD = planted.query_QD[: len(exact.valid_BK)]
    found = {
        name: retrieval.recall(retrieval.search(index, sample_QD, k=arguments.donors), exact)
        for name, index in built.items()
    }
    if found["all"] < found["one"] - 0.01:
        raise SystemExit(f"an index built on all cores has a recall of {found['all']:.4f}, on one {found['one']:.4f}")
    cores = len(os.sched_getaffinity(0))
    row = harness.compare(
        "seconds of building on all cores, against one", f"{count} users, {cores} cores", timed["all"], timed["one"],
        "one thread", scale=1.0,
    )  # fmt: skip
    at_k = f"recall@{arguments.donors}"
    return row | {
        "ours_recall_k": found["all"], "other_recall_k": found["one"],
        "note": f"{at_k} {found['all']:.4f} and {found['one']:.4f}; of several threads no two graphs are equal",
    }  # fmt: skip


def ours_with(made: Engine, unit_PD: np.ndarray) -> Engine:
    """The same index over another copy of the same vectors."""
    from marsjax import retrieval

    if not np.array_equal(made.index.unit_PD, unit_PD):
        raise SystemExit(f"{made.name}: expected the vectors that all indexes are built of, found others")
    index = made.index._replace(unit_PD=unit_PD)

    def ask(query_BD: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        found = retrieval.search(index, query_BD, k=k, expansion_search=ef)
        return found.user_BK // 3, found.similarity_BK

    return made._replace(ask=ask, index=index)


def default_row(
    count: int, made: Engine, planted: Planted, exact: Any, first_exact: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The search as the pipeline asks for it, against the exact one."""
    from marsjax import retrieval

    sample, k = len(exact.valid_BK), arguments.donors
    query_BD = planted.query_QD[:sample]
    # The exact search of some 10^6 users takes seconds: fewer turns of it, and of no more than the sample.
    turns = arguments.turns if first_exact * sample < 1 else 3

    def index_side(times: int) -> None:
        for _ in range(times):
            retrieval.search(made.index, query_BD, k=k)

    def exact_side(times: int) -> None:
        for _ in range(times):
            retrieval.exact_search(query_BD, planted.base_PD, planted.user_P, k=k)

    timed = harness.take_turns({"ours": index_side, "other": exact_side}, turns=turns, seconds=0.0, warm=1)
    each = {
        name: harness.Timed([turn / sample for turn in side.turns], [turn / sample for turn in side.processor])
        for name, side in timed.items()
    }
    found = retrieval.search(made.index, query_BD, k=k)
    at_1 = float((found.similarity_BK[:, 0] >= exact.similarity_BK[:, 0] - 1e-6).mean())
    case = f"{count} users, {sample} queries"
    row = harness.compare(
        "microseconds of a search, defaults, against the exact one", case, each["ours"], each["other"],
        "exact_search", scale=1e6,
    )  # fmt: skip
    at_k = retrieval.recall(found, exact)
    return row | {
        "ours_recall_1": at_1, "ours_recall_k": at_k,
        "note": f"recall@1 {at_1:.4f}, recall@{k} {at_k:.4f}, built in {made.seconds:.0f} s",
    }  # fmt: skip


# --- the whole augmentation -----------------------------------------------------------------------------------------


class Lending(NamedTuple):
    """Donors with histories, and users who borrow."""

    donors: Any
    item_ND: np.ndarray
    centre_D: np.ndarray
    log: Any
    rows: Any
    queries: Any
    row_R: np.ndarray  # the last event of each user who asks


def lending(planted: Planted, *, history: int, seed: int = SEED) -> Lending:
    """Histories of `history` items of the donors, and short own ones of those who ask."""
    from marsjax.data.splits import make_rows
    from marsjax.records import Donors, Log, Queries

    rng, count, users = np.random.default_rng(seed), len(planted.user_P), len(planted.query_QD)
    item_ND = rng.standard_normal((ITEMS, planted.base_PD.shape[1]), np.float32)
    item_ND[0] = 0.0
    # int32 times would do, but times are int64 everywhere.
    donors = Donors(
        planted.user_P.astype(np.int32), rng.integers(1, ITEMS, (count, history), np.int32),
        np.broadcast_to(np.arange(history), (count, history)),
    )  # fmt: skip
    events = Log(
        np.arange(users + 1) * OWN, rng.integers(1, ITEMS, users * OWN).astype(np.int32),
        np.ones(users * OWN, np.float32), np.arange(users * OWN), np.arange(users).astype(str),
    )  # fmt: skip
    rows = make_rows(events, split="leave_one_out")
    queries = Queries(np.arange(users, dtype=np.int32), rows.histories.train_end_U, rows.user_E)
    return Lending(
        donors, item_ND, planted.base_PD.mean(axis=0), events, rows, queries, np.arange(1, users + 1) * OWN - 1
    )


def augment(lent: Lending, index: Any, planted: Planted, *, donors: int, cap: int) -> tuple[Any, list[Any]]:
    """Eqs. 15-18 for all who ask: what is borrowed, and the batches that it stands in."""
    from marsjax import retrieval
    from marsjax.augmentation import mars
    from marsjax.data.batches import ctr_batch
    from marsjax.embeddings import donor_units
    from marsjax.records import Augmentation

    neighbours = retrieval.search(index, planted.query_QD, k=donors)
    of_items = lent.donors.item_PL, lent.item_ND, lent.centre_D
    vectors = donor_units("static", None, None, None, *of_items)  # type: ignore[arg-type]
    candidates = mars.borrow(
        lent.donors, neighbours, planted.query_QD, vectors, strategy="filter", theta=None, theta_quantile=THETA,
        centre_D=lent.centre_D,
    )  # fmt: skip
    augmentation = Augmentation(lent.queries, mars.kept_items(candidates))
    made = [
        ctr_batch(
            lent.log, lent.rows, lent.row_R[begin : begin + 512], length=cap, size=512, cap=cap,
            augmentation=augmentation,
        )
        for begin in range(0, len(lent.row_R), 512)
    ]  # fmt: skip
    return augmentation.borrowed, made


def check_augmentation(
    lent: Lending, index: Any, planted: Planted, borrowed: Any, made: list[Any], donors: int
) -> None:
    """Stops where a user borrows anything but the better half of the nearest donor's items, in the donor's order."""
    from marsjax import retrieval

    some = np.random.default_rng(SEED).permutation(len(planted.query_QD))[:20]
    nearest = retrieval.search(index, planted.query_QD[some], k=donors)
    for query, donor in zip(some, nearest.user_BK[:, 0], strict=True):
        item_L = lent.donors.item_PL[np.searchsorted(lent.donors.user_P, donor)]
        vector_LD = lent.item_ND[item_L].astype(np.float64) - lent.centre_D
        asked_D = planted.query_QD[query].astype(np.float64) - lent.centre_D
        cosine_L = vector_LD @ asked_D / (np.linalg.norm(vector_LD, axis=1) * np.linalg.norm(asked_D))
        theta = np.sort(cosine_L)[int(THETA * len(item_L))]
        kept = [int(item) for item in item_L[cosine_L >= theta - 1e-6]]
        last = [item for at, item in enumerate(kept) if item not in kept[at + 1 :]]
        slots = slice(borrowed.start_Q1[query], borrowed.start_Q1[query + 1])
        row = made[query // 512].history_BL[query % 512]
        own = lent.log.item_E[query * OWN : (query + 1) * OWN - 1].tolist()
        if borrowed.item_S[slots].tolist() != last or row[row > 0].tolist() != [*last, *own]:
            raise SystemExit(f"user {query}: expected to borrow {last}, found {borrowed.item_S[slots].tolist()}")


def whole_row(
    count: int, index: Any, planted: Planted, machine: harness.Machine, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Users a second of the whole augmentation, against those of the search alone, as times of a user."""
    from marsjax import retrieval

    lent, k, cap = lending(planted, history=arguments.history), arguments.donors, arguments.history + OWN
    borrowed, made = augment(lent, index, planted, donors=k, cap=cap)
    check_augmentation(lent, index, planted, borrowed, made, k)
    users = len(planted.query_QD)

    def whole(times: int) -> None:
        for _ in range(times):
            augment(lent, index, planted, donors=k, cap=cap)

    def bare(times: int) -> None:
        for _ in range(times):
            retrieval.search(index, planted.query_QD, k=k)

    timed = harness.take_turns({"ours": whole, "other": bare}, turns=arguments.turns, seconds=arguments.seconds, warm=1)
    each = {
        name: harness.Timed([turn / users for turn in side.turns], [turn / users for turn in side.processor])
        for name, side in timed.items()
    }
    row = harness.compare(
        "microseconds of the whole augmentation of a user, against its search",
        f"{count} users, {users} ask, donors of {arguments.history} items",
        each["ours"], each["other"], "search alone", scale=1e6, target=WHOLE,
    )  # fmt: skip
    extra = each["ours"].median - each["other"].median
    # Eq. 16 reads a vector of each of the donor's items, once to gather it and once to multiply, and writes it once.
    least = harness.bound(
        machine, 2.0 * arguments.history * arguments.width, 3.0 * arguments.history * arguments.width * 4
    )
    return row | {
        "users_per_second": 1 / each["ours"].median, "search_per_second": 1 / each["other"].median,
        "reached": least / max(extra, 1e-9),
        "note": f"{1 / each['ours'].median:,.0f} users/s; what is beside the search: {least / max(extra, 1e-9):.0%} of "
        "what bytes allow",
    }  # fmt: skip


# --- what is printed ------------------------------------------------------------------------------------------------


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="users (default: 10000,100000)")
    parser.add_argument("--width", type=int, default=WIDTH, help="numbers of a vector (default: 256)")
    parser.add_argument("--queries", type=int, default=5000, help="users who ask (default: 5000)")
    parser.add_argument("--donors", type=int, default=5, help="neighbours of each (default: 5)")
    parser.add_argument("--history", type=int, default=100, help="items of a donor (default: 100)")
    parser.add_argument("--build-threads", type=int, default=1, help="of faiss and hnswlib (default: 1, as ours)")
    parser.add_argument("--turns", type=int, default=7, help="repeats, by turns (default: 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a turn takes at least (default: 1)")
    parser.add_argument("--alone", action="store_true", help="without faiss and hnswlib")
    parser.add_argument("--quick", action="store_true", help="3000 users, in less than a minute")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows there as JSON")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.counts, arguments.queries, arguments.turns, arguments.seconds = "3000", 1000, 3, 0.1
    try:
        arguments.counts = [int(part) for part in arguments.counts.split(",") if part]
    except ValueError:
        parser.error(f"--counts: expected whole numbers joined by commas, found {arguments.counts}")
    numbers = (arguments.width, arguments.queries, arguments.donors, arguments.history, arguments.turns)
    if min(*numbers, *arguments.counts) < 1:
        parser.error("expected numbers of 1 or more")
    return arguments


def main(words: list[str] | None = None) -> None:
    """Measures, prints the tables, and writes the rows."""
    arguments = parse(words)
    harness.log_progress(log.name)
    from marsjax.allocator import keep_freed_memory

    keep_freed_memory()  # as `marsjax` has it
    began, versions = harness.begin(), ""
    if not arguments.alone:  # before anything is measured
        need("hnswlib")
        versions = f"faiss {need('faiss').__version__}; "
    machine = harness.measure_machine()
    rows = (row for count in arguments.counts for row in search_rows(count, machine, arguments))
    harness.write_results(
        arguments.output, rows, began, program="-m benchmarks.retrieval", words=words,
        machine=versions + machine.describe(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
