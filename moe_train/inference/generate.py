"""``moe-train generate``: go on with a text, token by token with a key/value cache, on any layout."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from moe_train.checkpoint.folder import tokenizer_in
from moe_train.errors import UserError
from moe_train.inference.session import Plan, Session, call_ranks, open_session, plan, start_ranks

TARGET = "moe_train.inference.generate:generate_rank"


def generate(
    checkpoint: str | Path,
    prompt: str,
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    nproc: int | None = None,
    overrides: Iterable[str] = (),
) -> int:
    """Print ``prompt`` and its continuation, as it comes.

    Args:
        checkpoint: an ``iter_*`` folder, a run's folder, or what ``convert`` wrote; its tokenizer is used.
        prompt: empty: a new document is begun.
        max_tokens: tokens to add at most; the end of the document ends it before.
        temperature: 0: always the likeliest token.
        top_p: choose among the likeliest tokens that together have this probability.
        seed: the same seed gives the same text, on every layout.
        nproc: ranks to start (default: the fewest that the layout takes).
        overrides: keys of a run file's sections parallel and training, such as ``parallel.tensor=2``.

    Returns the exit status. Raises an error with ``exit_code`` for what is wrong before a rank is started.
    """
    planned = plan(checkpoint, nproc, overrides)
    sampling = _check_sampling(temperature, top_p, seed)
    arguments = _arguments(planned, prompt, max_tokens) | sampling
    return start_ranks(planned, TARGET, arguments)


def generate_text(
    checkpoint: str | Path,
    prompt: str,
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    nproc: int | None = None,
    overrides: Iterable[str] = (),
) -> str:
    """The continuation that :func:`generate` would print, without the prompt; nothing is printed.

    Raises an error with ``exit_code`` for what is wrong, also on a rank.
    """
    planned = plan(checkpoint, nproc, overrides)
    sampling = _check_sampling(temperature, top_p, seed)
    with tempfile.TemporaryDirectory(prefix="generate-") as folder:
        result = Path(folder) / "text.json"
        arguments = _arguments(planned, prompt, max_tokens) | sampling | {"result": str(result)}
        ended = call_ranks(planned, TARGET, arguments)
        if ended.code:
            raise RankFailure(ended.code, ended.message)
        return json.loads(result.read_text(encoding="utf-8"))


class RankFailure(Exception):
    """A rank failed; the message is its own."""

    def __init__(self, exit_code: int, message: str):
        super().__init__(message)
        self.exit_code = exit_code


def generate_rank(
    planned: dict[str, Any],
    tokenizer: str,
    prompt: str,
    prompt_ids: list[int],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    result: str | None = None,
) -> int:
    """One rank of :func:`generate`; the first one prints, or writes the text to ``result`` as JSON."""
    from moe_train.inference.sampling import Sampler

    words = load_tokenizer(tokenizer)
    with open_session(planned) as session:
        first = session.topology.rank == 0
        printer = _Printer(words, prompt, prompt_ids, echo=first and result is None)
        sampler = Sampler(temperature, top_p, seed)
        continue_ids(session, prompt_ids, max_tokens, sampler, words.eos_id, words.vocab_size, on_token=printer.add)
        printer.finish()
        if first and result is not None:
            Path(result).write_text(json.dumps(printer.text), encoding="utf-8")
    return 0


def continue_ids(
    session: Session,
    prompt_ids: list[int],
    max_tokens: int,
    sampler: Any,
    eos_id: int | None = None,
    known_ids: int | None = None,
    on_token: Callable[[int], None] | None = None,
    use_cache: bool = True,
) -> list[int]:
    """The tokens that follow ``prompt_ids``, the same on every rank; all ranks call it alike.

    Args:
        sampler: a :class:`moe_train.inference.sampling.Sampler`.
        eos_id: the token that ends it, and is not part of the answer.
        known_ids: ids from here up are never chosen (a model may have more than its tokenizer).
        on_token: called with each token as it comes.
        use_cache: False computes the whole sequence again for each token; for comparison.
    """
    import torch

    from parallel.pipeline import from_one_of_last_stage

    device = session.topology.device
    caches = session.new_caches() if use_cache else None
    ids, answer = list(prompt_ids), []
    position = 0
    while len(answer) < max_tokens:
        part = torch.tensor([ids[position:]], device=device)
        logits = session.forward(part, caches=caches, first_position=position)
        chosen = torch.zeros(1, dtype=torch.long, device=device)
        if logits is not None:
            chosen[0] = sampler.choose(logits[0, :known_ids])
        token = int(from_one_of_last_stage(chosen, session.topology))
        if token == eos_id:
            break
        if use_cache:
            position = len(ids)
        ids.append(token)
        answer.append(token)
        if on_token is not None:
            on_token(token)
    return answer


class _Printer:
    """Turns tokens into text as they come; characters of several tokens wait until they are whole."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], echo: bool):
        self._tokenizer, self._echo = tokenizer, echo
        self._ids = list(prompt_ids)
        self._shown = self._start = len(tokenizer.decode(prompt_ids))
        self._write(prompt)

    @property
    def text(self) -> str:
        """The continuation so far."""
        return self._tokenizer.decode(self._ids)[self._start :]

    def add(self, token: int) -> None:
        self._ids.append(token)
        if not self._echo:
            return
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text[self._shown :])
            self._shown = len(text)

    def finish(self) -> None:
        if self._echo:
            self._write(self._tokenizer.decode(self._ids)[self._shown :] + "\n")

    def _write(self, text: str) -> None:
        if self._echo:
            sys.stdout.write(text)
            sys.stdout.flush()


def _check_sampling(temperature: float, top_p: float, seed: int) -> dict[str, Any]:
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature}: must be 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: must be more than 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: must be 0 or more, and below 2**63")
    return {"temperature": temperature, "top_p": top_p, "seed": seed}


def _arguments(planned: Plan, prompt: str, max_tokens: int) -> dict[str, Any]:
    """Tokenizer and prompt, checked against the model."""
    path = tokenizer_in(planned.checkpoint)
    if path is None:
        raise UserError(
            f"{planned.checkpoint}: has no tokenizer; put its tokenizer.model or tokenizer.json there to generate text"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no text
        raise UserError("--prompt is not text in UTF-8; correct it") from None
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    model = planned.model
    if max(ids) >= model.vocab_size:
        raise UserError(
            f"{path}: gives the id {max(ids)}, and the model's vocabulary has {model.vocab_size}: it is another model's"
        )
    room = model.max_sequence_length - len(ids)
    if room < 1:
        raise UserError(
            f"--prompt has {len(ids)} tokens, and the model's max_sequence_length is"
            f" {model.max_sequence_length}; shorten it"
        )
    return {"tokenizer": str(path), "prompt": prompt, "prompt_ids": ids, "max_tokens": min(max_tokens, room)}
