"""The DIN of a bundle in PyTorch, as one would serve it: candidates of one user, whose history is gathered once.

Items are embedded once, as the bundle has them. The history is shared by all candidates, so no copy of it is made: the
four blocks of the attention's first layer (t, h, t - h, t * h) are folded into one [D, A] matrix a candidate, and
these lie side by side, so that the layer is one product [L, D] x [D, C * A]. That is the fastest of what was tried in
eager mode: [t, h, t - h, t * h] itself takes twice as long for histories of 30 entries and six times for 200, and one
product a candidate, in a batch, takes about as long. What is pooled is one product [C, L] x [L, D]. Padding is left out
instead of masked; masks are made only where parts of the history are pooled apart, or a borrowed entry that is the
candidate is dropped.

Evaluation only: Dice by its running statistics, and nothing that only training needs.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from torch.nn import functional

from marsjax.ctr.din import Din
from marsjax.serving.bundle import Bundle


class TorchDin(torch.nn.Module):
    """Click probabilities of candidates of one user.

    Raises ValueError for a bundle of another model than a `Din` in float32.
    """

    def __init__(self, bundle: Bundle):
        super().__init__()
        # As NumPy's arrays: of jax's own, NumPy's functions would be compiled, and that while serving.
        model, (params, statistics) = bundle.model, jax.device_get((bundle.params, bundle.statistics))
        if type(model) is not Din or model.dtype != "float32":
            found = f"{type(model).__name__} in {getattr(model, 'dtype', 'float32')}"
            raise ValueError(f"{bundle.folder}: expected a bundle of a Din in float32, found {found}")
        self.softmax, self.apart = model.softmax, model.apart
        self.drop_target = bool(bundle.manifest["lends"]["drop_target"])
        # With marks an entry of the history is wider than an item's vector, and a target has zeros there.
        item_NI, mark_3M = np.asarray(bundle.tables.vector_ND), params["marks"]["table"] if model.levels else None
        self.item_NI = self.target_ND = _constant(item_NI)
        self.mark_3M = None if mark_3M is None else _constant(mark_3M)
        if mark_3M is not None:
            self.target_ND = _constant(np.pad(item_NI, ((0, 0), (0, mark_3M.shape[1]))))
        self.user_UE = None
        if model.n_users:
            table_UE = np.array(params["users"]["table"])
            table_UE[0] = 0.0  # nobody
            self.user_UE = _constant(table_UE)
        attend, depth = params["attend"], self.target_ND.shape[1]
        of_t_DA, of_h_DA, of_difference_DA, of_product_DA = np.asarray(attend["kernel"]).reshape(4, depth, -1)
        self.of_history_D1A = _constant((of_h_DA - of_difference_DA)[:, None])
        self.of_product_D1A = _constant(of_product_DA[:, None])
        self.of_target_DA, self.bias_A = _constant(of_t_DA + of_difference_DA), _constant(attend["bias"])
        self.attend = _layers(attend, statistics.get("attend", {}), model.activation)
        self.tower = _layers(params["score"], statistics.get("score", {}), model.activation)

    def forward(
        self,
        target_C: torch.Tensor,
        item_L: torch.Tensor,
        mark_L: torch.Tensor,
        lent_L: torch.Tensor,
        user_1: torch.Tensor,
        dense_CJ: torch.Tensor,
    ) -> torch.Tensor:
        """Returns [C] float32.

        `item_L` are items of the history (int64, none of them 0, in any order), `mark_L` their marks (int64), `lent_L`
        (bool) says which are borrowed; `user_1` is the number of the user + 1 or 0 (int64). L and J may be 0.
        """
        target_CD, history_LD = self.target_ND[target_C], self.item_NI[item_L]
        if self.mark_3M is not None:
            history_LD = torch.cat([history_LD, self.mark_3M[mark_L]], dim=1)
        logit_LC = self._attention(target_CD, history_LD)
        features = [target_CD]
        for weight_LC in self._weights(logit_LC, target_C, item_L, lent_L):
            interest_CD = weight_LC.T @ history_LD
            features += [interest_CD, target_CD * interest_CD]
        if self.user_UE is not None:
            features.append(self.user_UE[user_1].expand(target_C.shape[0], -1))
        features.append(dense_CJ)
        return torch.sigmoid(self.tower(torch.cat(features, dim=1))[:, 0])

    def _attention(self, target_CD: torch.Tensor, history_LD: torch.Tensor) -> torch.Tensor:
        """Logits [L, C] of the attention."""
        width = self.bias_A.shape[0]
        matrix_DCA = torch.addcmul(self.of_history_D1A, target_CD.T[:, :, None], self.of_product_D1A)
        shift_CA = torch.addmm(self.bias_A, target_CD, self.of_target_DA)
        hidden_LX = torch.addmm(
            shift_CA.reshape(1, -1), history_LD, matrix_DCA.reshape(self.of_product_D1A.shape[0], -1)
        )
        return self.attend(hidden_LX.reshape(-1, width)).reshape(history_LD.shape[0], target_CD.shape[0])

    def _weights(
        self, logit_LC: torch.Tensor, target_C: torch.Tensor, item_L: torch.Tensor, lent_L: torch.Tensor
    ) -> list[torch.Tensor]:
        """Weights [L, C] of each part of the history that is pooled."""
        if not self.apart and not self.drop_target:
            return [torch.softmax(logit_LC, dim=0) if self.softmax else logit_LC]
        lent_LC = lent_L[:, None].expand(-1, target_C.shape[0])
        dropped_LC = lent_LC & (item_L[:, None] == target_C) if self.drop_target else torch.zeros_like(lent_LC)
        masks = [~lent_LC, lent_LC & ~dropped_LC] if self.apart else [~dropped_LC]
        if not self.softmax:
            return [logit_LC * mask_LC for mask_LC in masks]
        weights = [torch.softmax(logit_LC.masked_fill(~mask_LC, -torch.inf), dim=0) for mask_LC in masks]
        # A part without entries is NaN up to here.
        return [weight_LC.masked_fill(~mask_LC, 0.0) for weight_LC, mask_LC in zip(weights, masks, strict=True)]


class Prelu(torch.nn.Module):
    """x, or alpha * x below 0. [X, A] -> [X, A]. An ONNX file has the greater of the two where no alpha is above 1: the
    PRelu of ONNX Runtime takes four times as long, that of PyTorch half as long."""

    def __init__(self, alpha_A: Any):
        super().__init__()
        self.alpha_A, self.is_greater = _constant(alpha_A), bool(np.max(alpha_A) <= 1.0)

    def forward(self, x_XA: torch.Tensor) -> torch.Tensor:
        """Returns [X, A]."""
        if self.is_greater and torch.onnx.is_in_onnx_export():
            return torch.maximum(x_XA, x_XA * self.alpha_A)
        return functional.prelu(x_XA, self.alpha_A)


class Dice(torch.nn.Module):
    """By running statistics: x * (g + (1 - g) * alpha), g the sigmoid of the normalised x. [X, A] -> [X, A]."""

    def __init__(self, alpha_A: Any, mean_A: Any, variance_A: Any):
        super().__init__()
        scale_A = 1.0 / np.sqrt(np.asarray(variance_A) + np.float32(1e-8))
        self.scale_A, self.shift_A = _constant(scale_A), _constant(-np.asarray(mean_A) * scale_A)
        self.alpha_A, self.rest_A = _constant(alpha_A), _constant(1.0 - np.asarray(alpha_A))

    def forward(self, x_XA: torch.Tensor) -> torch.Tensor:
        """Returns [X, A]."""
        gate_XA = torch.sigmoid(torch.addcmul(self.shift_A, x_XA, self.scale_A))
        return x_XA * torch.addcmul(self.alpha_A, gate_XA, self.rest_A)


def _layers(params: Any, statistics: Any, kind: str) -> torch.nn.Sequential:
    """Activations and dense layers in the order in which they come: with a dense layer more than activations the first
    one is dense, else the first dense layer is one that the caller has folded."""
    activations = sum(name.startswith("Activation_") for name in params)
    dense = [_linear(params[f"Dense_{i}"]) for i in range(sum(name.startswith("Dense_") for name in params))]
    layers = [dense.pop(0)] if len(dense) > activations else []
    for i, linear in enumerate(dense):
        name = f"Activation_{i}"
        layers += [_activation(params[name]["alpha"], statistics.get(name), kind), linear]
    return torch.nn.Sequential(*layers).eval()


def _activation(alpha_A: Any, statistics: Any, kind: str) -> torch.nn.Module:
    if kind == "dice":
        return Dice(alpha_A, statistics["mean"], statistics["variance"])
    return Prelu(alpha_A)


def _linear(params: Any) -> torch.nn.Linear:
    made = torch.nn.Linear(*params["kernel"].shape, bias="bias" in params)
    made.weight = _constant(np.asarray(params["kernel"]).T)
    if "bias" in params:
        made.bias = _constant(params["bias"])
    return made


def _constant(value: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(np.array(value, np.float32, order="C")), requires_grad=False)
