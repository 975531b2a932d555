"""The trainer of scenes: captions mean what they say, runs resume, and the reader judges rightly. Needs no drawings."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from bitdance_core import BitDancePipeline
from bitdance_core.model.text_model import TextReader
from bitdance_core.model.tokenizer_config import AutoencoderConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder
from builtin.scenes import cache, edits, grow, loop, style, train_model, train_tokenizer
from builtin.scenes import model as scenes_model
from builtin.scenes.captions import Meaning, Part, read_caption
from builtin.scenes.compose import Composer, Scene, place, random_scene
from builtin.scenes.grounds import ALL_GROUNDS, COLOURS, GRADIENTS, PLACES, PLAIN, Ground
from builtin.scenes.muon import orthogonalize
from builtin.scenes.read_back import Reader
from builtin.scenes.score import holds, is_right, judge, score_task, summary, task_scene
from builtin.scenes.things import BY_NAME, HIDDEN_ON, THINGS, is_kept_out

TINY = AutoencoderConfig(channels=32, channel_multipliers=(1, 1), num_res_blocks=1, bits=8, gan_decoder=False)


@pytest.fixture(scope="module")
def art():
    """A made-up drawing of each thing: three coloured shapes."""
    rng, drawings = np.random.default_rng(0), {}
    for thing in THINGS:
        drawing = Image.new("RGBA", (256, 256))
        pen = ImageDraw.Draw(drawing)
        pen.ellipse((8, 8, 248, 248), fill=(*rng.integers(0, 256, 3).tolist(), 255))
        for _ in range(4):
            x, y, side = rng.integers(0, 150), rng.integers(0, 150), rng.integers(60, 106)
            shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
            shape((x, y, x + side, y + side), fill=(*rng.integers(0, 256, 3).tolist(), 255))
        drawings[thing.name] = drawing
    return drawings


def random_scenes(count, **options):
    rng = np.random.default_rng(7)
    return [random_scene(rng, **options) for _ in range(count)]


# -- captions and scenes -----------------------------------------------------------------------------------------------


def test_captions_read_back_as_what_was_meant():
    for scene in random_scenes(2000):
        said, meant = read_caption(scene.caption), scene.meaning
        assert [(p.name, p.count) for p in said.parts] == [(p.name, p.count) for p in meant.parts], scene.caption
        assert said.relation == meant.relation, scene.caption
        assert said.ground in (None, meant.ground), scene.caption
        assert said.parts[0].size in (None, meant.parts[0].size), scene.caption


@pytest.mark.parametrize("caption", ["", "a fox on", "a wug on a red background", "a fox beside a fox beside a fox"])
def test_other_words_are_no_captions(caption):
    with pytest.raises(ValueError, match="not a caption"):
        read_caption(caption)


def test_a_caption_in_ones_own_words():
    meaning = read_caption("a photo of a big puppy next to an automobile in a meadow")
    assert meaning == Meaning((Part("dog", 1, "large"), Part("car")), "beside", Ground("grass"))
    assert read_caption("at night, four bunnies") == Meaning((Part("rabbit", 4),), None, Ground("night"))


def test_words_belong_to_one_thing():
    words = [word for thing in THINGS for word, _ in thing.words]
    assert len(words) == len(set(words)) and len(BY_NAME) == len(THINGS)


def test_pairs_kept_out_never_come_in_training():
    pairs = [{p.name for p in s.meaning.parts} for s in random_scenes(3000) if len(s.meaning.parts) == 2]
    assert len(pairs) > 1000 and not any(is_kept_out(*pair) for pair in pairs)
    unseen = [[p.name for p in s.meaning.parts] for s in random_scenes(100, kind="two", unseen=True)]
    assert all(is_kept_out(*pair) for pair in unseen)
    names = [thing.name for thing in THINGS]
    share = np.mean([is_kept_out(a, b) for a in names for b in names if a != b])
    assert 0.08 < share < 0.12
    assert all(is_kept_out(a, b) == is_kept_out(b, a) for a in names[:20] for b in names[:20] if a != b)


def test_nothing_is_shown_that_can_hardly_be_seen():
    grounds = [(s.meaning.ground, {part.name for part in s.meaning.parts}) for s in random_scenes(3000)]
    assert any(ground == Ground("yellow") for ground, _ in grounds)
    assert not any(names & HIDDEN_ON.get(colour, set()) for g, names in grounds for colour in (g.top, g.bottom))
    assert set().union(*HIDDEN_ON.values()) < set(BY_NAME) and HIDDEN_ON.keys() < {*COLOURS, *PLACES}


def test_a_seed_is_a_scene_and_a_picture(art):
    once, again = random_scenes(20), random_scenes(20)
    assert once == again
    for scene in once[:5]:
        pixels = Composer(art).paint(scene, 64, 96)
        assert pixels.shape == (64, 96, 3) and pixels.dtype == np.uint8
        assert (pixels == Composer(art).paint(scene, 64, 96)).all()


def test_things_lie_inside_the_picture(art):
    for scene in random_scenes(500):
        for thing in scene.placed:
            for at, offset in ((thing.x, thing.dx), (thing.y, thing.dy)):
                assert (
                    thing.side / 2 <= round(at * 128) + offset + 1 and round(at * 128) + offset + thing.side / 2 <= 129
                )


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (32, 288), (384, 96), (2, 3, 16, 40)])
def test_muons_update_is_nearly_orthogonal(shape):
    update = orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(update)
    assert update.shape == shape and 0.3 < values.min() and values.max() < 1.3


def test_a_larger_tokenizer_computes_what_the_smaller_one_did():
    torch.manual_seed(0)
    small = BinaryAutoencoder(TINY, device="cpu")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    weights, config = grow.more_bits(small.state_dict(), TINY, 12)
    weights, config = grow.wider(weights, config, 32, (1, 2))
    weights, config = grow.wider(weights, config, 64, (1, 2))
    large = BinaryAutoencoder(config, device="cpu")
    large.load_state_dict(weights)
    bits, more = small.encode(pixels), large.encode(pixels)
    assert torch.equal(more[:, :8], bits)
    torch.testing.assert_close(large.decode(more), small.decode(bits), atol=1e-4, rtol=1e-3)


def test_a_finer_tokenizer_draws_nearly_the_same_picture_larger():
    torch.manual_seed(0)
    small = BinaryAutoencoder(TINY, device="cpu")
    weights, config = grow.finer(small.state_dict(), TINY)
    large = BinaryAutoencoder(config, device="cpu")
    large.load_state_dict(weights)
    # as smooth as a picture is, so that halving it loses little
    smooth = nn.functional.interpolate(torch.rand(1, 3, 4, 4) * 2 - 1, size=(32, 32), mode="bicubic")
    small_bits, bits = small.encode(nn.functional.avg_pool2d(smooth, 2)), large.encode(smooth)
    assert bits.shape == small_bits.shape and (bits == small_bits).float().mean() > 0.85


@torch.inference_mode(False)
@pytest.mark.parametrize("is_matrix", [lambda name, p: p.ndim == 2, lambda name, p: False], ids=["muon", "adamw"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, is_matrix):
    def start(path, stop_at=None):
        def loss_of_step(step):
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            return module(x).square().mean(), {}

        torch.manual_seed(0)
        module = nn.Linear(4, 4)
        plan = loop.Plan(6, 1e-2, 1e-2, warmup=2, decay=2, save_seconds=-1, log_every=2)
        loop.train(path, module, plan, loss_of_step, is_matrix)
        return torch.load(path, weights_only=True)

    whole = start(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "stopped.pt", stop_at=4)
    resumed = start(tmp_path / "stopped.pt")
    for part in ("module", "ema"):
        assert all(torch.equal(whole[part][key], resumed[part][key]) for key in whole[part])


@torch.inference_mode(False)
def test_the_tokenizers_loss_teaches_both_halves(art):
    torch.manual_seed(0)
    tiny = BinaryAutoencoder(TINY, loop.Bf16Operations, device="cpu")
    pixels = (
        torch.from_numpy(Composer(art).paint(random_scenes(1)[0], 32, 32).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    )
    flips = torch.zeros(1, 8, 16, 16, dtype=torch.bool)
    loss, figures = train_tokenizer.tokenizer_loss(tiny.encoder, tiny.decoder, pixels, flips, 3.0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny.parameters())
    assert 0 < figures["psnr"] < 20 and 0 < figures["entropy"] <= 1


@pytest.fixture
def prepared(tmp_path, art):
    """A cache of 64 scenes, a tokenizer's folder, a prompt tokenizer and a configuration of a tiny model."""
    torch.manual_seed(0)
    autoencoder = BinaryAutoencoder(TINY, device="cpu")
    composer = Composer(art)
    cache.write_cache(tmp_path / "scenes-0.npz", autoencoder.encoder, composer, 16, 64, 0)
    prompts = scenes_model.prompt_tokenizer(tmp_path / "tokenizer.json")
    config = scenes_model.model_config(prompts, TINY, side=16, width=64, layers=1, head=128, depth=1)
    return SimpleNamespace(
        cache=cache.Cache(tmp_path), prompts=prompts, config=config, autoencoder=autoencoder, folder=tmp_path
    )


def test_cached_bits_are_those_of_the_picture(prepared, art):
    grid, captions, bits = prepared.cache.batch(4, np.random.default_rng(0))
    assert set(bits.unique().tolist()) == {-1.0, 1.0} and bits.shape[1:] == (8, *grid) and len(captions) == len(bits)
    rng = loop.step_rng(0, cache.STAGE, 0)[0]
    size = cache.sizes_of(16)[rng.choice(3, p=cache.SHARES)]
    scene = random_scene(rng)
    pixels = torch.from_numpy(Composer(art).paint(scene, *size).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    grid = (size[0] // 2, size[1] // 2)
    assert prepared.cache.captions[grid][0] == scene.caption
    stored = cache.unpack(torch.from_numpy(prepared.cache.packed[grid][:1]), (8, *grid))
    # a batch of one sums in another order than a batch of many
    assert (stored == (prepared.autoencoder.encode(pixels) > 0)).float().mean() > 0.99


@torch.inference_mode(False)
def test_a_tiny_model_resumes_to_the_same_weights_and_draws(prepared):
    settings = train_model.Settings(batch=2)

    def start(name, steps):
        run = prepared.folder / name
        run.mkdir(exist_ok=True)
        plan = loop.Plan(steps, 1e-3, 1e-2, warmup=2, log_every=1)
        train_model.train_model(run, prepared.cache, prepared.config, prepared.prompts, settings, plan, operations=nn)
        return torch.load(run / "state.pt", weights_only=True)["ema"]

    whole = start("whole", 4)
    start("stopped", 2)
    resumed = start("stopped", 4)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)

    folder = prepared.folder / "model"
    weights = prepared.autoencoder.state_dict()
    scenes_model.write_folder(folder, prepared.config, prepared.folder / "tokenizer.json", whole, weights)
    pipe = BitDancePipeline.from_pretrained(folder, device="cpu")
    assert pipe.generate("a fox beside a mushroom", steps=1).images[0].size == (16, 16)
    again = train_model.load_start(folder)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], whole[key].half().float()) for key in whole)


def test_training_sees_what_sampling_sees(prepared):
    """One pass over a whole picture gives the conditioning that the engine computes patch by patch."""
    settings = train_model.Settings(batch=3, unconditional=0.4)
    batch = train_model.make_batch(prepared.cache, prepared.prompts, settings, 0)
    model = train_model.BitDance(prepared.config, device="cpu")
    grid = batch.grid
    assert batch.padding.max() > 0
    at_once = train_model.hidden_states(model, batch, grid.positions(64))
    rows = [row[pad:].tolist() for row, pad in zip(batch.ids, batch.padding)]
    context = TextReader(model, rows, grid, grid.num_patches, "cpu", torch.float32)
    hidden = [context.prefill()]
    for i in range(grid.num_patches - 1):
        hidden.append(context.read(batch.context[:, i : i + 1], i))
    torch.testing.assert_close(at_once, torch.stack(hidden, dim=1) + context.positions, atol=1e-4, rtol=1e-4)


def test_a_word_is_a_token(prepared):
    for scene in random_scenes(200):
        ids = prepared.prompts.conditional(scene.caption)
        assert len(ids) == len(scene.caption.replace(",", " ,").split()) + 6, scene.caption


# -- the reader --------------------------------------------------------------------------------------------------------

MEANINGS = [
    Meaning((Part("fox", 1, "large"),), None, Ground("red")),
    Meaning((Part("house", 1, "small"),), None, Ground("night")),
    Meaning((Part("fox"), Part("mushroom")), "left of", Ground("grass")),
    Meaning((Part("cat"), Part("house")), "below", Ground("white", "blue")),
    Meaning((Part("bus", 3),), None, Ground("sea")),
    Meaning((Part("star", 4),), None, Ground("black")),
    Meaning((Part("pear", 2), Part("key", 1)), None, Ground("pink")),
]


@pytest.fixture(scope="module")
def reader(art):
    names = {part.name for meaning in MEANINGS for part in meaning.parts} | {"dog", "tree", "owl"}
    return Reader({name: art[name] for name in names})


@pytest.mark.parametrize("meaning", MEANINGS, ids=lambda m: "-".join(p.name for p in m.parts))
@pytest.mark.parametrize("size", [(128, 128), (128, 192)])
def test_the_reader_finds_what_was_drawn(art, reader, meaning, size):
    scene = Scene("", meaning, place(meaning, np.random.default_rng(3)))
    noise = np.random.default_rng(0).normal(0, 12, (*size, 3))  # as a tokenizer's mistakes
    pixels = np.clip(Composer(art).paint(scene, *size) + noise, 0, 255).astype(np.uint8)
    right = judge(meaning, meaning, reader.read(pixels))
    assert all(right.values()), right


def test_the_reader_says_when_another_thing_was_drawn(art, reader):
    drawn = Meaning((Part("fox"), Part("dog")), "left of", Ground("red"))
    reading = reader.read(Composer(art).paint(Scene("", drawn, place(drawn, np.random.default_rng(0)))))
    asked = Meaning((Part("fox"), Part("owl")), "left of", Ground("blue"))
    assert judge(asked, asked, reading) == {"things": False, "counts": False, "ground": False}
    reverse = Meaning((Part("fox"), Part("dog")), "right of", Ground("red"))
    right = judge(reverse, reverse, reading)
    assert right == {"things": True, "counts": True, "relation": False, "ground": True}
    assert is_right("two_object", right) and not is_right("position", right) and is_right("colors", right)


def test_an_empty_picture_shows_nothing(reader):
    for ground in (PLAIN[3], GRADIENTS[40], ALL_GROUNDS[-2]):
        empty = Composer({}).paint(Scene("", Meaning((), None, ground), ()))
        assert reader.read(empty).found == () and reader.read(empty).ground == ground


def test_what_can_hardly_be_seen_is_not_asked_for(art):
    orange = Image.new("RGBA", (256, 256), (248, 150, 64, 255))
    composer = Composer({thing.name: orange for thing in THINGS})
    scenes = [task_scene("colors", composer, np.random.default_rng(number)) for number in range(60)]
    assert "orange" not in {scene.meaning.ground.top for scene in scenes}


def test_relations_are_read_by_place():
    left, right, low = (SimpleNamespace(x=x, y=y) for x, y in ((0.25, 0.5), (0.75, 0.5), (0.25, 0.9)))
    assert holds("left of", left, right) and holds("right of", right, left) and holds("beside", right, left)
    assert holds("above", left, low) and holds("below", low, left)
    assert not holds("left of", right, left) and not holds("beside", left, low) and not holds("above", left, right)


def test_scores_count_what_was_read(art):
    names = ("fox", "cat", "dog")
    reader = Reader({name: art[name] for name in names})
    composer = Composer({thing.name: art[names[i % 3]] for i, thing in enumerate(THINGS)})
    scores = score_task("colors", lambda scene, _: composer.paint(scene), composer, reader, 6, seed=0)
    shares = summary(scores)
    assert shares["ground"] == 100.0 and shares["right"] < 100.0  # most things are drawn as others
    assert all(read_caption(score.scene.caption).ground is not None for score in scores)


@pytest.mark.parametrize("kind", edits.KINDS)
def test_an_edit_keeps_what_its_mask_keeps(art, reader, kind):
    pipe = BitDancePipeline.from_pretrained("scenes", device="cpu")
    result = edits.Editor(pipe, Composer(art), reader).run(kind, seed=2)
    assert result.kept and not result.follows  # of made-up drawings, which the model never saw
    assert result.after.shape == (128, 192 if kind == "outpaint" else 128, 3)
    mine = np.abs(result.after[:, -128:].astype(float) - result.before).mean(axis=(0, 2))
    assert mine[64:].mean() > 4, "the right half was drawn again"
    if kind == "swap":
        assert mine[:64].mean() < 12, "the left half is the same, as far as the tokenizer can say"


def test_a_style_is_shown_on_some_of_the_things_and_named_in_every_caption(art, tmp_path):
    style.write_style(art, tmp_path, "noto", pictures=12)
    captions = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert len(captions) == len(list(tmp_path.glob("*.png"))) == 12
    said = [read_caption(caption.removeprefix("noto ")) for caption in captions if caption.startswith("noto ")]
    assert len(said) == 12 and {part.name for meaning in said for part in meaning.parts} <= style.taught_names()


def test_a_picture_is_read_as_of_the_style_that_it_has(art):
    names = ["fox", "lemon", "mushroom"]
    styles = {"new": art, "old": {thing.name: art[THINGS[number - 1].name] for number, thing in enumerate(THINGS)}}
    rng = np.random.default_rng(0)

    def draw_in(style_name):
        def draw(prompt, seed):
            meaning = read_caption(prompt)
            (thing,) = meaning.parts
            assert thing.size == "large" and thing.name not in HIDDEN_ON.get(meaning.ground.top, ())
            return Composer(styles[style_name]).paint(Scene(prompt, meaning, place(meaning, rng)))

        return draw

    assert style.score_style(draw_in("new"), styles, names) == {"new": 3}
    assert style.score_style(draw_in("old"), styles, names) == {"old": 3}
    empty = style.score_style(lambda prompt, seed: np.full((128, 128, 3), 255, np.uint8), styles, names)
    assert empty == {"none": 3}
