"""The methods that a report compares. A method is one function and one line in `METHODS`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from marsjax.augmentation import baselines, controls, posterior, votes
from marsjax.augmentation.baselines import BASELINES
from marsjax.data.grades import check_grades, graded_log, graded_rows
from marsjax.data.histories import cut_histories, feedback
from marsjax.progress import progress
from marsjax.records import (
    HIGH,
    LOW,
    NEW,
    TRAIN,
    Augmentation,
    Borrowed,
    Donors,
    Log,
    Objective,
    Queries,
    Rows,
    Viewing,
)

Learn = Callable[..., posterior.Opinions]
LEARN: Learn = posterior.learn_opinions


class Offer(NamedTuple):
    """What a method may use."""

    log: Log
    rows: Rows
    queries: Queries
    donors: Donors
    borrowed: Borrowed  # what MARS lends; its counts are the budget of the other methods
    item_ND: np.ndarray  # [N, D] float32, item vectors of the aligned space
    votes: votes.Settings
    low_only: bool  # ask voters for low-active users alone
    posterior: posterior.Settings
    cut_share: float  # of the rows that `short_histories` cuts
    baselines: baselines.Settings
    seed: int
    learn: Learn = LEARN  # or what knows the answer from another method


class Treatment(NamedTuple):
    """How a method changes what the CTR model reads."""

    augmentation: Augmentation | None = None  # items lent, in the history
    dense_EJ: np.ndarray | None = None  # [E, J] float32, numbers lent, beside the history
    rows: Rows | None = None  # rows with other histories
    hidden_E: np.ndarray | None = None  # [E] bool, events whose user id is not shown
    viewing: Viewing | None = None  # views of the own histories of training rows
    objective: Objective | None = None  # a loss on the views, beside the click loss
    opinions: posterior.Opinions | None = None  # what `dense_EJ` was worked out from, for those who serve


def base(offer: Offer) -> Treatment:
    """Nothing is lent."""
    return Treatment()


def mars(offer: Offer) -> Treatment:
    """What the similar donor's history has that is relevant, Eqs. 15-18."""
    return lend(offer, offer.borrowed)


def mars_time_safe(offer: Offer) -> Treatment:
    """MARS without what the donor met later than the row's own time; nothing takes its place."""
    return lend(offer, offer.borrowed, time_safe=True)


def mars_without_target(offer: Offer) -> Treatment:
    """MARS without the target item itself, which nothing replaces: what is left is no vote on the very item."""
    return lend(offer, offer.borrowed, drop_target=True)


def mars_vote(offer: Offer) -> Treatment:
    """The vote of all donors on the target, weighted by similarity in the aligned space; no items are lent."""
    return ask(offer, offer.item_ND)


def mars_vote_time_safe(offer: Offer) -> Treatment:
    """The vote of those who met the target before the row's own time."""
    return ask(offer._replace(votes=offer.votes._replace(time_safe=True)), offer.item_ND)


def mars_vote_and_items(offer: Offer) -> Treatment:
    """The vote beside the borrowed items."""
    return Treatment(mars(offer).augmentation, mars_vote(offer).dense_EJ)


def short_histories(offer: Offer) -> Treatment:
    """Users who are not low-active are also shown as if they were, and low-active users are known by their history."""
    return shorten(offer)[1]


def mars_posterior(offer: Offer) -> Treatment:
    """What is to be expected of the user on the target, given the history and what donors' opinions go together."""
    return expect(offer, offer.item_ND)


def mars_graded_posterior(offer: Offer) -> Treatment:
    """As `mars_posterior`, of grades: how much the user and the donors liked an item, not only whether."""
    return expect(graded(offer), offer.item_ND)


def hidden_ids(offer: Offer) -> Treatment:
    """Control: low-active and new users are known by their history alone, as where ids of few rows are dropped."""
    return Treatment(hidden_E=_few_rows(offer.rows))


def mars_short_posterior(offer: Offer) -> Treatment:
    """Short histories, and what is to be expected given these."""
    return expect_of_short(offer, mars_posterior)


def mars_short_graded_posterior(offer: Offer) -> Treatment:
    """Short histories, and what is to be expected given the grades in these."""
    return expect_of_short(offer, mars_graded_posterior)


def mars_short_posterior_and_items(offer: Offer) -> Treatment:
    """Short histories, what is to be expected given these, and the borrowed items."""
    return mars_short_posterior(offer)._replace(augmentation=mars(offer).augmentation)


def mars_train_only(offer: Offer) -> Treatment:
    """MARS for training rows alone: what a model loses that has learnt with borrowed items and is served without."""
    return mars(ask_for(offer, offer.rows.split_E == TRAIN))


def mars_test_only(offer: Offer) -> Treatment:
    """MARS for validation and test rows alone: borrowing for a model that was trained without."""
    return mars(ask_for(offer, offer.rows.split_E != TRAIN))


def mars_short_vote(offer: Offer) -> Treatment:
    """Short histories, and the vote of the donors who are similar by them."""
    shorter, treatment = shorten(offer)
    return treatment._replace(dense_EJ=mars_vote(shorter).dense_EJ)


def everybody_votes(offer: Offer) -> Treatment:
    """Control: all donors count the same, so what is lent is what donors think of the target, whoever asks."""
    return ask(offer._replace(votes=offer.votes._replace(sharpness=0.0)), offer.item_ND)


def collaborative_vote(offer: Offer) -> Treatment:
    """Control: users are compared by who likes what with whom, without text or images."""
    return ask(offer, votes.collaborative_factors(offer.log, offer.rows, offer.donors.user_P, offer.item_ND))


def collaborative_posterior(offer: Offer) -> Treatment:
    """Control: the posterior from what donors say alone, without the aligned space."""
    return expect(offer, None)


def collaborative_graded_posterior(offer: Offer) -> Treatment:
    """Control: as `mars_graded_posterior`, without the aligned space."""
    return expect(graded(offer), None)


def _tfidf_donor(offer: Offer, *, components: int) -> Treatment:
    budget_Q, n_items = np.diff(offer.borrowed.start_Q1), len(offer.item_ND)
    return lend(
        offer,
        controls.tfidf_donor(
            offer.donors, offer.rows.histories, offer.queries, budget_Q, n_items=n_items, components=components
        ),
    )


def tfidf_donor(offer: Offer) -> Treatment:
    """Control: the last items, as many as MARS lends, of the donor whose items are most alike by TF-IDF."""
    return _tfidf_donor(offer, components=0)


def collaborative_donor(offer: Offer) -> Treatment:
    """Control: as `tfidf_donor`, of the donor who is nearest in a space of 64 directions made of who met what."""
    return _tfidf_donor(offer, components=64)


def collaborative_short_posterior(offer: Offer) -> Treatment:
    """Control: as `mars_short_posterior`, without the aligned space."""
    return expect_of_short(offer, collaborative_posterior)


def collaborative_short_graded_posterior(offer: Offer) -> Treatment:
    """Control: as `mars_short_graded_posterior`, without the aligned space."""
    return expect_of_short(offer, collaborative_graded_posterior)


def random_donor(offer: Offer) -> Treatment:
    """The same number of items of a random high-active user."""
    budget_Q = np.diff(offer.borrowed.start_Q1)
    return lend(offer, controls.random_donor(offer.donors, budget_Q, seed=offer.seed))


def popular_items(offer: Offer) -> Treatment:
    """The same number of the items that most donors hold."""
    budget_Q = np.diff(offer.borrowed.start_Q1)
    return lend(offer, controls.popular_items(offer.donors, budget_Q, n_items=len(offer.item_ND)))


def own_form(offer: Offer, *, name: str) -> Treatment:
    """A baseline as in its source: training histories are replaced by a view of them, or a loss on views is added."""
    n_items = len(offer.item_ND)
    similar_NK = baselines.similar_items(name, offer.log, offer.rows, n_items=n_items)
    viewing = baselines.viewing(name, offer.baselines, n_items=n_items, similar_NK=similar_NK)
    return Treatment(viewing=viewing, objective=_objective(name, offer))


def budget_form(offer: Offer, *, name: str) -> Treatment:
    """A baseline at the budget of MARS: as many items for the same queries, and its loss on low-active rows alone."""
    n_items = len(offer.item_ND)
    similar_NK = baselines.similar_items(name, offer.log, offer.rows, n_items=n_items)
    borrowed = BASELINES[name].lend(
        offer.rows.histories, offer.queries, np.diff(offer.borrowed.start_Q1),
        seed=offer.seed, n_items=n_items, similar_NK=similar_NK, mode=offer.baselines.mode,
    )  # fmt: skip
    lent, objective = lend(offer, borrowed), _objective(name, offer)
    if objective is None:
        return lent
    low_E = offer.rows.group_U[offer.rows.user_E] == LOW
    viewing = baselines.viewing(name, offer.baselines, n_items=n_items, similar_NK=similar_NK, row_E=low_E)
    return lent._replace(viewing=viewing, objective=objective)


def _objective(name: str, offer: Offer) -> Objective | None:
    make = BASELINES[name].objective
    return None if make is None else make(offer.baselines.mode)


class Method(NamedTuple):
    """A function, and what must be known of it before it is called."""

    treat: Callable[[Offer], Treatment]
    numbers: int = 0  # J of `Treatment.dense_EJ`
    mask_token: bool = False  # views may hold item N, a mask: the model has a row for it
    borrows: bool = True  # reads what MARS does, its vectors, donors or budget
    baseline: bool = False  # reads `Offer.baselines`
    posterior: bool = False  # reads `Offer.posterior`
    graded: bool = False  # reads grades
    live: bool = False  # lends what MARS looks up, so a service can look it up anew
    offline: bool = False  # needs of a row what a bundle does not hold


def _both_forms(name: str) -> dict[str, Method]:
    baseline = BASELINES[name]
    masks = baseline.mask_token
    budget = functools.partial(budget_form, name=name)
    return {
        name: Method(functools.partial(own_form, name=name), mask_token=masks, borrows=False, baseline=True),
        # What is lent holds no masks, the views for a loss do.
        f"{name}_budget": Method(budget, mask_token=masks and baseline.objective is not None, baseline=True),
    }


METHODS: dict[str, Method] = {
    "base": Method(base, borrows=False),
    "random_donor": Method(random_donor),
    "popular_items": Method(popular_items),
    "mars": Method(mars, live=True),
    "mars_time_safe": Method(mars_time_safe, live=True),
    "mars_without_target": Method(mars_without_target, live=True),
    "mars_vote": Method(mars_vote, numbers=2, offline=True),
    "mars_vote_time_safe": Method(mars_vote_time_safe, numbers=2, offline=True),
    "mars_vote_and_items": Method(mars_vote_and_items, numbers=2, offline=True),
    "mars_posterior": Method(mars_posterior, numbers=2, posterior=True),
    "mars_graded_posterior": Method(mars_graded_posterior, numbers=2, posterior=True, graded=True),
    "mars_train_only": Method(mars_train_only, offline=True),
    "mars_test_only": Method(mars_test_only, offline=True),
    "hidden_ids": Method(hidden_ids, borrows=False),
    "short_histories": Method(short_histories),
    "mars_short_vote": Method(mars_short_vote, numbers=2, offline=True),
    "mars_short_posterior": Method(mars_short_posterior, numbers=2, posterior=True),
    "mars_short_graded_posterior": Method(mars_short_graded_posterior, numbers=2, posterior=True, graded=True),
    "mars_short_posterior_and_items": Method(mars_short_posterior_and_items, numbers=2, posterior=True, offline=True),
    "everybody_votes": Method(everybody_votes, numbers=2, offline=True),
    "collaborative_vote": Method(collaborative_vote, numbers=2, offline=True),
    "collaborative_posterior": Method(collaborative_posterior, numbers=2, posterior=True),
    "collaborative_graded_posterior": Method(collaborative_graded_posterior, numbers=2, posterior=True, graded=True),
    "collaborative_short_posterior": Method(collaborative_short_posterior, numbers=2, posterior=True),
    "collaborative_short_graded_posterior": Method(
        collaborative_short_graded_posterior, numbers=2, posterior=True, graded=True
    ),
    "tfidf_donor": Method(tfidf_donor),
    "collaborative_donor": Method(collaborative_donor),
    **_both_forms("ran"),
    **_both_forms("ran_s"),
    **_both_forms("reppad"),
    **_both_forms("cmr"),
    **_both_forms("cmrsi"),
    **_both_forms("cl4srec"),
    **_both_forms("coserec"),
    **_both_forms("basrec"),
}


def lend(offer: Offer, borrowed: Borrowed, *, time_safe: bool = False, drop_target: bool = False) -> Treatment:
    """Items lent to the queries, each with what its donor thought of it, unless that is told already."""
    if borrowed.feedback_S is None:
        borrowed = borrowed._replace(feedback_S=opinions(offer.log, offer.rows, borrowed, n_items=len(offer.item_ND)))
    return Treatment(Augmentation(offer.queries, borrowed, time_safe, drop_target))


def ask(offer: Offer, item_ND: np.ndarray) -> Treatment:
    """The donors' votes on the targets of all rows of users who are no donors (or of the low-active ones alone)."""
    group_E = offer.rows.group_U[offer.rows.user_E]
    asks_E = (group_E == LOW if offer.low_only else group_E != HIGH) & (offer.rows.split_E >= 0)
    voters = votes.make_voters(offer.log, offer.rows, offer.donors.user_P, item_ND)
    dense_E2 = np.zeros((len(group_E), 2), np.float32)
    row_R = np.flatnonzero(asks_E)
    dense_E2[row_R] = votes.vote(offer.log, offer.rows, voters, item_ND, row_R, offer.votes)
    return Treatment(dense_EJ=dense_E2)


def shorten(offer: Offer) -> tuple[Offer, Treatment]:
    """The offer with a share of the histories cut short, and the treatment that shows these."""
    rows, cut_E = cut_histories(offer.rows, share=offer.cut_share, seed=offer.seed)
    return offer._replace(rows=rows), Treatment(rows=rows, hidden_E=cut_E | _few_rows(rows))


def _few_rows(rows: Rows) -> np.ndarray:
    """[E] bool, events of users whose ids say little: low-active and new ones."""
    return np.isin(rows.group_U[rows.user_E], (LOW, NEW))


def expect(offer: Offer, item_ND: np.ndarray | None) -> Treatment:
    """What is to be expected on the targets of all rows. Donors are asked as any user is, about other donors."""
    rows, settings, n_items = offer.rows, offer.posterior, len(offer.item_ND)
    with progress("opinions", settings.folds) as advance:
        opinions = offer.learn(
            offer.log, rows, offer.donors.user_P, item_ND, n_items=n_items, settings=settings, advance=advance
        )
    row_R = np.flatnonzero(rows.split_E >= 0)
    dense_E2 = np.zeros((len(rows.split_E), 2), np.float32)
    with progress("expectations", len(row_R)) as advance:
        dense_E2[row_R] = posterior.expect(offer.log, rows, opinions, row_R, settings=settings, advance=advance)
    return Treatment(dense_EJ=dense_E2, opinions=opinions)


def expect_of_short(offer: Offer, treat: Callable[[Offer], Treatment]) -> Treatment:
    """Short histories, and the expectation that `treat` has of these."""
    shorter, treatment = shorten(offer)
    expected = treat(shorter)
    return treatment._replace(dense_EJ=expected.dense_EJ, opinions=expected.opinions)


def graded(offer: Offer) -> Offer:
    """The offer with grades in the place of labels. Raises ValueError where the log has labels alone."""
    check_grades(offer.log, "graded posterior")
    return offer._replace(log=graded_log(offer.log), rows=graded_rows(offer.rows))


def ask_for(offer: Offer, row_E: np.ndarray) -> Offer:
    """The offer in which the rows `row_E` alone borrow."""
    query_E = np.where(row_E, offer.queries.query_E, -1)
    return offer._replace(queries=offer.queries._replace(query_E=query_E))


def opinions(log: Log, rows: Rows, borrowed: Borrowed, *, n_items: int) -> np.ndarray:
    """What the lender of each item thought of it in training, [S] int8 as in `CtrBatch`: 2, 1, or 0 for not known.

    All training events of the lender count, whenever they were. So this is not for items that a user borrows from the
    own history, where an item met again would tell the label of that row: those come with the mark of their event.
    """
    train_X = np.flatnonzero(rows.split_E == TRAIN)
    key_X = rows.user_E[train_X].astype(np.int64) * n_items + log.item_E[train_X]
    order_X = np.argsort(key_X, kind="stable")
    key_X, mark_X = key_X[order_X], feedback(log.label_E[train_X][order_X])
    key_S = borrowed.donor_S.astype(np.int64) * n_items + borrowed.item_S
    # Of several events with the item, the last one speaks.
    at_S = np.searchsorted(key_X, key_S, side="right") - 1
    return np.where((at_S >= 0) & (key_X[at_S] == key_S), mark_X[at_S], 0).astype(np.int8)
