"""Claims about the analyses of a trained model."""

import json
import math
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from profiles import __main__ as command
from profiles.model import allocator, heads, losses, ranks, sensitivity
from profiles.model.calibration import calibration
from profiles.model.subject import Estimate, Subject, open_subject, predict, window_nats
from trainer import budget, calibrate, checkpoint, corpus
from trainer.config import QuantConfig, RunConfig
from trainer.folder import RunFolder
from trainer.tokenizer import Tokenizer
from verify.models import TINY, random_model

SMALL = replace(TINY, vocab_size=1024, layers=2, value_embed_layers=(1,))
CONFIG = RunConfig(
    device="cpu",
    compute_dtype="float32",
    mlp="reference",
    attention="sdpa",
    passes="reference",
    compile=False,
    model=SMALL,
    quant=QuantConfig(int6_matrices=3, clip_percentiles=(1.0,), compressor="brotli"),
)
WINDOWS = 6


def _run_folder(path: Path) -> Path:
    """What a run leaves behind once its Hessians are there."""
    config = replace(CONFIG, out=path, name="run")
    folder = RunFolder.create(config, "run")
    model = random_model(SMALL)
    ids_BT = calibrate.generate(model, 4, SMALL.seq_len, 0.8, seed=1)
    checkpoint.save_tensors(folder.model, dict(model.state_dict()), {})
    checkpoint.save_tensors(folder.calibration, {"ids_BT": ids_BT}, {})
    checkpoint.save_tensors(folder.hessians, calibrate.collect_hessians(model, ids_BT), {})
    return folder.path


@cache
def _shared() -> Path:
    return _run_folder(Path(tempfile.mkdtemp(prefix="fairway-analysis-")))


def _subject() -> Subject:
    torch.set_num_threads(1)
    tokens = WINDOWS * SMALL.seq_len
    return open_subject(_shared(), None, torch.device("cpu"), tokens)


# The subject and its errors.


def test_windows_are_the_held_out_text_side_by_side() -> None:
    """Inputs are the split's first tokens in whole windows; targets are one token further on."""
    subject = _subject()
    tokens = corpus.open_data(None, 1024).val(SMALL.seq_len).astype(int).tolist()
    count = WINDOWS * SMALL.seq_len
    assert subject.inputs_BT.flatten().tolist() == tokens[:count]
    assert subject.targets_BT.flatten().tolist() == tokens[1 : count + 1]


def test_standard_errors_are_of_the_mean_over_windows() -> None:
    """Estimate gives the mean and the textbook standard error."""
    values = torch.tensor([0.1, 0.4, -0.2, 0.3])
    found = Estimate.of(values)
    assert found.mean == pytest.approx(0.15)
    assert found.error == pytest.approx(float(stats.sem(values.numpy())))


def test_predictions_agree_with_the_loss_of_the_model() -> None:
    """Nats of the predictions and of the windows are the model's own cross-entropy."""
    subject = _subject()
    predictions = predict(subject)
    loss = subject.model.loss(subject.inputs_BT, subject.targets_BT).item()
    assert predictions.nats_BT.mean().item() == pytest.approx(loss, rel=1e-5)
    assert window_nats(subject).mean().item() == pytest.approx(loss, rel=1e-5)
    logits = subject.model.logits(subject.model.hidden(subject.inputs_BT))
    best, guess = logits.softmax(-1).max(-1)
    torch.testing.assert_close(predictions.confidence_BT, best)
    assert torch.equal(predictions.correct_BT, guess == subject.targets_BT)


# Ranks.


def test_utilisation_of_known_spectra() -> None:
    """Equal singular values use all of the rank, one alone uses one part, two equal ones two."""
    whole = ranks.rank(torch.ones(8))
    assert (whole.full, whole.utilisation, whole.energy_utilisation) == (8, pytest.approx(1), 1)
    one = ranks.rank(torch.tensor([5.0, 0, 0, 0]))
    assert (one.utilisation, one.energy_utilisation) == (pytest.approx(1 / 4), 1 / 4)
    two = ranks.rank(torch.tensor([3.0, 3.0, 0, 0]))
    assert (two.utilisation, two.energy_utilisation) == (pytest.approx(2 / 4), 2 / 4)
    uneven = ranks.rank(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert uneven.utilisation == pytest.approx(math.exp(entropy) / 2)
    assert uneven.energy_utilisation == 1 / 2, "9 of 10 parts of the energy lie in the first"


def test_ranks_are_of_the_matrices() -> None:
    """An outer product has rank one, an orthogonal matrix full rank; scale plays no part."""
    square = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    found = ranks.ranks({"flat": torch.ones(6, 9), "square": 7 * square})
    assert found["flat"].utilisation == pytest.approx(1 / 6, rel=1e-3)
    assert found["square"].utilisation == pytest.approx(1.0, rel=1e-5)


# Sensitivity.


def test_a_change_is_that_of_the_one_matrix() -> None:
    """Held-out changes are paired differences with one matrix exchanged, and none is left so."""
    subject = _subject()
    made = budget.make(subject.model, subject.hessians, (4,), CONFIG.quant)
    whole_B = window_nats(subject)
    changes = sensitivity.held_out_changes(subject, made, whole_B, (4,))[4]
    other = random_model(SMALL)
    other.matrices()["blocks.1.up"].copy_(made.matrices[4]["blocks.1.up"].decoded())
    expected_B = window_nats(replace(subject, model=other)) - whole_B
    torch.testing.assert_close(changes["blocks.1.up"], expected_B, rtol=1e-4, atol=1e-7)
    assert torch.equal(window_nats(subject), whole_B)
    groups = sensitivity.by_kind(changes)
    total = sum(c.mean().item() for c in changes.values())
    assert groups["all"].mean == pytest.approx(total)
    assert groups["MLP"].mean + groups["attention"].mean == pytest.approx(total)
    stacked = torch.stack([c for n, c in changes.items() if n.endswith(("up", "down"))]).sum(0)
    assert groups["MLP"].error == pytest.approx(Estimate.of(stacked).error)


def test_agreement_counts_what_both_orders_have_at_the_top() -> None:
    """Spearman and the overlap of two orders, worked out by hand."""
    proxy = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
    measured = {"a": 10.0, "b": 1.0, "c": 5.0, "d": 0.5}
    (found,) = sensitivity.agreement({"p": proxy}, {"m": measured}, top=2)
    assert (found.proxy, found.measure, found.shared) == ("p", "m", 1)
    assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))


# Heads.


def test_probabilities_give_back_the_output_of_attention() -> None:
    """Probabilities formed from caught q and k, times v, are what the model's attention gave."""
    seen: list[tuple[Tensor, Tensor]] = []
    ids_BT = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    model = random_model()
    original = F.scaled_dot_product_attention

    with heads._Catch(lambda q, k: seen.append((q, k))):
        hidden = model.hidden(ids_BT)
    assert torch.equal(hidden, model.hidden(ids_BT)), "looking changes nothing"
    assert len(seen) == TINY.layers
    generator = torch.Generator().manual_seed(1)
    for q, k in seen:
        p_BHTT = heads.attention_probabilities(q, k)
        torch.testing.assert_close(p_BHTT.sum(-1), torch.ones(p_BHTT.shape[:-1]))
        v = torch.randn(k.shape, generator=generator)
        shared = v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        attended = original(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(p_BHTT @ shared, attended, rtol=1e-4, atol=1e-5)


def test_patterns_are_measured_where_they_lie() -> None:
    """Ideal heads score 1 on their own pattern and are named by it."""
    T, half = 12, 6
    eye = torch.eye(T)
    previous = eye.roll(-1, dims=1).tril()
    first = torch.zeros(T, T)
    first[:, 0] = 1
    induction = torch.zeros(T, T)
    for t in range(half, T):
        induction[t, t - half + 1] = 1
    natural = heads._natural(torch.stack((previous, first, eye))[None])
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    expected[0, 1] = 1 / (T - 1)  # position 1's previous one is the first
    torch.testing.assert_close(natural, expected)
    torch.testing.assert_close(
        heads._induction(torch.stack((previous, induction))[None]), torch.tensor([0.0, 1.0])
    )
    assert heads.Head(0, 0, 0.5, 0.2, 0.1, 0.1).name(0.4) == "previous"
    assert heads.Head(0, 0, 0.5, 0.2, 0.1, 0.1).name(0.6) == "other"
    assert heads.Head(0, 0, 0.3, 0.4, 0.1, 0.1).name(0.3) == "induction"


def test_random_sequences_are_repeated() -> None:
    """The second half repeats the first; only the given tokens are drawn."""
    ids = heads.repeated(torch.tensor([3, 5, 8]), sequences=5, half=7, seed=0)
    assert ids.shape == (5, 14)
    assert torch.equal(ids[:, :7], ids[:, 7:])
    assert set(ids.flatten().tolist()) == {3, 5, 8}
    assert not torch.equal(ids[0], ids[1])


# Loss by class and position, calibration.


def test_every_token_has_its_class() -> None:
    """Pieces of the embedded tokenizer fall into the classes that their text says."""
    tokenizer = Tokenizer(corpus.open_data(None, 1024).tokenizer, 1024)
    ids = tokenizer.encode("Hello there, 7 words\u00e9\u4e2d.")
    found = {}
    for token in ids:
        found[tokenizer.model.id_to_piece(token)] = losses.token_class(tokenizer, token)
    assert losses.token_class(tokenizer, tokenizer.bos_id) == "control"
    assert {c for p, c in found.items() if p.startswith("<0x")} == {"byte"}
    assert found[","] == found["."] == "punctuation and space"
    digits = [c for p, c in found.items() if "7" in p and not p.startswith("<0x")]
    assert digits == ["digit"]
    for piece, name in found.items():
        if any(c.isalpha() for c in piece) and not piece.startswith("<"):
            starts = piece.startswith("\u2581")
            assert name == ("word start" if starts else "word continuation"), piece


def test_parts_make_up_the_whole_loss() -> None:
    """Classes and positions cover every token once, with the means of their own tokens."""
    nats_BT = torch.rand(3, 10, generator=torch.Generator().manual_seed(0))
    targets_BT = torch.arange(30).view(3, 10) % 4
    classes_V = torch.tensor([0, 1, 1, 3])
    parts = losses.by_class(nats_BT, targets_BT, classes_V)
    assert [p.name for p in parts] == ["word start", "word continuation", "punctuation and space"]
    chosen = nats_BT[(targets_BT == 1) | (targets_BT == 2)]
    assert parts[1].nats.mean == pytest.approx(chosen.mean().item())
    positions = losses.by_position(nats_BT)
    assert [p.name for p in positions] == ["0", "1", "2-3", "4-7", "8-9"]
    assert positions[2].nats.mean == pytest.approx(nats_BT[:, 2:4].mean().item())
    assert positions[0].nats.error == pytest.approx(Estimate.of(nats_BT[:, 0]).error)
    for whole in (parts, positions):
        assert sum(p.tokens for p in whole) == 30
        assert sum(p.share_of_loss for p in whole) == pytest.approx(1)


def test_calibration_error_of_known_guesses() -> None:
    """The error is the mean gap between confidence and accuracy, weighted by the guesses."""
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.3, 1.0])
    correct = torch.tensor([True, True, False, False, True, True])
    found = calibration(confidence, correct)
    assert [b.tokens for b in found.bins] == [1, 4, 1]
    assert found.error == pytest.approx((4 * 0.4 + 1 * 0.7 + 1 * 0.0) / 6)
    assert calibration(torch.full((8,), 0.25), torch.arange(8) < 2).error == pytest.approx(0)


# The command.


def test_the_command_writes_tables_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command leaves summary, JSON and every picture; the schemes are what they say."""
    out = tmp_path / "out"
    arguments = ["model", str(_shared()), "--out", str(out), "--max-tokens", "96"]
    before = {p.name for p in _shared().iterdir()}
    arguments += ["--sweep-tokens", "72", "--device", "cpu", "--widths", "5"]
    assert command.main(arguments) == 0
    assert {p.name for p in _shared().iterdir()} == before, "the run itself is left alone"
    found = json.loads((out / "model.json").read_text())
    assert (found["text"]["windows"], found["text"]["sweep_windows"]) == (4, 3)
    summary = (out / "summary.md").read_text()
    for picture in out.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"({picture.name})" in summary
    assert len(list(out.glob("*.png"))) == 8
    schemes = {s["name"].split(":")[0]: s for s in found["schemes"]}
    assert set(schemes["int5 throughout"]["bits"].values()) == {5}
    assert sorted(schemes["mixed"]["bits"].values()) == [5] * 9 + [6] * 3
    equal = schemes["measured, no larger than mixed"]
    assert equal["artifact_bytes"] <= schemes["mixed"]["artifact_bytes"]
    assert equal["expected_nats"] <= schemes["mixed"]["expected_nats"]
    assert min(schemes["measured, fills the limit"]["bits"].values()) >= 7, "all of it fits"
    assert schemes["mixed"]["against_mixed"]["mean"] == 0
    assert "measured, fills the limit" in capsys.readouterr().out


def test_a_run_without_hessians_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is no run, or an unfinished one, ends the command with one line of advice."""
    assert command.main(["model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    RunFolder.create(replace(CONFIG, out=tmp_path, name="young"), "run")
    assert command.main(["model", str(tmp_path / "young")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert command.main(["model", str(_shared()), "--widths", "3"]) == 2
    assert "--widths" in capsys.readouterr().err
    assert command.main(["model", str(_shared()), "--sweep-tokens", "-1"]) == 2
    assert "--sweep-tokens" in capsys.readouterr().err


def test_schemes_are_judged_as_artifacts_and_the_model_is_put_back() -> None:
    """Within the block the model is the decoded artifact; afterwards the same as before."""
    subject = _subject()
    made = budget.make(subject.model, subject.hessians, (5, 6), CONFIG.quant)
    before = {n: t.clone() for n, t in subject.model.state_dict().items()}
    bits = dict.fromkeys(made.sizes, 5)
    with allocator.decoded(subject, made.chosen(bits)):
        up = subject.model.matrices()["blocks.0.up"]
        assert torch.equal(up, made.matrices[5]["blocks.0.up"].decoded())
        assert not torch.equal(subject.model.tok_emb.weight, before["tok_emb.weight"])
    assert all(torch.equal(t, before[n]) for n, t in subject.model.state_dict().items())
    even = budget.make(subject.model, subject.hessians, (5,), CONFIG.quant, even=True)
    with allocator.packer(subject) as packer:
        assert packer.start(made, bits) is packer.start(made, dict(bits)), "compressed once"
        assert packer.size(made, bits) == made.packed_bytes(bits, "brotli")
        assert packer.size(even, bits) == even.packed_bytes(bits, "brotli")
