"""Text safety: what a user writes is text, whatever it looks like."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

import golden
from bitdance_core import BitDanceError
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.convert import convert
from bitdance_core.checkpoints.files import read_json
from bitdance_core.errors import is_panic
from bitdance_core.model.prompt import MAX_BYTES, MAX_TOKENS, QWEN_WORDS, PromptTokenizer
from bitdance_core.model.text_config import POSITIONS

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


@pytest.mark.parametrize(
    "change",
    [
        {"continuing_subword_prefix": "##########"},  # panics
        {"continuing_subword_prefix": "x", "vocab": {"é": 0, "a": 1, "aé": 2}, "merges": [["a", "é"]]},  # aborts
        {"type": "WordLevel"},
        {"vocab": {"a": 2**40}},
    ],
)
def test_a_hostile_tokenizer_is_named(change):
    with pytest.raises(BitDanceError, match="some.json: not a tokenizer file"):
        PromptTokenizer({**DATA, "model": {**DATA["model"], **change}}, "some.json")


def panic():
    """Make the tokenizers library panic: Qwen's regular expression on ten million spaces."""
    pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated").pre_tokenize_str(" " * 10**7)


class Breaking:
    """A model of tokens that breaks in the given way."""

    def __init__(self, action):
        self.action = action

    def encode(self, *args, **kwargs):
        self.action()


def test_a_panic_of_the_library_is_an_error_about_the_prompt():
    with pytest.raises(BaseException) as caught:
        panic()
    assert is_panic(caught.value) and not isinstance(caught.value, Exception)  # the library still does it
    prompts = PromptTokenizer(DATA, "some.json")
    prompts._text = Breaking(panic)
    with pytest.raises(BitDanceError, match="the prompt cannot be tokenized .*retry-limit") as refused:
        prompts.conditional("a cat")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_tokenizing_stays_an_interrupt(kind):
    def interrupt():
        raise kind

    prompts = PromptTokenizer(DATA, "some.json")
    prompts._text = Breaking(interrupt)
    with pytest.raises(kind):
        prompts.conditional("a cat")


@pytest.mark.parametrize("text", [" " * 10**7, "é" * (MAX_BYTES // 2 + 1), "\udcff" * 10**6, "\n" * (MAX_BYTES + 1)])
def test_a_huge_prompt_is_refused_before_it_is_tokenized(text):
    prompts = PromptTokenizer(DATA, "some.json")
    prompts._text = Breaking(lambda: pytest.fail("it was tokenized"))
    with pytest.raises(BitDanceError, match="the prompt is too long: it has .* bytes, at most 262,144 are read"):
        prompts.conditional(text)


def test_a_prompt_of_more_tokens_than_positions_is_refused():
    assert len(PROMPTS.conditional("~" * (MAX_TOKENS - 50))) > MAX_TOKENS - 50
    with pytest.raises(BitDanceError, match="the prompt is too long: it has .* tokens, at most 40,960 are read"):
        PROMPTS.conditional("~" * (MAX_TOKENS + 1))


def test_the_models_own_positions_bound_a_prompt(tmp_path):
    """Of the golden model, 4096; of a file without a configuration, Qwen3's."""
    folder = FILE.parent
    assert read_json(folder / "config.json")["max_position_embeddings"] == 4096
    prompts = read_checkpoint(folder).prompts
    assert len(prompts.conditional("~" * 4000)) > 4000
    with pytest.raises(BitDanceError, match="it has 4,... tokens, at most 4,096 are read"):
        prompts.conditional("~" * 4096)
    (single,) = convert(folder, tmp_path / "x.safetensors", "single")
    assert read_checkpoint(single).prompts.max_tokens == 4096, "`convert` keeps it"
    for value, expected in ((None, MAX_TOKENS), ("many", None), (0, None), (-5, None)):
        copy = tmp_path / repr(value)
        shutil.copytree(folder, copy)
        (copy / "config.json").write_text(json.dumps(read_json(folder / "config.json") | {POSITIONS: value}))
        if expected:
            assert read_checkpoint(copy).prompts.max_tokens == expected
        else:
            with pytest.raises(BitDanceError, match="config.json: 'max_position_embeddings' must be a whole number"):
                read_checkpoint(copy)
