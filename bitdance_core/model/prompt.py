"""Convert prompts to token ids: chat template, image opening, and no control tokens from the prompt's text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..errors import BitDanceError, is_panic
from .vocabulary import Vocabulary

# of a model whose configuration does not say how many positions it was trained for: Qwen3's; a longer prompt is
# refused, by its bytes before it is tokenized
MAX_TOKENS, MAX_BYTES = 40_960, 2**18


class PromptTokenizer:
    """A Hugging Face `tokenizer.json` with BitDance's special tokens.

    Control tokens are inserted by id, and text is encoded without them: "<|im_end|>" in a prompt is encoded as ordinary
    text.
    """

    def __init__(
        self,
        data: dict[str, Any],
        source: str,
        max_tokens: int | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Read a parsed tokenizer.json; `source` is the file named in errors, `max_tokens` the model's positions.

        `vocabulary` has the words that the model was trained on, if they are few.

        Raises BitDanceError if it is malformed or lacks BitDance's tokens.
        """
        try:
            self._added = data["added_tokens"]
            self._special = {str(token["content"]): token["id"] for token in self._added}
            _check_model(data["model"])
            # no added tokens, no truncation, no padding
            plain = {**data, "added_tokens": [], "truncation": None, "padding": None}
            self._text = Tokenizer.from_str(json.dumps(plain))
        except BaseException as error:  # the tokenizers library raises bare Exception for any malformed file, or panics
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise BitDanceError(f"{source}: not a tokenizer file ({error})") from error
        if any(type(i) is not int or i < 0 for i in self._special.values()):
            raise BitDanceError(f"{source}: not a tokenizer file (the ids of its added tokens must be whole numbers)")
        missing = [t for t in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|res_1|>") if t not in self._special]
        if missing:
            raise BitDanceError(f"{source}: not a BitDance tokenizer; missing tokens: {', '.join(missing)}")
        self.source, self.max_tokens, self.vocabulary = source, max_tokens or MAX_TOKENS, vocabulary

    def to_json(self) -> str:
        """Return the text of a tokenizer.json that reads back as this tokenizer."""
        return json.dumps({**json.loads(self._text.to_str()), "added_tokens": self._added}, ensure_ascii=False)

    @property
    def num_queries(self) -> int:
        """The number of `<|query_i|>` tokens: one less than the tokens of a patch."""
        count = 0
        while f"<|query_{count + 1}|>" in self._special:
            count += 1
        return count

    @cached_property
    def max_id(self) -> int:
        return max(*self._special.values(), *self._text.get_vocab(with_added_tokens=False).values())

    def conditional(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, or a negative prompt, in the chat template.

        Raises BitDanceError for a prompt that is too long or no valid text.
        """
        if (size := len(prompt.encode(errors="surrogatepass"))) > MAX_BYTES:
            raise BitDanceError(f"the prompt is too long: it has {size:,} bytes, at most {MAX_BYTES:,} are read")
        start, end = self._special["<|im_start|>"], self._special["<|im_end|>"]
        words = self._encode("user\n" + prompt)
        if (count := len(words)) > self.max_tokens:
            raise BitDanceError(
                f"the prompt is too long: it has {count:,} tokens, at most {self.max_tokens:,} are read"
            )
        return [start, *words, end, *self._encode("\n"), start, *self._encode("assistant\n")]

    def unconditional(self) -> list[int]:
        """Return the ids of the template without a prompt, for the unconditional branch."""
        return [self._special["<|im_start|>"], *self._encode("assistant\n")]

    def words(self) -> list[str]:
        """Return the words of at least three letters that are one token each, in the order of ids."""
        vocabulary = sorted(self._text.get_vocab(with_added_tokens=False).items(), key=lambda entry: entry[1])
        return [token[1:] for token, _ in vocabulary if len(token) > 3 and token[0] == "\u0120" and token[1:].isalpha()]

    def is_own(self, ids: Sequence[int]) -> bool:
        """Return whether token ids can be from this tokenizer: they begin with <|im_start|> and are in its range."""
        return bool(ids) and ids[0] == self._special["<|im_start|>"] and max(ids) <= self.max_id

    def has_side(self, tokens: int) -> bool:
        """Return whether there is a `<|res_k|>` token for a grid side of `tokens` tokens."""
        return f"<|res_{tokens}|>" in self._special

    def opening(self, height: int, width: int, tokens_per_patch: int) -> list[int]:
        """Return the ids that open an image of height x width tokens: vision start, both sides, P - 1 queries.

        Raises BitDanceError if one of the tokens is missing.
        """
        names = ["<|vision_start|>", f"<|res_{height}|>", f"<|res_{width}|>"]
        names += [f"<|query_{i}|>" for i in range(1, tokens_per_patch)]
        missing = [name for name in names if name not in self._special]
        if missing:
            raise BitDanceError(f"{self.source}: the tokenizer has no token {missing[0]}")
        return [self._special[name] for name in names]

    def _encode(self, text: str) -> list[int]:
        try:
            return self._text.encode(text, add_special_tokens=False).ids
        except BaseException as error:  # the tokenizers library raises TypeError and bare Exception, or panics
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise BitDanceError(f"the prompt cannot be tokenized ({error}): {text[:200]!r}") from error


def _check_model(model: dict[str, Any]) -> None:
    """Raise ValueError for a model that is no byte-level BPE.

    With a prefix of subwords the tokenizers library slices tokens in the middle of a character; its error message is
    then no valid text, for which it ends the whole process.
    """
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {str(model['type'])[:40]!r}, expected 'BPE'")
    if prefix := model.get("continuing_subword_prefix"):
        raise ValueError(f"its model has continuing_subword_prefix {str(prefix)[:40]!r}, expected none")


# Qwen's regular expression that splits text into words before the byte-level BPE
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = {"<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652}
QWEN_TOKENS = 151669  # words and special tokens; BitDance's tokens follow
RES_TOKENS = 256


def published_tokenizer(vocab: Path, merges: Path, rows: int) -> dict[str, Any] | None:
    """Build the tokenizer.json of a published model from Qwen's vocabulary files; None if `rows` fits no such model.

    BitDance appends `<|res_1|>` … `<|res_256|>` and its query tokens to Qwen3's tokens, so `rows`, the size of the
    language model's embedding table, gives the number of queries.
    """
    queries = rows - QWEN_TOKENS - RES_TOKENS
    if queries + 1 not in (16, 64):
        return None
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    own = [f"<|res_{k}|>" for k in range(1, RES_TOKENS + 1)] + [f"<|query_{i}|>" for i in range(1, queries + 1)]
    special = QWEN_SPECIAL | {token: QWEN_TOKENS + i for i, token in enumerate(own)}
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [
        {"id": i, "content": token, "special": True, "normalized": False, "single_word": False, "lstrip": False,
         "rstrip": False}
        for token, i in special.items()
    ]  # fmt: skip
    return data
