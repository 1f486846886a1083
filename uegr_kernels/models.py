"""Four small text classifiers, ids [N, T] -> logits [N, C], that the demo, the tests and the
benchmarks share.

Each has `.embedding`, the word embedding that attacks perturb, and `.classify`, everything after
it. Index 0 is padding, at the end of a text, whose logits do not depend on how much there is of it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

PADDING = 0
# TextCNN's windows
WIDTHS = (3, 4, 5)


class TextClassifier(nn.Module):
    """Holds what the classifiers share: forward(ids, attention_mask=None) =
    classify(embedding(ids), mask).

    ids             [N, T]  int64  word indices, 0 = padding
    attention_mask  [N, T]  bool or number, nonzero = a word; None: where ids is not 0
    returns         [N, C]  logits
    """

    def __init__(self, words: int, dimension: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, dimension, padding_idx=PADDING)
        # Word vectors of norm one whatever the dimension, so that an epsilon means the same in
        # every model.
        nn.init.normal_(self.embedding.weight, std=dimension**-0.5)
        with torch.no_grad():
            self.embedding.weight[PADDING].zero_()

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = ids != PADDING if attention_mask is None else attention_mask != 0
        return self.classify(self.embedding(ids), mask)

    def classify(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns logits [N, C] of embedded words x [N, T, d] under a bool mask [N, T]."""
        raise NotImplementedError


class TextCNN(TextClassifier):
    """Classifies by convolutions of widths 3, 4, 5 over the words, their maximum over time,
    dropout, linear (Kim, 2014).
    """

    def __init__(
        self,
        words: int,
        classes: int,
        dimension: int = 128,
        filters: int = 100,
        dropout: float = 0.3,
    ) -> None:
        super().__init__(words, dimension)
        self.convolutions = nn.ModuleList(nn.Conv1d(dimension, filters, width) for width in WIDTHS)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(len(WIDTHS) * filters, classes)

    def classify(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x.transpose(1, 2)  # [N, d, T]
        features = []
        for width, convolution in zip(WIDTHS, self.convolutions, strict=True):
            # One window per word, the last ones reaching into zeros, and none that starts at
            # padding.
            windows = F.relu(convolution(F.pad(x, (0, width - 1))))
            features.append((windows * mask[:, None]).amax(2))
        logits: Tensor = self.linear(self.dropout(torch.cat(features, 1)))
        return logits


class BiLSTM(TextClassifier):
    """Classifies by a bidirectional LSTM, the maximum of its outputs over time, dropout, linear."""

    def __init__(
        self, words: int, classes: int, dimension: int = 128, hidden: int = 64, dropout: float = 0.3
    ) -> None:
        super().__init__(words, dimension)
        self.lstm = nn.LSTM(dimension, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * hidden, classes)

    def classify(self, x: Tensor, mask: Tensor) -> Tensor:
        states = _read(self.lstm, x, mask)
        # below tanh's range
        pooled = states.masked_fill(~mask[:, : states.shape[1], None], -2.0).amax(1)
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits


class TextHAN(TextClassifier):
    """Classifies by hierarchical attention: words are read and weighed within pieces of `piece`
    words, the pieces within the text (Yang et al., 2016).
    """

    def __init__(
        self,
        words: int,
        classes: int,
        dimension: int = 128,
        hidden: int = 64,
        dropout: float = 0.3,
        piece: int = 16,
    ) -> None:
        super().__init__(words, dimension)
        self.piece = piece
        self.word_reader = nn.GRU(dimension, hidden, batch_first=True, bidirectional=True)
        self.word_attention = _Attention(2 * hidden)
        self.piece_reader = nn.GRU(2 * hidden, hidden, batch_first=True, bidirectional=True)
        self.piece_attention = _Attention(2 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * hidden, classes)

    def classify(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, length, dimension = x.shape
        missing = -length % self.piece
        x = F.pad(x, (0, 0, 0, missing)).reshape(-1, self.piece, dimension)
        mask = F.pad(mask, (0, missing)).reshape(-1, self.piece)
        pieces = self.word_attention(self.word_reader(x)[0], mask).reshape(
            rows, -1, self.word_attention.size
        )
        mask = mask.any(1).reshape(rows, -1)
        states = _read(self.piece_reader, pieces, mask)
        logits: Tensor = self.linear(
            self.dropout(self.piece_attention(states, mask[:, : states.shape[1]]))
        )
        return logits


class TextTransformer(TextClassifier):
    """Classifies by a small Transformer encoder over words and learned positions, the mean over
    words, dropout, linear.
    """

    def __init__(
        self,
        words: int,
        classes: int,
        dimension: int = 128,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
        longest: int = 512,
    ) -> None:
        super().__init__(words, dimension)
        self.position = nn.Parameter(torch.randn(longest, dimension) * dimension**-0.5)
        layer = nn.TransformerEncoderLayer(
            dimension, heads, 2 * dimension, dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(dimension), enable_nested_tensor=False
        )
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(dimension, classes)

    def classify(self, x: Tensor, mask: Tensor) -> Tensor:
        if x.shape[1] > len(self.position):
            raise ValueError(
                f"texts of {x.shape[1]} words; this model takes {len(self.position)}: "
                f"build it with longest={x.shape[1]}"
            )
        weights = mask.to(x.dtype)[..., None]
        # Added to the scores rather than -inf, so that a text without words is not NaN.
        states = self.encoder(
            x + self.position[: x.shape[1]], src_key_padding_mask=(weights[..., 0] - 1) * 1e4
        )
        logits: Tensor = self.linear(
            self.dropout((states * weights).sum(1) / weights.sum(1).clamp(min=1))
        )
        return logits


class _Attention(nn.Module):
    """Computes the mean of states [N, T, size] weighed by a learned query; padding weighs
    nothing.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.key = nn.Linear(size, size)
        self.query = nn.Linear(size, 1, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        scores = self.query(torch.tanh(self.key(states)))[..., 0].masked_fill(~mask, -1e4)
        weighed: Tensor = (scores.softmax(1) * mask)[..., None] * states
        return weighed.sum(1)


def _read(reader: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Returns a recurrent network's outputs over each text's own length, so that neither
    direction reads padding.
    """
    lengths = mask.sum(1).clamp(min=1).cpu()
    packed, _ = reader(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    return pad_packed_sequence(packed, batch_first=True)[0]


MODELS = {"textcnn": TextCNN, "bilstm": BiLSTM, "texthan": TextHAN, "transformer": TextTransformer}
