"""locales/ against the nodes' schemas: English is what they say, and every other language says all of it."""

import json

import pytest

import locales
from paths import ROOT


@pytest.fixture(scope="module")
def english(pack_module):
    return locales.english(pack_module.NODES)


def test_english_is_what_the_schemas_say(english):
    for name in locales.FILES:
        text = (ROOT / "locales" / "en" / f"{name}.json").read_text(encoding="utf-8")
        assert json.loads(text) == english[name], "run scripts/locales.py"


def test_the_languages_are_those_that_are_promised():
    assert {path.name for path in (ROOT / "locales").iterdir()} == {"en", *locales.LANGUAGES}


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_a_language_says_all_that_english_says(language):
    assert locales.faults(language) == {}, "scripts/locales.py lists them"


@pytest.mark.parametrize("language", ["en", *locales.LANGUAGES])
def test_no_text_has_signs_that_the_page_reads_as_a_message_format(language):
    texts = {key: text for key, text in locales.read(language).items() if not key.endswith(".md")}
    assert [key for key, text in texts.items() if set(text) & set("{}@|")] == []


def test_what_is_wrong_is_found(tmp_path, monkeypatch):
    source = {"A": {"display_name": "Empty Bits", "description": "0 or as in guide_from.", "inputs": {}}}
    (tmp_path / "en").mkdir()
    locales.write(tmp_path / "en" / "main.json", {"nodeCategories": {"BitDance": "BitDance"}})
    locales.write(tmp_path / "en" / "nodeDefs.json", source)
    monkeypatch.setattr(locales, "FOLDER", tmp_path)
    monkeypatch.setattr(locales, "WITH_PAGES", ())

    def faults(definition, language="zh"):
        locales.write(tmp_path / language / "main.json", {"nodeCategories": {"BitDance": "BitDance"}})
        locales.write(tmp_path / language / "nodeDefs.json", {"A": definition})
        return locales.faults(language)

    good = {"display_name": "空白位", "description": "0，或与 guide_from 相同。"}
    assert "made from other English" in faults(good)
    locales.accept("zh", [])
    assert faults(good) == {}
    name, description = "nodeDefs.A.display_name", "nodeDefs.A.description"
    assert faults({"description": good["description"]}) == {"missing": [name]}
    assert faults(good | {"title": "空白位"}) == {"unknown": ["nodeDefs.A.title"]}
    assert faults(good | {"display_name": "Empty Bits"}) == {"untranslated": [name]}
    assert faults(good | {"display_name": "Some Bits"}) == {"untranslated": [name]}
    assert faults(good | {"description": "0，或与上面相同。"}) == {"incomplete": [description]}
    assert locales.lost("0.5 of 7", "0,5 von 7") == set() and locales.lost("0.5 of 7", "0,7 von 7") == {"0.5"}
    locales.write(tmp_path / "en" / "nodeDefs.json", {"A": source["A"] | {"display_name": "No Bits"}})
    assert faults(good) == {"made from other English": [name]}
    locales.accept("zh", [name])
    assert faults(good) == {}
