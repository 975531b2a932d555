"""Words on which a small model was not trained: said once, never an error, by the model's own list."""

import json
import shutil
import warnings

import numpy as np
import pytest

import golden
from batches import batch, write_lines
from bitdance_core import BitDanceError, BitDancePipeline
from bitdance_core.checkpoints.checkpoint import read_text_checkpoint
from bitdance_core.checkpoints.convert import convert
from bitdance_core.checkpoints.locate import ASSETS, locate
from bitdance_core.cli import main
from bitdance_core.model.vocabulary import Vocabulary, unseen_note
from bitdance_core.pipeline.text import UnseenWords
from builtin.pictures import ALL_PICTURES, read
from builtin.scenes.compose import random_scene
from loras import write_lora

KNOWN = Vocabulary(frozenset("a large red star on blue background".split()), "stars")
PROMPT = "a large red star on a blue background"


@pytest.mark.parametrize(
    "prompt, unseen",
    [
        (PROMPT, []),
        ("A LARGE, Red star; on (a) \u201cblue\u201d background!", []),
        ("", []),
        ("a dragon's star, 3 dragons and A DRAGON's star", ["dragon's", "3", "dragons", "and"]),
        ("\u8d64\u3044\u661f, a star", ["\u8d64\u3044\u661f"]),
        ("The red-star on an blue_background", []),  # articles and signs
        ("a red-dragon", ["red-dragon"]),
    ],
)
def test_unseen_words(prompt, unseen):
    assert KNOWN.unseen([prompt]) == unseen
    note = unseen_note(KNOWN, [prompt])
    assert (note is None) == (not unseen)
    if note:
        assert all(f'"{word}"' in note for word in unseen) and note.endswith("it draws stars")
    assert unseen_note(None, [prompt]) is None  # a model of any words


COLOURS = Vocabulary(frozenset("a fox car red blue on background and".split()), "foxes", {"red": {"background"}})


@pytest.mark.parametrize(
    "prompt, unseen",
    [
        ("a fox on a red background", []),
        ("a Red  Fox on a blue background", ["Red Fox"]),
        ("a red fox, a red car and a red fox", ["red fox", "red car"]),
        ("on red, a fox; a fox on red", []),  # a sign, and the end
        ("a red the fox", []),
        ("a red dragon", []),  # the dragon itself is unseen
        ("a blue fox", []),
    ],
)
def test_unseen_pairs(prompt, unseen):
    assert COLOURS.unseen_pairs([prompt]) == unseen
    assert all(f'"{pair}"' in unseen_note(COLOURS, [prompt]) for pair in unseen)
    assert COLOURS.with_texts([prompt]).unseen_pairs([prompt]) == []
    assert COLOURS.unseen_pairs([prompt], ["a red fox", "a car"]) == []  # a LoRA's words


def test_a_vocabulary_is_written_as_it_is_read():
    assert Vocabulary.from_dict(COLOURS.to_dict(), "x") == COLOURS
    more = COLOURS.with_texts(["a Red dragon on a red fox"])
    assert more.words - COLOURS.words == {"dragon"} and more.followed_by["red"] == {"background", "dragon", "fox"}


def test_scenes_says_of_a_things_colour_that_it_was_never_taught():
    pipe = BitDancePipeline.from_pretrained("scenes")
    rng = np.random.default_rng(3)
    assert pipe.unseen_note([random_scene(rng).caption for _ in range(2000)]) is None
    with pytest.warns(UnseenWords, match='not trained on "red car"; it draws 89 things in their own colours'):
        pipe.generate("a red car on grass", steps=1)


def test_words_of_a_lora_are_not_unseen():
    assert unseen_note(KNOWN, ["a red dragon"], ["", "a dragon on"]) is None
    assert '"dragon"' in unseen_note(KNOWN, ["a red dragon"], ["a diamond"])


def test_the_built_in_model_knows_its_training_prompts():
    pipe = BitDancePipeline.from_pretrained("builtin")
    assert pipe.unseen_note([picture.prompt for picture in ALL_PICTURES]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = pipe.generate("A Large RED Star on a Blue Background").images
    assert read(images[0]).prompt == PROMPT  # capitals are small letters to it
    with pytest.warns(UnseenWords, match='not trained on "dragon"; it draws .* such as'):
        pipe.generate("a dragon", steps=1)
    with pytest.warns(UnseenWords, match='"grass"'):
        pipe.generate(PROMPT, steps=1, negative_prompt="grass")


def test_the_words_go_along_into_every_layout(tmp_path):
    own = read_text_checkpoint(ASSETS / "builtin").prompts.vocabulary
    for format, path in (("official", tmp_path / "a"), ("single", tmp_path / "b.safetensors")):
        convert(locate("builtin"), path, format=format)
        assert own == read_text_checkpoint(path).prompts.vocabulary is not None
    assert read_text_checkpoint(golden.DATA / "t2i_p16").prompts.vocabulary is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"words": "red"}, "'words' must be a list"),
        ({"words": [1]}, "'words' must be a list of words"),
        ({"draws": None}, "'draws' must be text"),
        ({"followed_by": ["red"]}, "'followed_by' must be an object"),
        ({"followed_by": {"red": "star"}}, "'followed_by.red' must be a list"),
        ({"followed_by": {"red": [None]}}, "'followed_by.red' must be a list of words"),
    ],
)
def test_damaged_words_are_refused(tmp_path, change, message):
    folder = shutil.copytree(ASSETS / "builtin", tmp_path / "model")
    file = folder / "bitdance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BitDanceError, match=message) as refusal:
        read_text_checkpoint(folder)
    assert str(file) in str(refusal.value)


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    assert main(["generate", "a dragon", "--steps", "1", "-o", str(tmp_path / "x.png")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bitdance:")]
    assert len(lines) == 1 and '"dragon"' in lines[0] and ".py" not in lines[0]


def test_the_words_of_a_file_given_by_lora_are_taught(tmp_path, capsys):
    write_lora(BitDancePipeline.from_pretrained("builtin").model.head, tmp_path / "x.safetensors", words="a dragon on")
    command = ["generate", "a dragon", "--steps", "1", "-o", str(tmp_path / "x.png")]
    assert main([*command, "--lora", str(tmp_path / "x.safetensors")]) == 0
    assert "not trained" not in capsys.readouterr().err


def test_a_loras_words_are_known_when_its_file_is_gone(tmp_path):
    pipe, file = BitDancePipeline.from_pretrained("builtin"), tmp_path / "x.safetensors"
    write_lora(pipe.model.head, file, words="a dragon on")
    pipe.add_lora(file)
    file.unlink()
    assert pipe.unseen_note(["a red dragon"]) is None and '"cow"' in pipe.unseen_note(["a red cow"])


def test_a_batch_says_it_once(tmp_path, capsys):
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "a dragon"}, {"prompt": "a red dragon"}, {"prompt": "a cow"})
    assert batch(prompts, tmp_path / "out", "--steps", 1) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "not trained" in line]
    assert len(lines) == 1 and '"dragon", "cow"' in lines[0]
