"""How a rounded network compares with the float one, and how well it does its task.

The numbers are computed apart from `afpq._metrics`, on purpose: what the project says of itself is not measured by its
own code.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax
from scipy.stats import spearmanr

from accuracy.cases import PAIRS
from afpq.data import Data

__all__ = ["BATCH", "Run", "measure"]

BATCH = 20

Run = Callable[[dict], np.ndarray]  # a feed -> the first output: [samples, ..]


def measure(
    task: str, run: Run, reference: list[np.ndarray], data: Data, labels: np.ndarray | None
) -> dict:
    """The numbers that the task has, of a network `run` against the float outputs by batch.

    Every task: `sqnr_db`. classes: `agreement`, `kl`, and `top1`, `top5` with labels. tokens: `agreement`, `kl`,
    `perplexity`. sentences: `cosine` of the embeddings and `spearman` of their similarities with the labels.
    """
    signal = noise = 0.0
    columns: dict[str, list[np.ndarray]] = {}  # a number of every row, by batch
    vectors = []
    done = 0
    for feed, expected in zip(data.batches(BATCH), reference, strict=True):
        a, b = rows_of(task, expected, feed), rows_of(task, run(feed), feed)
        signal, noise = signal + np.square(a).sum(), noise + np.square(a - b).sum()
        if task == "sentences":
            found = {"cosine": (a * b).sum(1)}
            vectors.append(b)
        else:
            found = distances(a, b)
        if task == "tokens":
            found["surprise"] = surprises(b, feed["input_ids"][:, 1:].reshape(-1))
        elif task == "classes" and labels is not None:
            found |= hits(b, labels[done : done + len(a)])
        for name, values in found.items():
            columns.setdefault(name, []).append(values)
        done += len(a)
    result = {"sqnr_db": float(10 * np.log10(signal / max(noise, 1e-30)))}
    result |= {name: float(np.concatenate(values).mean()) for name, values in columns.items()}
    if task == "tokens":
        result["perplexity"] = float(np.exp(result.pop("surprise")))
    if task == "sentences" and labels is not None:
        first, second = np.concatenate(vectors).reshape(-1, 2, PAIRS, b.shape[1]).swapaxes(0, 1)
        similarity = (first * second).sum(-1).reshape(-1)
        result["spearman"] = float(spearmanr(similarity, labels[: len(similarity)]).statistic)
    return result


def rows_of(task: str, output: np.ndarray, feed: dict) -> np.ndarray:
    """float64 rows: logits of a sample, logits of a token that has a next one, or the embedding of a sentence."""
    wide = output.astype(np.float64)
    if task == "tokens":
        return wide[:, :-1].reshape(-1, wide.shape[-1])
    if task == "sentences":  # the mean over the tokens that are there, of length 1
        mask = feed["attention_mask"][..., None]
        pooled = (wide * mask).sum(1) / mask.sum(1)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return wide.reshape(len(wide), -1)


def distances(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    p, q = log_softmax(a, axis=1), log_softmax(b, axis=1)
    return {"agreement": p.argmax(1) == q.argmax(1), "kl": (np.exp(p) * (p - q)).sum(1)}


def hits(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    best = np.argsort(-logits, 1, kind="stable")[:, :5]
    return {"top1": best[:, 0] == labels, "top5": (best == labels[:, None]).any(1)}


def surprises(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """-log p of the token that came, in nats."""
    return -np.take_along_axis(log_softmax(logits, axis=1), tokens[:, None], 1)[:, 0]
