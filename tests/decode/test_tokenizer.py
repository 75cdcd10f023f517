"""Tokenizers of other kinds than the embedded teacher's: where texts begin, break off and end."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TEACHER, Command, changed_copy, unsealed

from decode.tokenizer import Tokenizer
from distill.data.reply_dataset import Replies
from distill.provenance import teacher_files

BOS, EOS = 1, 2
LINES = ("One line of a reply that is said.", "  two spaces, and more of it", "- naïve 東京 🙂👩‍👩‍👧", "", " the end ")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, small_teacher: Path) -> Path:
    """A teacher whose tokenizer is of Llama 2's kind: spaces are part of the tokens, the first one is taken off when
    decoding, other characters are bytes, and every text gets the BOS token."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, processors, trainers

    fast = Fast(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    fast.train_from_iterator([(ROOT / "data" / "README.md").read_text(encoding="utf-8").replace("\n", " ")], trainer)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    content = json.loads(fast.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return changed_copy(
        small_teacher,
        tmp_path_factory.mktemp("teachers") / "llama",
        tokenizer__json=json.dumps(content).encode(),
        tokenizer_config__json=json.dumps(about).encode(),
    )


def test_a_template_among_others_by_name_is_the_same_template(small_teacher: Path, tmp_path: Path) -> None:
    """As text, in a list of several and as files beside one another: what is left out of it forms no prompt."""
    plain, config = Tokenizer(small_teacher), json.loads((small_teacher / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    assert plain.template_hash == hashlib.sha256(template.encode()).hexdigest()
    tools = "{{ strftime_now('%d') }}"  # which asks for the time
    named = [{"name": "default", "template": template}, {"name": "rag", "template": tools}]
    for name, listed in (("one", named[:1]), ("two", named), ("files", None)):
        content = config if listed is None else config | {"chat_template": listed}
        folder = changed_copy(small_teacher, tmp_path / name, tokenizer_config__json=json.dumps(content).encode())
        if listed is None:
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "rag.jinja").write_text(tools)
            (folder / "chat_template.jinja").write_text(template)
        other = Tokenizer(folder)
        assert teacher_files(other) == teacher_files(plain) and other.template_time is None
    changed = json.dumps(config | {"chat_template": [{"name": "default", "template": f"Hm. {template}"}]}).encode()
    other = Tokenizer(changed_copy(small_teacher, tmp_path / "other", tokenizer_config__json=changed))
    assert other.template_hash not in (None, plain.template_hash)


@pytest.mark.parametrize("kind", ["bytes", "llama"])
def test_what_is_blank_is_known_from_its_beginning(kind: str, small_teacher: Path, llama: Path) -> None:
    """As from all of it: also where that ends within a space of three bytes, or bytes spoil what is before them."""
    tokenizer = Tokenizer(small_teacher if kind == "bytes" else llama)
    spaces = [tokenizer.encode_text(text)[-count:] for text in ("\u3000", "\n", " ") for count in (1, 2, 3)]
    others = [tokenizer.encode_text("東")[-3:][:count] for count in (1, 2, 3)] + [sorted(tokenizer.end_tokens)[:1]]
    rng, found = random.Random(8), list[bool]()
    for _ in range(2000):
        parts = rng.choices(spaces, k=rng.randint(0, 8))
        if rng.random() < 0.5:
            parts.insert(rng.randint(0, len(parts)), rng.choice([*others, tokenizer.encode_text("a")[-1:]]))
        tokens = [token for part in parts for token in part]
        found.append(tokenizer.is_blank(tokens))
        assert found[-1] == (tokenizer.decode(tokens).strip() == ""), tokens
    assert 300 < sum(found) < 1700


@pytest.mark.parametrize("size", [1, 2, 5, 99])
def test_a_byte_that_makes_no_character_spoils_none_before_it(llama: Path, size: int) -> None:
    """Tokenizers decode neighbouring bytes at once, and lose all where one is wrong: what was whole was shown."""
    tokenizer = Tokenizer(llama)
    emoji = [tokenizer._wrapped.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    for ids, shown in (
        (emoji * 2 + emoji[:2], "🙂🙂\ufffd\ufffd"),
        (emoji + emoji[:1] + tokenizer.encode_text("so")[1:], "🙂\ufffd so"),
    ):
        streamer = tokenizer.streamer()
        pieces = [streamer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "".join(pieces) + streamer.finish() == shown == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["llama", "embedded"])
def test_what_was_streamed_is_the_decoded_whole(llama: Path, kind: str) -> None:
    """Of any tokens, most of them bytes, also behind lines where decoding begins anew."""
    tokenizer = Tokenizer(llama if kind == "llama" else TEACHER)
    lines, numbers = tokenizer.encode_text("It is one of many lines.\n" * 20), np.random.default_rng(0)
    for most in (280, 600):
        for _ in range(20):
            ids = lines + [int(token) for token in numbers.integers(most, size=100)]
            streamer = tokenizer.streamer()
            assert streamer.push(ids) + streamer.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_streams_keep_the_spaces_of_llamas_tokenizers(llama: Path, size: int) -> None:
    """Also behind a line end, where decoding begins anew in long replies."""
    tokenizer = Tokenizer(llama)
    text = "\n".join(LINES * 12)
    ids = tokenizer.encode_text(text)
    streamer = tokenizer.streamer()
    shown = "".join(streamer.push(ids[i : i + size]) for i in range(0, len(ids), size)) + streamer.finish()
    assert shown == tokenizer.decode(ids) == text


@pytest.mark.parametrize("at", range(2, 40, 3))
def test_a_bare_text_is_gone_on_with_behind_the_space_at_its_end(llama: Path, at: int) -> None:
    tokenizer = Tokenizer(llama)
    ids = tokenizer.encode_text("Once upon a time, 東京 was a village.\nAnd then")
    prompt, reply = ids[:at], ids[at:]
    streamer = tokenizer.streamer(prompt)
    shown = "".join(streamer.push([token]) for token in reply) + streamer.finish()
    if "\ufffd" not in tokenizer.decode(prompt):  # no text ends within a character
        assert tokenizer.decode(prompt) + shown == tokenizer.decode(ids)


def test_a_text_that_begins_with_the_bos_token_has_it_once(llama: Path) -> None:
    tokenizer = Tokenizer(llama)
    plain = tokenizer.encode_text("Once upon a time")
    assert plain[0] == BOS != plain[1]
    assert tokenizer.encode_text("<s>Once upon a time") == plain
    assert tokenizer.encode_text("<s><s>Once upon a time") == [BOS, *plain]  # as it was asked for
    assert tokenizer.encode_text("") == [BOS] == tokenizer.encode_text("<s>")
    bare = Tokenizer(TEACHER)  # puts none before a text
    assert bare.encode_text("<|im_start|><|im_start|>")[:2] == [1, 1] != bare.encode_text("<|im_start|>a")[:2]


def test_raw_prompts_and_sources_have_the_bos_token_once(llama: Path, inside: Command, tmp_path: Path) -> None:
    replies = []
    for prompt in ("Once upon a time", "<s>Once upon a time"):
        options = ("--teacher", llama, "--raw", "--prompt", prompt, "--max-tokens", 4, "--json", "-")
        done = inside("decode", "plain", *options)
        assert done.code == 0, done.err
        replies.append([(o["prompt_tokens"], o["token_ids"]) for o in json.loads(done.out)["outputs"]])
        (output,) = json.loads(done.out)["outputs"]
        whole = Tokenizer(llama).decode(Tokenizer(llama).encode_text(prompt) + output["token_ids"])
        assert "Once upon a time" + output["text"] == whole  # the space at the border is there
    assert replies[0] == replies[1]
    done = inside("decode", "plain", "--teacher", llama, "--prompt", "Once", "--max-tokens", 1)
    assert done.code == 0 and "no chat template" in done.err  # that it is given bare is said

    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "<s>" + "Once upon a time. " * 40}) + "\n")
    options = ("--tokens", 100, "--seq-len", 64, "--batch", 1, "--source", tmp_path / "text.jsonl")
    done = inside("distill", "collect", "--teacher", llama, *options, "--out", tmp_path / "d", "-q")
    assert done.code == 0, done.err
    (folder,) = tmp_path.glob("replies-*")
    examples = Replies.open(folder).read(0)
    assert [int(np.sum(example.tokens == BOS)) for example in examples] == [1] * len(examples) and examples


def test_no_end_token_stands_behind_a_prompt_or_within_a_text(llama: Path, inside: Command, tmp_path: Path) -> None:
    """As tokenizers put it there that were saved with `add_eos_token`: a reply would go on behind its own end."""
    content = json.loads((llama / "tokenizer.json").read_text())
    after = content["post_processor"]
    after["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    after["special_tokens"]["</s>"] = {"id": "</s>", "ids": [EOS], "tokens": ["</s>"]}
    ending = changed_copy(llama, tmp_path / "ending", tokenizer__json=json.dumps(content).encode())
    for raw in ([], ["--raw"]):  # without a chat template a prompt is given bare too
        replies = []
        for teacher in (llama, ending):
            options = ("--teacher", teacher, "--prompt", "Once upon a time", "--max-tokens", 4, "--json", "-")
            done = inside("decode", "plain", *options, *raw)
            assert done.code == 0, done.err
            replies.append([(o["prompt_tokens"], o["token_ids"]) for o in json.loads(done.out)["outputs"]])
        assert replies[0] == replies[1]
    assert Tokenizer(ending).encode_text("Once</s>") == [*Tokenizer(llama).encode_text("Once"), EOS]  # as asked for

    after["single"] = after["single"][1:]  # it ends texts, and begins none
    about = json.loads((llama / "tokenizer_config.json").read_text()) | {"bos_token": "</s>"}
    only = changed_copy(
        llama,
        tmp_path / "only",
        tokenizer__json=json.dumps(content).encode(),
        tokenizer_config__json=json.dumps(about).encode(),
    )
    assert Tokenizer(only).encode_text("<unk>") == [0]

    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Once upon a time. " * 100}) + "\n")
    options = ("--tokens", 200, "--seq-len", 64, "--batch", 1, "--source", tmp_path / "text.jsonl")
    done = inside("distill", "collect", "--teacher", ending, *options, "--out", tmp_path / "d", "-q")
    assert done.code == 0, done.err
    (folder,) = tmp_path.glob("replies-*")
    examples = Replies.open(folder).read(0)
    assert len(examples) > 1 and not any(EOS in example.tokens for example in examples)


@pytest.mark.slow
def test_end_tokens_of_either_file_end_replies_everywhere(
    small_teacher: Path, weak_draft: Path, inside: Command, tmp_path: Path
) -> None:
    """Each file knows one that the other, and the tokenizer, do not; the text of a token that only ends is no part of a
    reply."""

    def said(command: str, *options: object, of: Path) -> dict[str, Any]:
        done = inside(*command.split(), *options, "--teacher", of, "--max-tokens", 12, "--json", "-", "-q")
        assert done.code == 0, done.err
        return json.loads(done.out)["outputs"][0]

    free = said("decode plain", "--prompt", "Hi", of=small_teacher)
    tokens = free["token_ids"]
    plain_text = Tokenizer(small_teacher).decode
    at = next(i for i in range(1, 12) if tokens[i] not in tokens[:i] and plain_text(tokens[:i]).strip())
    other = next(token for token in range(100, 200) if token not in tokens)
    assert free["finish_reason"] == "length" and free["text"]
    config = json.loads((small_teacher / "config.json").read_text()) | {"eos_token_id": [2, tokens[at]]}
    teacher = changed_copy(
        small_teacher,
        tmp_path / "teacher",
        config__json=json.dumps(config).encode(),
        generation_config__json=json.dumps({"eos_token_id": [2, other]}).encode(),
    )
    assert Tokenizer(teacher).end_tokens >= {2, tokens[at], other}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Hi"}) + "\n")
    out = tmp_path / "evaluation"
    plain = said("decode plain", "--prompt", "Hi", of=teacher)
    for reply in (
        plain,
        said("decode spec", "--draft", weak_draft, "--prompt", "Hi", of=teacher),
        said("distill evaluate", "--draft", weak_draft, "--prompts", prompts, "--out", out, of=teacher),
    ):
        assert reply["token_ids"] == tokens[: at + 1] and reply["finish_reason"] == "stop"
        assert reply["text"] == plain["text"] == Tokenizer(small_teacher).decode(tokens[:at])

    sizes = ("--tokens", 40, "--seq-len", 64, "--max-reply", 12, "--batch", 1, "--reply-batch", 1)
    done = inside(
        *("distill", "collect", "--teacher", teacher, "--source", prompts, *sizes, "--reply-temperature", 0, "-q"),
        *("--out", tmp_path / "data"),
    )
    assert done.code == 0, done.err
    (replies,) = tmp_path.glob("replies-*")
    (example,) = Replies.open(replies).read(0)
    assert example.tokens[example.trained].tolist() == tokens[: at + 1]


def test_a_reply_that_no_template_ends_has_the_tokenizers_own_end(small_teacher: Path, tmp_path: Path) -> None:
    config = json.loads((small_teacher / "config.json").read_text()) | {"eos_token_id": [0, 2]}
    about = json.loads((small_teacher / "tokenizer_config.json").read_text())
    del about["chat_template"]
    folder = changed_copy(
        small_teacher,
        tmp_path / "teacher",
        config__json=json.dumps(config).encode(),
        tokenizer_config__json=json.dumps(about).encode(),
    )
    tokenizer = Tokenizer(folder)
    assert tokenizer.end_tokens == {0, 2}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert tokenizer.encode_conversation(messages)[0][-1] == 2


@pytest.mark.slow
def test_a_tokenizer_saved_again_is_the_same(small_teacher: Path, inside: Command, tmp_path: Path) -> None:
    """By transformers, by hand, and by mlx-lm with the model: other files, the same tokens, merges and template."""
    from mlx_lm.convert import convert
    from transformers import AutoTokenizer

    data, text = tmp_path / "data", tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small house. " * 60)
    sizes = ("--tokens", 512, "--seq-len", 64, "--batch", 2, "--source", text, "--out", data, "-q")
    assert inside("distill", "collect", "--teacher", small_teacher, *sizes).code == 0
    manifest = (data / "manifest.json").read_bytes()

    again = changed_copy(small_teacher, tmp_path / "again", tokenizer__json=None, tokenizer_config__json=None)
    AutoTokenizer.from_pretrained(small_teacher).save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (again / "tokenizer.json").write_text(json.dumps(content))
    template = json.loads((small_teacher / "tokenizer_config.json").read_text())["chat_template"]
    (again / "chat_template.jinja").write_text(template + "\n")  # as editors end files
    shutil.copy(tmp_path / "saved" / "tokenizer_config.json", again)
    done = inside("distill", "collect", "--teacher", again, *sizes)
    assert done.code == 0, done.err
    assert (data / "manifest.json").read_bytes() == manifest

    convert(str(small_teacher), str(tmp_path / "mlx"))
    shape = ("--layers", 1, "--hidden", 64, "--tokens", 512, "--batch", 2, "--live-prompts", 0, "-q")
    train = ("distill", "train", "--data", data, *shape)
    done = inside(*train, "--teacher", tmp_path / "mlx", "--out", tmp_path / "draft")
    assert done.code == 0, done.err

    # What was collected before 0.2.0 names the hash of all that the file holds.
    older = json.loads(unsealed(data / "manifest.json"))
    file = json.dumps(json.loads((small_teacher / "tokenizer.json").read_text()), sort_keys=True)
    older["settings"]["tokenizer_hash"] = hashlib.sha256(file.encode()).hexdigest()
    (data / "manifest.json").write_text(json.dumps(older))
    done = inside("distill", "collect", "--teacher", small_teacher, *sizes)
    assert done.code == 0, done.err
    older["settings"]["tokenizer_hash"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(older))
    inside(*train, "--teacher", small_teacher, "--out", tmp_path / "other").refused("distill", str(small_teacher))
