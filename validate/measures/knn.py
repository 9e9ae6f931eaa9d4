"""k-nearest-neighbour classification by cosine, votes weighted by inverse distance.

The published figures of this family of servers come from scikit-learn's `KNeighborsClassifier` with
`n_neighbors=10, metric="cosine", weights="distance"`. These scores are its probabilities. Over images it
is a few-shot classifier. Over one text embedding a class it is the published zero-shot protocol.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from siglip_serve.embeddings.zero_shot import Floats, require_matrix
from siglip_serve.errors import InvalidInputError

__all__ = ["knn_scores", "text_knn_scores"]


def knn_scores(
    gallery: Floats, labels: NDArray[np.int64], queries: Floats, classes: int, k: int = 10
) -> Floats:
    """Share of the `k` nearest gallery rows' votes that each class gets.

    Args:
        gallery: [m, d] embeddings of known class, of any length but zero.
        labels: int64 [m], the class of each gallery row, in 0..classes-1.
        queries: [n, d] embeddings to classify.
        classes: number of classes.
        k: neighbours that vote; all of them when the gallery is smaller.

    Returns:
        scores [n, classes] in 0..1, minus infinity where a class has no vote.

    Raises:
        InvalidInputError: a shape, a label or `k` does not fit.
    """
    from sklearn.neighbors import NearestNeighbors

    require_matrix("gallery", gallery)
    require_matrix("queries", queries, gallery.shape[1])
    if labels.shape != (len(gallery),) or not len(gallery):
        raise InvalidInputError(
            f"labels: expected one a gallery row, [{len(gallery)}] and not none, got {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise InvalidInputError(f"labels: expected 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    if k < 1:
        raise InvalidInputError(f"k: expected at least 1, got {k}")
    search = NearestNeighbors(n_neighbors=min(k, len(gallery)), metric="cosine").fit(gallery)
    distances, neighbours = search.kneighbors(queries)
    votes = np.zeros((len(queries), classes))
    np.add.at(votes, (np.arange(len(queries))[:, None], labels[neighbours]), _weights(distances))
    return np.where(votes > 0, votes / votes.sum(axis=1, keepdims=True), -np.inf)


def _weights(distances: Floats) -> Floats:
    """Inverse distances [n, k]. Where a neighbour coincides with the query, only such neighbours count."""
    same = distances == 0
    weights: Floats = np.where(same.any(axis=1, keepdims=True), same, 1 / np.where(same, 1, distances))
    return weights


def text_knn_scores(class_texts: Floats, queries: Floats, k: int = 10) -> Floats:
    """The published zero-shot protocol: the `k` class texts nearest to an image vote.

    With one text a class the ranking of the first `k` classes is that of their cosines.

    Args:
        class_texts: [classes, d], the embedding of each class's one prompt.
        queries: [n, d] image embeddings.
        k: neighbours that vote.

    Returns:
        scores [n, classes] in 0..1, minus infinity beyond the `k` nearest.

    Raises:
        InvalidInputError: a shape or `k` does not fit.
    """
    require_matrix("class_texts", class_texts)
    return knn_scores(class_texts, np.arange(len(class_texts)), queries, len(class_texts), k)
