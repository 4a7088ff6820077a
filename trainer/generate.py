"""Let an artifact write: `python -m trainer.generate ARTIFACT [ARTIFACT2] --prompt TEXT`.

    python -m trainer.generate runs/NAME/artifact.fwy --prompt "The sea" --temperature 0.8 --seed 7
    python -m trainer.generate A.fwy B.fwy --prompt "The sea" --html both.html
    python -m trainer.generate A.fwy B.fwy --text book.txt

Every token is coloured by its surprise: -ln of its probability under the model that reads it. Two
artifacts stand side by side, with the same prompt and the same random numbers. Same artifact,
prompt, settings and seed: same text, on one kind of device.

Letters: P tokens of the prompt, N drawn tokens.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from trainer import corpus, files
from trainer.colour import Column, html_page, print_columns
from trainer.errors import ConfigError, DataError, FairwayError
from trainer.evaluate import load_artifact, read_text
from trainer.folder import RunFolder
from trainer.model import GPT
from trainer.progress import log, progress
from trainer.sampling import Sampler
from trainer.surprise import cut, surprises
from trainer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m trainer.generate`."""

    artifact: tyro.conf.Positional[Path]
    """The artifact that writes."""
    other: tyro.conf.Positional[Path | None] = None
    """A second artifact, shown beside the first."""
    prompt: str = ""
    """Text to continue; none: a document from its beginning."""
    text: Path | None = None
    """Write nothing; show the surprise of this UTF-8 text file."""
    tokens: int = 256
    """Tokens to write."""
    temperature: float = 0.8
    """Logits are divided by it; above 0."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this share."""
    seed: int = 1337
    """Seed of the drawing."""
    data: Path | None = None
    """Folder with the tokenizer (*.model); none: that of the artifact's run folder, or else the
    embedded corpus's."""
    html: Path | None = None
    """Also write this HTML file; pointing at a piece shows nats and rank of its tokens."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"--tokens {self.tokens} must be at least 1")
        if self.temperature <= 0:
            raise ConfigError(
                f"--temperature {self.temperature} must be above 0; 0.01 all but always takes the "
                "likeliest token"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} must lie above 0 and not above 1")
        if self.text is not None and self.prompt:
            raise ConfigError("--text is read and --prompt continued: give one of the two")


def continuation(
    model: GPT,
    prompt_ids: list[int],
    tokens: int,
    *,
    temperature: float,
    top_p: float = 1.0,
    seed: int,
) -> list[int]:
    """The ids of a prompt and of `tokens` more, drawn one by one.

    The model sees at most its window. When that is full, as with a longer prompt, it goes on from
    the last half of it, so that every token is drawn from at least half a window.

    Args:
        model: on its device.
        prompt_ids: at least one; a document begins with BOS.
        tokens: N >= 1.
        temperature: above 0.
        top_p: share of the likeliest tokens that are drawn from.
        seed: of the N uniform numbers, which depend on nothing else.

    Raises:
        ValueError: an empty prompt, or settings `Sampler` refuses.
    """
    if not prompt_ids:
        raise ValueError("an empty prompt: begin with BOS")
    seq_len = model.config.seq_len
    uniform_N1 = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(seed))
    length = min(seq_len, len(prompt_ids) + tokens)
    sampler = Sampler(model, 1, length, temperature, top_p)
    ids = list(prompt_ids)
    done = 0
    with progress("writing", tokens) as advance:
        while done < tokens:
            context = ids if len(ids) < length else ids[-max(1, length // 2) :]
            count = min(tokens - done, length - len(context))
            drawn = sampler.extend(
                torch.tensor([context]), uniform_N1[done : done + count], advance
            )
            ids += drawn[0, len(context) :].tolist()
            done += count
    return ids


def main(argv: list[str] | None = None) -> int:
    """Write and show; returns the exit status."""
    try:
        _main(tyro.cli(Arguments, args=argv, description=__doc__))
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _main(arguments: Arguments) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA GPU; use --device cpu")
    paths = [p for p in (arguments.artifact, arguments.other) if p is not None]
    device = torch.device(arguments.device)
    # Plain operators: a step has one row, and any GPU will do.
    models = [
        load_artifact(path, device, mlp="reference", attention="sdpa", passes="reference")
        for path in paths
    ]
    vocab_size = models[0].config.vocab_size
    if any(model.config.vocab_size != vocab_size for model in models):
        raise ConfigError("the artifacts have vocabularies of different sizes; show one at a time")
    tokenizer_path = corpus.find_tokenizer(arguments.data or _trained_on(paths))
    log(f"tokenizer: {tokenizer_path}")
    tokenizer = Tokenizer(tokenizer_path, vocab_size)
    given = tokenizer.encode(arguments.prompt if arguments.text is None else _read(arguments.text))
    columns: list[Column] = []
    for path, model in zip(paths, models, strict=True):
        ids = given if arguments.text is not None else _written(path, model, given, arguments)
        pieces = cut(tokenizer, ids, surprises(model, ids), given=len(given))
        columns.append(Column(str(path), pieces))
    print_columns(Console(), columns, vocab_size)
    if arguments.html is not None:
        title = "Written by a model" if arguments.text is None else "Surprise of a text"
        page = html_page(title, _settings(arguments), columns, vocab_size)
        files.write_text(arguments.html, page)
        log(f"HTML: {arguments.html}")


def _trained_on(artifacts: list[Path]) -> Path | None:
    """The data folder of the runs the artifacts lie in; None: the embedded corpus.

    Raises:
        ConfigError: two runs with different data, or settings that cannot be read.
    """
    runs = {path.parent for path in artifacts if (path.parent / "config.json").exists()}
    try:
        folders = {RunFolder.open(run)[1].data.dir for run in runs}
    except FairwayError as error:
        raise ConfigError(f"{error}. Name the folder of the tokenizer with --data") from error
    if len(folders) > 1:
        raise ConfigError(
            "the artifacts come from runs on different data; name the folder of the tokenizer "
            "they share with --data"
        )
    return folders.pop() if folders else None


def _read(path: Path) -> str:
    """A text to show. Raises DataError when there is none."""
    text = read_text(path)
    if not text:
        raise DataError(f"{path} is empty: there is nothing to show")
    return text


def _written(path: Path, model: GPT, given: list[int], arguments: Arguments) -> list[int]:
    seq_len = model.config.seq_len
    if len(given) >= seq_len:
        log(
            f"{path}: the prompt has {len(given):,} tokens, the model sees {seq_len:,} at most; "
            f"it goes on from the last {seq_len // 2:,}"
        )
    return continuation(
        model,
        given,
        arguments.tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )


def _settings(arguments: Arguments) -> str:
    """How the text came to be, for the page."""
    if arguments.text is not None:
        return f"Text: {arguments.text}."
    return (
        f"Temperature {arguments.temperature}, top-p {arguments.top_p}, seed {arguments.seed}, "
        f"{arguments.tokens} tokens written."
    )


if __name__ == "__main__":
    sys.exit(main())
