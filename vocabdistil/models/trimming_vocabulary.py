"""A vocabulary of the teacher's own tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.surfaces import BYTE_OF
from ..core.errors import need
from .counting import count_tokens, frequent_characters
from .rebuilding import Vocabulary, contains_step, model_ids, rebuild, special_strings, tokenizer_state

__all__ = ["trim_vocabulary"]

_UNUSED = re.compile(r"\[unused\d+\]|<unused\d+>")
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class _Unigram:
    """The path of the highest score: fewer tokens leave it the best one as long as it is there.

    A character without a token costs the lowest score of the vocabulary and 10 more, so a token of that score stays:
    otherwise a path across such a character could overtake one that was better.
    """

    prefix = ""

    def __init__(self, model: dict[str, Any]) -> None:
        self.ids = model_ids(model)
        self.byte_fallback = bool(model["byte_fallback"])
        lowest = min(score for _, score in model["vocab"])
        self._scores = {token: model["vocab"][i][1] for token, i in self.ids.items()}
        self.lowest = [token for token, score in self._scores.items() if score == lowest]

    def symbols(self, token: str) -> list[str]:
        return list(token)

    def needs(self, token: str) -> set[str]:
        return {token}

    def with_tokens(self, model: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
        unk = model["unk_id"]
        vocab = [[token, self._scores[token]] for token in tokens]
        return model | {"vocab": vocab, "unk_id": None if unk is None else tokens.index(model["vocab"][unk][0])}


class _Greedy:
    """WordPiece, the longest match from the left, and WordLevel, whole words: fewer tokens leave a match that is still
    there the longest one."""

    lowest: tuple[str, ...] = ()
    byte_fallback = False

    def __init__(self, model: dict[str, Any]) -> None:
        self.ids = model_ids(model)
        self.prefix = model.get("continuing_subword_prefix") or ""
        self._whole_words = model.get("continuing_subword_prefix") is None

    def symbols(self, token: str) -> list[str]:
        if self._whole_words:
            return []
        inside = token.startswith(self.prefix) and len(token) > len(self.prefix)
        spelled = token[len(self.prefix) :] if inside else token
        first, rest = spelled[0], spelled[1:]
        return [self.prefix * inside + first, *(self.prefix + character for character in rest)]

    def needs(self, token: str) -> set[str]:
        return {token}

    def with_tokens(self, model: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
        return model | {"vocab": {token: i for i, token in enumerate(tokens)}}


class _Bpe:
    """Merges in the order of their ranks. Inside a token that stands in a reading, the merges were those that make it
    from its own characters alone: with them, and whatever they pass through, it is made again."""

    lowest: tuple[str, ...] = ()

    def __init__(self, model: dict[str, Any]) -> None:
        self.ids = model_ids(model)
        self.byte_fallback = bool(model.get("byte_fallback"))
        self.prefix = model.get("continuing_subword_prefix") or ""
        self._suffix = model.get("end_of_word_suffix") or ""
        split = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        merges = [(left, right) for left, right in split]
        self._merges = merges
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}

    def _merged(self, left: str, right: str) -> str:
        return left + right[len(self.prefix) :]

    def symbols(self, token: str) -> list[str]:
        ends = bool(self._suffix) and token.endswith(self._suffix) and len(token) > len(self._suffix)
        inside = bool(self.prefix) and token.startswith(self.prefix) and len(token) > len(self.prefix)
        body = token[len(self.prefix) * inside : len(token) - len(self._suffix) * ends]
        symbols = [self.prefix * (inside or i > 0) + character for i, character in enumerate(body)]
        symbols[-1] += self._suffix * ends
        return symbols

    def needs(self, token: str) -> set[str]:
        """The token and all that is passed through on the way to it from its characters.

        The token alone where the merges do not lead to it: it is read as a whole word (``ignore_merges``) or never.
        """
        symbols = self.symbols(token)
        seen = {token, *symbols}
        while len(symbols) > 1:
            last = len(self._ranks)
            rank, i = min((self._ranks.get(pair, last), i) for i, pair in enumerate(pairwise(symbols)))
            if rank == last:
                return {token}
            symbols[i : i + 2] = [self._merged(*symbols[i : i + 2])]
            seen.add(symbols[i])
        return seen if symbols == [token] and seen <= self.ids.keys() else {token}

    def with_tokens(self, model: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
        ids = {token: i for i, token in enumerate(tokens)}
        merges = [
            [left, right]
            for left, right in self._merges
            if left in ids and right in ids and self._merged(left, right) in ids
        ]
        return model | {"vocab": ids, "merges": merges}


_FAMILIES: dict[str, type[_Unigram | _Greedy | _Bpe]] = {
    "Unigram": _Unigram,
    "WordPiece": _Greedy,
    "WordLevel": _Greedy,
    "BPE": _Bpe,
}


def _byte_symbols(state: dict[str, Any], family: Any) -> set[str]:
    """The tokens of single bytes, if with them any text can be read."""
    if family.byte_fallback and _BYTE_TOKENS <= family.ids.keys():
        return set(_BYTE_TOKENS)
    if not contains_step([state["normalizer"], state["pre_tokenizer"]], "ByteLevel"):
        return set()
    suffix = state["model"].get("end_of_word_suffix") or ""
    return {*BYTE_OF, *(character + suffix for character in BYTE_OF)} & family.ids.keys()


def _symbols_of_text(family: Any, count: Mapping[str, int], without: Container[str]) -> dict[str, int]:
    """How often the single-character tokens that the text can be read with stand in it, alone or in other tokens."""
    found: Counter[str] = Counter()
    for token, times in count.items():
        if times and token not in without:
            for symbol in family.symbols(token):
                if symbol in family.ids:
                    found[symbol] += times
    return found


def _pieces(family: Any, token: str, kept: Container[str]) -> list[tuple[str, int]]:
    """About how a token's text is read where the token itself is not there: the longest others from the left, and how
    many characters or bytes each of them spells; empty where they do not spell all of it."""
    symbols, skip = family.symbols(token), len(family.prefix)
    found, start = [], 0
    while start < len(symbols):
        for end in range(len(symbols), start, -1):
            piece = symbols[start] + "".join(symbol[skip:] for symbol in symbols[start + 1 : end])
            if piece in kept and piece != token:
                found.append((piece, end - start))
                start = end
                break
        else:
            return []
    return found


def _lost_without(family: Any, tokens: Sequence[str], kept: Container[str], embedding: Tensor) -> list[float]:
    """For each token how far the mean row of its pieces is from its own, longer ones weighing more: 1 - cosine, of
    rows without the mean of all; 1 where there are none."""
    spelled = [_pieces(family, token, kept) for token in tokens]
    ids = torch.tensor([family.ids[piece] for pieces in spelled for piece, _ in pieces], dtype=torch.int64)
    sizes = torch.tensor([float(size) for pieces in spelled for _, size in pieces])
    offsets = torch.tensor([0, *map(len, spelled)]).cumsum(0)[:-1]
    table = embedding.detach().float().cpu()
    mean = table.mean(0)
    # A sum points where the mean does.
    totals = torch.tensor([float(sum(size for _, size in pieces)) for pieces in spelled])
    means = nn.functional.embedding_bag(ids, table, offsets, mode="sum", per_sample_weights=sizes)
    own = table[[family.ids[token] for token in tokens]]
    distance = 1 - torch.cosine_similarity(means - totals[:, None] * mean, own - mean)
    return distance.masked_fill(totals == 0, 1.0).clamp(min=0).tolist()


def _chosen(
    family: Any, candidates: Iterable[str], worth: Mapping[str, float], always: Iterable[str], room: int
) -> set[str]:
    """The candidates of the greatest worth, each with what it needs, beside those that are always kept."""
    chosen = set(always)
    for token in sorted(candidates, key=lambda token: (-worth[token], bool(_UNUSED.match(token)), family.ids[token])):
        needed = family.needs(token) - chosen
        if len(needed) <= room - len(chosen):
            chosen |= needed
        if len(chosen) == room:
            break
    return chosen


def trim_vocabulary(
    teacher: Any,
    counts_or_texts: Tensor | Iterable[str],
    vocab_size: int,
    spare: int | None = None,
    embedding: Tensor | None = None,
    keep: Iterable[int] = (),
) -> Vocabulary:
    """The teacher's own tokens that a text needs most.

    Always kept: added tokens, special or not; tokens with a role; the tokens of single bytes where the tokenizer has
    them, else those of the single characters of the text (all but the rarest, where they would take more than a
    quarter of the vocabulary: see :func:`frequent_characters`). The rest goes by count, equal counts by id, and where
    there is an ``embedding`` by the count times the square of the distance between a token's row and the mean of those
    of the pieces that are read in its place: ``operators`` can go, as ``operator`` and ``##s`` say the same. With a
    token of a BPE vocabulary come those that its merges pass through. A text all of whose teacher tokens are kept
    reads exactly as before, unless the teacher read UNK in it: a word that a longer WordPiece led into a dead end may
    become readable.

    Args:
        teacher: a fast tokenizer of ``transformers`` or a ``tokenizers.Tokenizer``.
        counts_or_texts: int64 ``[V_t]``, how often each teacher id occurs (:func:`count_tokens`), or texts.
        vocab_size: tokens of the result; all that the teacher has if those are fewer.
        spare: how many of them to leave to others, as far as what is always kept allows it; tokens that the text does
            not use are then left out too.
        embedding: floating point ``[rows, E]``, the teacher's input embeddings, a row for each of its ids or more.
        keep: ids of the teacher that are always kept too.

    Returns:
        The vocabulary; ``kept`` ascends, but for added tokens that the teacher's model does not hold: they come last.

    Raises:
        VocabdistilError: ``vocab_size`` has no room for what is always kept; the tokenizer cannot be taken apart.
    """
    state = tokenizer_state(teacher)
    family = _FAMILIES[state["model"]["type"]](state["model"])
    counts = counts_or_texts if isinstance(counts_or_texts, Tensor) else count_tokens(teacher, counts_or_texts)
    count = dict(zip(family.ids, counts[list(family.ids.values())].tolist(), strict=True))
    specials = special_strings(teacher, state)
    outside = [token for token in specials if token not in family.ids]

    asked = set(keep)
    named = specials.keys() & family.ids.keys() | {token for token, i in family.ids.items() if i in asked}
    kept = {needed for token in named for needed in family.needs(token)}
    single = _byte_symbols(state, family)
    symbols: Mapping[str, int] = {} if single else _symbols_of_text(family, count, specials)
    kept |= single.union(frequent_characters(symbols, vocab_size))
    if family.lowest and kept.isdisjoint(family.lowest):
        kept.add(max(family.lowest, key=lambda token: (count[token], -family.ids[token])))
    size = min(vocab_size, len(family.ids) + len(outside))
    least = len(kept) + len(outside)
    need(size >= least, "vocab_size", f"at least the {least} special tokens and characters of the text", vocab_size)

    always = frozenset(kept)
    size = size if spare is None else max(least, vocab_size - spare)
    room = size - len(outside)

    candidates = [token for token in family.ids if spare is None or count[token]]
    kept = _chosen(family, candidates, count, always, room)
    if embedding is not None:
        rows = max(family.ids.values()) + 1
        need(embedding.shape[0] >= rows, "embedding", f"a row for each of {rows} ids", embedding.shape[0])
        used = [token for token in family.ids if count[token] and token not in always]
        lost = _lost_without(family, used, kept, embedding)
        # Spearman on STS-B dev, all layers, by count alone / times the distance / its square / its cube: MiniLM with
        # 5,000 tokens 0.8468 / 0.8510 / 0.8521 / 0.8526, e5 in Russian with 8,000 0.8109 / 0.8133 / 0.8132 / 0.8121.
        worth = {token: count[token] * far**2 for token, far in zip(used, lost, strict=True)}
        kept = _chosen(family, candidates, {**count, **worth}, always, room)

    tokens = sorted(kept, key=family.ids.__getitem__)
    model = family.with_tokens(state["model"], tokens)
    return Vocabulary(
        rebuild(teacher, state | {"model": model}),
        "trim",
        torch.tensor([*map(family.ids.__getitem__, tokens), *map(specials.__getitem__, outside)], dtype=torch.int64),
        _notes(symbols, kept, size, vocab_size) + _unused(count, kept - always, size),
    )


def _unused(count: Mapping[str, int], chosen: Iterable[str], size: int) -> tuple[str, ...]:
    """A note where much of the vocabulary was chosen without need."""
    idle = sum(not count[token] for token in chosen)
    if idle <= size // 4:
        return ()
    return (f"The text uses only {size - idle:,} of these {size:,} tokens: fewer do, or more text is needed.",)


def _notes(symbols: Mapping[str, int], kept: Container[str], size: int, vocab_size: int) -> tuple[str, ...]:
    notes = []
    if size < vocab_size:
        notes.append(f"The teacher's tokenizer has only {size:,} tokens: all of them are kept.")
    lost = [symbol for symbol in symbols if symbol not in kept]
    if lost:
        share = sum(symbols[symbol] for symbol in lost) / sum(symbols.values())
        notes.append(f"{len(lost):,} rare characters, {share:.3%} of the text, have no token of their own.")
    return tuple(notes)
