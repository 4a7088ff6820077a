"""Claims about text written by an artifact, and about showing how surprising it is."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from trainer import artifact, calibrate, files
from trainer.colour import CALM_RGB, HOT_RGB, colour, visible
from trainer.config import QuantConfig
from trainer.errors import ConfigError
from trainer.generate import continuation, main
from trainer.model import GPT
from trainer.quantize import quantize_matrices, with_matrices
from trainer.sampling import Sampler, nucleus
from trainer.surprise import cut, surprises, whole_characters
from trainer.tokenizer import Tokenizer, train_tokenizer
from verify.models import TINY, random_model
from verify.tolerance import check, rounding_budget

CONFIG = replace(TINY, vocab_size=300)
SEA = "\U0001f30a"
"""A character of four bytes that no tokenizer here has a piece for."""


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 pieces and two artifacts of its vocabulary."""
    folder = tmp_path_factory.mktemp("generate")
    texts = [f"the sea number {n} and the ship" for n in range(200)]
    (folder / "small.model").write_bytes(train_tokenizer(texts, CONFIG.vocab_size))
    for name, seed in (("a.fwy", 0), ("b.fwy", 1)):
        written = random_model(CONFIG, seed)
        names = written.matrices()
        hessians = calibrate.collect_hessians(written, torch.randint(0, 300, (4, CONFIG.seq_len)))
        matrices, _ = quantize_matrices(names, hessians, dict.fromkeys(names, 6), QuantConfig())
        files.write_bytes(folder / name, artifact.pack(with_matrices(written, matrices), quality=1))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "small.model")


def run(folder: Path, *arguments: str) -> int:
    return main([str(folder / "a.fwy"), "--data", str(folder), "--device", "cpu", *arguments])


def naive_draws(model: GPT, prompt: list[int], tokens: int, top_p: float, seed: int) -> list[int]:
    """Sampling with a full forward per token, in float64; the text must fit the window."""
    uniform = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(seed))
    ids = list(prompt)
    for u in uniform[:, 0].tolist():
        logits = model.logits(model.hidden(torch.tensor([ids])))[0, -1].double() / 0.8
        shares = logits.softmax(-1).tolist()
        kept: dict[int, float] = {}
        for token in sorted(range(len(shares)), key=lambda i: -shares[i]):
            if sum(kept.values()) >= top_p:
                break
            kept[token] = shares[token]
        mark, total = u * sum(kept.values()), 0.0
        for token in sorted(kept):
            total += kept[token]
            if total > mark:
                ids.append(token)
                break
    return ids


# Drawing.


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("length", [1, 7])
def test_continuation_equals_sampling_without_a_cache(
    model: GPT, length: int, top_p: float
) -> None:
    """A prompt's continuation equals sampling with a full forward per token, with and without
    top-p."""
    prompt = torch.randint(0, 300, (length,)).tolist()
    drawn = continuation(model, prompt, 12, temperature=0.8, top_p=top_p, seed=3)
    assert drawn == naive_draws(model, prompt, 12, top_p, seed=3)


def test_the_seed_alone_decides(model: GPT) -> None:
    """Same seed: same text, and a longer one begins with the shorter; other seed: another."""
    first = continuation(model, [1, 5], 12, temperature=0.8, seed=3)
    assert first == continuation(model, [1, 5], 12, temperature=0.8, seed=3)
    assert first != continuation(model, [1, 5], 12, temperature=0.8, seed=4)
    assert continuation(model, [1, 5], 20, temperature=0.8, seed=3)[:14] == first


def test_text_beyond_the_window_goes_on_from_half_of_it(model: GPT) -> None:
    """When the window is full, or the prompt longer, its last half is the next context."""
    T, seed = CONFIG.seq_len, 3
    uniform = torch.rand(2 * T, 1, generator=torch.Generator().manual_seed(seed))
    prompt = torch.randint(0, 300, (2 * T + 5,)).tolist()
    ids = continuation(model, prompt, 2 * T, temperature=0.8, seed=seed)
    assert ids[: len(prompt)] == prompt
    assert len(ids) == len(prompt) + 2 * T
    sampler = Sampler(model, 1, T, 0.8)
    for begin in range(0, 2 * T, T // 2):
        end = len(prompt) + begin
        context = torch.tensor([ids[end - T // 2 : end]])
        drawn = sampler.extend(
            context, uniform[begin : begin + T // 2], lambda amount=1, note="": None
        )
        assert drawn[0, T // 2 :].tolist() == ids[end : end + T // 2]


@given(
    weights=st.lists(st.floats(0.0009765625, 1, width=32), min_size=1, max_size=20),
    top_p=st.floats(0.01, 1),
)
@example(weights=[1.0, 1.0, 1.0, 1.0], top_p=0.3)
def test_nucleus_is_the_least_set_that_reaches_the_share(
    weights: list[float], top_p: float
) -> None:
    """Top-p keeps the likeliest tokens: enough for the share, and none that is not needed."""
    shares = torch.tensor([weights]) / sum(weights)
    kept = nucleus(shares, top_p)[0]
    alive = kept > 0
    assert torch.equal(kept[alive], shares[0][alive])
    slack = rounding_budget(64, torch.float32)
    assert kept.sum().item() >= min(top_p, shares.sum().item()) - slack
    least = kept[alive].min()
    assert not (shares[0][~alive] >= least).any()
    without_ties = shares[0][shares[0] > least].sum().item()
    assert without_ties < top_p + slack


@pytest.mark.gpu
def test_continuation_on_the_gpu_repeats_and_keeps_its_prompt(model: GPT) -> None:
    """The captured step leaves the prompt as it was, and gives the same text every time."""
    there = random_model(CONFIG).cuda()
    prompt = [1, 5, 9, 200]
    first = continuation(there, prompt, 60, temperature=0.8, top_p=0.9, seed=3)
    assert first[:4] == prompt
    assert first == continuation(there, prompt, 60, temperature=0.8, top_p=0.9, seed=3)


# Surprise.


@pytest.mark.parametrize("length", [2, CONFIG.seq_len + 1, 3 * CONFIG.seq_len + 5])
def test_surprise_equals_its_definition(model: GPT, length: int) -> None:
    """Nats and rank equal -ln p and the place in the sorted distribution, in windows by half."""
    ids = torch.randint(0, 300, (length,)).tolist()
    found = surprises(model, ids)
    T = CONFIG.seq_len
    assert len(found) == length - 1
    for target, surprise in enumerate(found):
        # The window that scores this target: the first, or one that ends half a window on.
        over = max(0, -(-(target + 1 - T) // (T // 2)))
        end = min(T + over * (T // 2), length - 1)
        begin = max(0, end - T)
        logits = model.logits(model.hidden(torch.tensor([ids[begin:end]])))[0, target - begin]
        nats = -logits.double().log_softmax(-1)[ids[target + 1]].item()
        check("nats", abs(surprise.nats - nats), 200 * rounding_budget(8, torch.float32))
        by_share = logits.argsort(descending=True).tolist()
        assert surprise.rank == 1 + by_share.index(ids[target + 1])


def test_one_token_has_no_surprise(model: GPT) -> None:
    """A text of one token is refused with advice."""
    with pytest.raises(ConfigError, match="at least two tokens"):
        surprises(model, [1])


# Showing.


@given(parts=st.lists(st.binary(min_size=1, max_size=3), max_size=12))
@example(parts=[bytes([b]) for b in SEA.encode()])
@example(parts=[b"\xe2", b" the"])
@example(parts=[b"a", b"\xe2\x96"])
@example(parts=[b"\xf0", b"\x9f", b"\xf0", b"\x9f", b"\x8c", b"\x8a"])
def test_pieces_are_whole_characters(parts: list[bytes]) -> None:
    """Every byte lies in one piece, in order; what decodes as a whole decodes piece by piece."""
    ranges = list(whole_characters(parts))
    assert [i for first, last in ranges for i in range(first, last)] == list(range(len(parts)))
    data = b"".join(parts)
    pieces = [b"".join(parts[first:last]) for first, last in ranges]
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    assert "".join(piece.decode() for piece in pieces) == text


def test_a_broken_character_does_not_swallow_what_follows() -> None:
    """A character that is never finished is its own piece; the next token stands alone."""
    assert list(whole_characters([b"\xe2", b" the"])) == [(0, 1), (1, 2)]
    assert list(whole_characters([b"\xf0", b"\x9f", b"\xf0", b"\x9f", b"\x8c", b"\x8a"])) == [
        (0, 2),
        (2, 6),
    ]


def test_a_character_of_byte_tokens_is_one_piece(model: GPT, tokenizer: Tokenizer) -> None:
    """Byte tokens of one character share a piece, whose surprise is the sum of theirs."""
    ids = tokenizer.encode(f"the {SEA} sea")
    found = surprises(model, ids)
    pieces = cut(tokenizer, ids, found, given=len(ids))
    assert pieces[0].text == "<s>"
    assert pieces[0].nats is None
    assert "".join(piece.text for piece in pieces[1:]) == f"the {SEA} sea"
    (whole,) = (piece for piece in pieces if piece.text == SEA)
    assert [token.name for token in whole.tokens] == [f"<0x{b:02X}>" for b in SEA.encode()]
    at = ids.index(tokenizer.model.piece_to_id("<0xF0>"))
    assert whole.nats == sum(surprise.nats for surprise in found[at - 1 : at + 3])


def test_given_and_written_bytes_stay_apart(model: GPT, tokenizer: Tokenizer) -> None:
    """A prompt that ends inside a character does not share a piece with what is written."""
    ids = tokenizer.encode(SEA)
    pieces = cut(tokenizer, ids, surprises(model, ids), given=len(ids) - 2)
    assert [piece.given for piece in pieces if "\ufffd" in piece.text] == [True, False, False]


@given(text=st.text(max_size=30))
@example(text="\x1b[2J\r\x07\x9b31m\u202eabc\x7f")
def test_nothing_shown_steers_a_terminal(text: str) -> None:
    """Shown text holds no control character but the line break and tab it marks."""
    shown = visible(text)
    steering = {c for c in shown if not c.isprintable()} - {"\n", "\t", "\N{NO-BREAK SPACE}"}
    assert not steering
    assert shown.count("\u21b5\n") >= text.count("\n")


def test_colour_runs_from_nothing_to_a_uniform_guess() -> None:
    """No surprise is white, ln V nats and more the full colour, and the way there is even."""
    assert colour(0.0, 1024) == colour(None, 1024) == CALM_RGB
    assert colour(math.log(1024), 1024) == colour(99.0, 1024) == HOT_RGB
    greens = [colour(n * math.log(1024) / 10, 1024)[1] for n in range(11)]
    assert greens == sorted(greens, reverse=True)
    assert abs(greens[5] - (CALM_RGB[1] + HOT_RGB[1]) / 2) <= 1


class _Page(HTMLParser):
    """Text and hover titles of a page's spans, and whatever it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[list[str]] = []
        self.titles: list[list[str]] = []
        self.loads: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [v for k, v in values.items() if k in ("src", "href") and v]
        if tag == "section":
            self.texts.append([])
            self.titles.append([])
        if tag == "span" and "title" in values:
            self.titles[-1].append(values["title"] or "")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "span"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1].append(data)


def test_html_shows_both_artifacts_token_by_token(
    folder: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page holds both texts, nats and rank of every token, and loads nothing."""
    out = folder / "both.html"
    prompt = f"the <b>sea</b> & {SEA}"
    status = run(
        folder, str(folder / "b.fwy"), "--prompt", prompt, "--tokens", "20", "--html", str(out)
    )
    assert status == 0
    source = out.read_text()
    page = _Page(source)
    assert not page.loads
    assert "url(" not in source
    assert len(page.texts) == 2
    given = len(tokenizer.encode(prompt))
    for texts, titles in zip(page.texts, page.titles, strict=True):
        assert "".join(texts).startswith(f"<s>{prompt}")
        lines = "\n".join(titles).split("\n")
        assert len(lines) == given + 20
        assert all(re.search(r": -?\d+\.\d{3} nats, rank \d+$", line) for line in lines[1:])
    assert page.texts[0] != page.texts[1]
    printed = capsys.readouterr().out
    assert "a.fwy" in printed
    assert "b.fwy" in printed
    assert "nats/token" in printed


def test_commands_repeat(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command prints the same text; an empty prompt begins a document."""
    printed: list[str] = []
    for seed in ("7", "7", "8"):
        assert run(folder, "--tokens", "30", "--seed", seed) == 0
        printed.append(re.sub(r"done in [\d.]+ s", "done", capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert printed[0] != printed[2]
    assert "<s>" in printed[0]


def test_a_given_text_is_read_by_both(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--text shows one text under two artifacts and writes nothing."""
    text = folder / "given.txt"
    text.write_text("the sea and the ship\n" * 5)
    assert run(folder, str(folder / "b.fwy"), "--text", str(text)) == 0
    printed = capsys.readouterr().out
    assert "given:" in printed
    assert "written:" not in printed


def test_long_prompts_are_announced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt beyond the window is read from its end, and the user told."""
    assert run(folder, "--prompt", "the sea " * 40, "--tokens", "3") == 0
    assert f"from the last {CONFIG.seq_len // 2}" in capsys.readouterr().out


def test_the_run_folder_names_the_tokenizer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --data the tokenizer is that of the run the artifact lies in."""
    (tmp_path / "artifact.fwy").write_bytes((folder / "a.fwy").read_bytes())
    files.write_json(tmp_path / "config.json", {"data": {"dir": str(folder)}})
    assert main([str(tmp_path / "artifact.fwy"), "--tokens", "2", "--device", "cpu"]) == 0
    assert str(folder / "small.model") in capsys.readouterr().out


@pytest.mark.parametrize("content", ['{"hidden_size": 8}', "[]", "half of a fi"])
def test_settings_of_another_program_are_explained(
    folder: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a config.json that is not a run's, the tokenizer has to be named."""
    (tmp_path / "artifact.fwy").write_bytes((folder / "a.fwy").read_bytes())
    (tmp_path / "config.json").write_text(content)
    arguments = [str(tmp_path / "artifact.fwy"), "--tokens", "2", "--device", "cpu"]
    assert main(arguments) == 2
    assert "config.json cannot be read" in (message := capsys.readouterr().err)
    assert "with --data" in message
    assert main([*arguments, "--data", str(folder)]) == 0


def bad_commands() -> Iterator[tuple[list[str], str]]:
    yield ["--tokens", "0"], "--tokens"
    yield ["--temperature", "0"], "--temperature"
    yield ["--top-p", "0"], "--top-p"
    yield ["--text", "t.txt", "--prompt", "x"], "one of the two"
    yield ["--text", "no-such-file"], "no-such-file"
    yield ["--prompt", "lone \udcff"], "surrogate"
    yield ["no-such.fwy"], "no-such.fwy"
    yield ["--data", "no-such-folder"], "exactly one tokenizer"


@pytest.mark.parametrize(("arguments", "advice"), list(bad_commands()))
def test_bad_commands_are_explained(
    folder: Path, arguments: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be done ends with status 2 and one line that says why."""
    assert run(folder, *arguments) == 2
    captured = capsys.readouterr()
    assert advice in captured.err
    assert captured.err.count("\n") == 1


def test_another_vocabulary_is_explained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer of another size is refused, naming both sizes."""
    texts = [f"the sea number {n} and the ship" for n in range(200)]
    (tmp_path / "other.model").write_bytes(train_tokenizer(texts, 310))
    assert run(folder, "--data", str(tmp_path)) == 2
    assert "310 pieces, the model expects 300" in capsys.readouterr().err
