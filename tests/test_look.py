"""--probe and --draw on the toy world."""
import json
import re
import resource
from pathlib import Path

import pytest
import torch
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.v2.functional import pil_to_tensor

import atha
import train


def test_probe_tells_what_changed_and_draw_shows_it(tmp_path, capsys):
    code = train.main(["--dataset", "toy", "--method", "zero-shot", "atha", "--episodes", "2", "--steps", "10", "--out", str(tmp_path), "--probe",
                       "--draw", str(tmp_path / "look.png"), "--draw-block", "1"])
    said = capsys.readouterr()
    assert code == 0 and said.out.count("gap shift") == 1, "zero-shot changes nothing, so it is not probed"
    assert "training once more to look inside: step 0/10 of 5 pictures\n" in said.err
    *blocks, whole = [json.loads(line, parse_constant=pytest.fail) for line in next(tmp_path.glob("*.probe.jsonl")).read_text().splitlines()]
    assert [row["block"] for row in blocks] == [0, 1, 2, 3] and blocks[0]["cka"] > 0.999 > whole["cka_features"] > 0.5
    for row in blocks:
        assert row["head_before"] > row["neutral_before"] > row["tail_before"]
    assert blocks[2]["alpha"] == pytest.approx(0.8, abs=0.02), "block 8 of 12 is block 2 of 4"
    assert blocks[2]["head_after"] == pytest.approx(blocks[2]["head_before"], abs=0.05), "seen before the pull"
    assert blocks[3]["head_after"] > blocks[3]["head_before"] + 0.1, "pulled towards the class texts"
    picture = pil_to_tensor(pil_loader(str(tmp_path / "look.png"))).float()
    panels = picture[:, 44:156, :].split(116, 2)                          # picture, before, after of the first query
    colour = [(panel[0] - panel[2]).abs().gt(40).float().mean().item() for panel in panels]
    assert colour[0] == 0 and all(0.05 < share < 0.3 for share in colour[1:]), "a sixth of the patches is tinted, the picture is not"


def test_probe_under_the_released_recipe_whose_sequence_grows(tmp_path, capsys):
    assert train.main(["--dataset", "toy", "--method", "atha+tir", "--recipe", "released", "--episodes", "2", "--steps", "2", "--out", str(tmp_path),
                       "--probe", "--draw", str(tmp_path / "look.png")]) == 0
    assert "nan" not in capsys.readouterr().out


def test_a_mean_of_nothing_is_null_in_the_file_and_a_dash_in_the_table(tmp_path, capsys):
    assert train.main(["--dataset", "toy", "--method", "atha", "--rho", "0", "--episodes", "1", "--steps", "1", "--out", str(tmp_path), "--probe"]) == 0
    assert "     - ->      -" in capsys.readouterr().out
    rows = [json.loads(line, parse_constant=pytest.fail) for line in next(tmp_path.glob("*.probe.jsonl")).read_text().splitlines()]
    assert rows[0]["head_before"] is None and rows[0]["tail_before"] is not None


@pytest.mark.parametrize("flags", [["--probe"], ["--draw", "look.png"]])
def test_what_cannot_be_written_whole_is_not_there(flags, tmp_path, capsys):
    """Room for the results, not for the picture and the table."""
    argv = ["--dataset", "toy", "--method", "atha", "--episodes", "1", "--steps", "1", "--query", "3", "--out", str(tmp_path)]
    assert train.main(argv) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        assert train.main([*argv, *flags]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(r"train.py: error: cannot write .*(probe.jsonl|look.png): File too large\n$", capsys.readouterr().err)
    assert [p.suffix for p in tmp_path.iterdir()] == [".jsonl"] and not list(Path().iterdir())


def test_head_is_orange_and_tail_blue_where_they_are(tmp_path):
    head, tail = (torch.arange(5)[None] == i for i in (1, 4))            # a copied [CLS], then 2 x 2 patches
    atha.draw_patches(str(tmp_path / "x.png"), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [torch.stack([head, tail], 1)], 2, ["said"], ["picture", "patches"])
    panel = pil_to_tensor(pil_loader(str(tmp_path / "x.png")))[:, 44:156, 116:]
    seen = [panel[:, i, i].tolist() for i in (24, 85)]
    assert seen == [pytest.approx([128, 70, 0], abs=1), pytest.approx([0, 55, 128], abs=1)] and panel[:, 24, 85].sum() == 0
