"""Holds what is timed, as data: the tensors of the models, and the sizes of sweeps and losses."""

Shapes = list[tuple[int, ...]]


def linear(outputs: int, inputs: int) -> Shapes:
    return [(outputs, inputs), (outputs,)]


def textcnn(
    words: int = 30_000, dimension: int = 300, filters: int = 100, classes: int = 2
) -> Shapes:
    """Returns the shapes of convolutions of widths 3, 4, 5 over word vectors."""
    convolutions = [
        shape for width in (3, 4, 5) for shape in [(filters, dimension, width), (filters,)]
    ]
    return [(words, dimension), *convolutions, *linear(classes, 3 * filters)]


def bert(
    hidden: int = 768, layers: int = 12, words: int = 30_522, positions: int = 512, types: int = 2
) -> Shapes:
    """Returns the tensors of BERT, or RoBERTa, for classification in two classes."""
    norm = [(hidden,), (hidden,)]
    layer = [
        *linear(hidden, hidden) * 4,
        *norm,
        *linear(4 * hidden, hidden),
        *linear(hidden, 4 * hidden),
        *norm,
    ]
    embeddings = [(words, hidden), (positions, hidden), (types, hidden), *norm]
    return [*embeddings, *layer * layers, *linear(hidden, hidden), *linear(2, hidden)]


def decoder(hidden: int, layers: int, inner: int, words: int, keys: int, tied: bool) -> Shapes:
    """Returns the tensors of a decoder in Llama's manner: keys and values `keys` wide, a gated
    inner layer, no biases.
    """
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer = [*attention, (inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    return [(words, hidden), *layer * layers, (hidden,), *[(words, hidden)] * (not tied)]


MODELS = {
    "TextCNN": textcnn(),
    # 109,483,778 elements in 201 tensors, at its published sizes
    "BERT-base": bert(),
    "BERT-large": bert(1024, 24),
    "RoBERTa-large": bert(1024, 24, 50_265, 514, 1),
    # Llama 3.2 1B's sizes
    "1 B decoder": decoder(2048, 16, 8192, 128_256, 512, tied=True),
    # Llama 2 7B's
    "7 B decoder": decoder(4096, 32, 11_008, 32_000, 4096, tied=False),
}
# tensors of 64
SMALL_COUNTS = (10_000, 5_000, 20_000)
# elements of one tensor
SIZES = [10**k for k in range(3, 10)]
# tensors of 1,000
COUNTS = [10**k for k in range(5)]
# m
PASSES = (2, 3, 4, 5)
# classes C: rows N
ROWS = {2: 16, 1_000: 1024, 32_000: 128, 128_256: 32}
# of the losses from hidden states
HIDDEN = 512
# texts, words
BERT_BATCH = (16, 128)
