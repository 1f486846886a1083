"""Supervised fine-tuning of a language model with TRL's SFTTrainer and SelectiveAdamW.

pip install trl  # beside uegr-kernels
python examples/sft.py
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import uegr_kernels as uk

WHO, WHAT = ("the cat", "the dog", "a bird", "a fox"), ("a ball", "the fish", "the tree")
TEXTS = [f"{who} {does} {what} ." for who in WHO for does in ("sees", "likes") for what in WHAT]


def build_tokenizer() -> PreTrainedTokenizerFast:
    marks = {"pad_token": "<pad>", "eos_token": "<eos>"}
    words = Tokenizer(models.WordLevel())
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=[*marks.values()]))
    return PreTrainedTokenizerFast(tokenizer_object=words, **marks)


def main() -> list[float]:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ends))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            num_train_epochs=8,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=(uk.SelectiveAdamW, {"lr": 1e-2}),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0], "the loss does not fall"
    return losses


if __name__ == "__main__":
    main()
