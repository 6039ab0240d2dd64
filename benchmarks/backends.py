"""What stands in for `scoring.score_rows` in a service: the bundle's DIN in eager PyTorch or in ONNX Runtime.

Neither pads: a request is computed for as many candidates and as long a history as it has.
"""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from marsjax.serving import scoring
from marsjax.serving.bundle import Bundle

MOST = 128  # candidates at a time: what is computed between the layers of more leaves the cache
MISSING = "{} cannot be imported: pip install torch onnx onnxruntime"


class Inputs(NamedTuple):
    """What the DIN reads, in the order and by the names in which `TorchDin.forward` and the ONNX file have it."""

    target_C: np.ndarray  # [C] int64
    item_L: np.ndarray  # [L] int64, the history without what is blanked
    mark_L: np.ndarray  # [L] int64
    lent_L: np.ndarray  # [L] bool
    user_1: np.ndarray  # [1] int64, the number + 1; 0: nobody
    dense_CJ: np.ndarray  # [C, J] float32


DYNAMIC = {
    "target_C": {0: "C"}, "item_L": {0: "L"}, "mark_L": {0: "L"}, "lent_L": {0: "L"}, "dense_CJ": {0: "C"},
    "score_C": {0: "C"},
}  # fmt: skip

Run = Callable[[Inputs], np.ndarray]  # click probabilities [C] float32
ScoreRows = Callable[[Bundle, Sequence[scoring.Row]], list[np.ndarray]]


def need(*names: str) -> None:
    """Stops with one line that says what to install, where a package is not there."""
    for name in names:
        try:
            __import__(name)
        except ImportError as error:
            raise SystemExit(MISSING.format(f"{name} ({error})")) from None


def inputs_of(bundle: Bundle, row: scoring.Row) -> Inputs:
    """One request as the DIN reads it."""
    item_L, mark_L, extra = scoring.history(bundle, row)
    kept_L, lent_L = item_L > 0, np.arange(len(item_L)) < extra
    dense_CJ = scoring.dense_numbers(bundle, [row])
    return Inputs(
        row.target_C.astype(np.int64), item_L[kept_L].astype(np.int64), mark_L[kept_L].astype(np.int64),
        lent_L[kept_L], np.array([scoring.shown_user(bundle, row.profile.user) + 1]),
        np.zeros((len(row.target_C), 0), np.float32) if dense_CJ is None else dense_CJ,
    )  # fmt: skip


def score_rows_with(make: Callable[[Bundle], Run]) -> ScoreRows:
    """A `scoring.score_rows` of what `make` makes of a bundle, once, on the thread that scores."""
    made: dict[pathlib.Path, Run] = {}

    def score_rows(bundle: Bundle, rows: Sequence[scoring.Row]) -> list[np.ndarray]:
        if bundle.folder not in made:
            made[bundle.folder] = make(bundle)
        return [_in_parts(made[bundle.folder], inputs_of(bundle, row)) for row in rows]

    return score_rows


def _in_parts(run: Run, inputs: Inputs) -> np.ndarray:
    parts = [slice(begin, begin + MOST) for begin in range(0, len(inputs.target_C), MOST)]
    found = [run(inputs._replace(target_C=inputs.target_C[x], dense_CJ=inputs.dense_CJ[x])) for x in parts]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def torch_run(bundle: Bundle, *, threads: int) -> Run:
    """The DIN in eager PyTorch."""
    import torch

    from benchmarks.torch_din import TorchDin

    torch.set_num_threads(threads)
    model = TorchDin(bundle).eval()

    @torch.inference_mode()
    def run(inputs: Inputs) -> np.ndarray:
        found: np.ndarray = model(*map(torch.from_numpy, inputs)).numpy()
        return found

    return run


def export_onnx(bundle: Bundle, path: pathlib.Path) -> None:
    """Writes the DIN as an ONNX file for any number of candidates and length of the history."""
    import torch

    from benchmarks.torch_din import TorchDin

    item_L, dense = np.ones(3, np.int64), scoring.dense_width(bundle.known)
    inputs = Inputs(np.ones(5, np.int64), item_L, item_L, item_L > 0, item_L[:1], np.zeros((5, dense), np.float32))
    with warnings.catch_warnings():
        # The exporter by tracing is called old; the new one needs a package more and gives the same operations.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            TorchDin(bundle).eval(), tuple(map(torch.from_numpy, inputs)), str(path), dynamo=False,
            input_names=list(Inputs._fields), output_names=["score_C"], dynamic_axes=DYNAMIC,
        )  # fmt: skip


def onnx_run(path: pathlib.Path, *, threads: int = 1) -> Run:
    """The DIN in ONNX Runtime, on the CPU."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    read = {value.name for value in session.get_inputs()}  # what the model does not read is not in the file

    def run(inputs: Inputs) -> np.ndarray:
        given = {name: value for name, value in inputs._asdict().items() if name in read}
        (score_C,) = session.run(None, given)
        return np.asarray(score_C)

    return run
