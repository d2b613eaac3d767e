"""A text model and its tokenizer: somebody's, or a tiny BERT whose words are those of the captions."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = 4000
LONGEST = 64  # tokens


def load_text_model(name: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or repository.

    Raises:
        SystemExit: the model has no `pooler_output`, which is what is compared with images.
    """
    model, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    with torch.no_grad():
        given = model(**tokenizer(["a"], return_tensors="pt"))
    if getattr(given, "pooler_output", None) is None:
        raise SystemExit(f"train_clip: {name}, {type(model).__name__}: it gives no pooler_output; take another model")
    return model, tokenizer


def make_vocabulary(captions: Iterable[str]) -> dict[str, int]:
    """WordPiece's vocabulary, piece -> number, made from captions.

    The most frequent words whole, and all letters, so that any word of these letters can be spelled. It is the same in
    every run and process, which the trainer of `tokenizers` is not: ties fall as its hash tables have it.
    """
    backend = BertTokenizerFast().backend_tokenizer
    words: Counter[str] = Counter()
    for caption, count in Counter(captions).items():
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption)):
            words[word] += count
    letters = sorted(set("".join(words)))
    frequent = sorted(words, key=lambda word: (-words[word], word))[:WORDS]
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *frequent]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def make_text_model(vocabulary: dict[str, int]) -> tuple[Any, Any]:
    """A tiny BERT with random weights, and its tokenizer."""
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LONGEST,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config), BertTokenizerFast(vocab=vocabulary, model_max_length=LONGEST)
