"""Text without weights: TF-IDF, and its truncated singular value decomposition (latent semantic analysis).

Deerwester et al., Indexing by latent semantic analysis, 1990. Term frequencies are 1 + log(count), inverse document
frequencies log((1 + n) / (1 + df)) + 1, and documents have length 1 before the decomposition, as after it.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from marsjax.features.signature import Encoded, Encoder, Options
from marsjax.files import digest_arrays, digest_json

WORD = re.compile(r"\w+")  # of any script
TERMS = 20_000  # the most frequent ones that are counted
BATCH = 1024


def make_tfidf(options: Options, texts: Sequence[str]) -> Encoder:
    """Learns terms and directions from all texts; a word of one text alone tells nothing of another and is left out.

    What was learnt is part of the facts, so one changed text changes all vectors (they take seconds).

    Raises:
        ValueError: the texts share too few words to be told apart.
    """
    count = collections.Counter(term for text in texts for term in set(_words(text)))
    terms = sorted((term for term, df in count.items() if df > 1), key=lambda term: (-count[term], term))[:TERMS]
    position = {term: place for place, term in enumerate(terms)}
    idf_T = np.log((1 + len(texts)) / (1 + np.array([count[term] for term in terms], float))) + 1
    width = min(options.width, len(texts) - 1, len(terms) - 1)
    if width < 1:
        raise ValueError(
            f"tfidf: expected several texts that share words, found {len(texts)} texts with {len(terms)} words in more "
            "than one of them; give more texts, or another encoder"
        )
    matrix_IT = _weigh(texts, position, idf_T)
    direction_TF = _directions(matrix_IT, width)
    width = direction_TF.shape[1]

    def encode(batch: Sequence[str]) -> Encoded:
        row_BF = _weigh(batch, position, idf_T) @ direction_TF
        length_B1 = np.linalg.norm(row_BF, axis=1, keepdims=True)
        # A text of none of the words has no direction: NaN, which is masked and counted as broken.
        row_BF = np.divide(row_BF, length_B1, out=np.full_like(row_BF, np.nan), where=length_B1 > 1e-9)
        reason_B = ["" if has else reason(text) for has, text in zip(length_B1[:, 0] > 1e-9, batch, strict=True)]
        return Encoded(row_BF.astype(np.float32), np.zeros(len(batch), bool), reason_B)

    def reason(text: str) -> str:
        words = _words(text)
        if not words:
            return "it has no word: signs and emoji are none"
        if not any(word in position for word in words):
            among = f", as one of the {TERMS:,} most frequent" if len(terms) == TERMS else ""
            return f"none of its words occurs in another text{among}"
        return f"its words have no part in the {width} directions that are kept"

    facts = {
        "encoder": "tfidf",
        "terms": len(terms),
        "learnt_sha256": digest_json([terms, digest_arrays({"idf": idf_T, "directions": direction_TF})]),
        "pooling": "sum of terms, projected to singular vectors",
        "normalisation": "l2",
    }
    return Encoder(width, options.batch or BATCH, facts, encode)


def _directions(matrix_IT: scipy.sparse.csr_matrix, width: int) -> np.ndarray:
    """The foremost right singular vectors, [T, F], the strongest first: a function of the matrix (and, in the last
    bits, of how many threads BLAS has).

    `scipy.sparse.linalg.svds` is none: where singular values are equal, or fewer than `width` are not zero, ARPACK asks
    for random vectors, and svds has it draw them anew in every process.
    """
    few_SL = matrix_IT if matrix_IT.shape[0] < matrix_IT.shape[1] else matrix_IT.T.tocsr()
    count = few_SL.shape[0]
    gram_SS = scipy.sparse.linalg.LinearOperator(
        (count, count), matvec=lambda vector_S: few_SL @ (few_SL.T @ vector_S), dtype=np.float64
    )
    start_S = np.random.default_rng(0).normal(size=count)
    _, basis_SF = scipy.sparse.linalg.eigsh(gram_SS, k=width, v0=start_S, rng=0)
    basis_SF, _ = np.linalg.qr(basis_SF)  # those of equal eigenvalues may not be orthogonal
    if few_SL is matrix_IT:
        direction_TF, strength_F, _ = np.linalg.svd(matrix_IT.T @ basis_SF, full_matrices=False)
    else:
        _, strength_F, turn_FF = np.linalg.svd(matrix_IT @ basis_SF, full_matrices=False)
        direction_TF = basis_SF @ turn_FF.T
    # Directions that no text has are noise: there are fewer than asked for where the texts repeat themselves.
    direction_TF = direction_TF[:, strength_F > 1e-6 * strength_F.max()]
    # The largest entry is positive; of equally large ones the first, or rounding would choose.
    size_TF = np.abs(direction_TF)
    top_F = (size_TF > (1 - 1e-6) * size_TF.max(axis=0)).argmax(axis=0)
    return direction_TF * np.sign(direction_TF[top_F, np.arange(direction_TF.shape[1])])


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _weigh(texts: Sequence[str], position: dict[str, int], idf_T: np.ndarray) -> scipy.sparse.csr_matrix:
    """[I, T], rows of length 1, or 0 where a text has none of the terms."""
    start, term, weight = [0], [], []
    for text in texts:
        count = collections.Counter(position[word] for word in _words(text) if word in position)
        at = np.array(sorted(count), int)
        value_X = (1 + np.log([count[place] for place in at])) * idf_T[at] if len(at) else np.zeros(0)
        term.append(at)
        weight.append(value_X / max(float(np.linalg.norm(value_X)), 1e-12))
        start.append(start[-1] + len(at))
    return scipy.sparse.csr_matrix((np.concatenate(weight), np.concatenate(term), start), (len(texts), len(idf_T)))
