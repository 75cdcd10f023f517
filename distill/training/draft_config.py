"""The shape of a draft model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decode.models import draft_vocabulary
from decode.models.dimensions import DRAFT_HEAD_DIM, Dimensions
from kernels.errors import UserError
from kernels.files import read_json

# Weights that share a scale, by bits: 4-bit codes need the finer groups; both divide every matrix (their widths are
# multiples of 64).
GROUP_SIZE = {4: 32, 8: 64}


@dataclass(frozen=True)
class DraftConfig:
    """The shape of a draft. `eos` may be one id or several, as in a teacher's config.json."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    rope_theta: float
    max_positions: int
    eps: float
    tied: bool = True
    bos: int | None = None
    eos: int | list[int] | None = None
    draft_vocab_size: int | None = None  # tokens that the head has, where it is trimmed (draft_vocabulary)

    @classmethod
    def for_teacher(
        cls, teacher_folder: Path, layers: int, hidden: int, draft_vocab_size: int | None = None
    ) -> DraftConfig:
        """A draft of `layers` x `hidden` for the teacher in a folder, its head of `draft_vocab_size` tokens or all."""
        path = teacher_folder / "config.json"
        return cls.for_config(read_json(path), str(path), layers, hidden, draft_vocab_size)

    @classmethod
    def for_config(
        cls, teacher: dict[str, Any], name: str, layers: int, hidden: int, draft_vocab_size: int | None = None
    ) -> DraftConfig:
        """The same for a teacher of which only the content of config.json is known; name: the file's, for errors."""
        check_size(layers, hidden)
        try:
            rope = teacher.get("rope_parameters") or {}  # where transformers 5 writes it
            teacher_heads = int(teacher["num_attention_heads"])
            ratio = int(teacher.get("num_key_value_heads") or teacher_heads) / teacher_heads
            shape = Dimensions.of_draft(layers, hidden, kv_ratio=ratio, vocab=int(teacher["vocab_size"]))
            return cls(
                layers=layers,
                hidden=hidden,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                intermediate=shape.intermediate,
                vocab_size=shape.vocab,
                rope_theta=float(teacher.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
                max_positions=int(teacher["max_position_embeddings"]),
                eps=float(teacher["rms_norm_eps"]),
                bos=teacher.get("bos_token_id"),
                eos=teacher.get("eos_token_id"),
                draft_vocab_size=draft_vocab_size,
            )
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{name}: no usable {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The `config.json` of mlx-lm and Hugging Face; of no stock model where the head is trimmed."""
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_positions,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "bfloat16",
        }
        if self.draft_vocab_size is not None:
            trimmed = {"model_type": draft_vocabulary.MODEL_TYPE, draft_vocabulary.SIZE: self.draft_vocab_size}
            config |= {"architectures": []} | trimmed
        return config | {
            key: value for key, value in (("bos_token_id", self.bos), ("eos_token_id", self.eos)) if value is not None
        }

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> DraftConfig:
        """The inverse of `to_json`; KeyError, TypeError or ValueError where it is no Llama."""
        if config.get("model_type") not in ("llama", draft_vocabulary.MODEL_TYPE):
            raise ValueError(f"model_type is {config.get('model_type')!r}, not 'llama'")
        trimmed = config["model_type"] == draft_vocabulary.MODEL_TYPE
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return cls(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            rope_theta=float(config.get("rope_theta", 10_000.0)),
            max_positions=int(config.get("max_position_embeddings") or 2048),
            eps=float(config["rms_norm_eps"]),
            tied=bool(config.get("tie_word_embeddings", True)),
            bos=config.get("bos_token_id"),
            eos=config.get("eos_token_id"),
            draft_vocab_size=int(config[draft_vocabulary.SIZE]) if trimmed else None,
        )

    def record(self) -> dict[str, Any]:
        """The shape as draft.json keeps it."""
        return {"kept" if name == "draft_vocab_size" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> DraftConfig:
        """The inverse of `record`; TypeError where it is none."""
        return cls(**{"draft_vocab_size" if name == "kept" else name: value for name, value in record.items()})

    @property
    def head_size(self) -> int:
        """How many tokens the draft can propose."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def parameters(self) -> int:
        """How many numbers the draft has."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.vocab_size * self.hidden * (1 if self.tied else 2) + self.hidden


def check_size(layers: int, hidden: int) -> None:
    """UserError naming the option that no draft can have."""
    if layers < 1:
        raise UserError(f"--layers {layers}: must be at least 1")
    if hidden < DRAFT_HEAD_DIM or hidden % DRAFT_HEAD_DIM:
        raise UserError(f"--hidden {hidden}: must be a multiple of {DRAFT_HEAD_DIM} (one attention head each)")
