"""What decides a training run, beside its data and its teacher."""

from __future__ import annotations

from dataclasses import dataclass

from decode.settings import Settings, option
from distill.training.draft_config import GROUP_SIZE, check_size
from distill.training.losses import bucket_loss


@dataclass(frozen=True)
class TrainSettings(Settings):
    """All that decides what a training run does with its data; saved with the draft."""

    layers: int = option(2, "Transformer layers of the draft.")
    hidden: int = option(256, "Width of the draft, a multiple of 64.")
    vocab: int | None = option(
        None,
        "Trim the head to the N most frequent tokens of the dataset and all special ones. Default: all.",
        metavar="N",
        low=1,
    )
    loss: str = option("kl", "kl: KL with the tail as a bucket; ce: the teacher's first choice; tv: total variation.")
    temperature: float = option(1.0, "Temperature of the loss; the dataset must have it.", above=0)
    tokens: int = option(500_000, "Tokens trained on; the dataset is repeated.", low=1)
    batch: int = option(2, "Rows a step.", low=1)
    lr: float = option(2e-3, "Peak learning rate.", above=0, high=10)
    warmup: float = option(0.05, "Share of the steps in which the rate rises.", low=0, high=1, recipe_only=True)
    weight_decay: float = option(0.1, "Of matrices, not of norms.", low=0, high=10, recipe_only=True)
    clip: float = option(1.0, "The largest norm of a gradient.", above=0, recipe_only=True)
    bits: int | None = option(
        None, "Quantise the saved weights to 4 or 8 bits. Default: bfloat16.", choices=tuple(GROUP_SIZE)
    )
    seed: int = option(0, "Seed of everything random.", low=0)
    eval_share: float = option(0.02, "Share of the rows held out.", low=0, high=0.5, recipe_only=True)
    eval_rows: int = option(64, "Most rows held out.", low=1, recipe_only=True)
    evals: int = option(20, "Evaluations, evenly over the run, the last at its end.", low=1, recipe_only=True)
    dtype: str = option(
        "auto",
        "Of the computation; auto is bfloat16 on a GPU.",
        choices=("auto", "float32", "bfloat16"),
        recipe_only=True,
    )
    teacher_embedding: bool = option(True, "Start the embedding from the teacher's.", recipe_only=True)

    def check(self, vocab_size: int | None = None) -> None:
        """UserError naming the first option that cannot be; vocab_size: the teacher's, which bounds a trimmed head."""
        bucket_loss(self.loss)
        check_size(self.layers, self.hidden)
        self.check_bounds(vocab=vocab_size and vocab_size - 1)
