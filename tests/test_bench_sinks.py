"""The sinks experiment on a random decoder: what it measures and what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from loralab.bench import sinks
from loralab.errors import UserError
from loralab.models.decoder import DecoderConfig, DecoderForCausalLM


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    shape = DecoderConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        max_position_embeddings=16,
        bos_token_id=tiny.BOS,
        eos_token_id=tiny.EOS,
        pad_token_id=tiny.PAD,
    )
    made = DecoderForCausalLM(shape).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_the_ways_differ_only_where_something_was_let_go(model: Any, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("##".join(tiny.words(20 + 10 * i, i) for i in range(6)))
    options = sinks.Options(
        model="", text=str(tmp_path / "t.txt"), separator="##", sinks=2, prompt="aa bb", seed=1
    )
    before = model.config.to_dict()
    table = sinks.run(options, loaded=(model, tiny.tokenizer()))
    assert model.config.to_dict() == before
    assert table.facts["text"].startswith("3 documents of 48 tokens")
    everything, last, first = table.data["curves"].values()
    assert len(everything) == 3 * sinks.BUCKETS
    assert everything[:4] == pytest.approx(last[:4], rel=1e-5)
    assert everything[:4] == pytest.approx(first[:4], rel=1e-5)
    assert abs(everything[-1] - last[-1]) > 1e-3
    assert abs(first[-1] - last[-1]) > 1e-3
    # A document's mean loss by the model's own head, without the experiment's code.
    ids = sinks.documents_of(options, tiny.tokenizer(), 48)
    plain = model(ids[:, :16], labels=ids[:, :16]).loss
    assert sinks.losses(model, ids)[:, :15].mean().item() == pytest.approx(plain.item(), rel=1e-5)
    rows = table.sections[0].rows
    curve = sinks.losses(model, ids)
    expected = math.exp(curve[:, :16].mean().item())
    assert float(str(rows[0][1])) == pytest.approx(expected, abs=0.006)
    assert rows[0][-1] == "-"
    assert "±" in str(rows[1][-1])
    texts = table.data["texts"]
    assert len(set(texts.values())) == 3
    assert table.files[sinks.FIGURE][:4] == b"\x89PNG"


def test_its_page_lies_beside_its_figure(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "t.txt").write_text(tiny.words(60, 0))
    page = tmp_path / "docs" / "page.md"
    given = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "t.txt")]
    assert sinks.main([*given, "--out", str(page), "--times", "2"]) == 0
    assert f"]({sinks.FIGURE})" in page.read_text()
    assert (page.parent / sinks.FIGURE).is_file()
    assert json.loads(page.with_suffix(".json").read_text())["options"]["times"] == 2
    assert sinks.main([*given, "--out", str(page), "--times", "9"]) == 2
    assert "no document has 144 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="not a Llama"):
        sinks.run(sinks.Options(model="", text=""), loaded=(tiny.model("gpt2"), tiny.tokenizer()))
