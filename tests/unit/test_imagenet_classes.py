"""ImageNet's classes by name and by number."""

import tomllib

import pytest

from bitdance_core.errors import BitDanceError
from bitdance_core.model.class_names import class_index, class_labels, class_names, parse_classes
from paths import ROOT


def test_the_names_are_torchvisions():
    from torchvision.models import ResNet50_Weights

    theirs = ResNet50_Weights.DEFAULT.meta["categories"]
    changed = [(their, name) for name, their in zip(class_names(), theirs, strict=True) if name != their]
    assert changed == [("Cardigan", "Cardigan (dog)"), ("cardigan", "cardigan (garment)")]


def test_names_are_unique_and_can_be_separated():
    names = class_names()
    assert len(names) == len({name.casefold() for name in names}) == 1000
    assert all(name == " ".join(name.split()) and not set(name) & set(",;:") for name in names)


def test_every_class_is_found_by_each_of_its_writings():
    for number, (name, label) in enumerate(zip(class_names(), class_labels(), strict=True)):
        writings = (number, str(number), name, name.upper(), f"  {name}\n", label, label.replace(": ", ":"))
        assert {class_index(writing) for writing in writings} == {number}
    assert class_labels()[207] == "207: golden retriever"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("golden retreiver", "no class 'golden retreiver'; close names: golden retriever, "),
        ("cardigan", r"close names: Cardigan \(dog\), cardigan \(garment\)"),
        ("shark", "close names: great white shark, tiger shark"),
        ("xyzzy", "'xyzzy'.* name, .* 0 to 999"),
        ("207: goldfish", "two classes: goldfish .* 1, .*207"),
        ("1000", "from 0 to 999, found 1000"),
        ("-1", "from 0 to 999, found -1"),
        ("", "there is no class ''"),
        (1000, "from 0 to 999, found 1000"),
        (True, "from 0 to 999, found True"),
        (2.0, "from 0 to 999, found 2.0"),
        (None, "from 0 to 999, found None"),
    ],
)
def test_what_is_no_class_is_said(entry, words):
    with pytest.raises(BitDanceError, match=words) as error:
        class_index(entry)
    assert str(error.value).count(",") <= 4  # at most three names


def test_lists_of_classes():
    assert parse_classes("golden retriever, 1; 980: volcano\n\n ,macaw;") == [207, 1, 980, 88]
    assert parse_classes(" \n") == []
    with pytest.raises(BitDanceError, match="no class 'gold fish'; close names: goldfish"):
        parse_classes("1, gold fish")


def test_the_list_is_in_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "model/class_names.txt" in data["bitdance_core"]
