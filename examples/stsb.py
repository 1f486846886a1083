"""Sentence similarity by regression with any recipe: Pearson's and Spearman's correlation on STS-B.

pip install scipy && python examples/stsb.py ../shared/data/stsb r_at  # a folder and a recipe
"""

import gzip  # of train.tsv.gz and test.tsv.gz: a header, then score<TAB>sentence ||| sentence
import sys
import zlib

import scipy.stats
import torch
from torch import Tensor, nn

import uegr_kernels as uk

LENGTH, WORDS = 32, 20000  # words of a sentence that are read; numbers that words are hashed to


class Similarity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS + 1, 128, padding_idx=0)
        self.output = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ids: Tensor) -> Tensor:  # [N, 2 * LENGTH], two sentences -> [N, 1]
        a, b = (sentence.sum(1) for sentence in self.embedding(ids).tanh().chunk(2, 1))
        return self.output(torch.cat([(a - b).abs(), a * b], 1))


def read(path: str) -> tuple[Tensor, Tensor]:
    lines = gzip.open(path, "rt", encoding="utf-8").read().splitlines()[1:]
    ids = torch.zeros(len(lines), 2, LENGTH, dtype=torch.int64)
    for row, line in zip(ids, lines, strict=True):
        for half, text in zip(row, line.split("\t")[1].split(" ||| "), strict=True):
            words = text.lower().split()[:LENGTH]
            half[: len(words)] = torch.tensor([zlib.crc32(w.encode()) % WORDS + 1 for w in words])
    return ids.flatten(1), torch.tensor([float(line.split("\t")[0]) for line in lines])


def main(folder: str, recipe: str = "at", epochs: int = 10, batch: int = 32) -> list[float]:
    torch.manual_seed(0)
    (ids, scores), test = (read(f"{folder}/{part}.tsv.gz") for part in ("train", "test"))
    model, losses = Similarity(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    method = getattr(uk.recipes, recipe)(model, model.embedding, optimizer, task="regression")
    for _ in range(epochs):
        for rows in torch.randperm(len(ids)).split(batch):
            optimizer.zero_grad()
            losses.append(float(method.backward({"ids": ids[rows]}, scores[rows])["loss"]))
            method.before_step()
            optimizer.step()
            method.after_step()
    assert losses[-1] < losses[0]
    found = model.eval()(test[0]).detach()[:, 0]
    return [float(f(found, test[1])[0]) for f in (scipy.stats.pearsonr, scipy.stats.spearmanr)]


if __name__ == "__main__":
    print("Pearson {:.3f}, Spearman {:.3f}".format(*main(*sys.argv[1:])))
