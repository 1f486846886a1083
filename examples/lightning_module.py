"""Any recipe in a Lightning module, which optimizes by hand.

pip install lightning  # beside uegr-kernels
python examples/lightning_module.py
"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import uegr_kernels as uk


class Classifier(lightning.LightningModule):
    """Trains a small network on words with a recipe of `uk.recipes.NAMES`."""

    def __init__(self, recipe: str = "uegr") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.embedding = torch.nn.Embedding(100, 32)
        self.net = torch.nn.Sequential(
            self.embedding, torch.nn.Flatten(), torch.nn.Dropout(0.1), torch.nn.Linear(8 * 32, 2)
        )
        self.name, self.losses = recipe, []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return uk.SelectiveAdamW(self.net.parameters(), lr=1e-2)

    def on_train_start(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.recipe = getattr(uk.recipes, self.name)(self.net, self.embedding, optimizer)

    def training_step(self, batch: list[torch.Tensor]) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        losses = self.recipe.backward(*batch)
        self.recipe.before_step()
        optimizer.step()
        self.recipe.after_step()
        self.losses.append(losses["loss"].item())  # self.log_dict(losses) with a logger

    def on_train_end(self) -> None:
        self.recipe.close()


def main() -> list[float]:
    torch.manual_seed(0)
    words = torch.randint(100, (256, 8))
    data = TensorDataset(words, (words[:, 0] < 50).long())
    model = Classifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=5, accelerator="cpu", devices=1, **quiet)
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    assert model.losses[-1] < model.losses[0], "the loss does not fall"
    return model.losses


if __name__ == "__main__":
    main()
