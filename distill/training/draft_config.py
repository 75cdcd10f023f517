"""The shape of a draft model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decode.models import draft_vocabulary, reader
from decode.models.dimensions import DRAFT_HEAD_DIM, Dimensions
from decode.models.formats import PACKED, READER, TAPS, TEACHER_HIDDEN
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
    taps: tuple[int, ...] = ()  # the teacher's layers that it reads; none is a standalone draft
    teacher_hidden: int = 0  # width of what it reads
    ternary: bool = False  # the layers' matrices, and what a reader has before them, are BitNet's

    @classmethod
    def for_teacher(
        cls,
        teacher_folder: Path,
        layers: int,
        hidden: int,
        draft_vocab_size: int | None = None,
        taps: tuple[int, ...] = (),
        ternary: bool = False,
    ) -> DraftConfig:
        """A draft of `layers` x `hidden` for the teacher in a folder, its head of `draft_vocab_size` tokens or all; it
        reads the states that leave the teacher's layers `taps`; ternary: it is a BitNet itself."""
        path = teacher_folder / "config.json"
        return cls.for_config(read_json(path), str(path), layers, hidden, draft_vocab_size, taps, ternary)

    @classmethod
    def for_config(
        cls,
        teacher: dict[str, Any],
        name: str,
        layers: int,
        hidden: int,
        draft_vocab_size: int | None = None,
        taps: tuple[int, ...] = (),
        ternary: bool = False,
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
                taps=taps,
                teacher_hidden=int(teacher["hidden_size"]) if taps else 0,
                ternary=ternary,
            )
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{name}: no usable {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The `config.json` of mlx-lm and Hugging Face; of no stock model where the head is trimmed or states are
        read."""
        config: dict[str, Any] = {
            "architectures": ["BitNetForCausalLM" if self.ternary else "LlamaForCausalLM"],
            "model_type": "bitnet" if self.ternary else "llama",
            "hidden_act": self.activation,
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
        if self.ternary:
            config["quantization_config"] = PACKED
        if self.draft_vocab_size is not None:
            trimmed = {"model_type": draft_vocabulary.MODEL_TYPE, draft_vocabulary.SIZE: self.draft_vocab_size}
            config |= {"architectures": []} | trimmed
        if self.taps:
            del config["tie_word_embeddings"]  # it has neither embedding nor head of its own
            config |= {"architectures": [], "model_type": READER, reader.FORMAT_KEY: reader.FORMAT}
            config |= {TAPS: list(self.taps), TEACHER_HIDDEN: self.teacher_hidden}
        return config | {
            key: value for key, value in (("bos_token_id", self.bos), ("eos_token_id", self.eos)) if value is not None
        }

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> DraftConfig:
        """The inverse of `to_json`; KeyError, TypeError or ValueError where it is no draft's."""
        kind, ternary = config.get("model_type"), "quantization_config" in config
        if kind not in ("bitnet" if ternary else "llama", draft_vocabulary.MODEL_TYPE, READER):
            raise ValueError(f"model_type is {kind!r}, not 'llama'")
        reads, size = kind == READER, config.get(draft_vocabulary.SIZE)
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
            draft_vocab_size=None if size is None else int(size),
            taps=tuple(int(tap) for tap in config[TAPS]) if reads else (),
            teacher_hidden=int(config[TEACHER_HIDDEN]) if reads else 0,
            ternary=ternary,
        )

    def record(self) -> dict[str, Any]:
        """The shape as draft.json keeps it."""
        return {"kept" if name == "draft_vocab_size" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> DraftConfig:
        """The inverse of `record`; TypeError where it is none."""
        named = {"draft_vocab_size" if name == "kept" else name: value for name, value in record.items()}
        return cls(**named | {"taps": tuple(named.get("taps", ()))})

    @property
    def head_size(self) -> int:
        """How many tokens the draft can propose."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def prefix(self) -> str:
        """What the names of its layers begin with in the weights' file."""
        return "" if self.taps else "model."

    @property
    def is_stock(self) -> bool:
        """Whether programs that know Llamas and BitNets load it too."""
        return self.draft_vocab_size is None and not self.taps

    @property
    def activation(self) -> str:
        """Of the feed-forward layer, as config.json names it."""
        return "relu2" if self.ternary and not self.taps else "silu"

    @property
    def parameters(self) -> int:
        """How many numbers the draft has, those of its teacher that it uses left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        if self.ternary:
            layer += self.heads * self.head_dim + self.intermediate
        embeddings = 0 if self.taps else self.vocab_size * self.hidden * (1 if self.tied else 2)
        read = len(self.taps) * self.teacher_hidden
        reading = read * (self.hidden + 1) + (self.teacher_hidden + self.hidden) * (self.hidden + 1) if self.taps else 0
        if self.taps and self.hidden != self.teacher_hidden:
            reading += self.hidden * self.teacher_hidden
        return self.layers * layer + embeddings + reading + self.hidden


def check_size(layers: int, hidden: int) -> None:
    """UserError naming the option that no draft can have."""
    if layers < 1:
        raise UserError(f"--layers {layers}: must be at least 1")
    if hidden < DRAFT_HEAD_DIM or hidden % DRAFT_HEAD_DIM:
        raise UserError(f"--hidden {hidden}: must be a multiple of {DRAFT_HEAD_DIM} (one attention head each)")
