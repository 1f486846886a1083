"""Sentence similarity by regression with any recipe: Pearson's and Spearman's correlation on STS-B.

    python examples/stsb.py ../shared/data/stsb --recipe r_at

The folder holds train.tsv.gz and test.tsv.gz: a header, then lines of score<TAB>sentence |||
sentence, scores from 0 to 5.
"""

import argparse
import gzip
import pathlib
import re
from collections import Counter

import scipy.stats
import torch
from torch import Tensor, nn

import uegr_kernels as uk

LENGTH = 32  # words of a sentence that are read


class Similarity(nn.Module):
    """Scores ids [N, 2 * LENGTH], two sentences side by side: their similarity [N, 1]."""

    def __init__(self, words: int, dimension: int = 128, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, dimension, padding_idx=0)
        self.convolution = nn.Conv1d(dimension, dimension, 3, padding=1)
        self.output = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(4 * dimension, dimension),
            nn.ReLU(),
            nn.Linear(dimension, 1),
        )

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        # both sentences in one call, as an attack wants it
        x = self.embedding(ids) * attention_mask[..., None]
        ends = [
            self.encode(half, mask)
            for half, mask in zip(x.chunk(2, 1), attention_mask.chunk(2, 1), strict=True)
        ]
        return self.output(torch.cat([(ends[0] - ends[1]).abs(), ends[0] * ends[1]], 1))

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        read = self.convolution(x.transpose(1, 2)).tanh().transpose(1, 2) * mask[..., None]
        return torch.cat([x, read], 2).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def read(path: pathlib.Path) -> list[tuple[float, list[list[str]]]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        next(file)
        lines = [line.rstrip("\n").split("\t", 1) for line in file]
    return [
        (float(score), [re.findall(r"\w+", text.lower())[:LENGTH] for text in pair.split(" ||| ")])
        for score, pair in lines
    ]


def encoded(pairs: list, numbers: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Returns ids [n, 2 * LENGTH], 0 = padding, 1 = unknown, and scores [n]."""
    ids = torch.zeros(len(pairs), 2, LENGTH, dtype=torch.int64)
    for row, (_, sentences) in zip(ids, pairs, strict=True):
        for half, words in zip(row, sentences, strict=True):
            half[: len(words)] = torch.tensor([numbers.get(word, 1) for word in words])
    return ids.flatten(1), torch.tensor([score for score, _ in pairs])


def correlations(model: nn.Module, ids: Tensor, scores: Tensor) -> tuple[float, float]:
    """Returns Pearson's and Spearman's, of the model in eval mode."""
    model.eval()
    with torch.no_grad():
        guesses = torch.cat([model(part, (part != 0).float())[:, 0] for part in ids.split(256)])
    model.train()
    return float(scipy.stats.pearsonr(guesses, scores).statistic), float(
        scipy.stats.spearmanr(guesses, scores).statistic
    )


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", type=pathlib.Path, help="the folder with train.tsv.gz and test.tsv.gz"
    )
    parser.add_argument("--recipe", choices=uk.recipes.NAMES, default="at")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more pay on an idle machine only")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    pairs = [read(options.data / f"{part}.tsv.gz") for part in ("train", "test")]
    counts = Counter(word for _, sentences in pairs[0] for words in sentences for word in words)
    numbers = {word: number for number, (word, _) in enumerate(counts.most_common(10000), 2)}
    (ids, scores), test = (encoded(part, numbers) for part in pairs)
    model = Similarity(len(numbers) + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recipe = getattr(uk.recipes, options.recipe)(
        model, model.embedding, optimizer, task="regression"
    )
    for epoch in range(1, options.epochs + 1):
        for rows in torch.randperm(len(ids)).split(options.batch):
            optimizer.zero_grad()
            losses = recipe.backward(
                {"ids": ids[rows], "attention_mask": (ids[rows] != 0).float()}, scores[rows]
            )
            recipe.before_step()
            optimizer.step()
            recipe.after_step()
        recipe.epoch_end()
        pearson, spearman = correlations(model, *test)
        print(
            f"epoch {epoch}: loss {losses['loss']:.3f}, test Pearson {pearson:.3f}, Spearman "
            f"{spearman:.3f}",
            flush=True,
        )
    recipe.close()
    return pearson, spearman


if __name__ == "__main__":
    main()
