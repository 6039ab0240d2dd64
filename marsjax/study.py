"""What `marsjax reproduce` runs: section 4 of the paper on one backbone, and what the paper does not show.

A study is made of parts, a part of cells. A cell is one configuration and the methods that are trained on it, for every
seed; what cells share (data, alignment, the base) is done once. This file is data: `commands.reproduce` runs it, and
`evaluation.study_page` draws it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Cell(NamedTuple):
    """One configuration, and what is trained on it."""

    name: str  # of its file in --workdir/cells
    label: str  # in tables and plots
    methods: tuple[str, ...]  # each with "base", which the others are compared with
    changes: Mapping[str, str]  # configuration key -> value, over the configuration of the command
    x: float | None = None  # its place on the axis of a sweep
    settings: Mapping[str, Mapping[str, str]] = MappingProxyType({})  # tried for each method; none: as configured


class Part(NamedTuple):
    """A section of the report."""

    name: str  # for --parts
    title: str
    kind: str  # how it is drawn: a key of `evaluation.study_page.DRAWN`
    text: str
    cells: tuple[Cell, ...] = ()
    x_label: str = ""  # of a sweep


BASELINES = ("ran", "ran_s", "reppad", "cmr", "cmrsi", "cl4srec", "coserec", "basrec")
BUDGET = tuple(f"{name}_budget" for name in BASELINES)
CONTROLS = (
    "random_donor", "popular_items", "tfidf_donor", "collaborative_donor", "collaborative_posterior", "hidden_ids",
    "short_histories",
)  # fmt: skip
PUBLISHED = ("mars", "mars_time_safe", "mars_without_target", "mars_train_only", "mars_test_only")
TABLE_2 = {  # in parts that each take an hour of two cores or two, since a cell is kept when it is whole
    "in their usual form": ("base", *BASELINES, "mars", "mars_posterior"),
    "at MARS's number of items": ("base", *BUDGET, "mars", "mars_posterior"),
    "controls and MARS": (
        "base",
        *CONTROLS,
        *PUBLISHED,
        "mars_posterior",
        "mars_graded_posterior",
        "mars_short_posterior",
    ),
}
ATTEMPTS = (  # what was tried on the way to what works, and the same without content
    "everybody_votes", "collaborative_vote", "mars_vote", "mars_vote_time_safe", "mars_vote_and_items",
    "mars_short_vote", "mars_short_posterior_and_items",
)  # fmt: skip
BASES = {"ids": "ids only, as the paper", "strong": "strong inputs"}
HEADLINE = (
    "base", "random_donor", "popular_items", "tfidf_donor", "short_histories", "collaborative_short_posterior",
    "collaborative_short_graded_posterior", "mars", "mars_posterior", "mars_short_posterior",
    "mars_short_graded_posterior",
)  # fmt: skip
GRADED = (
    "base", "popular_items", "short_histories", "mars", "mars_short_posterior", "mars_short_graded_posterior",
)  # fmt: skip
FOLLOWED = {  # along the length of a history; baselines are compared at five events, in the part `search`
    "ids": ("base", "random_donor", "popular_items", "mars", "mars_posterior", "mars_short_posterior"),
    "strong": (
        "base", "random_donor", "popular_items", "short_histories", "collaborative_short_posterior", "mars",
        "mars_posterior", "mars_short_posterior", "mars_short_graded_posterior",
    ),
}  # fmt: skip
ALONE = ("base", "mars", "mars_posterior")  # what is followed through ablations and sweeps
# As long as histories are in the baselines' sources; the 200 of the paper would take two to three times as long.
FIFTY = {"ctr.cap": "50", "ctr.buckets": "25,50", "retrieval.history": "50"}
SPARSE = {"split.kind": "last_fraction", "split.sparse_fraction": "0.3", **FIFTY}
FIVE_EVENTS = {"ctr.inputs": "strong", **SPARSE, "split.sparse_events": "5"}
TEN_SEEDS = {"seeds": "0,1,2,3,4,5,6,7,8,9"}
SETTINGS = {  # what matters most where ids of few events overfit: how much they may
    "as configured": {},
    "decay of ids 1": {"ctr.id_decay": "1"},
    "decay of ids 4": {"ctr.id_decay": "4"},
}


def full(known: frozenset[str]) -> tuple[Part, ...]:
    """The whole study, of the methods that are `known`."""

    def of(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in known)

    def variant(part: str, label: str, changes: Mapping[str, str], methods: tuple[str, ...] = ALONE,
                x: float | None = None, inputs: str = "strong") -> Cell:  # fmt: skip
        slug = "".join(letter if letter.isalnum() or letter == "." else "_" for letter in label)
        return Cell(f"{part}_{slug}_{inputs}", label, of(*methods), {"ctr.inputs": inputs, **FIFTY, **changes}, x)

    def sweep(part: str, title: str, key: str, values: tuple[str, ...], text: str) -> Part:
        # What is kept of a donor's history (theta) does not enter the posterior, and tells over strong inputs, where
        # what is lent costs AUC. The space tells over ids, where without text or images some of the gain is gone.
        methods, inputs = (("base", "mars"), "strong") if part == "theta" else (ALONE, "ids")
        cells = tuple(variant(part, value, {key: value}, methods, float(value), inputs) for value in values)
        return Part(part, title, "sweep", text, cells, x_label=key)

    ablations = {
        "complete": {},
        "without text": {"alignment.modalities": "image"},
        "without image": {"alignment.modalities": "text"},
        "without Stein": {"alignment.beta": "0"},
        "without training": {"alignment.epochs": "0"},
    }
    losses = {
        "Stein": {},
        "printed sign": {"alignment.entropy_sign": "printed"},
        "InfoNCE": {"alignment.objective": "info_nce"},
        "cosine": {"alignment.objective": "cosine"},
        "MMD": {"alignment.objective": "mmd"},
    }
    spaces = {
        "ids": losses | {"values kept": {"alignment.keep_values": "true"}},
        "strong": losses
        | {
            "static item vectors": {"augmentation.vectors": "static"},
            "donors of the whole history": {"retrieval.prefix_stride": "0"},
        },
    }
    paddings = {"most similar": "most_similar", "filter": "filter", "kth similar": "kth_similar", "DP": "dp"}
    return (
        Part(
            "headline",
            "The headline: users of five events, ten seeds",
            "search",
            "A random 30% of the users keep only their first five events, in training and at test, over a base with "
            "strong inputs. Each method has the setting that suits it: the one of those below with the best AUC of "
            "the low-active users' validation rows, on the first seed. Test rows are judged with that one alone.",
            (Cell("headline", "5 events", of(*HEADLINE), FIVE_EVENTS | TEN_SEEDS, 5.0, SETTINGS),),
        ),
        Part(
            "graded",
            "The same over a base that reads grades",
            "search",
            "The expectation may gain from grades: how much an item was liked, and not only whether. Here the base "
            "reads them too: the marks of history items are ratings, and mean ratings stand beside the rates of likes.",
            (Cell("graded", "5 events", of(*GRADED), FIVE_EVENTS | {"ctr.inputs": "graded"}, 5.0, SETTINGS),),
        ),
        Part("table1", "Table 1: the data", "statistics", "Counts after cleaning, beside the paper's."),
        Part(
            "features",
            "What the features know",
            "features",
            "Here are how far texts lie from images before and after the alignment is trained, a map, and the "
            "neighbours of some items, drawn by seed, as pictures.",
        ),
        *(
            Part(
                f"table2_{inputs}",
                f"Table 2: all methods, {name}",
                "methods",
                "Every method is trained anew, with the same seeds, epochs and model. Baselines in their usual form, "
                "and (`_budget`) lending low-active users as many items as MARS does. All read the last "
                "50 entries of a history.",
                tuple(variant("table2", label, {}, methods, inputs=inputs) for label, methods in TABLE_2.items()),
            )
            for inputs, name in BASES.items()
        ),
        *(
            Part(
                f"table3_{inputs}",
                f"Table 3: MARS without its parts, {BASES[inputs]}",
                "variants",
                "Without training, the encoder is used as it was drawn.",
                tuple(variant("table3", label, changes, inputs=inputs) for label, changes in ablations.items()),
            )
            for inputs in BASES
        ),
        *(
            Part(
                f"figure4_{inputs}",
                f"Figure 4: padding strategies, {BASES[inputs]}",
                "variants",
                "What of the donors' histories is lent (section 4.4). Of 50 entries the nearest donor fills what the "
                "own history leaves, so that the k nearest donors (kth similar) lend what the nearest one does.",
                tuple(
                    variant("figure4", label, {"augmentation.strategy": value}, ("base", "mars"), inputs=inputs)
                    for label, value in paddings.items()
                ),
            )
            for inputs in BASES
        ),
        *(
            Part(
                f"sparse_{inputs}",
                f"Sparse users: what a history is worth, {BASES[inputs]}",
                "sparse",
                "A random 30% of the users keep only their first events, in training and at test. The ceiling, "
                "`full_history`, is the base model with their whole histories, on the same rows.",
                tuple(
                    Cell(
                        f"sparse{count}_{inputs}",
                        f"{count} events",
                        of(*FOLLOWED[inputs], *(ATTEMPTS if (count, inputs) == (5, "strong") else ())),
                        {"ctr.inputs": inputs, **SPARSE, "split.sparse_events": str(count)},
                        float(count),
                    )
                    for count in (3, 5, 10, 20)
                ),
                x_label="events that low-active users keep",
            )
            for inputs in BASES
        ),
        Part(
            "search",
            "Every method with the setting that suits it",
            "search",
            "The same with the methods of other papers, and fewer seeds.",
            (
                Cell(
                    "search_sparse5_strong", "5 events",
                    of("base", *BASELINES, *BUDGET, "mars_short_posterior", "mars_short_graded_posterior"),
                    FIVE_EVENTS, 5.0, SETTINGS,
                ),
            ),
        ),
        Part(
            "donors",
            "How many donors it takes",
            "sweep",
            "Few users have few donors. What the aligned space adds is the difference of `mars_posterior` to "
            "`collaborative_posterior`, which knows donors alone.",
            tuple(
                variant("donors", str(count), {**SPARSE, "split.sparse_events": "5", "data.sample_users": str(count)},
                        ("base", "mars_posterior", "collaborative_posterior"), float(count))
                for count in (300, 1000, 3000)
            ),
            x_label="users in the data",
        ),
        *(
            Part(
                f"alignment_{inputs}",
                f"How the space is made, {BASES[inputs]}",
                "variants",
                "Losses that align text and images, signs of the entropy, and what else decides who is similar.",
                tuple(variant("alignment", label, changes, inputs=inputs) for label, changes in variants.items()),
            )
            for inputs, variants in spaces.items()
        ),
        Part(
            "leak",
            "Does a label leak?",
            "control",
            "Labels are put in random order. Of methods that are put together from others, the parts stand here. "
            "Over the whole log nothing is left to learn, and an AUC above 0.5, but for noise, is a label that "
            "leaks. Within each user how much the user likes stays, which AUC sees. GAUC can lie far from 0.5 on "
            "either side though nothing leaks: strong inputs hold the labels of the user's earlier test rows, and "
            "of two rows with different labels the later one has the other's in its history. So the user's rate "
            "of likes puts the wrong one first, and its opposite the right one; and of a model that has nothing "
            "to learn the weight of the rate is noise, of either sign, and yet most of what tells the rows of one "
            "user apart.",
            tuple(
                Cell(
                    f"leak_{among}_strong", label,
                    of("base", "short_histories", "mars", "mars_vote", "mars_posterior", "mars_graded_posterior"),
                    {"ctr.inputs": "strong", "data.permute_labels": among, "split.kind": "last_fraction", **FIFTY},
                )
                for among, label in {"log": "permuted over the log", "users": "permuted within users"}.items()
            ),
        ),
        sweep("theta", "How much is kept", "augmentation.theta_quantile", ("0", "0.25", "0.5", "0.75"), "Eq. 17."),
        sweep("beta", "Weight of the Stein loss", "alignment.beta", ("0.01", "0.1", "1"), "Eq. 14."),
        sweep("lambda", "Weight of the entropy", "alignment.lambda_", ("0.0003", "0.003", "0.03"), "Eq. 8."),
        Part("cases", "What MARS does for single users", "cases", "Low-active users drawn by seed, not chosen."),
    )  # fmt: skip


QUICK = {
    "seeds": "0",
    "data.sample_users": "600",
    "alignment.epochs": "0.5",
    "ctr.epochs": "1",
    "ctr.cap": "50",
    "ctr.buckets": "25,50",
    "evaluation.bootstrap": "200",
}


QUICK_CELL = {  # of the parts of which one cell is enough: the baselines stand in the table of ids
    "table2_strong": "table2_controls_and_MARS_strong",
    "sparse_strong": "sparse5_strong",
}


def quick(known: frozenset[str]) -> tuple[Part, ...]:
    """A small version: some users, one seed, one epoch, and no sweeps. It shows the report, and proves nothing."""
    wanted = ("table1", "features", "table2_ids", "table2_strong", "figure4_ids", "sparse_strong", "cases")
    parts = []
    for part in full(known):
        if part.name in wanted:
            kept = [cell for cell in part.cells if cell.name == QUICK_CELL.get(part.name, cell.name)]
            parts.append(part._replace(cells=tuple(cell._replace(changes={**cell.changes, **QUICK}) for cell in kept)))
    return tuple(parts)
