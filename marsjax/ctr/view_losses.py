"""The losses of CL4SRec, CoSeRec and BASRec on views of the histories, beside the click loss of any backbone.

The sources predict the next item from an encoded sequence. Here a sequence is encoded by what the backbone pools of it
for the row's target, and a mixture is scored as a click on the row's target, against the row's label. Both are new
here: the sources have no target while they encode.

Backbones are asked in three parts: `embed`, `pool` and `decide`. They are run apart from the click loss, whose running
statistics (Dice) no view moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from marsjax.ctr import mixup
from marsjax.ctr.contrastive import nt_xent
from marsjax.records import CtrBatch, ItemTables, Objective, Views
from marsjax.training.step import total

Part = Callable[..., Any]


def check_backbone(model: nn.Module) -> None:
    """Raises ValueError where views cannot be run through a backbone."""
    missing = [name for name in ("embed", "pool", "decide") if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"losses on views: expected a ctr.backbone with embed, pool and decide (din and dnn have them), found "
            f"{type(model).__name__} without {', '.join(missing)}; take one of these, or no such method"
        )


def view_loss(
    model: nn.Module,
    objective: Objective,
    variables: Mapping[str, Any],
    batch: CtrBatch,
    tables: ItemTables,
    key: jax.Array,
    *,
    axis_name: str | None,
) -> jax.Array:
    """This device's share of the weighted loss over the rows whose views count.

    Raises ValueError for another kind, a batch without views, and a backbone that cannot do it.
    """
    check_backbone(model)
    if batch.views is None:
        raise ValueError("losses on views: expected a batch with views, found none; make it with a `Viewing`")
    if objective.kind not in LOSSES:
        raise ValueError(f"objective: expected one of {sorted(LOSSES)}, found {objective.kind!r}")

    def part(method: str, *arguments: Any, **options: Any) -> Any:
        return model.apply(variables, *arguments, method=method, mutable=["statistics"], **options)[0]

    # A row counts in a loss, and in the batch's statistics, where its views count.
    views, rows = batch.views, batch if batch.views.rows is None else batch.views.rows
    rows = rows._replace(weight_B=views.weight_B)
    return LOSSES[objective.kind](objective, part, rows, views, tables, key, axis_name)


def _contrastive(
    objective: Objective,
    part: Part,
    batch: CtrBatch,
    views: Views,
    tables: ItemTables,
    key: jax.Array,
    axis_name: str | None,
) -> jax.Array:
    """NT-Xent over what is pooled of two views. Other rows of the same user are negatives too, as in RecBole-DA."""
    target_BD, embedded, seen = _embedded_views(part, batch, views, tables)
    pooled = [
        jnp.concatenate(part("pool", target_BD, view_BWD, one, train=True), axis=1)
        for view_BWD, one in zip(embedded, seen, strict=True)
    ]
    share = nt_xent(
        pooled[0],
        pooled[1],
        batch.weight_B,
        temperature=objective.temperature,
        similarity="dot",  # CoSeRec as released, and CL4SRec as RecBole-DA runs it
        axis_name=axis_name,
    )
    return objective.weight * share


def _mixup(
    objective: Objective,
    part: Part,
    batch: CtrBatch,
    views: Views,
    tables: ItemTables,
    key: jax.Array,
    axis_name: str | None,
) -> jax.Array:
    """BASRec: histories mixed with their views, and what is pooled of the plain histories mixed across rows.

    Means over the views and over the mixtures, so that the weights do not depend on how many there are. Mixed rows keep
    user and numbers of their own: these have no mixture of a meaning. The source trains the plain model first and adds
    these losses in a second stage; here they count from the first step, so that all methods take the same steps.
    """
    lambda_key, partner_key = jax.random.split(key)
    target_BD, (own_BWD, *changed), seen = _embedded_views(part, batch, views, tables)
    n_rows, depth = target_BD.shape
    n_views, levels = len(changed), objective.levels
    # One draw for all: a share for each view; then, `levels` times each, one a row and one a channel, with which the
    # released code mixes rows.
    lambda_BX = mixup.draw_lambda(
        lambda_key,
        n_rows,
        alpha=objective.alpha,
        axis_name=axis_name,
        n_channels=n_views + levels + levels * depth,
    )
    within, across = lambda_BX[:, :n_views].T, lambda_BX[:, n_views:]
    by_channel = jnp.moveaxis(across[:, levels:].reshape(n_rows, levels, depth), 1, 0)
    click = functools.partial(_click_losses, part, batch)
    loss = jnp.zeros(())
    if objective.weight:
        losses = []
        for view_BWD, rate_B, lambda_B in zip(changed, jnp.asarray(views.rate_BV).T[1:], within, strict=True):
            mixed_BWD = mixup.mix_histories(own_BWD, view_BWD, lambda_B)
            loss_B = click(target_BD, part("pool", target_BD, mixed_BWD, seen[0], train=True), batch.label_B)
            omega_B = mixup.relevance(lambda_B, rate_B, batch.weight_B, axis_name=axis_name)
            losses.append(
                mixup.weighted_loss(loss_B, omega_B, batch.weight_B, mode=objective.mode, axis_name=axis_name)
            )
        loss += objective.weight * jnp.mean(jnp.stack(losses))
    if objective.cross_weight:
        target_BD, history_BLD = part("embed", batch, tables)
        pooled = part("pool", target_BD, history_BLD, batch, train=True)
        counted = jnp.maximum(total(jnp.sum(batch.weight_B), axis_name), 1.0)
        partners = jax.vmap(lambda one_key: mixup.draw_partners(one_key, batch.weight_B, axis_name=axis_name))(
            jax.random.split(partner_key, 2 * levels)
        )
        losses = []
        for lambda_, partner_B in zip([*across[:, :levels].T, *by_channel], partners, strict=True):
            mixed = [
                mixup.mix_rows(
                    pooled_BD, target_BD, batch.label_B, lambda_, partner_B, mode=objective.mode, axis_name=axis_name
                )
                for pooled_BD in pooled
            ]
            loss_B = click(mixed[0].target_BD, [one.encoded_BD for one in mixed], mixed[0].label_B)
            losses.append(jnp.sum(loss_B * batch.weight_B) / counted)
        loss += objective.cross_weight * jnp.mean(jnp.stack(losses))
    return loss


LOSSES = {"contrastive": _contrastive, "mixup": _mixup}


def _click_losses(
    part: Part, batch: CtrBatch, target_BD: jax.Array, interests: list[jax.Array], label_B: jax.Array
) -> jax.Array:
    logit_B = part("decide", target_BD, interests, batch, train=True)
    return optax.sigmoid_binary_cross_entropy(logit_B, label_B)


def _embedded_views(
    part: Part, batch: CtrBatch, views: Views, tables: ItemTables
) -> tuple[jax.Array, list[jax.Array], list[CtrBatch]]:
    """Targets [B, D], each view [B, W, D], and the batch with each view in the place of its history."""
    view_BVW, mark_BVW = jnp.asarray(views.item_BVW), views.feedback_BVW
    seen = [
        batch._replace(
            history_BL=view_BVW[:, number],
            borrowed_BL=jnp.zeros(view_BVW[:, number].shape, bool),
            feedback_BL=None if mark_BVW is None else mark_BVW[:, number],
        )
        for number in range(view_BVW.shape[1])
    ]
    embedded = [part("embed", one, tables) for one in seen]
    return embedded[0][0], [history_BWD for _, history_BWD in embedded], seen
