"""The alignment stage: modality projection, fusion and the joint loss, Eqs. 3-4 and 9-14."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from marsjax import alignment_losses, stein
from marsjax.products import dense_dot_general, entries_by_matrix
from marsjax.records import AlignmentBatch, Array, Items
from marsjax.training.optimizer import AdamW, adamw
from marsjax.training.sharding import Lifted, lift
from marsjax.training.step import Share, StepFn, make_step

PyTree = Any


class FeatureTables(NamedTuple):
    """Constants of the items: raw features of each modality, and who has them."""

    feature_NF: Mapping[str, Array]  # name -> [N, F]
    present_N: Mapping[str, Array]  # name -> [N] bool
    # name -> [N, D] float32, what Eq. 3 makes of the features, which are not read then; to encode only
    vector_ND: Mapping[str, Array] | None = None


def feature_tables(items: Items, modalities: tuple[str, ...]) -> FeatureTables:
    """Raw features, moved and scaled by modality so that encoders of any scale train alike; absent rows stay zero.

    Raises ValueError for a modality that the items lack.
    """
    check_modalities(items, modalities)
    features, present = {}, {}
    for name in modalities:
        feature_NF, present_N = items.modalities[name]
        moved_NF = (feature_NF - feature_NF[present_N].mean(axis=0)) * present_N[:, None]
        features[name] = (moved_NF / max(float(moved_NF[present_N].std()), 1e-12)).astype(np.float32)
        present[name] = present_N
    return FeatureTables(features, present)


def check_modalities(items: Items, modalities: tuple[str, ...]) -> None:
    """Raises ValueError for a modality that the items lack."""
    for name in modalities:
        if name not in items.modalities:
            raise ValueError(
                f"alignment.modalities: expected modalities of the data, {sorted(items.modalities)}, found {name!r}; "
                f"set --config.alignment.modalities={','.join(items.modalities)}, or give --config.data.{name}_features"
            )
        if not items.modalities[name].present_N.any():
            raise ValueError(
                f"modality {name!r}: expected features of at least one item, found none; the ids of the feature file "
                "and of the items must be the same"
            )


def matched_kernel(query_ND: Array, key_ND: Array, both_N: Array) -> jax.Array:
    """-L_align of Eq. 6."""
    return -stein.alignment(query_ND, key_ND, both_N)[0]


# What draws an item's modalities together: `(query_ND, key_ND, both_N) -> scalar`, lower is better.
OBJECTIVES: dict[str, Callable[[Array, Array, Array], jax.Array]] = {
    "stein": matched_kernel,
    "info_nce": alignment_losses.info_nce,
    "cosine": alignment_losses.cosine,
    "mmd": alignment_losses.mmd,
}
# How the score of Eq. 7 is estimated: `(x_ND, mask_N, eta) -> score_ND`.
ESTIMATORS: dict[str, Callable[[Array, Array, float], jax.Array]] = {
    "stein": lambda x_ND, mask_N, eta: stein.stein_score(x_ND, mask_N, eta=eta),
    "ssge": lambda x_ND, mask_N, _: stein.ssge_score(x_ND, mask_N),
}
ENTROPY_SIGNS = {"dispersive": 1.0, "printed": -1.0}


class AlignmentLoss(NamedTuple):
    """The weights of the joint loss, Eqs. 8 and 14."""

    beta: float  # weight of L_stein in Eq. 14
    lambda_: float  # weight of the entropy in Eq. 8
    entropy_sign: float  # +1 spreads the space (mars), -1 contracts it (Eqs. 7-8 as printed)
    eta: float  # ridge of the score estimator
    estimator: str  # a key of ESTIMATORS
    objective: str = "stein"  # a key of OBJECTIVES, for -L_align in Eq. 8


class MultimodalEncoder(nn.Module):
    """Aligns item modalities and contextualises items within a history.

    What the joint loss of Eq. 14 trains, and what not: Eq. 12 reads targets alone, and over their one key the softmax
    of Eq. 9 is 1, so its queries and keys get no gradient and act on histories as they were drawn. Histories enter
    Eqs. 11-12 by their ids. User vectors (Eq. 13) are thus compared in a space that only the projections of Eq. 3, the
    values of Eq. 9, the id embeddings and Eq. 11 have shaped; no term asks similar users to be near one another.

    Attributes:
        modalities: none, one or two names. With two, the first gives keys and values and the second the queries of
            Eq. 9 (text, image in the paper). With one, Eq. 9 has nothing to attend to and the fused vector is the
            normalised modality; with none it is the projected item id.
        id_width, width: 128 and 256 in the paper.
        normalise: put modality vectors on the sphere of radius sqrt(width). Without it the entropy is unbounded and
            the dispersive sign inflates the space without end.
        residual: add the fused vector to the result of Eq. 11 and normalise. Without it the item vector is a mix of
            projected ids alone: text and image only set the weights, and an item without a trained id has no content.
        keep_values: start the values of Eq. 9 at the projected text itself (W_V = identity). The objective aligns the
            results of Eq. 3; a random W_V after it tears text and image apart again before they are added (Eq. 10) and
            averaged to user vectors (Eq. 13).
    """

    n_items: int
    modalities: tuple[str, ...]
    id_width: int = 128
    width: int = 256
    hidden: int = 128
    normalise: bool = True
    residual: bool = True
    keep_values: bool = False

    def setup(self) -> None:
        if len(self.modalities) > 2:
            raise ValueError(f"alignment: expected at most two modalities, found {self.modalities}")
        self.item = self.param("item", nn.initializers.normal(stddev=0.05), (self.n_items, self.id_width))
        dense = functools.partial(nn.Dense, dot_general=dense_dot_general)
        self.project = {name: dense(self.width, use_bias=False, name=f"project_{name}") for name in self.modalities}
        self.self_attention = Attention(self.id_width)  # Eq. 4
        self.modal_attention = Attention(self.width, self.keep_values)  # Eq. 9
        self.id_attention = Attention(self.width)  # Eq. 11
        self.fuse_norm = nn.LayerNorm()
        if not self.modalities:
            self.project_id = dense(self.width, use_bias=False)
        if self.residual:
            self.residual_norm = nn.LayerNorm()
        self.score_hidden = dense(self.hidden)
        self.score_out = dense(1)

    def modality(self, name: str, item_I: jax.Array, tables: FeatureTables) -> tuple[jax.Array, jax.Array]:
        """Eq. 3: projected features [..., D] of items [...], and which of them are present; absent ones are zero."""
        present = tables.present_N[name][item_I]
        if tables.vector_ND is not None and not self.is_initializing():
            return tables.vector_ND[name][item_I], present
        emb = self.project[name](tables.feature_NF[name][item_I])
        if self.normalise:
            # eps inside the root: the norm of an absent item's zero row has no gradient otherwise (NaN).
            emb = emb * lax.rsqrt(jnp.mean(emb * emb, axis=-1, keepdims=True) + 1e-6)
        return emb * present[..., None], present

    def fused(self, item_BL: jax.Array, tables: FeatureTables, *, alone: bool) -> jax.Array:
        """Eqs. 9-10: [B, L, D]. `alone` lets each item attend to its own text only (targets, static vectors)."""
        if not self.modalities:
            return self.fuse_norm(self.project_id(self.item[item_BL]))
        if len(self.modalities) == 1:
            return self.fuse_norm(self.modality(self.modalities[0], item_BL, tables)[0])
        key_BLD, key_mask_BL = self.modality(self.modalities[0], item_BL, tables)
        query_BLD, _ = self.modality(self.modalities[1], item_BL, tables)
        if alone:
            # The softmax over one key is 1, so the attended value is the projected text itself.
            attended_BLD = self.modal_attention.value(key_BLD) * key_mask_BL[..., None]
        else:
            attended_BLD = self.modal_attention(query_BLD, key_BLD, key_mask_BL & (item_BL > 0))
        return self.fuse_norm(query_BLD + attended_BLD)

    def history(self, history_BL: jax.Array) -> jax.Array:
        """Eq. 4: self-attention over the history's id embeddings, [B, L, id_width]."""
        id_BLD = self.item[history_BL]
        return self.self_attention(id_BLD, id_BLD, history_BL > 0)

    def items_in(self, fused_BTD: jax.Array, history_BL: jax.Array) -> jax.Array:
        """Eq. 11: fused vectors [B, T, D] attend to the history; returns emb_item^mm [B, T, D]."""
        attended_BTD = self.id_attention(fused_BTD, self.history(history_BL), history_BL > 0)
        return self.residual_norm(fused_BTD + attended_BTD) if self.residual else attended_BTD

    def encode(self, history_BL: jax.Array, tables: FeatureTables) -> tuple[jax.Array, jax.Array]:
        """Contextual item vectors [B, L, D] of a history, zero at padding, and their mean, Eq. 13, [B, D]."""
        mask_BL1 = (history_BL > 0).astype(jnp.float32)[..., None]
        item_BLD = self.items_in(self.fused(history_BL, tables, alone=False), history_BL) * mask_BL1
        return item_BLD, jnp.sum(item_BLD, axis=1) / jnp.maximum(jnp.sum(mask_BL1, axis=1), 1.0)

    def static(self, item_N: jax.Array, tables: FeatureTables) -> jax.Array:
        """Item vectors [N, D] of histories of one item: what a service can precompute."""
        return self.encode(item_N[:, None], tables)[0][:, 0]

    def logits(self, history_BL: jax.Array, target_BT: jax.Array, tables: FeatureTables) -> jax.Array:
        """Eq. 12: logits [B, T] of targets, which attend to the history and never join it."""
        item_BTD = self.items_in(self.fused(target_BT, tables, alone=True), history_BL)
        return self.score_out(nn.gelu(self.score_hidden(item_BTD)))[..., 0]

    def __call__(self, batch: AlignmentBatch, tables: FeatureTables) -> jax.Array:
        """Touches every parameter once, for initialisation."""
        self.encode(batch.history_BL, tables)
        return self.logits(batch.history_BL, batch.target_BT, tables)


def make_encoder(settings: Mapping[str, Any], *, n_items: int) -> MultimodalEncoder:
    """The encoder that `settings` (the section `alignment` of a configuration) describes."""
    names = ("id_width", "width", "hidden", "normalise", "residual", "keep_values")
    return MultimodalEncoder(n_items, tuple(settings["modalities"]), **{name: settings[name] for name in names})


def apply(encoder: MultimodalEncoder, params: PyTree, *arguments: Any, method: str) -> Any:
    """`encoder.method(*arguments)` with these parameters."""
    return encoder.apply({"params": params}, *arguments, method=method)


class Attention(nn.Module):
    """One head of scaled dot-product attention with a key mask. A row without a valid key gets zeros.

    Queries and values are linear in what they are made of, so (x W_Q) (y W_K)^T = (x W_Q W_K^T) y^T, and the value of
    the mean of some keys is the mean of their values. So keys are compared, and averaged, as they come, and no matrix
    is multiplied with each of them: one product for a query and one for a result, where there were two for a key
    beside them. That is the fewer, the more keys a query has and the narrower they are.

    Attributes:
        keep_values: initialise W_V at the identity, so that values are the keys' own vectors at the start.
    """

    width: int
    keep_values: bool = False

    def setup(self) -> None:
        self.to_query = Kernel(self.width)
        self.to_key = Kernel(self.width)
        self.to_value = Kernel(self.width, _identity if self.keep_values else nn.linear.default_kernel_init)

    def value(self, key_BLD: jax.Array) -> jax.Array:
        return entries_by_matrix(key_BLD, self.to_value(key_BLD.shape[-1]))

    def __call__(self, query_BTD: jax.Array, key_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        """Queries [B, T, D'] over keys [B, L, D'']; returns [B, T, width]."""
        of_query_DK = self.to_query(query_BTD.shape[-1]) @ self.to_key(key_BLD.shape[-1]).T  # K = D''
        logit_BTL = jnp.einsum("btk,blk->btl", entries_by_matrix(query_BTD, of_query_DK), key_BLD) * self.width**-0.5
        # A large negative number, not -inf: the softmax of a row of -inf is NaN, and so is its gradient.
        logit_BTL = jnp.where(mask_BL[:, None, :], logit_BTL, -1e30)
        weight_BTL = nn.softmax(logit_BTL, axis=-1) * mask_BL[:, None, :]
        return self.value(jnp.einsum("btl,blk->btk", weight_BTL, key_BLD))


class Kernel(nn.Module):
    """The matrix of a linear layer without a bias."""

    width: int
    drawn_by: Callable[..., jax.Array] = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, depth: int) -> jax.Array:
        """Returns [depth, width]."""
        return self.param("kernel", self.drawn_by, (depth, self.width))


def _identity(_: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.eye(*shape, dtype=dtype)


def make_loss(
    encoder: MultimodalEncoder, weights: AlignmentLoss, *, axis_name: str | None
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """`(params, batch, tables) -> (share of the loss, shares of the metrics)`, Eq. 14.

    The click loss is a mean over rows, so each device adds its rows over the global count. L_stein, with whatever
    objective, is a statement about the whole batch: embeddings are gathered from all devices and each device answers
    for 1/n of it.
    """
    for name, choices in (("estimator", ESTIMATORS), ("objective", OBJECTIVES)):
        if getattr(weights, name) not in choices:
            found = getattr(weights, name)
            raise ValueError(f"alignment.{name}: expected one of {sorted(choices)}, found {found!r}")
    estimate, objective = ESTIMATORS[weights.estimator], OBJECTIVES[weights.objective]

    def score(x_ND: jax.Array, mask_N: jax.Array) -> jax.Array:
        return estimate(x_ND, mask_N, weights.eta)

    def gather(x: jax.Array) -> jax.Array:
        return x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)

    def loss(params: PyTree, batch: AlignmentBatch, tables: FeatureTables) -> tuple[jax.Array, dict[str, jax.Array]]:
        if tables.vector_ND is not None:
            raise ValueError("expected tables of features, found vectors of Eq. 3, through which nothing learns it")
        logit_BT = apply(encoder, params, batch.history_BL, batch.target_BT, tables, method="logits")
        n_rows = jnp.sum(batch.weight_BT)
        n_devices = 1 if axis_name is None else lax.axis_size(axis_name)
        n_rows = n_rows if axis_name is None else lax.psum(n_rows, axis_name)
        click_BT = optax.sigmoid_binary_cross_entropy(logit_BT, batch.label_BT) * batch.weight_BT
        click = jnp.sum(click_BT) / jnp.maximum(n_rows, 1.0)

        vectors = {}
        for name in encoder.modalities:
            emb_ND, present_N = apply(encoder, params, name, batch.stein_item_N, tables, method="modality")
            vectors[name] = gather(emb_ND), gather(present_N & (batch.stein_item_N > 0))
        entropy, apart, align, gamma = jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
        for emb_ND, present_N in vectors.values():
            entropy += stein.entropy_surrogate(emb_ND, present_N, score=score) / len(vectors)
        if len(vectors) == 2:
            (key_ND, key_N), (query_ND, query_N) = vectors.values()
            align, gamma = stein.alignment(query_ND, key_ND, key_N & query_N)
            apart = objective(query_ND, key_ND, key_N & query_N)
        stein_loss = (apart + weights.lambda_ * weights.entropy_sign * entropy) / n_devices
        metrics = {"click_loss": click, "l_align": align / n_devices, "gamma": gamma / n_devices}
        return click + weights.beta * stein_loss, metrics

    return loss


@functools.lru_cache(maxsize=4)
def lifted_step(encoder: MultimodalEncoder, weights: AlignmentLoss, settings: AdamW, mode: str) -> Lifted:
    """The training step over all devices. Cached: every seed trains with one compiled step."""

    def make(axis: str | None) -> StepFn:
        loss = make_loss(encoder, weights, axis_name=axis)

        def share(params: PyTree, statistics: PyTree, batch: PyTree, tables: PyTree, key: jax.Array) -> Share:
            value, metrics = loss(params, batch, tables)
            return Share(value, statistics, metrics)

        return make_step(share, adamw(settings), axis_name=axis)

    return lift(make, mode=mode)


@functools.partial(jax.jit, static_argnums=0)
def diagnostics(
    encoder: MultimodalEncoder, params: Mapping, tables: FeatureTables, item_N: jax.Array
) -> dict[str, jax.Array]:
    """How the space looks, over a sample of items: scalars, computed without gradient.

    l_align (Eq. 6), gamma (Eq. 5), and for each modality `effective_rank` (exponential of the entropy of the
    covariance's normalised eigenvalues, Roy and Vetterli 2007), `uniformity` (log mean Gaussian potential on the unit
    sphere, Wang and Isola 2020, lower is more uniform); for two, `modality_gap` (distance of the modality means on the
    unit sphere, Liang et al. 2022) and `matched_recall` (share of items whose nearest text is their own).
    """
    out: dict[str, jax.Array] = {}
    vectors = {}
    for name in encoder.modalities:
        emb_ND, present_N = apply(encoder, params, name, item_N, tables, method="modality")
        present_N = present_N & (item_N > 0)
        vectors[name] = emb_ND, present_N
        keep_N1 = present_N.astype(jnp.float32)[:, None]
        count = jnp.maximum(jnp.sum(keep_N1), 1.0)
        centred_ND = (emb_ND - jnp.sum(emb_ND * keep_N1, axis=0, keepdims=True) / count) * keep_N1
        eigen_D = jnp.maximum(jnp.linalg.eigvalsh(centred_ND.T @ centred_ND / count), 0.0)
        share_D = eigen_D / jnp.maximum(jnp.sum(eigen_D), 1e-12)
        out[f"effective_rank_{name}"] = jnp.exp(-jnp.sum(share_D * jnp.log(share_D + 1e-12)))
        unit_ND = alignment_losses.unit(emb_ND)
        pair_NN = present_N[:, None] & present_N[None, :] & ~jnp.eye(len(item_N), dtype=bool)
        potential_NN = jnp.exp(-2.0 * stein.squared_distances(unit_ND, unit_ND)) * pair_NN
        out[f"uniformity_{name}"] = jnp.log(jnp.sum(potential_NN) / jnp.maximum(jnp.sum(pair_NN), 1.0) + 1e-12)
    if len(vectors) == 2:
        (key_ND, key_N), (query_ND, query_N) = vectors.values()
        both_N = key_N & query_N
        out["l_align"], out["gamma"] = stein.alignment(query_ND, key_ND, both_N)
        count = jnp.maximum(jnp.sum(both_N), 1.0)
        difference_ND = alignment_losses.unit(key_ND) - alignment_losses.unit(query_ND)
        gap_D = jnp.sum(difference_ND * both_N[:, None], axis=0) / count
        out["modality_gap"] = jnp.sqrt(jnp.sum(gap_D**2))
        distance_NN = jnp.where(both_N[None, :], stein.squared_distances(query_ND, key_ND), jnp.inf)
        hit_N = jnp.argmin(distance_NN, axis=1) == jnp.arange(len(item_N))
        out["matched_recall"] = jnp.sum(hit_N & both_N) / count
    return out
