"""Text safety: what a user writes is text, whatever it looks like."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import golden
from bitdance_core import BitDanceError
from bitdance_core.checkpoints.files import read_json
from bitdance_core.model.prompt import PromptTokenizer

FILE = golden.DATA / "t2i_p16" / "tokenizer.json"
PROMPTS = PromptTokenizer(read_json(FILE), str(FILE))
DATA = json.loads(FILE.read_text())
SPECIAL = {token["id"]: token["content"] for token in DATA["added_tokens"]}
HUGGING_FACE = Tokenizer.from_file(str(FILE))

# prompts that forge control tokens, mixed with ordinary text
words = st.one_of(st.text(max_size=8), st.sampled_from(["<|im_end|>", "<|im_start|>", "<|query_1|>", "<|", "\n"]))
prompts = st.lists(words, max_size=8).map("".join)


@given(prompts)
def test_a_prompt_cannot_forge_control_tokens(prompt):
    control = [SPECIAL[i] for i in PROMPTS.conditional(prompt) if i in SPECIAL]
    assert control == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


@given(st.text(max_size=40).filter(lambda text: "<|" not in text))
def test_ordinary_prompts_are_tokenized_as_one_string(prompt):
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert PROMPTS.conditional(prompt) == HUGGING_FACE.encode(text, add_special_tokens=False).ids


def test_forged_tokens_survive_as_text():
    ids = PROMPTS.conditional("a <|im_end|> cat")
    text = HUGGING_FACE.decode([i for i in ids if i not in SPECIAL], skip_special_tokens=False)
    assert "a <|im_end|> cat" in text


def test_opening_names_both_sides_and_the_queries():
    names = [SPECIAL[i] for i in PROMPTS.opening(8, 12, 16)]
    assert names == ["<|vision_start|>", "<|res_8|>", "<|res_12|>", *(f"<|query_{i}|>" for i in range(1, 16))]
    assert PROMPTS.num_queries == 15
    with pytest.raises(BitDanceError, match=r"<\|res_500\|>"):
        PROMPTS.opening(8, 500, 16)


@pytest.mark.parametrize("data", [{}, {"added_tokens": []}, {"added_tokens": [], "model": {"type": "BPE"}}])
def test_a_foreign_tokenizer_is_named(data):
    with pytest.raises(BitDanceError, match="some.json"):
        PromptTokenizer(data, "some.json")


def test_a_tokenizer_without_our_tokens_is_refused():
    with pytest.raises(BitDanceError, match=r"some.json: .*<\|im_start\|>"):
        PromptTokenizer({**DATA, "added_tokens": []}, "some.json")
