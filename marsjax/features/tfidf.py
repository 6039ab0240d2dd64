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
    # The starting vector is fixed, so that the same texts have the same vectors.
    start = np.random.default_rng(0).normal(size=min(matrix_IT.shape))
    _, strength_F, direction_FT = scipy.sparse.linalg.svds(matrix_IT, k=width, v0=start, random_state=0)
    # Directions that no text has are noise: there are fewer than asked for where the texts repeat themselves.
    direction_TF = direction_FT[::-1][strength_F[::-1] > 1e-6 * strength_F.max()].T
    width = direction_TF.shape[1]
    top_F = np.abs(direction_TF).argmax(axis=0)
    direction_TF = direction_TF * np.sign(direction_TF[top_F, np.arange(width)])

    def encode(batch: Sequence[str]) -> Encoded:
        row_BF = _weigh(batch, position, idf_T) @ direction_TF
        length_B1 = np.linalg.norm(row_BF, axis=1, keepdims=True)
        # A text of none of the words has no direction: NaN, which is masked and counted as broken.
        row_BF = np.divide(row_BF, length_B1, out=np.full_like(row_BF, np.nan), where=length_B1 > 1e-9)
        return Encoded(row_BF.astype(np.float32), np.zeros(len(batch), bool))

    facts = {
        "encoder": "tfidf",
        "terms": len(terms),
        "learnt_sha256": digest_json([terms, digest_arrays({"idf": idf_T, "directions": direction_TF})]),
        "pooling": "sum of terms, projected to singular vectors",
        "normalisation": "l2",
    }
    return Encoder(width, options.batch or BATCH, facts, encode)


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
