"""Train the tiny tokenizer on the embedded data: `python tests/goldens/make_tokenizer.py`.

A byte-level BPE like Qwen3's, with 512 tokens: 3 of ChatML, 256 bytes, and merges. Any UTF-8
text can be encoded and decoded again. One thing is special, for the tiny model's sake: only a word
that follows a space, starts the text, or has one capital letter in front may be merged. Every other
character is a token of its own, so a word in quotation marks and an answer are letters, which a
model of a million parameters can reverse, count and sort.
"""

import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common.tiny.skills import records  # noqa: E402

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The start of the text is the start of what stands between two special tokens: a role's name.
SPLIT = r'\A\p{L}+| ?\p{Lu}\p{Ll}+| \p{L}+| "|[\s\S]'


def train(count=20_000, vocab_size=512):
    """A Tokenizer with `vocab_size` tokens, trained on `count` records of all the skills."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # What stands between the special tokens of a record.
    texts = (f"{message['role']}\n{message['content']}"
             for item in records("all", "train", count) for message in item["messages"])
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


if __name__ == "__main__":
    train().save(str(ROOT / "common" / "tiny" / "tokenizer.json"))
