"""Write locales/en from the nodes' schemas, and say what other languages lack: `.venv/bin/python scripts/locales.py`.

After a translation was made or corrected, `scripts/locales.py --accept zh [KEY ...]` notes which English it was made
from (of all texts of the language, or of those named), so that a later change of the English shows.
"""

import argparse
import asyncio
import hashlib
import importlib
import json
import re
import sys
from pathlib import Path

from environment import ROOT, ensure_comfyui
from in_process import import_pack

FOLDER = ROOT / "locales"
FILES = ("main", "nodeDefs")  # of those that ComfyUI reads
MADE_FROM = "made_from.json"  # beside them: text -> the English that it was made from
LANGUAGES = ("zh", "zh-TW", "ja", "ko", "fr", "es", "de")
WITH_PAGES = ("zh", "ja")  # have help pages and a README too
ALIKE = {"BitDance", "LoRA", "cfg", "psnr", "ssim", "vae", "clip", "lora"}  # names, the same in every language
# words that a language shares with English
SHARED: dict[str, set[str]] = {
    "fr": {"bits", "image", "images", "latent", "mode", "options", "position", "source"},
    "es": {"bits"},
}
SIGNS = {"zh": "\u4e00-\u9fff", "zh-TW": "\u4e00-\u9fff", "ja": "\u3040-\u30ff\u4e00-\u9fff", "ko": "\uac00-\ud7af"}
# what a translation must keep
KEPT = re.compile(r'`[^`]+`|"[^"]+"|\d+(?:[.x]\d+)*|\w+_\w+', re.ASCII)
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def english(nodes: list) -> dict[str, dict]:
    """Return locales/en from the schemas of `nodes`: a file's name -> its content, with the keys of ComfyUI's page."""
    schemas = [node.define_schema() for node in nodes]
    categories = {part: part for schema in schemas for part in schema.category.split("/")}
    return {
        "main": {"nodeCategories": categories},
        "nodeDefs": {schema.node_id: _definition(schema) for schema in schemas},
    }


def _definition(schema) -> dict:
    inputs = {declared.id.replace(".", "_"): _texts(declared, declared.id) for declared in schema.inputs}
    if any(getattr(declared, "control_after_generate", None) for declared in schema.inputs):
        inputs["control_after_generate"] = {"name": "control after generate"}
    # an output without a name of its own is called after its type, which the page translates itself
    outputs = {str(place): _texts(declared, declared.id) for place, declared in enumerate(schema.outputs)}
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        "outputs": outputs,
    }


def _texts(declared, name: str | None) -> dict[str, str]:
    texts = {"name": declared.display_name or name, "tooltip": declared.tooltip}
    return {kind: text for kind, text in texts.items() if text}


def flatten(tree: dict, prefix: str = "") -> dict[str, str]:
    """Join the keys of a tree of texts with dots."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read(language: str) -> dict[str, str]:
    """Return a language's texts: of its files, under dotted keys, and its pages, under the English page's path."""
    found: dict[str, str] = {}
    for name in FILES:
        content = json.loads((FOLDER / language / f"{name}.json").read_text(encoding="utf-8"))
        found |= flatten(content if name == "main" else {name: content})
    return found | _pages(language)


def page_path(page: Path, language: str) -> Path:
    """Return where the page looks for a help page in another language, and where README.md has its translation."""
    if language == "en":
        return page
    return page.with_suffix(f".{language}.md") if page.parent == ROOT else page.with_suffix("") / f"{language}.md"


def _pages(language: str) -> dict[str, str]:
    if language not in ("en", *WITH_PAGES):
        return {}
    pages = [ROOT / "README.md", *sorted((ROOT / "web" / "docs").glob("*.md"))]
    paths = {page.relative_to(ROOT).as_posix(): page_path(page, language) for page in pages}
    return {key: path.read_text(encoding="utf-8") for key, path in paths.items() if path.is_file()}


def faults(language: str) -> dict[str, list[str]]:
    """Return the keys of what is wrong with a language, by kind; empty if nothing is."""
    source, texts, made_from = read("en"), read(language), _made_from(language)
    if language not in WITH_PAGES:
        source = {key: text for key, text in source.items() if not key.endswith(".md")}
    both = [key for key in source if key in texts]
    found = {
        "missing": [key for key in source if not texts.get(key, "").strip()],
        "unknown": [key for key in texts if key not in source],
        "untranslated": [key for key in both if not is_translated(source[key], texts[key], language)],
        "incomplete": [k for k in both if not k.endswith(".name") and lost(source[k], texts[k])],
        "made from other English": [key for key in both if made_from.get(key) != _digest(source[key])],
    }
    return {kind: keys for kind, keys in found.items() if keys}


def is_translated(source: str, text: str, language: str) -> bool:
    """Return whether a text is in the language: unlike the English, and in the language's own script."""
    if source in ALIKE | SHARED.get(language, set()):
        return True
    return text != source and (language not in SIGNS or re.search(f"[{SIGNS[language]}]", text) is not None)


def lost(source: str, text: str) -> set[str]:
    """Return the numbers, names with underscores, `code` and "messages" that a translation lacks."""
    text = re.sub(r"(?<=\d),(?=\d)", ".", text)  # French, German and Spanish write 0,5
    kept, its = ({" ".join(part.split()) for part in KEPT.findall(FENCE.sub("", t))} for t in (source, text))
    return {part for part in kept - its if part[0] != '"' or " " in part}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _made_from(language: str) -> dict[str, str]:
    path = FOLDER / language / MADE_FROM
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def accept(language: str, keys: list[str]) -> None:
    """Note that these texts of a language, or all, say what today's English says."""
    source, texts, noted = read("en"), read(language), _made_from(language)
    if unknown := [key for key in keys if key not in source or key not in texts]:
        raise SystemExit(f"{language} has no texts {', '.join(unknown)}")
    noted |= {key: _digest(source[key]) for key in keys or texts if key in source}
    write(FOLDER / language / MADE_FROM, {key: noted[key] for key in source if key in texts and key in noted})


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", nargs="+", metavar=("LANGUAGE", "KEY"))
    arguments = parser.parse_args()
    import_pack(ensure_comfyui())
    extension = importlib.import_module("pack.nodes").BitDanceExtension()
    asyncio.run(extension.on_load())
    for name, content in english(asyncio.run(extension.get_node_list())).items():
        write(FOLDER / "en" / f"{name}.json", content)
    if arguments.accept:
        accept(arguments.accept[0], arguments.accept[1:])
    found = {language: faults(language) for language in LANGUAGES if (FOLDER / language).is_dir()}
    for language, kinds in found.items():
        for kind, keys in kinds.items():
            print(f"{language}: {kind}:", *keys, sep="\n    ")
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
