"""tests/world.py, but for the training: what it draws, what puts sinks in, that the programs take what it writes."""
import claims
import torch
import torch.nn.functional as F
import world
from world import CLASSES, CONFIG, FIRST

import clip_min


def drawn(labels, domain, seed=0):
    return world.draw(torch.as_tensor(labels), torch.Generator().manual_seed(seed), domain)


def test_ground_shows_no_thing_and_the_target_is_far():
    labels = torch.arange(len(CLASSES))
    (source, ground), (target, _) = (drawn(labels, domain) for domain in ("source", "target"))
    assert torch.equal(source, drawn(labels, "source")[0]) and not torch.equal(source, drawn(labels, "source", 1)[0])

    def colourful(pictures):                                               # (n, 3, S, S) -> (n, L)
        of_pixels = pictures.float().amax(1, keepdim=True) - pictures.float().amin(1, keepdim=True)
        return F.avg_pool2d(of_pixels, CONFIG.patch).flatten(1)
    ours, theirs = colourful(source), colourful(target)
    assert 0.5 < ground.float().mean() < 0.9 and ours[~ground].mean() > 1.5 * ours[ground].mean()
    assert theirs.mean() > 2 * ours[ground].mean(), "its ground is loud"


def test_the_terms_are_low_where_there_are_sinks_and_these_are_on_the_ground():
    torch.manual_seed(0)
    clip, token_ids = world.new_clip()
    text, tokens = F.normalize(clip.encode_text(token_ids), dim=-1), torch.randn(CONFIG.vision_layers, 4, 37, 64)
    ground = torch.arange(36).expand(4, -1) > 8                            # the first nine patches show a thing

    def terms(factor, patches):
        longer = tokens.clone()
        longer[:, :, 1:][:, :, patches] *= factor
        return world.sink_terms(clip, [*longer], text, ground).item()
    few = slice(20, 20 + world.SINKS)
    assert terms(world.LENGTH, few) < min(terms(1, few), terms(2 * world.LENGTH, few)) - 0.2
    assert terms(world.LENGTH, slice(0, world.SINKS)) > terms(world.LENGTH, few) + 1, "a long patch of a thing is none"


def test_training_with_the_terms_lowers_them(monkeypatch):
    monkeypatch.setattr(world, "BATCH", 8)
    clip, token_ids = world.new_clip()

    def terms():
        pictures, ground = drawn(torch.arange(8), "source")
        tokens = []
        clip.visual(world.normalize(pictures / 255), lambda x, layer: tokens.append(x) or x)
        return world.sink_terms(clip, tokens, F.normalize(clip.encode_text(token_ids), dim=-1), ground).item()
    before = terms()
    world.train(clip, token_ids, steps=12, rate=2e-3, seed=0, sinks=True)
    assert terms() < 0.7 * before


def test_what_it_writes_is_what_the_programs_take(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(world, "BATCH", 4)
    monkeypatch.setattr(world, "CLASSES", CLASSES[:8])
    world.make(tmp_path, steps=1, sink_steps=1, each=2)
    assert capsys.readouterr().out.count(f"block {FIRST}: sinks") == 4
    plain, sinks = (clip_min.load(tmp_path / f"{name}.safetensors")[0] for name in ("plain", "sinks"))
    assert plain.config == CONFIG and not torch.equal(plain.visual.proj, sinks.visual.proj)
    given = ["--dataset", str(tmp_path / "target"), "--weights", str(tmp_path / "sinks.safetensors"), "--source", str(tmp_path / "source"),
             "--query", "1", "--episodes", "2", "--steps", "1", "--out", str(tmp_path / "out")]
    rows = claims.run(claims.parse(given), [claim for claim in claims.CLAIMS if claim.said == "after TIR it lowers it"])
    assert rows[0]["episodes"] == 2 and rows[0]["unit"] == "CKA"
